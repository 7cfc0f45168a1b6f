"""Dense Normals of the classes, independent but for a shift of all of them that no probability depends on."""

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import register_kl

from pyrolora.guides.base import Factor
from pyrolora.guides.block_covariance import BlockCovariance, BlockCovarianceFactor, RowNormal, require_matrix
from pyrolora.guides.normal_kl import kl_to_factorised_normal
from pyrolora.guides.projection import projected_covariance
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class ClassContrasts(BlockCovariance):
    """`BlockCovariance` with the common part of all rows taken out and a Normal of its own put in its place.

    Usage::

        VBLL(guide=ClassContrasts(), refit="mc")

    A shift of all rows changes no class probability, so the posterior of the rows' mean is its prior, independent of the
    contrasts between rows. Rows that are independent cannot say so: they hold the shift down together with the contrasts,
    and are too wide by up to a half where they are to predict equally well. Here only contrasts of the rows count; two
    classes can have any Normal posterior, and the ELBO is never below that of independent rows.

    Source: own; the integral over the shift is Gaussian. Harrison, Willes and Snoek, "Variational Bayesian Last Layers",
    2024, for the rows.

    Args:
        init_scale: standard deviation of a weight at the start; None starts at the prior's own.

    Raises:
        ValueError: ``init_scale`` is not positive.
    """

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `BlockCovariance.factor`.

        Raises:
            ValueError: a single row, which has no contrasts.
        """
        rows, _ = require_matrix(site, type(self).__name__)
        if rows < 2:
            raise ValueError(
                f"ClassContrasts needs two rows at least; {site.name!r} has {rows}. Use BlockCovariance there: an identified "
                "head has no shift to leave out."
            )
        return super().factor(site, start, prior)

    def _factor(self, start: Tensor, scale: Tensor) -> "ClassContrastsFactor":
        return ClassContrastsFactor(start, scale)


class ContrastNormal(RowNormal):
    """Normal over a matrix W: contrasts of independent rows ``u_k ~ N(0, S_k)``, and a mean row of its own.

    ``W = loc + u - mean_k(u) + shift_scale * noise``, the last one noise for all rows.

    Args:
        loc: mean.
        scale_tril: lower Cholesky factors of the S_k.
        shift_scale: standard deviation of the mean over rows, of every weight.

    Shape:
        loc ``(rows, weights)``, scale_tril ``(rows, weights, weights)``, shift_scale ``()``
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, shift_scale: Tensor) -> None:
        self.scale_tril, self.shift_scale = scale_tril, shift_scale
        super().__init__(loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        own, rows = self.scale_tril.square().sum(-1), len(self.loc)
        return own * (1 - 2 / rows) + own.sum(0) / rows**2 + self.shift_scale.square()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        rows = torch.einsum("kde,...ke->...kd", self.scale_tril, self.noise(sample_shape, *self.loc.shape))
        shift = self.shift_scale * self.noise(sample_shape, 1, self.loc.shape[-1])
        return self.loc + rows - rows.mean(-2, keepdim=True) + shift

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, ``sample_shape``.

        The density of the contrasts is that of the independent rows, integrated over their shift.
        """
        flat = (value - self.loc).reshape(-1, *self.loc.shape)
        shift = flat.mean(1)
        # rows first, draws as columns of one solve
        away = (flat - shift[:, None]).permute(1, 2, 0)
        pulls = torch.cholesky_solve(away, self.scale_tril)
        total = torch.linalg.solve_triangular(self._sum_root, pulls.sum(0), upper=False).square().sum(0)
        misfit = (away * pulls).sum((0, 1)) - total + (shift / self.shift_scale).square().sum(-1)
        return (-0.5 * misfit - self._log_volume - self.volume_of_unit()).reshape(value.shape[: value.dim() - 2])

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self._log_volume + self.volume_of_unit() + 0.5 * self.loc.numel()

    @property
    def _sum_root(self) -> Tensor:
        """Lower Cholesky factor of the sum of the rows' precisions."""
        return torch.linalg.cholesky(torch.cholesky_inverse(self.scale_tril).sum(0))

    @property
    def _log_volume(self) -> Tensor:
        """Half the log determinant of the covariance: of all contrasts, and of the shift in an orthonormal direction."""
        rows, weights = self.loc.shape
        own = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum()
        joint = self._sum_root.diagonal().log().sum() - 0.5 * weights * math.log(rows)
        return own + joint + weights * (self.shift_scale.log() + 0.5 * math.log(rows))


register_kl(ContrastNormal, dist.Independent)(kl_to_factorised_normal)


@projected_covariance.register(ContrastNormal)
def _project(distribution: ContrastNormal, jacobian: Tensor) -> Tensor:
    contrasts = jacobian - jacobian.mean(2, keepdim=True)
    rows = torch.einsum("crkd,kde->rcke", contrasts, distribution.scale_tril).flatten(2)
    shift = distribution.shift_scale * jacobian.sum(2).transpose(0, 1)
    return rows @ rows.mT + shift @ shift.mT


class ClassContrastsFactor(BlockCovarianceFactor):
    """The parameters of independent rows, and the logarithm of the standard deviation of their mean."""

    roles = {**BlockCovarianceFactor.roles, "log_shift": "scale"}  # noqa: RUF012 - as its parent's

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__(start, scale)
        # of a mean of rows as wide as the start's
        self.log_shift = nn.Parameter((scale.square().mean() / len(start)).sqrt().log())

    @torch.no_grad()
    def set_shift_scale(self, scale: float) -> None:
        """Take over the standard deviation of the rows' mean."""
        self.log_shift.fill_(math.log(scale))

    def distribution(self) -> ContrastNormal:
        """See `Factor.distribution`."""
        return ContrastNormal(self.loc, self.scale_tril, self.log_shift.exp())
