"""Draws that cover a posterior better than independent ones: in mirrored pairs, or one in every stratum."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrolora.guides.projection import is_normal
from pyrolora.models.naming import nearest

SAMPLERS = ("independent", "antithetic", "stratified")


def require_sampler(name: str) -> None:
    """Refuse an unknown sampler and offer the nearest."""
    if name not in SAMPLERS:
        raise ValueError(
            f"Unknown sampler {name!r}. Did you mean {nearest(name, SAMPLERS)!r}? Samplers: {', '.join(SAMPLERS)}."
        )


@torch.no_grad()
def draws_of(distribution: TorchDistribution, count: int, sampler: str) -> Tensor:
    """Draws of one site from torch's global state.

    Every draw by itself has the distribution asked for, so means over draws stay unbiased; only the draws' errors are made to
    cancel. ``"antithetic"`` draws come in pairs, the second the first mirrored at the mean, which takes every odd part of a
    function out of the error. ``"stratified"`` draws are a Latin hypercube: the values of each weight fall one into each of
    ``count`` strata of equal probability, which takes out what is additive in the weights. Distributions for which a sampler
    has no meaning (no Normal; no independent Normals for strata) are drawn independently.

    Source: McKay, Beckman and Conover, "A Comparison of Three Methods for Selecting Values of Input Variables", 1979.

    Args:
        distribution: the site's posterior.
        count: how many.
        sampler: one of `SAMPLERS`.

    Shape:
        ``(count, *event_shape)``
    """
    if sampler == "antithetic" and is_normal(distribution):
        first = distribution.sample(torch.Size((-(-count // 2),)))
        pairs = torch.stack([first, 2 * distribution.mean - first], dim=1)
        return pairs.flatten(0, 1)[:count]
    if sampler == "stratified" and isinstance(distribution, dist.Independent) and is_normal(distribution):
        base = distribution.base_dist
        shape = (count, *base.loc.shape)
        strata = torch.rand(shape, dtype=base.loc.dtype, device=base.loc.device).argsort(0)
        inside = torch.rand(shape, dtype=torch.float64, device=base.loc.device)
        # in float64, where no uniform number rounds to one
        uniform = ((strata + inside) / count).clamp(1e-12, 1 - 1e-12)
        return base.loc + base.scale * torch.special.ndtri(uniform).to(base.loc)
    return distribution.sample(torch.Size((count,)))
