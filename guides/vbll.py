"""Gaussian moments of logits under a Normal posterior of a last layer: the one input of every VBLL objective."""

from functools import singledispatch
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora.guides.block_covariance import BlockNormal
from pyrolora.guides.class_contrasts import ContrastNormal
from pyrolora.guides.full_covariance import DenseNormal
from pyrolora.guides.kronecker import KroneckerDistribution
from pyrolora.guides.low_rank import LowRankNormal
from pyrolora.guides.low_rank_precision import LowRankPrecisionNormal
from pyrolora.guides.matrix_normal import MatrixNormalDistribution


class LogitMoments(NamedTuple):
    """Mean and spread of the logits of some examples.

    Attributes:
        mean: ``(examples, classes)``.
        spread: variances ``(examples, classes)`` where classes are independent, else covariances
            ``(examples, classes, classes)``.
    """

    mean: Tensor
    spread: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of each logit, ``(examples, classes)``."""
        return self.spread if self.independent else self.spread.diagonal(dim1=-2, dim2=-1)

    @property
    def covariance(self) -> Tensor:
        """Covariance of each example's logits, ``(examples, classes, classes)``."""
        return torch.diag_embed(self.spread) if self.independent else self.spread

    @property
    def independent(self) -> bool:
        """Whether classes are independent."""
        return self.spread.dim() == self.mean.dim()

    def times(self, vectors: Tensor) -> Tensor:
        """Covariance times a vector for each example, ``(examples, classes)``."""
        return self.spread * vectors if self.independent else (self.spread @ vectors[..., None])[..., 0]


@singledispatch
def logit_moments(q: Any, features: Tensor) -> LogitMoments:
    """Moments of ``W x`` for every row x of the features: ``logit_moments(factor.distribution(), features)``.

    Args:
        q: Normal distribution over the matrix W, ``(classes, weights)``.
        features: ``(examples, weights)``.

    Raises:
        TypeError: a distribution without closed-form moments; the families that have them are named.
    """
    raise TypeError(
        f"The logits of a {type(q).__name__} have no closed-form moments. Give head.weight one of BlockCovariance, "
        "ClassContrasts, FullCovariance, LowRank, LowRankPrecision, MatrixNormal, MeanField or Point."
    )


@logit_moments.register
def _(q: dist.Independent, features: Tensor) -> LogitMoments:
    base = q.base_dist
    if not isinstance(base, dist.Normal):
        return logit_moments(base, features)
    return LogitMoments(features @ base.loc.mT, features.square() @ base.scale.square().expand_as(base.loc).mT)


@logit_moments.register
def _(q: dist.Delta, features: Tensor) -> LogitMoments:
    mean = features @ q.v.mT
    return LogitMoments(mean, torch.zeros_like(mean))


@logit_moments.register
def _(q: LowRankNormal, features: Tensor) -> LogitMoments:
    along = torch.einsum("nd,cdr->ncr", features, q.cov_factor)
    return LogitMoments(features @ q.loc.mT, features.square() @ q.cov_diag.mT + along.square().sum(-1))


@logit_moments.register
def _(q: LowRankPrecisionNormal, features: Tensor) -> LogitMoments:
    return LogitMoments(features @ q.loc.mT, q.quadratic(features))


@logit_moments.register
def _(q: BlockNormal, features: Tensor) -> LogitMoments:
    return LogitMoments(features @ q.loc.mT, (features @ q.scale_tril).square().sum(-1).mT)


@logit_moments.register
def _(q: ContrastNormal, features: Tensor) -> LogitMoments:
    rows = (features @ q.scale_tril).square().sum(-1).mT
    classes = rows.shape[1]
    common = rows.sum(-1) / classes**2 + q.shift_scale.square() * features.square().sum(-1)
    spread = torch.diag_embed(rows) - (rows[:, :, None] + rows[:, None, :]) / classes + common[:, None, None]
    return LogitMoments(features @ q.loc.mT, spread)


@logit_moments.register
def _(q: MatrixNormalDistribution, features: Tensor) -> LogitMoments:
    length = (features @ q.column_tril).square().sum(-1)
    return LogitMoments(features @ q.loc.mT, length[:, None, None] * (q.row_tril @ q.row_tril.mT))


@logit_moments.register
def _(q: DenseNormal, features: Tensor) -> LogitMoments:
    classes, weights = q.loc.shape
    root = torch.einsum("nd,cdk->nck", features, q.scale_tril.reshape(classes, weights, -1))
    return LogitMoments(features @ q.loc.mT, root @ root.mT)


@logit_moments.register
def _(q: KroneckerDistribution, features: Tensor) -> LogitMoments:
    outside = q.rest[0].square()
    inside = (q.scale[0].square() - outside) @ (features @ q.in_basis[0]).square().mT
    basis = q.out_basis[0]
    spread = torch.einsum("cp,pn,kp->nck", basis, inside, basis)
    flat = outside * features.square().sum(-1)[:, None]
    return LogitMoments(features @ q.mean.mT, spread + torch.diag_embed(flat.expand(-1, basis.shape[0])))
