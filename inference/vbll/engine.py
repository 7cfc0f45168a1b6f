"""Variational Bayesian last layers over any adapter: trained with it, or fitted on top of one."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrolora.guides import Point, build_guide
from pyrolora.guides.base import Family, Guide, GuideSpecification, by_pattern
from pyrolora.guides.block_covariance import MOST_ENTRIES, BlockCovariance, BlockCovarianceFactor
from pyrolora.guides.class_contrasts import ClassContrasts
from pyrolora.guides.low_rank_precision import LowRankPrecision
from pyrolora.inference.features import FeatureCache
from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll.objectives import OBJECTIVES, Objective
from pyrolora.inference.vbll.posterior import LastLayerPosterior
from pyrolora.inference.vbll.refit import fit_head, refine_by_laplace
from pyrolora.inference.vbll.training import LastLayerRun
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.settings import check_numbers
from pyrolora.models.tasks import EncodedSplit, Split

MODES = ("alternating", "joint")
HEAD_STEPS = ("adam", "natural")
REFITS = (*OBJECTIVES, "laplace", "none")
# columns of the head's precision while the network is trained; all of them took most of a step, and gained nothing
TRAINING_RANK = 64
# bounds that depend on the variance of a shift of all logits
SHIFTED = ("jensen", "bouchard", "tightest")


@dataclass(frozen=True)
class VBLL(SVI):
    """A Normal posterior of the last layer, with everything below it a point unless a pattern says otherwise.

    Usage::

        model = BayesianModel(backbone, task, [PoLAR(), LastLayer()], {"*theta": Normal(0., 1.), "head.*": logit_scale(2.0)})
        posterior = VBLL(steps=150).fit(model, task.train)                   # trains both
        posterior = VBLL().fit(model, task.train, estimate=map_posterior)    # on top of a fitted adapter, in seconds

    The paper's own recipe is ``VBLL(guide=BlockCovariance(), objective="jensen", mode="joint", refit="none")``, or
    ``refit="laplace"``. Jensen's bound overstates curvature, so its posterior is too narrow by a factor of two and more
    where the data are few; the default trains the network with it, where that does no harm, and refits the head with the
    tilted bound.

    Nearest to the exact posterior is ``VBLL(guide=ClassContrasts(), objective="tilted", refit="mc", objective_draws=256)``.

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024; Xiang, Li and Lu, PoLAR-VBLL, 2026.

    Args:
        guide: family of ``head.weight``, or ``{glob pattern: family}`` with points at sites left out; None takes
            `LowRankPrecision` or `BlockCovariance`, whichever holds the optimum for the size of the data, or
            ``LowRankPrecision(64)`` where neither fits into memory, and while the network is trained if a refit follows.
        objective: what training maximises: ``"jensen"``, ``"tilted"``, ``"bohning"``, ``"bouchard"``, ``"tightest"``,
            ``"gauss_hermite"`` (two classes) or ``"mc"``.
        refit: objective of the last fit of the head on cached features, ``"laplace"`` to keep its mean and take the
            inverse of each class's block of the Hessian for its covariance, or ``"none"``.
        mode: ``"alternating"`` or ``"joint"``.
        head_learning_rate: Adam's rate for the mean of ``head.weight``, in units of its prior's standard deviation.
        head_steps: head steps for every step of the rest, in alternating mode.
        head_step: ``"adam"``, or ``"natural"`` for natural gradients, which need no learning rate in the weights' own units
            (alternating mode, `BlockCovariance` or `ClassContrasts`).
        natural_rate: length of a natural-gradient step: about one over the number of batches that it averages.
        objective_draws: logit draws of ``"mc"``.
        warm_start: fit the head to the network as it starts before the first step.
        feature_folder: where features of refit and post-training are kept; None keeps none.
        kl_weight: as in `SVI`, in training, warm start and refit alike: the head's posterior is that of data seen
            ``1 / kl_weight`` times. The record's ``refit_loss`` is ``NLL + kl_weight * KL`` of all data, nats.

    Raises:
        ValueError: a setting out of range.
        TypeError: a guide that is not a family.
    """

    guide: GuideSpecification | None = field(default=None, metadata={"help": "family of head.weight"})  # type: ignore[assignment]
    steps: int = field(default=150, metadata={"help": "optimisation steps"})
    max_grad_norm: float | None = field(default=1.0, metadata={"help": "clip gradients to this norm"})
    objective: str = field(default="jensen", metadata={"help": ", ".join(OBJECTIVES)})
    refit: str = field(default="tilted", metadata={"help": ", ".join(REFITS)})
    mode: str = field(default="alternating", metadata={"help": ", ".join(MODES)})
    head_learning_rate: float = field(default=0.02, metadata={"help": "rate of the head's mean, in prior deviations"})
    head_steps: int = field(default=5, metadata={"help": "head steps for every step of the rest"})
    head_step: str = field(default="adam", metadata={"help": ", ".join(HEAD_STEPS)})
    natural_rate: float = field(default=0.1, metadata={"help": "length of a natural-gradient step of the head"})
    objective_draws: int = field(default=32, metadata={"help": "logit draws of the mc objective"})
    warm_start: bool = field(default=True, metadata={"help": "fit the head before the first step"})
    feature_folder: str | None = field(default=None, metadata={"help": "where features are kept"})

    def __post_init__(self) -> None:
        check_numbers(self)
        # the checks of SVI are about a guide for all sites
        dataclasses.replace(SVI(), **{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(SVI)
                                      if entry.name != "guide"})  # fmt: skip
        if self.retaining is not None:
            raise ValueError(
                "VBLL integrates the head out, so no logits are there to retain; leave retaining out, or use MAP or SVI."
            )
        if self.guide is not None:
            by_pattern(self.guide)
        Objective(self.objective)
        for name, valid in (("refit", REFITS), ("mode", MODES), ("head_step", HEAD_STEPS)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(
                    f"Unknown {name} {value!r} for VBLL. Did you mean {nearest(str(value), valid)!r}? "
                    f"Choices: {', '.join(valid)}."
                )
        if self.width != "gradient":
            raise ValueError(
                f"VBLL integrates the last layer out, so no draws tell its curvature; got width={self.width!r}. Leave it out."
            )
        if not self.head_learning_rate > 0:
            raise ValueError(f"head_learning_rate must be positive; got {self.head_learning_rate}. Try 0.02.")
        if self.head_step == "natural" and self.mode == "joint":
            raise ValueError(
                "head_step='natural' takes the head's steps apart from the rest's. Use mode='alternating'."
            )
        if not 0 < self.natural_rate <= 1:
            raise ValueError(f"natural_rate is a length above 0 and at most 1; got {self.natural_rate}. Try 0.1.")
        for name in ("head_steps", "objective_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
        estimate: Posterior | None = None,
    ) -> LastLayerPosterior:
        """Train network and head, or only the head on top of an estimate, then refit the head on cached features.

        Args:
            model: a model with a `LastLayer`.
            data: training data.
            progress: show bars.
            generator: source of the seed, instead of ``seed``.
            start: site name -> where its mean starts.
            estimate: a posterior whose mean gives every site below the last layer; they then stay there. Its prior scales are
                kept where its prior is declared alike.

        Raises:
            ValueError: no `LastLayer`, a prior of ``head.weight`` that is no Normal, data that cannot train a head, or an
                estimate that lacks a site.
            FloatingPointError: the loss stopped being finite.
        """
        if estimate is not None:
            return self._on_top(model, data, estimate, progress)
        run = self.iterate(model, data, generator=generator, start=start)
        for _ in run.steps(progress=progress):
            pass
        fitted = run.posterior()
        guide = fitted.guide
        if self._trains_low_rank(model, len(run.data)):
            guide = build_guide(self._refitted_guide(model, len(run.data)), model, start=guide.mean())
        record = {**fitted.record, **self._refit(model, guide, run.data, progress)}
        return LastLayerPosterior(model, guide, record)

    def iterate(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> LastLayerRun:
        """One optimisation step an item; see `SVI.iterate`. The last refit is `fit`'s."""
        return LastLayerRun(self, model, data, generator=generator, start=start)

    def guide_for(self, model: BayesianModel, num_data: int) -> GuideSpecification:
        """The guide of training on so many examples; see the class."""
        if self._trains_low_rank(model, num_data):
            return self._with_points(model, {HEAD: LowRankPrecision(TRAINING_RANK)})
        return self._refitted_guide(model, num_data)

    def _trains_low_rank(self, model: BayesianModel, num_data: int) -> bool:
        """Whether a guide of low rank stands in while the network is trained: the refit finds the rest of the covariance."""
        if self.guide is not None or self.refit == "none" or self.head_step == "natural":
            return False
        return min(num_data, LastLayerHead(model).site.shape[1]) > TRAINING_RANK

    def _refitted_guide(self, model: BayesianModel, num_data: int) -> GuideSpecification:
        """The guide of the finished posterior."""
        if self.guide is None:
            specification: Mapping[str, Family] = {HEAD: family_for(LastLayerHead(model), num_data)}
        else:
            specification = {HEAD: self.guide} if isinstance(self.guide, Family) else self.guide
        for pattern, family in specification.items():
            if isinstance(family, Point) and model.sites[HEAD].matches(pattern):
                raise ValueError(
                    "VBLL needs a Normal posterior of head.weight; got Point(). Use MAP for a point estimate."
                )
        for pattern, family in specification.items():
            if isinstance(family, ClassContrasts) and model.sites[HEAD].matches(pattern):
                self._check_contrasts(LastLayerHead(model))
        return self._with_points(model, specification)

    def _with_points(self, model: BayesianModel, specification: Mapping[str, Family]) -> GuideSpecification:
        """Points at the sites that a specification leaves out."""
        matched = {site.name for pattern in specification for site in model.sites.matching(pattern)}
        return {**specification, **{name: Point() for name in model.sites if name not in matched}}

    def check_guide(self, model: BayesianModel, guide: Guide, num_data: int) -> None:
        """See `SVI.check_guide`: natural gradients need a dense covariance of each row."""
        factor = LastLayerHead(model).factor(guide)
        if self.head_step == "natural" and not isinstance(factor, BlockCovarianceFactor):
            family = type(factor.family).__name__
            raise ValueError(
                f"head_step='natural' moves dense precisions, and the guide of head.weight is a {family}. Use "
                "guide=BlockCovariance() or ClassContrasts(), or head_step='adam'."
            )

    def integrates_out(self, site: str) -> bool:
        """See `SVI.integrates_out`: the head, which so needs no draw for every example."""
        return site == HEAD

    def check(self, model: BayesianModel, num_data: int, *, estimated: bool = False) -> None:
        """See `SVI.check`."""
        LastLayerHead(model).normal_prior()
        if estimated:
            build_guide(
                self._refitted_guide(model, num_data), model, generator=torch.Generator().manual_seed(self.seed)
            )
        else:
            super().check(model, num_data)

    def _check_contrasts(self, head: LastLayerHead) -> None:
        """Refuse `ClassContrasts` where a shift of all classes counts.

        Raises:
            ValueError: an identified head, or a bound that a shift of all logits changes.
        """
        if head.layer.identified:
            raise ValueError(
                "ClassContrasts leaves out the shift of all classes, and LastLayer(identified=True) has none. Use "
                "BlockCovariance() with it, or LastLayer() without."
            )
        for name in ("objective", "refit"):
            if getattr(self, name) in SHIFTED:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is a bound that the variance of a shift of all logits loosens, and "
                    "ClassContrasts leaves that shift as wide as the prior. Use objective='tilted' and refit='mc'."
                )

    def _on_top(
        self, model: BayesianModel, data: Split | EncodedSplit, estimate: Posterior, progress: bool
    ) -> LastLayerPosterior:
        LastLayerHead(model).normal_prior()
        encoded = model.encode(data).require_trainable()
        model.place_scales(encoded, estimate.model)
        mean = estimate.mean()
        start = {name: mean[name] for name in model.sites if name in mean}
        for name, site in model.sites.items():
            if name != HEAD and (name not in start or start[name].shape != site.shape):
                raise ValueError(
                    f"The estimate has no value for the site {name!r} of shape {tuple(site.shape)}; its sites are "
                    f"{', '.join(mean)}. Pass a posterior of a model with the same adapters."
                )
        guide = build_guide(self._refitted_guide(model, len(encoded)), model, start=start)
        record = {
            **self.to_dict(),
            "num_data": len(encoded),
            "estimate": estimate.record,
            "seed": estimate.record.get("seed"),
            **self._refit(model, guide, encoded, progress),
        }
        return LastLayerPosterior(model, guide, record)

    def _refit(self, model: BayesianModel, guide: Guide, data: EncodedSplit, progress: bool) -> dict[str, Any]:
        """Fit the head to convergence with everything else at its mean; what a record keeps of it."""
        if self.refit == "none":
            return {}
        cache = FeatureCache(self.feature_folder, self.batch_size)
        features = cache.features(model, guide.mean(), data, progress=progress)
        head = LastLayerHead(model)
        # a cold posterior is that of data seen 1 / kl_weight times
        seen = HeadData.of(head, features.values, features.labels, 1 / self.kl_weight)
        factor = head.factor(guide)
        if self.refit == "laplace":
            refine_by_laplace(head, factor, seen)
            return {}
        loss = fit_head(head, factor, seen, Objective(self.refit, self.objective_draws))
        scale = float(head.normal_prior()[1].flatten()[0])
        return {"refit_loss": self.kl_weight * loss, "prior_scale": scale}


def family_for(head: LastLayerHead, num_data: int) -> Family:
    """The smallest family that holds the optimum of a factorised posterior, or a low-rank one where it would not fit."""
    rows, columns = head.site.shape
    if rows * columns * min(num_data, columns) > MOST_ENTRIES:
        return LowRankPrecision(rank=TRAINING_RANK)
    return LowRankPrecision(rank=num_data) if num_data < columns else BlockCovariance()
