"""Covariance of a linear function of a posterior's weights, without a covariance of the weights."""

from functools import singledispatch

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora.guides.full_covariance import DenseNormal
from pyrolora.guides.kronecker import KroneckerDistribution, rotate
from pyrolora.guides.low_rank import LowRankNormal


def is_normal(distribution: object) -> bool:
    """Whether `projected_covariance` knows the distribution."""
    if isinstance(distribution, dist.Independent):
        return isinstance(distribution.base_dist, dist.Normal)
    return projected_covariance.dispatch(type(distribution)) is not projected_covariance.dispatch(object)


@singledispatch
def projected_covariance(distribution: object, jacobian: Tensor) -> Tensor:
    """``J Sigma J'`` for the covariance Sigma of a Normal, row by row.

    Usage::

        projected_covariance(factor.distribution(), jacobian)   # (rows, columns, columns)

    Args:
        distribution: a Normal over the site's weights.
        jacobian: gradients of ``columns`` functions in each of ``rows`` rows.

    Shape:
        jacobian ``(columns, rows, *event_shape)``; returns ``(rows, columns, columns)``

    Raises:
        TypeError: a distribution that is no Normal of a known structure.
    """
    raise TypeError(
        f"The covariance of a {type(distribution).__name__} is not known in closed form. Known are Normal, LowRankNormal, "
        "DenseNormal and KroneckerDistribution; register yours with projected_covariance.register."
    )


@projected_covariance.register(dist.Independent)
def _independent(distribution: dist.Independent, jacobian: Tensor) -> Tensor:
    rows = _rows(jacobian)
    return (rows * distribution.variance.flatten()) @ rows.mT


@projected_covariance.register(LowRankNormal)
def _low_rank(distribution: LowRankNormal, jacobian: Tensor) -> Tensor:
    rows = _rows(jacobian)
    own = (rows * distribution.cov_diag.flatten()) @ rows.mT
    layers = torch.einsum("crli,lik->rclk", jacobian.flatten(3), distribution.cov_factor).flatten(2)
    return own + layers @ layers.mT


@projected_covariance.register(DenseNormal)
def _dense(distribution: DenseNormal, jacobian: Tensor) -> Tensor:
    rows = _rows(jacobian) @ distribution.scale_tril
    return rows @ rows.mT


@projected_covariance.register(KroneckerDistribution)
def _kronecker(distribution: KroneckerDistribution, jacobian: Tensor) -> Tensor:
    stacked = jacobian.reshape(*jacobian.shape[:2], *distribution.loc.shape)
    rotated = _rows(rotate(stacked, distribution.out_basis, distribution.in_basis))
    variance = distribution.scale.square()
    if not distribution.truncated:
        return (rotated * variance.flatten()) @ rotated.mT
    outside = distribution.rest.square()
    rows = _rows(jacobian)
    total = (rows * outside.expand(distribution.loc.shape).flatten()) @ rows.mT
    return total + (rotated * (variance - outside).flatten()) @ rotated.mT


def _rows(jacobian: Tensor) -> Tensor:
    """Columns and rows exchanged, weights flattened, ``(rows, columns, weights)``."""
    return jacobian.flatten(2).transpose(0, 1)
