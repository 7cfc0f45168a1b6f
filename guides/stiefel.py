"""Concentrated posteriors on the Stiefel manifold: a Normal in the tangent space, carried over by the polar retraction."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.mean_field import require_positive
from pyrolora.models.sites import Site
from pyrolora.models.stiefel import tangent_projection
from pyrolora.models.uniform_stiefel import stiefel


@dataclass(frozen=True)
class StiefelNormal(Family):
    """A Normal around a point with orthonormal columns, in the tangent space there, carried over by the polar retraction.

    Usage::

        SVI(guide={"*.polar_X": StiefelNormal(), "*.polar_Y": StiefelNormal(), "*theta": MeanField()})

    The point moves by Riemannian steps as `Point` does; every column of every matrix has a width of its own. The density
    against the uniform prior is exact (see `StiefelNormalDistribution`), so the ELBO estimates the KL by its draws.

    Args:
        init_scale: standard deviation of an entry of the tangent vector at the start; None for a tenth of the root mean
            square entry of an orthonormal column, ``0.1 / sqrt(rows)``.

    Raises:
        ValueError: ``init_scale`` is not positive.
    """

    init_scale: float | None = field(
        default=None, metadata={"help": "deviation of a tangent entry at the start; None for 0.1 / sqrt(rows)"}
    )

    @classmethod
    def fits_manifold(cls, support: constraints.Constraint) -> bool:
        """See `Family.fits_manifold`."""
        return support is stiefel

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.init_scale)

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`.

        Raises:
            ValueError: a site that does not live on the Stiefel manifold.
        """
        if site.support is not stiefel:
            raise ValueError(
                f"StiefelNormal is a posterior of matrices with orthonormal columns, and {site.name!r} lives on "
                f"{site.support}. Use MeanField() there."
            )
        scale = 0.1 / site.shape[-2] ** 0.5 if self.init_scale is None else self.init_scale
        return StiefelNormalFactor(start, scale)


class StiefelNormalDistribution(dist.TorchDistribution):
    """``Z = (Z0 + V)(I + V'V)^(-1/2)`` for V Normal in the tangent space at Z0, a stack of matrices as one event.

    V is the projection of independent ``N(0, scale_j^2)`` entries. Written as ``V = Z0 A + Z0_perp B`` with A skew, the
    entries of B have variance ``scale_j^2`` and those of A below the diagonal ``(scale_i^2 + scale_j^2) / 4``.

    The map from V to Z is one to one onto the matrices for which ``Z0' Z`` has its eigenvalues in the right half plane, and
    the density of Z against the uniform distribution is exact there, to no order in the width::

        log q(Z) = log N(V) + log vol - r log|I + A| + n log|S| + sum_{i<j} log(s_i + s_j) - log|a -> N a + a N'|

    with ``S = (I + V'V)^(1/2)``, s its eigenvalues, ``N = S (I + A)^-1``, the last determinant taken on skew matrices a, and
    vol the volume of the manifold. It is zero elsewhere. Only rank-by-rank algebra is needed: S solves
    ``M S + S M' = 2 I`` with ``M = Z0' Z``.

    Source: own; the retraction is that of Absil, Mahony and Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008,
    example 4.1.3, and the volume that of Muirhead, "Aspects of Multivariate Statistical Theory", 1982, theorem 2.1.15.

    Args:
        loc: Z0, with orthonormal columns.
        scale: standard deviations of the columns' tangent entries.

    Shape:
        loc ``(..., rows, rank)``, scale ``(..., 1, rank)``
    """

    arg_constraints: ClassVar = {}
    support = stiefel
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The point Z0, at which the density is symmetric; the mean of the entries is no point of the manifold."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Of every entry, to second order in the width, ``E[z^2]`` of a column adding up to exactly 1."""
        square = _second_moment(self.loc, self.scale)
        return (square - self.loc.square() * _shrinkage(self.loc, self.scale)).clamp_min(0)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        shape = (*sample_shape, *self.loc.shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        tangent = tangent_projection(self.loc, self.scale * noise)
        rank = tangent.shape[-1]
        gram = torch.eye(rank, dtype=torch.float64, device=tangent.device) + (tangent.mT @ tangent).double()
        return (self.loc + tangent) @ _InverseRoot.apply(gram).to(tangent)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats against the uniform distribution, ``sample_shape``; minus infinity where it is zero."""
        rows, rank = self.loc.shape[-2:]
        point, scale = self.loc.double(), self.scale.double()
        middle = point.mT @ value.double()
        root, inside = _retraction_root(middle)
        tangent = value.double() @ root - point
        # skew but for rounding
        product = point.mT @ tangent
        skew = 0.5 * (product - product.mT)
        variance = scale.square()
        below = torch.tril_indices(rank, rank, -1, device=value.device)
        within = 0.25 * (variance + variance.mT)[..., below[0], below[1]]
        inner = _log_normal(skew[..., below[0], below[1]].square(), within)
        away = (tangent - point @ product).square().sum(-2)
        width = variance[..., 0, :]
        outer = (-0.5 * away / width - 0.5 * (rows - rank) * (width.log() + math.log(2 * math.pi))).sum(-1)
        turned = torch.eye(rank).to(skew) + skew
        # N transposed, whose determinant on skew matrices is the same
        carried = torch.linalg.solve(turned.mT, root)
        jacobian = (
            rows * torch.linalg.slogdet(root).logabsdet
            - rank * torch.linalg.slogdet(turned).logabsdet
            + torch.linalg.slogdet(_on_skew(root)).logabsdet
            - torch.linalg.slogdet(_on_skew(carried)).logabsdet
        )
        each = inner + outer + jacobian + log_volume(rows, rank)
        each = torch.where(inside, each, -torch.inf).to(value.dtype)
        return each.flatten(value.dim() - self.loc.dim()).sum(-1) if self.loc.dim() > 2 else each

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StiefelNormalDistribution":
        """Only the empty batch shape; draws are asked for through the sample shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError("StiefelNormal has no batch shape; ask for draws with sample((n,)).")
        return self


def log_volume(rows: int, rank: int) -> float:
    """Logarithm of the volume of the manifold, each pair of columns' rotation counted once: ``log_volume(2, 1)`` is log 2 pi.

    Source: Muirhead, "Aspects of Multivariate Statistical Theory", 1982, theorem 2.1.15.
    """
    gamma = 0.25 * rank * (rank - 1) * math.log(math.pi) + sum(math.lgamma(0.5 * (rows - i)) for i in range(rank))
    return rank * math.log(2) + 0.5 * rows * rank * math.log(math.pi) - gamma


class _InverseRoot(torch.autograd.Function):
    """``G^(-1/2)`` of symmetric positive definite matrices, differentiable where eigenvalues coincide."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        roots = values.sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors / roots[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        # from T G T = I: dT = -sum over pairs of eigenvectors, each over s_i s_j (s_i + s_j)
        first, second = roots[..., :, None], roots[..., None, :]
        inner = vectors.mT @ (0.5 * (gradient + gradient.mT)) @ vectors
        return -vectors @ (inner / (first * second * (first + second))) @ vectors.mT


def _retraction_root(middle: Tensor) -> tuple[Tensor, Tensor]:
    """S of ``M S + S M' = 2 I``, and whether M has its eigenvalues in the right half plane."""
    rank = middle.shape[-1]
    i, j = torch.tril_indices(rank, rank, device=middle.device)
    operator = _pairs(middle, i, j, i, j) + torch.where(i == j, 0.0, _pairs(middle, i, j, j, i))
    wanted = torch.where(i == j, 2.0, 0.0).to(middle)
    entries, failed = torch.linalg.solve_ex(operator, wanted.expand(operator.shape[:-1]))
    root = middle.new_zeros(middle.shape)
    root[..., i, j] = entries
    root = root + root.tril(-1).mT
    # by Lyapunov's theorem
    positive = torch.linalg.cholesky_ex(root.detach().nan_to_num()).info == 0
    return root, positive & (failed == 0)


def _on_skew(matrix: Tensor) -> Tensor:
    """The matrix of ``a -> N a + a N'`` on skew a, by their entries below the diagonal."""
    rank = matrix.shape[-1]
    i, j = torch.tril_indices(rank, rank, -1, device=matrix.device)
    return _pairs(matrix, i, j, i, j) - _pairs(matrix, i, j, j, i)


def _pairs(matrix: Tensor, i: Tensor, j: Tensor, k: Tensor, m: Tensor) -> Tensor:
    """What entry (k, m) of X adds to entry (i, j) of ``N X + X N'``."""
    left = matrix[..., i[:, None], k] * (j[:, None] == m)
    return left + matrix[..., j[:, None], m] * (i[:, None] == k)


def _log_normal(square: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (square / variance + variance.log() + math.log(2 * math.pi)).sum(-1)


def _shrinkage(loc: Tensor, scale: Tensor) -> Tensor:
    """Squared length of the mean of a column to second order, ``(..., 1, rank)``."""
    rows, rank = loc.shape[-2:]
    variance = scale.square()
    turning = 0.25 * (variance * (rank - 2) + variance.sum(-1, keepdim=True))
    return 1 / (1 + (rows - rank) * variance + turning)


def _second_moment(loc: Tensor, scale: Tensor) -> Tensor:
    """``E[z^2]`` of every entry to second order, columns adding up to 1."""
    variance = scale.square()
    square = loc.square()
    # what B adds, and what the rotations A add from the other columns
    others = 0.25 * ((square * variance).sum(-1, keepdim=True) + variance * square.sum(-1, keepdim=True))
    own = 0.5 * variance * square
    outside = variance * (1 - square.sum(-1, keepdim=True)).clamp_min(0)
    total = square + others - own + outside
    return total / total.sum(-2, keepdim=True)


class StiefelNormalFactor(Factor):
    """The point, moved by Riemannian steps, and the logarithm of each column's width."""

    roles: ClassVar = {"loc": "manifold", "log_scale": "scale"}

    def __init__(self, start: Tensor, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(start.new_full((*start.shape[:-2], 1, start.shape[-1]), math.log(scale)))

    def distribution(self) -> StiefelNormalDistribution:
        """See `Factor.distribution`."""
        return StiefelNormalDistribution(self.loc, self.log_scale.exp())

    def mean(self) -> Tensor:
        """The point; see `StiefelNormalDistribution.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """To second order in the width; see `Factor.second_moment`."""
        return _second_moment(self.loc, self.log_scale.exp())
