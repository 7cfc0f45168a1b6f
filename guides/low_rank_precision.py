"""Normals whose precision is diagonal plus low rank, one for each row: exact for a last layer with few data."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import register_kl

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.block_covariance import RowNormal, require_matrix
from pyrolora.guides.mean_field import require_positive, starting_scale
from pyrolora.guides.normal_kl import kl_to_factorised_normal
from pyrolora.guides.projection import projected_covariance
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class LowRankPrecision(Family):
    """Normal with a diagonal plus rank-r precision for each row of a site, rows independent.

    Usage::

        VBLL(guide=LowRankPrecision(rank=64))

    The posterior of a linear layer is the prior wherever the data are silent and narrower on their span: a precision of
    rank N on top of the prior's. With a rank of at least the number of data it contains the optimum of every bound; a
    low-rank *covariance* of the same size does not come close. The KL costs O(weights * rank^2).

    Args:
        rank: rank of what is added to the diagonal of the precision.
        init_scale: standard deviation of a weight at the start; None starts at the prior's own, with next to nothing added.

    Raises:
        ValueError: a rank below 1, or ``init_scale`` not positive.
    """

    rank: int = field(default=64, metadata={"help": "columns of the precision factor"})
    init_scale: float | None = field(
        default=None, metadata={"help": "standard deviation of a weight at the start; None for the prior's own"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"The rank of a LowRankPrecision guide must be at least 1; got {self.rank}. Try 64.")
        require_positive(self.init_scale)

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`.

        Raises:
            ValueError: no matrix of real weights.
        """
        require_matrix(site, type(self).__name__)
        return LowRankPrecisionFactor(start, starting_scale(self.init_scale, site, start, prior), self.rank)


class LowRankPrecisionNormal(RowNormal):
    """Normal over a matrix whose rows are independent, each with precision ``D^(1/2) (I + A A') D^(1/2)``.

    Everything goes through the Cholesky factor R of ``I + A' A`` and ``B = A R^(-T)``, for which the covariance is
    ``D^(-1/2) (I - B B') D^(-1/2)``.

    Args:
        loc: mean.
        factor: A, without a unit, so that one learning rate suits it at any scale of the weights.
        log_precision: logarithm of the diagonal of D.

    Shape:
        loc and log_precision ``(rows, weights)``, factor ``(rows, weights, rank)``
    """

    def __init__(self, loc: Tensor, factor: Tensor, log_precision: Tensor) -> None:
        self.factor, self.log_precision = factor, log_precision
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        self.root = torch.linalg.cholesky(eye + self.factor.mT @ self.factor)
        self.removed = torch.linalg.solve_triangular(self.root, self.factor.mT, upper=False).mT
        super().__init__(loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        return (-self.log_precision).exp() * (1 - self.removed.square().sum(-1))

    def quadratic(self, features: Tensor) -> Tensor:
        """``x' S_k x`` for every row x of the features and every row k of the matrix, ``(examples, rows)``."""
        scaled = features * (-0.5 * self.log_precision).exp()[:, None]
        return (scaled.square().sum(-1) - (scaled @ self.removed).square().sum(-1)).mT

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        # noise with the precision for its covariance, divided by the precision
        common = self.noise(sample_shape, *self.factor.shape[::2])
        whole = self.noise(sample_shape, *self.loc.shape) + torch.einsum("kdr,...kr->...kd", self.factor, common)
        along = torch.einsum("kdr,...kd->...kr", self.removed, whole)
        inside = torch.einsum("kdr,...kr->...kd", self.removed, along)
        return self.loc + (-0.5 * self.log_precision).exp() * (whole - inside)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, ``sample_shape``."""
        away = (value - self.loc) * (0.5 * self.log_precision).exp()
        along = torch.einsum("kdr,...kd->...kr", self.factor, away).square().sum((-2, -1))
        misfit = away.square().sum((-2, -1)) + along
        return -0.5 * misfit - self._log_volume() - self.volume_of_unit()

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self._log_volume() + self.volume_of_unit() + 0.5 * self.loc.numel()

    def _log_volume(self) -> Tensor:
        return -0.5 * self.log_precision.sum() - self.root.diagonal(dim1=-2, dim2=-1).log().sum()


register_kl(LowRankPrecisionNormal, dist.Independent)(kl_to_factorised_normal)


@projected_covariance.register(LowRankPrecisionNormal)
def _project(distribution: LowRankPrecisionNormal, jacobian: Tensor) -> Tensor:
    scaled = jacobian * (-0.5 * distribution.log_precision).exp()
    rows = scaled.transpose(0, 1).flatten(2)
    removed = torch.einsum("crkd,kde->rcke", scaled, distribution.removed).flatten(2)
    return rows @ rows.mT - removed @ removed.mT


class LowRankPrecisionFactor(Factor):
    """Mean, logarithm of the precision's diagonal, and the precision's factor."""

    roles: ClassVar = {"loc": "loc", "log_precision": "scale", "factor": "scale"}

    def __init__(self, start: Tensor, scale: Tensor, rank: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.log_precision = nn.Parameter(-2 * scale.log())
        # a generator of its own, so that building a guide leaves a user's random state alone
        source = torch.Generator().manual_seed(0)
        noise = torch.randn(*scale.shape, rank, dtype=torch.float64, generator=source)
        self.factor = nn.Parameter(0.1 * noise.to(scale) / scale.shape[-1] ** 0.5)

    @torch.no_grad()
    def set_precision(self, log_precision: Tensor, factor: Tensor) -> None:
        """Take over a precision; missing columns of the factor are zero. Shapes as in `LowRankPrecisionNormal`."""
        self.log_precision.copy_(log_precision)
        self.factor.zero_()
        self.factor[..., : factor.shape[-1]].copy_(factor)

    def distribution(self) -> LowRankPrecisionNormal:
        """See `Factor.distribution`."""
        return LowRankPrecisionNormal(self.loc, self.factor, self.log_precision)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.distribution().variance
