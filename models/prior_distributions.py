"""From a declared distribution to that of one site: its shape, its device, and the flat one."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrolora.models.sites import Site


def flat_prior(site: Site) -> TorchDistribution:
    """What `Flat` means for a site: constant, which on a compact manifold is proper."""
    if site.prior is not None:
        return site.prior
    return Improper(dist.constraints.real, torch.Size(), site.shape)


class Improper(dist.ImproperUniform):
    """What `Flat` is for one site: Pyro's, with its zeros where the value is, so that they add up on an accelerator."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero in logarithm."""
        return super().log_prob(value).to(value)


def fit_to_site(declared: TorchDistribution, site: Site) -> TorchDistribution:
    """Expand a distribution so that its event shape is the site's shape.

    Raises:
        ValueError: the shape does not broadcast to the site's, or the support is not the whole real line.
    """
    full = declared.batch_shape + declared.event_shape
    try:
        fits = torch.broadcast_shapes(full, site.shape) == site.shape
    except RuntimeError:
        fits = False
    event = len(declared.event_shape)
    if not fits or declared.event_shape != site.shape[len(site.shape) - event :]:
        raise ValueError(
            f"The prior of {site.name!r} has shape {tuple(full)}, which does not broadcast to the site's shape "
            f"{tuple(site.shape)} ({', '.join(site.dims)}). A scalar distribution such as Normal(0., 0.2) always does."
        )
    support = declared.support
    if site.prior is not None and site.support is not dist.constraints.real:
        if support == site.prior.support and not declared.batch_shape:
            return declared
        raise ValueError(
            f"The prior of {site.name!r} is a {type(declared).__name__} with support {support}; the site lives on "
            f"{site.support}. Leave it out of the patterns, and it keeps its {type(site.prior).__name__} prior."
        )
    base = support
    while isinstance(base, dist.constraints.independent | MixtureSameFamilyConstraint):
        base = base.base_constraint
    if base not in (dist.constraints.real, dist.constraints.real_vector):
        raise ValueError(
            f"The prior of {site.name!r} is a {type(declared).__name__} with support {support}; adapter weights are "
            "real numbers, so use a distribution over all of them, such as Normal, StudentT or Laplace."
        )
    batch = site.shape[: len(site.shape) - event]
    return declared.expand(batch).to_event(len(batch))


def move(declared: TorchDistribution, device: torch.device, dtype: torch.dtype) -> TorchDistribution:
    """The same distribution with its parameters on a device and of a type, if it is plain or independent.

    A mixture of such is moved as well. Others (transformed ones) are returned as they came: create them where they are
    needed.
    """
    if isinstance(declared, dist.Independent):
        return move(declared.base_dist, device, dtype).to_event(declared.reinterpreted_batch_ndims)
    if isinstance(declared, dist.MixtureSameFamily):
        return dist.MixtureSameFamily(
            move(declared.mixture_distribution, device, dtype), move(declared.component_distribution, device, dtype)
        )
    parameters = parameters_of(declared)
    if not parameters:
        return declared
    family: Any = type(declared)
    return family(**{name: value.to(device, dtype) for name, value in parameters.items()})


def parameters_of(declared: TorchDistribution) -> dict[str, Tensor]:
    """Constructor arguments of a plain distribution; empty for the others."""
    given = {name: getattr(declared, name) for name in declared.arg_constraints if name in declared.__dict__}
    for ways in (("probs", "logits"), ("covariance_matrix", "precision_matrix", "scale_tril")):
        # torch keeps a second way of saying the same once it has computed it, and then accepts only one
        for name in [way for way in ways if way in given][1:]:
            del given[name]
    return given
