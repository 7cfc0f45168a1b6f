"""Matrix Normals: one covariance between rows, one between columns, their Kronecker product for all weights."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import register_kl

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.block_covariance import MOST_ENTRIES, RowNormal, require_matrix
from pyrolora.guides.full_covariance import unit_free_tril
from pyrolora.guides.mean_field import require_positive, starting_scale
from pyrolora.guides.normal_kl import kl_to_factorised_normal
from pyrolora.guides.projection import projected_covariance
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class MatrixNormal(Family):
    """Normal with covariance ``R kron C`` over the rows and columns of a site: classes are correlated, at C^2 + d^2 numbers.

    Usage::

        VBLL(guide=MatrixNormal())

    Source: Gupta and Nagar, "Matrix Variate Distributions", 1999; Louizos and Welling, 2016.

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
            ValueError: no matrix of real weights, or a covariance that would take too much memory.
        """
        _, columns = require_matrix(site, type(self).__name__)
        if columns**2 > MOST_ENTRIES:
            raise ValueError(
                f"MatrixNormal of {site.name!r} would hold a covariance of {columns} x {columns}: "
                f"{columns**2 * start.element_size() / 2**20:,.0f} MiB. Use LowRankPrecision(rank=64)."
            )
        return MatrixNormalFactor(start, starting_scale(self.init_scale, site, start, prior))


class MatrixNormalDistribution(RowNormal):
    """The distribution of `MatrixNormal`.

    Args:
        loc: mean.
        row_tril: lower Cholesky factor of the covariance between rows.
        column_tril: lower Cholesky factor of the covariance between columns.

    Shape:
        loc ``(rows, columns)``, row_tril ``(rows, rows)``, column_tril ``(columns, columns)``
    """

    def __init__(self, loc: Tensor, row_tril: Tensor, column_tril: Tensor) -> None:
        self.row_tril, self.column_tril = row_tril, column_tril
        super().__init__(loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        return self.row_tril.square().sum(-1)[:, None] * self.column_tril.square().sum(-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        return self.loc + self.row_tril @ self.noise(sample_shape, *self.loc.shape) @ self.column_tril.mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, ``sample_shape``."""
        half = torch.linalg.solve_triangular(self.row_tril, value - self.loc, upper=False)
        away = torch.linalg.solve_triangular(self.column_tril, half.mT, upper=False)
        return -0.5 * away.square().sum((-2, -1)) - self._log_volume() - self.volume_of_unit()

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self._log_volume() + self.volume_of_unit() + 0.5 * self.loc.numel()

    def _log_volume(self) -> Tensor:
        rows, columns = self.loc.shape
        return columns * self.row_tril.diagonal().log().sum() + rows * self.column_tril.diagonal().log().sum()


register_kl(MatrixNormalDistribution, dist.Independent)(kl_to_factorised_normal)


@projected_covariance.register(MatrixNormalDistribution)
def _project(distribution: MatrixNormalDistribution, jacobian: Tensor) -> Tensor:
    rows = (distribution.row_tril.mT @ jacobian @ distribution.column_tril).transpose(0, 1).flatten(2)
    return rows @ rows.mT


class MatrixNormalFactor(Factor):
    """Mean, and both Cholesky factors with their diagonals in logarithm."""

    roles: ClassVar = {
        "loc": "loc", "row_log_diag": "scale", "row_lower": "scale", "column_log_diag": "scale", "column_lower": "scale",
    }  # fmt: skip

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        rows, columns = start.shape
        self.loc = nn.Parameter(start.clone())
        # one scale for all weights: a product of two cannot follow one that varies freely
        self.row_log_diag = nn.Parameter(start.new_zeros(rows))
        self.row_lower = nn.Parameter(start.new_zeros(rows, rows))
        self.column_log_diag = nn.Parameter(scale.log().mean(0))
        self.column_lower = nn.Parameter(start.new_zeros(columns, columns))

    def distribution(self) -> MatrixNormalDistribution:
        """See `Factor.distribution`."""
        row_tril = unit_free_tril(self.row_log_diag, self.row_lower)
        column_tril = unit_free_tril(self.column_log_diag, self.column_lower)
        return MatrixNormalDistribution(self.loc, row_tril, column_tril)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.distribution().variance
