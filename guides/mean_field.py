"""Independent Normal posteriors, one mean and one standard deviation for each weight."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class MeanField(Family):
    """Independent Normals, sampled at the site itself so that their KL to a Normal prior is analytic.

    Usage::

        SVI(guide=MeanField())

    A site with constrained support (a positive scale, say) gets a Normal pushed through the constraint's bijection.

    Source: Blundell et al., "Weight Uncertainty in Neural Networks", 2015.

    Args:
        init_scale: standard deviation at the start; None starts at the prior's own (0.1 where it has none).

    Raises:
        ValueError: ``init_scale`` is not positive.
    """

    init_scale: float | None = field(
        default=None, metadata={"help": "standard deviation of a weight at the start; None for the prior's own"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.init_scale)

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`."""
        if site.support is constraints.real:
            return NormalFactor(start, starting_scale(self.init_scale, site, start, prior))
        return TransformedNormalFactor(site, start, 0.1 if self.init_scale is None else self.init_scale)


def require_positive(scale: float | None) -> None:
    """Refuse a starting scale that is not positive."""
    if scale is not None and scale <= 0:
        raise ValueError(f"init_scale is a standard deviation and must be positive; got {scale}. Try 0.05.")


def starting_scale(init_scale: float | None, site: Site, start: Tensor, prior: TorchDistribution) -> Tensor:
    """Standard deviation of every weight at the start: the given one, else the prior's, else 0.1.

    A converged width of weights on which the data are silent is the prior's own, so starting there starts at the optimum.

    Shape:
        the site's shape
    """
    if init_scale is None:
        try:
            scale = prior.stddev
        except (NotImplementedError, AttributeError):
            scale = torch.tensor(0.1)
        scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.full_like(scale, 0.1))
    else:
        scale = torch.tensor(init_scale)
    return scale.to(start).expand(site.shape).clone()


class IndependentNormalFactor(Factor):
    """A Normal for each weight, with its mean as the parameter ``loc`` and its width in a parameter of a subclass."""

    loc: nn.Parameter

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """Standard deviation of each weight."""

    @abstractmethod
    def set_scale(self, scale: Tensor) -> None:
        """Put the standard deviation of each weight to a value of the site's shape."""

    @abstractmethod
    def log_scale_gradient(self) -> Tensor | None:
        """Gradient of the last loss in the logarithm of each standard deviation; None without a backward."""

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        return dist.Normal(self.loc, self.scale, validate_args=False).to_event(self.loc.dim())

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.scale.square()


class NormalFactor(IndependentNormalFactor):
    """Normal(loc, exp(log_scale)) for each weight."""

    roles: ClassVar = {"loc": "loc", "log_scale": "scale"}

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(scale.log())

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each weight."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """See `IndependentNormalFactor.set_scale`."""
        self.log_scale.copy_(scale.log())

    def log_scale_gradient(self) -> Tensor | None:
        """See `IndependentNormalFactor.log_scale_gradient`."""
        return self.log_scale.grad


class TransformedNormalFactor(Factor):
    """A Normal pushed through the bijection of a constrained support, such as the positive numbers."""

    roles: ClassVar = {"loc": "loc", "log_scale": "scale"}

    def __init__(self, site: Site, start: Tensor, scale: float) -> None:
        super().__init__()
        self.transform = biject_to(site.support)
        self.loc = nn.Parameter(self.transform.inv(start).clone())
        self.log_scale = nn.Parameter(torch.full_like(self.loc, scale).log())

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        base = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(self.loc.dim())
        return dist.TransformedDistribution(base, [self.transform])

    def mean(self) -> Tensor:
        """See `Factor.mean`: the median for an elementwise bijection."""
        return self.transform(self.loc)

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`; a Monte-Carlo mean over 64 draws, since it has no closed form in general."""
        return self.distribution().sample((64,)).square().mean(0)
