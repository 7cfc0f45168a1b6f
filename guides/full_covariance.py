"""One dense Normal over all weights of a small site, such as a last layer."""

from dataclasses import dataclass, field
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.mean_field import require_positive, starting_scale
from pyrolora.models.sites import Site

# a dense factor of this many weights takes 400 MB in float32
MOST_WEIGHTS = 10_000


@dataclass(frozen=True)
class FullCovariance(Family):
    """Normal with a dense covariance over the flattened weights of one site.

    Usage::

        SVI(guide={"head.weight": FullCovariance(), "*.lora_*": Point()})

    Args:
        init_scale: standard deviation of a weight at the start; None starts at the prior's own.

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
        """See `Family.factor`.

        Raises:
            ValueError: the site is constrained, or too large for a dense covariance.
        """
        if site.support is not constraints.real or site.numel > MOST_WEIGHTS:
            raise ValueError(
                f"FullCovariance needs a site of at most {MOST_WEIGHTS:,} real weights; {site.name!r} has "
                f"{site.numel:,} with support {site.support}. Use LowRank or MeanField there."
            )
        return FullCovarianceFactor(start, starting_scale(self.init_scale, site, start, prior))


class DenseNormal(dist.TransformedDistribution):
    """Normal with a dense covariance over the flattened weights of a tensor.

    Args:
        loc: mean, of the event shape.
        scale_tril: lower Cholesky factor of the covariance.

    Shape:
        loc any, scale_tril ``(weights, weights)``
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        flat = dist.MultivariateNormal(loc.flatten(), scale_tril=scale_tril, validate_args=False)
        super().__init__(flat, [dist.transforms.ReshapeTransform(torch.Size((loc.numel(),)), loc.shape)])

    @property
    def mean(self) -> Tensor:
        """Mean, of the event shape."""
        return self.loc

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self.base_dist.entropy()

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        return self.scale_tril.square().sum(-1).reshape(self.loc.shape)


def unit_free_tril(log_diag: Tensor, lower: Tensor) -> Tensor:
    """``D (I + L)``: a Cholesky factor whose entries below the diagonal have no unit, so that one learning rate suits them.

    Shape:
        log_diag ``(..., weights)``, lower ``(..., weights, weights)``, of which only what is below the diagonal counts
    """
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return log_diag.exp()[..., None] * (lower.tril(-1) + eye)


class FullCovarianceFactor(Factor):
    """Mean, and the Cholesky factor: its diagonal in logarithm, what is below it over the diagonal of its line."""

    roles: ClassVar = {"loc": "loc", "log_diag": "scale", "relative_lower": "scale"}

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.log_diag = nn.Parameter(scale.flatten().log())
        self.relative_lower = nn.Parameter(
            torch.zeros(scale.numel(), scale.numel(), dtype=scale.dtype, device=scale.device)
        )

    @property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the covariance, ``(weights, weights)``."""
        return unit_free_tril(self.log_diag, self.relative_lower)

    @torch.no_grad()
    def set_scale_tril(self, scale_tril: Tensor) -> None:
        """Take over a lower Cholesky factor, ``(weights, weights)``."""
        diagonal = scale_tril.diagonal()
        self.relative_lower.copy_(scale_tril.tril(-1) / diagonal[:, None])
        self.log_diag.copy_(diagonal.log())

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        return DenseNormal(self.loc, self.scale_tril)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.distribution().variance
