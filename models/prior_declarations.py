"""What a user may declare as a prior beside a distribution, and its form in a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyrolora.models.covariance import Covariance
from pyrolora.models.mixture_prior import MemberMixture
from pyrolora.models.naming import nearest
from pyrolora.models.prior_distributions import Improper, parameters_of
from pyrolora.models.settings import check_numbers
from pyrolora.models.sites import Site
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
        check_numbers(self)
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
        check_numbers(self)
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

    With a scale for each layer and rank it is automatic relevance determination: a rank-one part of a LoRA that only adds
    noise to the predictions loses its prior width and its posterior width with it, and `rank_reports` shows both. No scale
    falls below ``scale sqrt(strength / (1 + strength))``: 0.71 of ``scale`` by default, 0.1 with ``strength=0.01``. A part
    that the likelihood does not feel at all keeps the declared scale, as its posterior is the prior.

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


def describe(declaration: Declaration) -> dict[str, Any]:
    """JSON description of a declaration, from which `rebuild` makes it again; that of a callable holds its name only."""
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
        return {**describe(declaration.base_dist), "to_event": declaration.reinterpreted_batch_ndims}
    if isinstance(declaration, TorchDistributionMixin):
        parameters = parameters_of(declaration)
        if parameters:
            return {
                "prior": type(declaration).__name__,
                "parameters": {name: value.tolist() for name, value in parameters.items()},
            }
    return {"prior": "callable", "name": getattr(declaration, "__qualname__", type(declaration).__name__)}


def rebuild(site: str, entry: Mapping[str, Any]) -> Declaration:
    """The declaration that `describe` described.

    Args:
        site: whose it is, for messages.
        entry: the description.

    Raises:
        ValueError: it was a callable, or names an unknown distribution (the nearest is offered).
    """
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
