"""KL from any Normal with known mean, marginal variance and entropy to a factorised Normal."""

import math

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import register_kl

from pyrolora.guides.full_covariance import DenseNormal
from pyrolora.guides.kronecker import KroneckerDistribution
from pyrolora.guides.low_rank import LowRankNormal


@register_kl(LowRankNormal, dist.Independent)
@register_kl(DenseNormal, dist.Independent)
@register_kl(KroneckerDistribution, dist.Independent)
def kl_to_factorised_normal(q: LowRankNormal | DenseNormal | KroneckerDistribution, p: dist.Independent) -> Tensor:
    """KL(q, p) in nats: the cross entropy needs only q's mean and marginal variances.

    Raises:
        NotImplementedError: p is no factorised Normal of q's event shape, and an ELBO then falls back on densities.
    """
    base = p.base_dist
    if not isinstance(base, dist.Normal) or p.reinterpreted_batch_ndims != len(q.event_shape):
        raise NotImplementedError
    variance = base.scale.square()
    misfit = ((q.variance + (q.mean - base.loc).square()) / variance + variance.log() + math.log(2 * math.pi)).sum()
    return 0.5 * misfit - q.entropy()
