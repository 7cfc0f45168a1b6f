"""A dense Normal for each row of a site, rows independent: VBLL's dense posterior of a last layer."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints, register_kl

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.full_covariance import unit_free_tril
from pyrolora.guides.mean_field import require_positive, starting_scale
from pyrolora.guides.normal_kl import kl_to_factorised_normal
from pyrolora.guides.projection import projected_covariance
from pyrolora.models.sites import Site

# 80 MB in float32, four times that with gradient and Adam's moments
MOST_ENTRIES = 20_000_000


@dataclass(frozen=True)
class BlockCovariance(Family):
    """Normal with one dense covariance for each row of a site, such as each class of a last layer.

    Usage::

        VBLL(guide=BlockCovariance())

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024 (its dense parameterisation).

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
            ValueError: no matrix of real weights, or covariances that would take too much memory.
        """
        rows, weights = require_matrix(site, type(self).__name__)
        entries = rows * weights**2
        if entries > MOST_ENTRIES:
            size = entries * start.element_size()
            raise ValueError(
                f"{type(self).__name__} of {site.name!r} would hold {rows} covariances of {weights} x {weights}: "
                f"{size / 2**20:,.0f} MiB, {4 * size / 2**30:.1f} GiB with gradient and Adam's moments. "
                "Use LowRankPrecision(rank=64), which takes a hundredth."
            )
        return self._factor(start, starting_scale(self.init_scale, site, start, prior))

    def _factor(self, start: Tensor, scale: Tensor) -> "BlockCovarianceFactor":
        return BlockCovarianceFactor(start, scale)


def require_matrix(site: Site, family: str) -> tuple[int, int]:
    """Rows and columns of a site that must be one matrix of real weights.

    Raises:
        ValueError: it is not; the remedy is named.
    """
    if len(site.shape) != 2 or site.support is not constraints.real:
        raise ValueError(
            f"{family} needs a matrix of real weights such as head.weight; {site.name!r} has shape {tuple(site.shape)} and "
            f"support {site.support}. Use MeanField or LowRank there."
        )
    return site.shape[0], site.shape[1]


class RowNormal(dist.TorchDistribution):
    """What Normals over the rows of a matrix have in common: no batch shape, draws asked for by the sample shape."""

    arg_constraints: ClassVar = {}
    support = constraints.real
    has_rsample = True
    loc: Tensor

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, of the event shape."""
        return self.loc

    def noise(self, sample_shape: Any, *shape: int) -> Tensor:
        """Standard Normal numbers ``(*sample_shape, *shape)`` where the parameters live."""
        return torch.randn(*sample_shape, *shape, dtype=self.loc.dtype, device=self.loc.device)

    def volume_of_unit(self) -> float:
        """Half the number of weights times ``log 2 pi``, nats."""
        return 0.5 * self.loc.numel() * math.log(2 * math.pi)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RowNormal":
        """Only the empty batch shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError(f"{type(self).__name__} has no batch shape; ask for draws with sample((n,)).")
        return self


class BlockNormal(RowNormal):
    """Normal over a matrix whose rows are independent, each with a dense covariance.

    Args:
        loc: mean.
        scale_tril: lower Cholesky factor of each row's covariance.

    Shape:
        loc ``(rows, weights)``, scale_tril ``(rows, weights, weights)``
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.scale_tril = scale_tril
        super().__init__(loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        return self.scale_tril.square().sum(-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        noise = self.noise(sample_shape, *self.loc.shape)
        return self.loc + torch.einsum("kde,...ke->...kd", self.scale_tril, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, ``sample_shape``."""
        # rows first, draws as columns of one solve: a broadcast solve would copy the factors for every draw
        flat = (value - self.loc).reshape(-1, *self.loc.shape).permute(1, 2, 0)
        away = torch.linalg.solve_triangular(self.scale_tril, flat, upper=False).square().sum((0, 1))
        misfit = away.reshape(value.shape[: value.dim() - 2])
        return -0.5 * misfit - self._log_volume() - self.volume_of_unit()

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self._log_volume() + self.volume_of_unit() + 0.5 * self.loc.numel()

    def _log_volume(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum()


register_kl(BlockNormal, dist.Independent)(kl_to_factorised_normal)


@projected_covariance.register(BlockNormal)
def _project(distribution: BlockNormal, jacobian: Tensor) -> Tensor:
    rows = torch.einsum("crkd,kde->rcke", jacobian, distribution.scale_tril).flatten(2)
    return rows @ rows.mT


class BlockCovarianceFactor(Factor):
    """Mean, and each row's Cholesky factor: its diagonal in logarithm, what is below it over the diagonal of its line."""

    roles: ClassVar = {"loc": "loc", "log_diag": "scale", "lower": "scale"}

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.log_diag = nn.Parameter(scale.log())
        self.lower = nn.Parameter(scale.new_zeros(*scale.shape, scale.shape[-1]))

    @property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factors of the covariances, ``(rows, weights, weights)``."""
        return unit_free_tril(self.log_diag, self.lower)

    @torch.no_grad()
    def set_scale_tril(self, scale_tril: Tensor) -> None:
        """Take over lower Cholesky factors, ``(rows, weights, weights)``."""
        diagonal = scale_tril.diagonal(dim1=-2, dim2=-1)
        self.lower.copy_(scale_tril.tril(-1) / diagonal[..., None])
        self.log_diag.copy_(diagonal.log())

    def distribution(self) -> RowNormal:
        """See `Factor.distribution`."""
        return BlockNormal(self.loc, self.scale_tril)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.distribution().variance
