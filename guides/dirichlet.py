"""Dirichlet posteriors of sites on the simplex."""

from dataclasses import dataclass, field
from typing import ClassVar

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class Dirichlet(Family):
    """A Dirichlet for a site on the simplex, such as the merge weights of a pool; its KL to a Dirichlet prior is analytic.

    Usage::

        SVI(guide={"*.lora_*": MeanField(), "pool.weights": Dirichlet()})

    Args:
        strength: sum of the concentrations at the start, whose proportions are those of the site's start.

    Raises:
        ValueError: the strength is not positive.
    """

    strength: float = field(default=10.0, metadata={"help": "sum of the concentrations at the start"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength > 0:
            raise ValueError(f"The strength of a Dirichlet must be positive; got {self.strength}. Try 10.")

    @classmethod
    def fits_manifold(cls, support: constraints.Constraint) -> bool:
        """See `Family.fits_manifold`."""
        return support is constraints.simplex

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`.

        Raises:
            ValueError: a site that is not on the simplex.
        """
        if site.support is not constraints.simplex:
            raise ValueError(
                f"A Dirichlet is a posterior over the simplex, and {site.name!r} lives on {site.support}. Use MeanField() "
                "there, or Point() on a manifold."
            )
        return DirichletFactor(start * self.strength)


class DirichletFactor(Factor):
    """Dirichlet(exp(log_concentration))."""

    roles: ClassVar = {"log_concentration": "scale"}

    def __init__(self, concentration: Tensor) -> None:
        super().__init__()
        self.log_concentration = nn.Parameter(concentration.log())

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        return dist.Dirichlet(self.log_concentration.exp(), validate_args=False)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.log_concentration.softmax(-1)

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        q = self.distribution()
        return q.variance + q.mean.square()
