"""A point estimate as a posterior: all mass on one value."""

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class Point(Family):
    """A Delta: maximum a posteriori under the declared prior, maximum likelihood under `Flat`.

    Usage::

        SVI(guide={"*.lora_A": BLoB(), "*.lora_B": Point()})
    """

    @classmethod
    def fits_manifold(cls, support: constraints.Constraint) -> bool:
        """See `Family.fits_manifold`."""
        return True

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`."""
        try:
            biject_to(site.support)
        except NotImplementedError:
            # a manifold proper: no unconstrained coordinates, so the engine's steps have to stay on it
            return ManifoldPointFactor(site, start)
        return PointFactor(site, start)


class PointFactor(Factor):
    """A Delta whose unconstrained value is a parameter."""

    roles: ClassVar = {"value": "point"}

    def __init__(self, site: Site, start: Tensor) -> None:
        super().__init__()
        self.transform = biject_to(site.support)
        self.value = nn.Parameter(self.transform.inv(start).clone())
        self.event_dim = len(site.shape)

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        return dist.Delta(self.mean(), event_dim=self.event_dim)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.transform(self.value)

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.mean().square()


class ManifoldPointFactor(Factor):
    """A Delta on a manifold: its value is the parameter itself, and the engine's steps keep it there."""

    roles: ClassVar = {"value": "manifold"}

    def __init__(self, site: Site, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.clone())
        self.event_dim = len(site.shape)

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        return dist.Delta(self.value, event_dim=self.event_dim)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.value

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.value.square()
