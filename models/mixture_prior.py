"""A mixture over whole adapters as the joint prior of their sites."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site


@dataclass(frozen=True, eq=False)
class MemberMixture:
    """``p(W) = sum_i zeta_i prod_sites Normal(site; mean_i, scale_i)``: one of several adapters, all its sites together.

    Usage::

        prior = posterior_of_pool.mixture_prior(weights)
        BayesianModel(backbone, task, adapter=pool.member, prior=prior)

    A mixture at each site by itself would let the query projection come from one member and the value projection from
    another. The joint mixture is written as the chain of its conditionals: each site's prior is a mixture whose weights are
    the members' posterior probabilities given the sites sampled before it, so the log densities add up to the joint one under
    any inference algorithm. There is no closed-form KL to it; engines score a draw instead. Start a fit at the leading
    member, since the mean of a posterior between two members may be no member at all.

    Args:
        means: site name -> mean of every member.
        scales: site name -> standard deviation of every weight of every member.
        weights: probability of each member.

    Shape:
        means and scales ``(members, *site.shape)`` (scales may broadcast), weights ``(members,)``

    Raises:
        ValueError: weights that are no probabilities, or scales that are not positive.
    """

    means: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    weights: Tensor

    def __post_init__(self) -> None:
        total = float(self.weights.sum())
        if self.weights.dim() != 1 or bool((self.weights < 0).any()) or not abs(total - 1) < 1e-4:
            raise ValueError(
                f"The members' weights must be non-negative and sum to 1; got {self.weights.tolist()}, which sum to {total}."
            )
        for name, scale in self.scales.items():
            if not bool((scale > 0).all()):
                raise ValueError(f"The mixture's standard deviations at {name!r} must be positive; some are not.")

    def check(self, site: Site) -> None:
        """Refuse a site that the members do not have.

        Raises:
            ValueError: an unknown site, or one of another shape.
        """
        if site.name not in self.means or site.name not in self.scales:
            raise ValueError(
                f"The mixture has no member values for the site {site.name!r}. Did you mean "
                f"{nearest(site.name, self.means)!r}? Use the adapter that the members were fitted with."
            )
        expected = (len(self.weights), *site.shape)
        if tuple(self.means[site.name].shape) != expected:
            raise ValueError(
                f"The mixture's means at {site.name!r} have the shape {tuple(self.means[site.name].shape)}; expected "
                f"{expected}, a value of the site for each of {len(self.weights)} members."
            )

    def given(self, site: Site, drawn: Mapping[str, Tensor]) -> TorchDistribution:
        """The prior of a site given those sampled before it.

        Args:
            site: the site.
            drawn: name -> value of the sites before it.

        Raises:
            ValueError: values with a dimension of draws; the chain is that of one draw.
        """
        mean = self.means[site.name]
        logits = self._log_weights(mean)
        for name, value in drawn.items():
            if name not in self.means:
                continue
            if value.dim() >= self.means[name].dim():
                raise ValueError(
                    "A mixture of members is the prior of one draw, and these are several at once. Fit with noise='weight'."
                )
            logits = logits + self._members(name, value).log_prob(value)
        members = self._members(site.name, mean)
        return dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False), members, validate_args=False
        )

    def _members(self, name: str, like: Tensor) -> TorchDistribution:
        mean = self.means[name].to(like)
        scale = self.scales[name].to(like).expand_as(mean)
        return dist.Normal(mean, scale, validate_args=False).to_event(mean.dim() - 1)

    def log_prob(self, drawn: Mapping[str, Tensor]) -> Tensor:
        """Log density of values of all sites together, nats.

        Args:
            drawn: site name -> value.
        """
        terms = [self._members(name, drawn[name]).log_prob(drawn[name]) for name in self.means]
        return torch.logsumexp(self._log_weights(terms[0]) + torch.stack(terms).sum(0), dim=0)

    def _log_weights(self, like: Tensor) -> Tensor:
        return self.weights.to(like).log().log_softmax(-1)
