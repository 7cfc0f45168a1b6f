"""The mean-field ELBO without the densities that it does not need."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from pyrolora.models.naming import nearest


class AnalyticELBO(TraceMeanField_ELBO):
    """Pyro's `TraceMeanField_ELBO`, number for number, that scores a site only where its KL has no closed form.

    Usage::

        loss = AnalyticELBO(num_particles=1).loss_and_grads(model, guide, batch)

    Pyro evaluates prior and posterior densities of every draw and then uses the analytic KL instead; with a draw for every
    example of a batch those unused densities cost about a tenth of a training step. A site that only one side has is an
    error here, where Pyro warns.

    Attributes:
        terms: site name -> its part of the last loss, averaged over particles (scaled as the loss is): minus log-likelihood
            for observed sites, KL for the others.
    """

    terms: dict[str, float]

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        self.terms = {}
        return super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        _check_match(model_trace, guide_trace)
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        nodes: Any = model_trace.nodes
        guide_nodes: Any = guide_trace.nodes
        terms: dict[str, Tensor] = {}
        for name, site in nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                terms[name] = -_scaled_log_prob(site)
                continue
            other = guide_nodes[name]
            if not other["fn"].has_rsample:
                raise ValueError(
                    f"The guide's {type(other['fn']).__name__} at {name!r} cannot be reparameterised, so its gradient would "
                    "be wrong. Use a distribution with rsample, or Pyro's own Trace_ELBO."
                )
            try:
                divergence = kl_divergence(other["fn"], site["fn"])
                terms[name] = scale_and_mask(divergence, scale=other["scale"], mask=other["mask"]).sum()
            except NotImplementedError:
                terms[name] = _scaled_log_prob(other) - _scaled_log_prob(site)
        loss = torch.stack(list(terms.values())).sum()
        values = torch.stack([term.detach() for term in terms.values()]).tolist()
        for name, value in zip(terms, values, strict=True):
            self.terms[name] = self.terms.get(name, 0.0) + value / self.num_particles
        return sum(values), loss


def _scaled_log_prob(site: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), scale=site["scale"], mask=site["mask"]).sum()


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    nodes: Any = model_trace.nodes
    guide_nodes: Any = guide_trace.nodes
    latent = [name for name, site in nodes.items() if site["type"] == "sample" and not site["is_observed"]]
    guided = [name for name, site in guide_nodes.items() if site["type"] == "sample"]
    for name in guided:
        if name not in latent:
            raise ValueError(
                f"The guide samples {name!r}, which the model does not. Did you mean {nearest(name, latent)!r}? "
                f"Model sites: {', '.join(latent)}."
            )
    for name in latent:
        if name not in guided:
            raise ValueError(
                f"The model samples {name!r}, which the guide does not (nearest: {nearest(name, guided)!r}). "
                "Give the guide that site."
            )
