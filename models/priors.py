"""Priors over sites: a distribution, a mapping of patterns, or a callable, made into one answer per site."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.models.covariance import Covariance
from pyrolora.models.mixture_prior import MemberMixture
from pyrolora.models.prior_declarations import (
    Declaration,
    Flat,
    Learned,
    PriorSpecification,
    Relative,
    describe,
    rebuild,
)
from pyrolora.models.prior_distributions import fit_to_site, flat_prior, move
from pyrolora.models.sites import Site, SiteTable


class Prior:
    """The declared prior of every adapter site; calling it inside a Pyro program gives a site's distribution.

    Usage::

        prior = Prior({"*.lora_A": dist.Normal(0., 0.2), "*.lora_B": Flat()}, sites)
        pyro.sample("q_proj.lora_A", prior(sites["q_proj.lora_A"]))

    Args:
        specification: one declaration for all sites, or ``{glob pattern: declaration}``; a declaration is a
            distribution that broadcasts to the site's shape, `Flat`, `learned`, or a callable from a `Site` to a
            distribution, which may itself call `pyro.sample` (hierarchical priors).
        sites: the adapter sites.
        device: where the distributions' parameters live.
        dtype: type of the distributions' parameters, and so of prior draws.
        relative_scales: from a ratio to the standard deviations of all sites, for `Relative`.

    Raises:
        ValueError: a pattern that matches nothing, a site without a prior, a wrong shape or support.
        TypeError: a declaration that is none of the above.
    """

    def __init__(
        self,
        specification: PriorSpecification,
        sites: SiteTable,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        relative_scales: Callable[[float], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.specification = specification
        patterns = specification if isinstance(specification, Mapping) else {"*": specification}
        own = {name: site.prior for name, site in sites.items() if site.prior is not None}
        self.declared: dict[str, Declaration] = sites.assign(patterns, "prior", own)
        self.device, self.dtype = torch.device(device), dtype
        self.scales: dict[str, Tensor] = {}
        self._centres: dict[str, float] = {}
        # whether scales in units of a logit have been converted with features that were seen
        self._calibrated = False
        self._fixed: dict[str, TorchDistribution] = {}
        for name, declaration in self.declared.items():
            if declaration is sites[name].prior:
                self._fixed[name] = declaration
            elif isinstance(declaration, Learned):
                if declaration.in_logits and "class" not in sites[name].dims:
                    raise ValueError(
                        f"logit_scale is the width of a logit, which {name!r} does not make alone. Declare it for the last "
                        'layer, as in {"*.lora_*": Normal(0, 0.05), "head.weight": logit_scale(2)}.'
                    )
                width = sites[name].shape[-1] ** 0.5 if declaration.in_logits else 1.0
                self._centres[name] = declaration.scale / width
                shape = declaration.scales_of(sites[name])
                self.scales[name] = torch.full(shape, self._centres[name], device=self.device, dtype=dtype)
            elif isinstance(declaration, TorchDistributionMixin):
                self._fixed[name] = fit_to_site(move(declaration, self.device, dtype), sites[name])
            elif isinstance(declaration, Flat):
                self._fixed[name] = flat_prior(sites[name])
            elif isinstance(declaration, Covariance):
                self._fixed[name] = declaration.distribution(sites[name], self.device, dtype)
            elif isinstance(declaration, Relative):
                if relative_scales is None:
                    raise ValueError("A relative prior needs a model, whose adapters know its scales.")
                scale = relative_scales(declaration.ratio)[name]
                self._fixed[name] = fit_to_site(dist.Normal(torch.zeros_like(scale), scale), sites[name])
            elif isinstance(declaration, MemberMixture):
                declaration.check(sites[name])
            elif isinstance(declaration, type) or not callable(declaration):
                # a class is callable, but calling it with a site makes no prior
                kind = declaration if isinstance(declaration, type) else type(declaration)
                given = f"{'the class' if kind is declaration else 'a'} {kind.__name__}"
                raise TypeError(
                    f"The prior of {name!r} is {given}; expected a Pyro distribution, Flat(), "
                    "learned(scale), Relative(ratio), Covariance(file, scale), or a callable from a site to a distribution."
                )

    def __call__(self, site: Site, drawn: Mapping[str, Tensor] | None = None) -> TorchDistribution:
        """The prior of one site, with the site's shape as its event shape; may sample hyper-parameters.

        Args:
            site: the site.
            drawn: name -> value of the sites sampled before it, for a prior that ties sites together.
        """
        if site.name in self._fixed:
            return self._fixed[site.name]
        declaration = self.declared[site.name]
        if isinstance(declaration, Learned):
            return fit_to_site(dist.Normal(torch.zeros_like(self.scales[site.name]), self.scales[site.name]), site)
        if isinstance(declaration, MemberMixture):
            return declaration.given(site, drawn or {})
        make: Any = declaration
        produced = make(site)
        if isinstance(produced, Flat):
            return flat_prior(site)
        if not isinstance(produced, TorchDistributionMixin):
            raise TypeError(
                f"The prior callable returned a {type(produced).__name__} for {site.name!r}; it must return a Pyro "
                "distribution that broadcasts to the site's shape."
            )
        # a callable's constants are made on the CPU in the default type, wherever the backbone lives
        return fit_to_site(move(produced, self.device, self.dtype), site)

    def snapshot(self) -> "Prior":
        """This prior with learned scales of its own, which move no more when this one's do."""
        other = copy.copy(self)
        other.scales = {name: scale.clone() for name, scale in self.scales.items()}
        other._centres = dict(self._centres)
        return other

    def adopt(self, other: "Prior") -> bool:
        """Take over the scales of a prior that was declared alike and has them in units of a weight.

        Returns:
            Whether it was and has; nothing happens otherwise.
        """
        alike = self.scales.keys() == other.scales.keys() and self.to_dict() == other.to_dict()
        if not alike or (self.in_logit_units and not other._calibrated):
            return False
        self._centres.update(other._centres)
        self.restore(other.scales)
        return True

    def restore(self, scales: Mapping[str, Tensor]) -> None:
        """Put every scale where it was when it was kept, site name -> its scales."""
        for name, scale in self.scales.items():
            scale.copy_(scales[name].to(scale))
        self._calibrated = True

    def reset_scales(self) -> None:
        """Put every learned scale back where it was declared."""
        for name, scale in self.scales.items():
            scale.fill_(self._centres[name])

    @property
    def learned_sites(self) -> tuple[str, ...]:
        """Names of the sites whose scale `update_scales` moves."""
        return tuple(name for name, entry in self.declared.items() if isinstance(entry, Learned) and not entry.fixed)

    @property
    def in_logit_units(self) -> tuple[str, ...]:
        """Names of the sites whose scale was declared in units of a logit."""
        return tuple(name for name, entry in self.declared.items() if isinstance(entry, Learned) and entry.in_logits)

    def calibrate(self, mean_square: float) -> None:
        """Convert scales in units of a logit, and put them there.

        Args:
            mean_square: mean squared length of the features.
        """
        self._calibrated = True
        for name in self.in_logit_units:
            declaration = self.declared[name]
            if isinstance(declaration, Learned):
                self._centres[name] = declaration.scale / mean_square**0.5
                self.scales[name].fill_(self._centres[name])

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Move learned scales to given values, one a site, as an engine does that finds them by the evidence."""
        for name, scale in scales.items():
            self.scales[name].fill_(scale)

    def due_scales(self, progress: float, step: int = 0) -> tuple[str, ...]:
        """Names of the sites whose scales are to be updated after a step.

        Args:
            progress: fraction of the training steps done.
            step: number of the step, from 1.
        """
        found = {name: self.declared[name] for name in self.learned_sites}
        return tuple(
            name
            for name, entry in found.items()
            if isinstance(entry, Learned) and progress >= entry.after and step % entry.every == 0
        )

    def update_scales(self, second_moments: Mapping[str, Tensor], progress: float, step: int = 0) -> None:
        """Closed-form empirical-Bayes step for the learned scales of some sites.

        Args:
            second_moments: site name -> E_q[w^2] of each of its weights, or their mean where the site has one scale; scales
                of other sites stay as they are.
            progress: fraction of the training steps done; see `due_scales`.
            step: number of the step, from 1; see `due_scales`.
        """
        for name in self.due_scales(progress, step):
            declaration, scale = self.declared[name], self.scales[name]
            if isinstance(declaration, Learned) and name in second_moments:
                centre, moments = self._centres[name], second_moments[name]
                # a sum to the scale's own shape, divided by how many weights each entry stands for
                mean = moments.sum_to_size(scale.shape) * (scale.numel() / moments.numel())
                pooled = declaration.strength * centre**2 + mean
                # all means may collapse when nothing holds the scale up; a Normal of no width would then be NaN
                scale.copy_((pooled / (declaration.strength + 1)).sqrt().clamp_min(1e-4 * centre))

    def to_dict(self) -> dict[str, Any]:
        """Site name -> JSON description. A callable is recorded as such and cannot be rebuilt from it."""
        return {name: describe(declaration) for name, declaration in self.declared.items()}

    @staticmethod
    def specification_from_dict(description: Mapping[str, Any]) -> dict[str, Declaration]:
        """Rebuild a ``{site name: declaration}`` specification from `to_dict`.

        Raises:
            ValueError: the prior was a callable, or names an unknown distribution.
        """
        # a site on a manifold brings its uniform prior with it
        declared = {name: entry for name, entry in description.items() if entry["prior"] != "UniformStiefel"}
        return {name: rebuild(name, entry) for name, entry in declared.items()}
