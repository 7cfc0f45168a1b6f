"""Stochastic variational inference: the true ELBO per example, one torch optimiser, resumable step by step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrolora.guides import BLoB
from pyrolora.guides.base import Family, Guide, GuideSpecification, by_pattern
from pyrolora.inference.assembly import assemble
from pyrolora.inference.natural_widths import WIDTHS
from pyrolora.inference.noise import SCOPES, TOKEN_SCOPES
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.retaining import QualityRetaining
from pyrolora.inference.riemannian import STEPS, check_settings
from pyrolora.inference.schedules import BlockSchedule
from pyrolora.inference.training import TrainingRun
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.settings import check_numbers
from pyrolora.models.stiefel import RETRACTIONS
from pyrolora.models.tasks import EncodedSplit, Split


@dataclass(frozen=True)
class SVI:
    """Fits a guide by maximising the ELBO.

    Usage::

        posterior = SVI(guide=BLoB(), steps=300, kl_weight=0.1).fit(model, task.train)

    The loss is ``NLL per example + kl_weight * KL / N``, so learning rates do not depend on the size of the data.
    ``kl_weight=1`` is the true ELBO; less is a cold posterior and should be chosen on validation data and named.
    The standard deviations have a learning rate of their own, large enough to converge within the run: a width that has not
    converged is an artefact of where training stops.

    Args:
        guide: the family of the posterior, or ``{glob pattern: family}``.
        steps: optimisation steps.
        batch_size: examples a step.
        learning_rate: Adam's rate for means and points.
        scale_learning_rate: Adam's rate for the parameters of the standard deviations.
        width: how standard deviations are found: ``"gradient"``, by Adam; ``"natural"``, each put at its optimum for the
            curvature that the steps so far have seen, which needs no rate and no good start; see `NaturalWidths`.
        kl_weight: weight of the KL (temperature of the posterior).
        particles: draws a step, one backward each.
        noise: ``"example"`` draws independently for every example, ``"weight"`` once for the batch; ``"token"`` (local
            reparameterisation) and ``"flipout"`` perturb every token by itself, which is no draw of weights and optimises
            another objective, offered because released code does it.
        warmup: fraction of the steps over which the rates rise linearly; they fall linearly to zero after it.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        average: fraction of the last steps whose parameters are averaged into the result; 0 takes the last ones.
        manifold_step: how factors with orthonormal columns move: ``"retraction"``, ``"landing"`` or ``"landing_scalar"``; see
            `RiemannianStep`.
        retraction: ``"polar"``, ``"cholesky_qr"``, ``"qr"``, ``"newton_schulz"`` or ``"cayley"``.
        landing_penalty: weight of the landing field's attraction to the manifold.
        seed: seeds the start, the order of the data and all draws.
        schedule: which blocks are trained when; None trains all of them in every step.
        retaining: holds the predictions of a task near what they were, see `QualityRetaining`; None for the plain likelihood.
        checkpoint: folder to keep the state in, or None.
        checkpoint_every: steps between two checkpoints.

    Raises:
        ValueError: a setting out of range.
        TypeError: a guide that is not a family.
    """

    guide: GuideSpecification = field(default_factory=BLoB, metadata={"help": "family of the posterior"})
    steps: int = field(default=300, metadata={"help": "optimisation steps"})
    batch_size: int = field(default=16, metadata={"help": "examples a step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "rate of means and points"})
    scale_learning_rate: float = field(default=2e-2, metadata={"help": "rate of standard deviations"})
    width: str = field(default="gradient", metadata={"help": "'gradient' or 'natural' standard deviations"})
    kl_weight: float = field(default=1.0, metadata={"help": "weight of the KL; 1 is the true ELBO"})
    particles: int = field(default=1, metadata={"help": "draws a step"})
    noise: str = field(default="example", metadata={"help": "'example', 'weight', 'token' or 'flipout'"})
    warmup: float = field(default=0.06, metadata={"help": "fraction of the steps with rising rates"})
    max_grad_norm: float | None = field(default=None, metadata={"help": "clip gradients to this norm"})
    average: float = field(default=0.0, metadata={"help": "fraction of the last steps that are averaged"})
    manifold_step: str = field(default="retraction", metadata={"help": ", ".join(STEPS)})
    retraction: str = field(default="polar", metadata={"help": ", ".join(RETRACTIONS)})
    landing_penalty: float = field(default=1.0, metadata={"help": "attraction of a landing step to the manifold"})
    seed: int = field(default=0, metadata={"help": "seed of start, data order and draws"})
    schedule: BlockSchedule | None = field(
        default=None, metadata={"help": "which blocks are trained when; None for all"}
    )
    retaining: QualityRetaining | None = field(
        default=None, metadata={"help": "what holds predictions near earlier ones; None for nothing"}
    )
    checkpoint: str | Path | None = field(default=None, metadata={"help": "folder of the training state"})
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints"})

    def __post_init__(self) -> None:
        check_numbers(self)
        by_pattern(self.guide)
        for name in ("steps", "batch_size", "particles", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("learning_rate", "scale_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} must be positive; got {getattr(self, name)}. Try {1e-3 if name[0] == 'l' else 2e-2}."
                )
        if not self.kl_weight > 0:
            raise ValueError(
                f"kl_weight must be positive; got {self.kl_weight}. 1 is the true ELBO; for no prior at all use MAP "
                "under Flat()."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be positive, or None for no clipping; got {self.max_grad_norm}. Try 1.0."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps in [0, 1); got {self.warmup}. Try 0.06.")
        if not 0 <= self.average < 1:
            raise ValueError(
                f"average is a fraction of the steps in [0, 1); got {self.average}. Try 0.25, or 0 for none."
            )
        if self.width not in WIDTHS:
            raise ValueError(
                f"Unknown width {self.width!r}. Did you mean {nearest(str(self.width), WIDTHS)!r}? "
                f"Widths: {', '.join(WIDTHS)}."
            )
        if self.width == "natural" and self.schedule is not None:
            raise ValueError(
                "width='natural' reads the curvature of every weight in every step, and a schedule lets blocks rest. Use "
                "width='gradient', or no schedule."
            )
        check_settings(self.manifold_step, self.retraction, self.landing_penalty)
        if self.schedule is not None and not isinstance(self.schedule, BlockSchedule):
            raise TypeError(f"The schedule is a {type(self.schedule).__name__}; expected BlockSchedule(...), or None.")
        if self.retaining is not None and not isinstance(self.retaining, QualityRetaining):
            raise TypeError(f"retaining is a {type(self.retaining).__name__}; expected QualityRetaining(...), or None.")
        if self.noise not in SCOPES:
            raise ValueError(
                f"Unknown noise scope {self.noise!r}. Did you mean {nearest(self.noise, SCOPES)!r}? "
                f"Scopes: {', '.join(SCOPES)}."
            )
        if self.noise in TOKEN_SCOPES and self.schedule is not None:
            raise ValueError(
                f"noise={self.noise!r} draws no weights, so a schedule has none to leave out of backward. Use "
                "noise='example' or noise='weight', or no schedule."
            )

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> Posterior:
        """Fit the guide to the data.

        With ``checkpoint`` set, a fit that was interrupted goes on from its last checkpoint and ends where an uninterrupted
        one would, because the batch and the draws of a step depend on the seed and the step alone.

        Args:
            model: the model; its backbone is not changed.
            data: training data.
            progress: show a bar with running means of NLL and KL.
            generator: source of the seed, instead of ``seed``.
            start: site name -> where its mean starts, such as another posterior's mean.

        Raises:
            ValueError: empty or one-class data, or a guide that does not fit the model's sites.
            FloatingPointError: the loss stopped being finite; the message names step and site.
        """
        run = self.iterate(model, data, generator=generator, start=start)
        for _ in run.steps(progress=progress):
            pass
        return run.posterior()

    def iterate(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> TrainingRun:
        """One optimisation step an item, `StepStats`; `fit` is a loop over it.

        Usage::

            run = SVI().iterate(model, task.train)
            for stats in run:
                ...
            posterior = run.posterior()
        """
        return TrainingRun(self, model, data, generator=generator, start=start)

    def guide_for(self, model: BayesianModel, num_data: int) -> GuideSpecification:
        """The guide of a model with so many training examples: the one that was given."""
        return self.guide

    def check_guide(self, model: BayesianModel, guide: Guide, num_data: int) -> None:
        """Refuse a guide at its start that this engine cannot train; an engine that takes any has nothing to say.

        Raises:
            ValueError: what does not fit.
        """

    def integrates_out(self, site: str) -> bool:
        """Whether the likelihood has no draw of an adapter's site in it."""
        return False

    def check(self, model: BayesianModel, num_data: int, *, estimated: bool = False) -> None:
        """Refuse what `fit` would refuse of a model when it begins, before any data are read: ``SVI().check(model, 300)``.

        Args:
            model: the model; its backbone does not run.
            num_data: training examples.
            estimated: whether the fit starts from an estimate.

        Raises:
            ValueError: a guide, a schedule, widths or noise that do not fit the model's sites, or an estimate.
        """
        if estimated:
            raise ValueError(f"{type(self).__name__} starts from no estimate. Leave estimate out.")
        assemble(self, model, num_data, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        settings = {key: value for key, value in vars(self).items() if key not in ("guide", "checkpoint")}
        settings["schedule"] = None if self.schedule is None else self.schedule.to_dict()
        settings["retaining"] = None if self.retaining is None else self.retaining.to_dict()
        patterns = self.guide if isinstance(self.guide, Mapping) else None
        settings["guide"] = (
            self.guide.to_dict()
            if isinstance(self.guide, Family)
            else patterns and {key: value.to_dict() for key, value in patterns.items()}
        )
        return {"engine": type(self).__name__, **settings}
