"""Token noise of Normal posteriors: local reparameterisation, and Flipout."""

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.guides.block_covariance import RowNormal
from pyrolora.guides.class_contrasts import ContrastNormal
from pyrolora.guides.full_covariance import DenseNormal
from pyrolora.guides.kronecker import KroneckerDistribution
from pyrolora.guides.low_rank import LowRankNormal
from pyrolora.guides.matrix_normal import MatrixNormalDistribution
from pyrolora.guides.vbll import logit_moments
from pyrolora.models.local import LocalWeight

# smallest variance of a product, so that its root has a gradient where a token's activations are all zero
TINY = 1e-30


class LocalNormal(LocalWeight):
    """Independent Normal weights, drawn for every token by the distribution of the product.

    ``x W'`` has independent coordinates with mean ``x M'`` and variance ``x^2 S^2'``.

    Source: Kingma, Salimans and Welling, "Variational Dropout and the Local Reparameterization Trick", 2015.

    Args:
        loc: means.
        scale: standard deviations.

    Shape:
        loc and scale ``(out, in)`` or ``(entries, out, in)``
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale

    @property
    def dtype(self) -> torch.dtype:
        """See `LocalWeight.dtype`."""
        return self.loc.dtype

    def entries(self) -> Sequence[LocalWeight]:
        """See `LocalWeight.entries`."""
        return [type(self)(*pair) for pair in zip(self.loc, self.scale, strict=True)]

    def product(self, rows: Tensor) -> Tensor:
        """See `LocalWeight.product`."""
        variance = functional.linear(rows.square(), self.scale.square())
        noise = torch.randn_like(variance)
        return functional.linear(rows, self.loc) + variance.clamp_min(TINY).sqrt() * noise


class Flipout(LocalNormal):
    """Independent Normal weights: one perturbation for all tokens, its signs flipped anew for every token.

    Uncorrelated between tokens, not independent; the marginal distribution of each token's product is that of `LocalNormal`.

    Source: Wen et al., "Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches", 2018.
    """

    def product(self, rows: Tensor) -> Tensor:
        """See `LocalWeight.product`."""
        perturbation = self.scale * torch.randn_like(self.scale)
        flipped = functional.linear(rows * signs(rows), perturbation)
        return functional.linear(rows, self.loc) + flipped * signs(flipped)


def signs(like: Tensor) -> Tensor:
    """Independent signs, each with probability a half, of the shape and type of a tensor."""
    return torch.empty_like(like).bernoulli_(0.5).mul_(2).sub_(1)


class LocalLowRank(LocalWeight):
    """Low-rank plus diagonal Normal weights: every token has coefficients of its own for the shared directions.

    Args:
        own: the diagonal part with the means.
        directions: columns of the covariance factor as matrices.

    Shape:
        directions ``(entries, rank, out, in)`` or ``(rank, out, in)``
    """

    def __init__(self, own: LocalNormal, directions: Tensor) -> None:
        self.own, self.directions = own, directions

    @property
    def dtype(self) -> torch.dtype:
        """See `LocalWeight.dtype`."""
        return self.own.dtype

    def entries(self) -> Sequence[LocalWeight]:
        """See `LocalWeight.entries`."""
        parts = zip(self.own.loc, self.own.scale, self.directions, strict=True)
        return [LocalLowRank(LocalNormal(loc, scale), directions) for loc, scale, directions in parts]

    def product(self, rows: Tensor) -> Tensor:
        """See `LocalWeight.product`."""
        along = torch.einsum("nti,koi->ntko", rows, self.directions)
        coefficients = torch.randn(*along.shape[:3], dtype=rows.dtype, device=rows.device)
        return self.own.product(rows) + torch.einsum("ntk,ntko->nto", coefficients, along)


class LocalKronecker(LocalWeight):
    """Normal weights with a diagonal covariance in Kronecker eigenbases: `LocalNormal` in the rotated coordinates.

    Args:
        loc: means.
        scale: standard deviation in each pair of directions within the bases' span.
        out_basis: see `KroneckerDistribution`.
        in_basis: see `KroneckerDistribution`.
        rest: standard deviation outside the span.

    Shape:
        as in `KroneckerDistribution`, without the entries for one matrix
    """

    def __init__(self, loc: Tensor, scale: Tensor, out_basis: Tensor, in_basis: Tensor, rest: Tensor) -> None:
        self.loc, self.scale, self.out_basis, self.in_basis, self.rest = loc, scale, out_basis, in_basis, rest

    @property
    def dtype(self) -> torch.dtype:
        """See `LocalWeight.dtype`."""
        return self.loc.dtype

    def entries(self) -> Sequence[LocalWeight]:
        """See `LocalWeight.entries`."""
        parts = zip(self.loc, self.scale, self.out_basis, self.in_basis, self.rest, strict=True)
        return [LocalKronecker(*part) for part in parts]

    def product(self, rows: Tensor) -> Tensor:
        """See `LocalWeight.product`."""
        rotated = rows @ self.in_basis
        inside = rotated.square()
        variance = inside @ self.scale.square().mT
        noise = torch.randn_like(variance) * variance.clamp_min(TINY).sqrt() @ self.out_basis.mT
        total = functional.linear(rows, self.loc) + noise
        if self.scale.numel() == self.loc.numel():
            return total
        # outside: all of the input for outputs off the out-basis, the input's own rest for outputs on it
        whole, within = rows.square().sum(-1, keepdim=True), inside.sum(-1, keepdim=True)
        free = torch.randn_like(total) * whole.clamp_min(TINY).sqrt()
        on_basis = free @ self.out_basis
        kept = torch.randn_like(on_basis) * (whole - within).clamp_min(TINY).sqrt()
        return total + self.rest * (free + (kept - on_basis) @ self.out_basis.mT)


class LocalMatrix(LocalWeight):
    """One matrix of Normal weights, whatever their covariance, drawn for every token by the distribution of its product.

    Args:
        distribution: over a matrix, one that `logit_moments` knows.
    """

    def __init__(self, distribution: Any) -> None:
        self.distribution = distribution

    @property
    def dtype(self) -> torch.dtype:
        """See `LocalWeight.dtype`."""
        return self.distribution.mean.dtype

    def entries(self) -> Sequence[LocalWeight]:
        """See `LocalWeight.entries`."""
        return [self]

    def product(self, rows: Tensor) -> Tensor:
        """See `LocalWeight.product`."""
        flat = rows.flatten(0, -2)
        noise = product_noise(self.distribution, flat)
        return (functional.linear(flat, self.distribution.mean) + noise).unflatten(0, rows.shape[:-1])


@singledispatch
def product_noise(q: Any, rows: Tensor) -> Tensor:
    """``x (W - E W)'`` for every row x, each with a draw of W of its own: ``product_noise(distribution, rows)``.

    Each family takes the root of the product's covariance from its own factors: one that is formed has lost the small
    directions of an ill-conditioned posterior in single precision.

    Args:
        q: Normal distribution over the matrix W, ``(out, in)``.
        rows: activations.

    Shape:
        ``(rows, in)`` to ``(rows, out)``
    """
    variance = logit_moments(q, rows).variance
    return variance.clamp_min(TINY).sqrt() * torch.randn_like(variance)


@product_noise.register
def _(q: MatrixNormalDistribution, rows: Tensor) -> Tensor:
    length = (rows @ q.column_tril).square().sum(-1, keepdim=True).clamp_min(TINY).sqrt()
    return length * (torch.randn_like(rows @ q.loc.mT) @ q.row_tril.mT)


@product_noise.register
def _(q: ContrastNormal, rows: Tensor) -> Tensor:
    variance = (rows @ q.scale_tril).square().sum(-1).mT
    own = variance.clamp_min(TINY).sqrt() * torch.randn_like(variance)
    length = rows.square().sum(-1, keepdim=True).clamp_min(TINY).sqrt()
    return own - own.mean(-1, keepdim=True) + q.shift_scale * length * torch.randn_like(length)


@product_noise.register
def _(q: DenseNormal, rows: Tensor) -> Tensor:
    root = torch.einsum("nd,cdk->nck", rows, q.scale_tril.reshape(*q.loc.shape, -1))
    noise = torch.randn(len(rows), root.shape[-1], 1, dtype=root.dtype, device=root.device)
    return (root @ noise)[..., 0]


def local_weight(distribution: object, method: str) -> LocalWeight:
    """Token noise of a Normal posterior.

    Usage::

        local_weight(factor.distribution(), "token")

    Args:
        distribution: a Normal over a site's weights.
        method: ``"token"``, local reparameterisation; or ``"flipout"``, for independent Normals.

    Raises:
        ValueError: a distribution or method for which there is none.
    """
    made = _token(distribution)
    if method == "flipout":
        # signs leave the law of independent Normals as it is, and of no others
        made = Flipout(made.loc, made.scale) if isinstance(made, LocalNormal) else None
    if made is None:
        base = distribution.base_dist if isinstance(distribution, dist.Independent) else distribution
        raise ValueError(
            f"There is no noise={method!r} for a {type(base).__name__}: a product with it has no simple distribution. "
            "Use noise='example' or noise='weight', which take any posterior."
        )
    return made


@singledispatch
def _token(distribution: object) -> LocalWeight | None:
    return None


@_token.register(dist.Independent)
def _independent(distribution: dist.Independent) -> LocalWeight | None:
    base = distribution.base_dist
    return LocalNormal(base.loc, base.scale) if isinstance(base, dist.Normal) else _token(base)


@_token.register(RowNormal)
def _matrix(distribution: Any) -> LocalWeight:
    return LocalMatrix(distribution)


@_token.register(LowRankNormal)
def _low_rank(distribution: LowRankNormal) -> LocalWeight | None:
    own = LocalNormal(distribution.loc, distribution.cov_diag.sqrt().reshape(distribution.loc.shape))
    return _along(distribution, own, distribution.cov_factor.mT)


@_token.register(DenseNormal)
def _dense(distribution: DenseNormal) -> LocalWeight | None:
    own = LocalNormal(distribution.loc, torch.zeros_like(distribution.loc))
    # what one entry says about another is nothing that a token's product with one of them could show
    entries = distribution.scale_tril.mT.unflatten(1, (len(distribution.loc), -1)).transpose(0, 1)
    return _along(distribution, own, entries)


def _along(distribution: Any, own: LocalNormal, directions: Tensor) -> LocalWeight | None:
    """A stack of matrices with shared directions, ``(entries, directions, weights)``, or one matrix by itself."""
    shape = distribution.loc.shape
    if len(shape) == 2:
        return LocalMatrix(distribution)
    return LocalLowRank(own, directions.unflatten(-1, shape[1:])) if len(shape) == 3 else None


@_token.register(KroneckerDistribution)
def _kronecker(distribution: KroneckerDistribution) -> LocalWeight:
    parts = (distribution.loc, distribution.scale, distribution.out_basis, distribution.in_basis, distribution.rest)
    stack = LocalKronecker(*parts)
    return stack if len(distribution.event_shape) == 3 else stack.entries()[0]
