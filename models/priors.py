"""Priors over sites: a distribution, a mapping of patterns, or a callable, made into one answer per site."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrolora.models.covariance import Covariance
from pyrolora.models.mixture_prior import MemberMixture
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site, SiteTable
from pyrolora.models.uniform_stiefel import UniformStiefel


@dataclass(frozen=True)
class Flat:
    """A deliberately improper prior, constant everywhere: ``prior=Flat()`` makes MAP maximum likelihood.

    It has a density (zero in logarithm) but cannot be sampled, so it suits point estimates, not prior predictives.
    """


@dataclass(frozen=True)
class Learned:
    """A zero-mean Normal prior whose scale is found in training. Made by `learned` and `logit_scale`.

    Attributes:
        scale: where the scale starts: standard deviation of one weight, or of a logit.
        strength: weight of its hyper-prior, as a fraction of the number of weights.
        after: fraction of the training steps before the first update.
        per: names of the site's dimensions along which it has scales of its own; without any, one for the site.
        every: training steps between two updates.
        in_logits: whether ``scale`` is that of a logit at features of average length.
        fixed: whether it is only converted, never updated.
    """

    scale: float
    strength: float = 1.0
    after: float = 0.5
    per: tuple[str, ...] = ()
    every: int = 1
    in_logits: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"The scale of a learned prior must be positive; got {self.scale}. Try 0.05.")
        if self.strength < 0:
            raise ValueError(f"The strength of a learned prior must not be negative; got {self.strength}. Try 1.0.")
        if not 0 <= self.after < 1:
            raise ValueError(f"`after` is a fraction of the steps in [0, 1); got {self.after}. Try 0.5.")
        if self.every < 1:
            raise ValueError(f"`every` counts steps between updates, at least 1; got {self.every}. Try 1.")

    def scales_of(self, site: Site) -> torch.Size:
        """Shape of a site's scales: its own along `per`, 1 elsewhere; a scalar for one scale.

        Raises:
            ValueError: the site has no dimension of that name; the nearest is offered.
        """
        for name in self.per:
            if name not in site.dims:
                raise ValueError(
                    f"The prior of {site.name!r} has a scale for each {name!r}, which is none of its dimensions "
                    f"({', '.join(site.dims)}). Did you mean {nearest(name, site.dims)!r}?"
                )
        sizes = zip(site.dims, site.shape, strict=True)
        return torch.Size(size if name in self.per else 1 for name, size in sizes) if self.per else torch.Size()


@dataclass(frozen=True)
class Relative:
    """Zero-mean Normal whose scale the adapter sets: the change of a weight matrix is ``ratio`` times the matrix.

    Usage::

        BayesianModel(backbone, task, adapter=PiSSA(rank=8), prior=Relative(0.1))

    Each adapter says which standard deviations of its sites give ``E |change|^2 = ratio^2 |weight|^2`` to first order:
    whitened over components for PiSSA and CorDA, relative to each column for S2FT. So one number means the same for all.

    Args:
        ratio: root mean square size of the change, relative to the frozen weight.

    Raises:
        ValueError: the ratio is not positive.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"The ratio of a relative prior must be positive; got {self.ratio}. Try 0.1.")


def learned(
    scale: float,
    *,
    strength: float = 1.0,
    after: float = 0.5,
    per: str | Sequence[str] = (),
    every: int = 1,
) -> Learned:
    """Declare a zero-mean Normal prior whose scales are learned in closed form: ``learned(0.05, per=("layer", "rank"))``.

    Every group of n weights that shares a scale s (the site, or what ``per`` tells apart) has the update that maximises the
    ELBO in s under a scaled inverse chi-squared hyper-prior on s^2 whose weight is ``strength * n`` and whose mode-like
    centre is ``scale^2``::

        s^2 = (strength * n * scale^2 + sum_i E_q[w_i^2]) / (strength * n + n)

    With a scale for each layer and rank it is automatic relevance determination: a rank-one part of a LoRA that the data do
    not use loses its prior width and its posterior width with it, and `rank_reports` shows both.

    With ``strength=0`` it is plain empirical Bayes, which collapses to zero where the data say little about most weights:
    measured on 300 headlines, the means went to zero. That is why the hyper-prior is on and the update starts late.

    Source: MacKay, "Bayesian non-linear modelling for the prediction competition", 1994; Tipping, "Sparse Bayesian learning
    and the relevance vector machine", 2001, for the fixed point.

    Args:
        scale: where s starts, and the centre of its hyper-prior (standard deviation of one weight).
        strength: weight of the hyper-prior, as a fraction of the number of weights.
        after: fraction of the training steps before the first update.
        per: names of the site's dimensions that have scales of their own, such as ``("layer", "rank")``; see
            `BayesianModel.print_sites`.
        every: training steps between two updates.

    Raises:
        ValueError: a scale that is not positive, a negative strength, ``after`` outside [0, 1), or ``every`` below 1.
    """
    return Learned(scale, strength, after, (per,) if isinstance(per, str) else tuple(per), every)


def logit_scale(scale: float = 2.0, *, learned: bool = False, strength: float = 1.0, after: float = 0.5) -> Learned:
    """A zero-mean Normal prior of a last layer, its scale in units of a logit.

    Usage: ``prior={"head.weight": logit_scale(2.0), ...}``.

    A weight gets the standard deviation ``scale / root mean square length of the features``, so that each logit has the prior
    standard deviation ``scale`` whatever the width of the network and the gain of its last norm. Engines measure the features
    when they start to fit; until then features of length ``sqrt(their number)`` are assumed.

    Args:
        scale: prior standard deviation of a logit.
        learned: whether to update the scale by empirical Bayes from there, see `learned`.
        strength: see `learned`.
        after: see `learned`.

    Raises:
        ValueError: a scale that is not positive, a negative strength, or ``after`` outside [0, 1).
    """
    return Learned(scale, strength, after, in_logits=True, fixed=not learned)


Declaration: TypeAlias = (
    TorchDistribution | Flat | Learned | Relative | Covariance | MemberMixture | Callable[[Site], TorchDistribution]
)
PriorSpecification: TypeAlias = Declaration | Mapping[str, Declaration]


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
        self._fixed: dict[str, TorchDistribution] = {}
        for name, declaration in self.declared.items():
            if declaration is sites[name].prior:
                self._fixed[name] = declaration
            elif isinstance(declaration, Learned):
                width = sites[name].shape[-1] ** 0.5 if declaration.in_logits else 1.0
                self._centres[name] = declaration.scale / width
                shape = declaration.scales_of(sites[name])
                self.scales[name] = torch.full(shape, self._centres[name], device=self.device, dtype=dtype)
            elif isinstance(declaration, TorchDistributionMixin):
                self._fixed[name] = fit_to_site(move(declaration, self.device, dtype), sites[name])
            elif isinstance(declaration, Flat):
                self._fixed[name] = _flat(sites[name])
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
            return _flat(site)
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
        """Take over the learned scales of a prior that was declared alike; false, and nothing happens, if it was not."""
        if self.scales.keys() != other.scales.keys() or self.to_dict() != other.to_dict():
            return False
        for name, scale in other.scales.items():
            self.scales[name].copy_(scale)
        self._centres.update(other._centres)
        return True

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
        return {name: _describe(declaration) for name, declaration in self.declared.items()}

    @staticmethod
    def specification_from_dict(description: Mapping[str, Any]) -> dict[str, Declaration]:
        """Rebuild a ``{site name: declaration}`` specification from `to_dict`.

        Raises:
            ValueError: the prior was a callable, or names an unknown distribution.
        """
        # a site on a manifold brings its uniform prior with it
        declared = {name: entry for name, entry in description.items() if entry["prior"] != "UniformStiefel"}
        return {name: _rebuild(name, entry) for name, entry in declared.items()}


def _flat(site: Site) -> TorchDistribution:
    # on a compact manifold what is constant is proper
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
    parameters = _parameters(declared)
    if not parameters:
        return declared
    family: Any = type(declared)
    return family(**{name: value.to(device, dtype) for name, value in parameters.items()})


def _parameters(declared: TorchDistribution) -> dict[str, Tensor]:
    """Constructor arguments of a plain distribution; empty for the others."""
    given = {name: getattr(declared, name) for name in declared.arg_constraints if name in declared.__dict__}
    for ways in (("probs", "logits"), ("covariance_matrix", "precision_matrix", "scale_tril")):
        # torch keeps a second way of saying the same once it has computed it, and then accepts only one
        for name in [way for way in ways if way in given][1:]:
            del given[name]
    return given


def _describe(declaration: Declaration) -> dict[str, Any]:
    if isinstance(declaration, Flat | Improper):
        return {"prior": "Flat"}
    if isinstance(declaration, UniformStiefel):
        return {"prior": "UniformStiefel", "shape": list(declaration.event_shape)}
    if isinstance(declaration, Covariance):
        return {"prior": "Covariance", **vars(declaration)}
    if isinstance(declaration, Relative):
        return {"prior": "Relative", "ratio": declaration.ratio}
    if isinstance(declaration, Learned):
        settings: dict[str, Any] = {key: getattr(declaration, key) for key in ("scale", "strength", "after")}
        if declaration.in_logits:
            return {"prior": "logit_scale", **settings, "learned": not declaration.fixed}
        # said only where it differs, so that what was written before there was a choice reads the same
        more = {"per": list(declaration.per)} if declaration.per else {}
        return {
            "prior": "learned",
            **settings,
            **more,
            **({"every": declaration.every} if declaration.every > 1 else {}),
        }
    if isinstance(declaration, dist.Independent):
        return {**_describe(declaration.base_dist), "to_event": declaration.reinterpreted_batch_ndims}
    if isinstance(declaration, TorchDistributionMixin):
        parameters = _parameters(declaration)
        if parameters:
            return {
                "prior": type(declaration).__name__,
                "parameters": {name: value.tolist() for name, value in parameters.items()},
            }
    return {"prior": "callable", "name": getattr(declaration, "__qualname__", type(declaration).__name__)}


def _rebuild(site: str, entry: Mapping[str, Any]) -> Declaration:
    kind = entry["prior"]
    if kind == "Flat":
        return Flat()
    if kind == "Covariance":
        return Covariance(entry["moments"], entry["scale"], entry["damping"])
    if kind == "Relative":
        return Relative(entry["ratio"])
    if kind == "learned":
        more = {key: entry[key] for key in ("per", "every") if key in entry}
        return learned(entry["scale"], strength=entry["strength"], after=entry["after"], **more)
    if kind == "logit_scale":
        return logit_scale(**{key: value for key, value in entry.items() if key != "prior"})
    if kind == "callable":
        raise ValueError(
            f"The prior of {site!r} was the callable {entry['name']!r}, which a file cannot hold. "
            "Build the model with that prior and pass it as model=."
        )
    family = getattr(dist, kind, None)
    if family is None:
        raise ValueError(f"Unknown prior {kind!r} for {site!r}. Did you mean {nearest(kind, dist.__all__)!r}?")
    parameters = {name: torch.tensor(value) for name, value in entry["parameters"].items()}
    return family(**parameters).to_event(entry.get("to_event", 0))
