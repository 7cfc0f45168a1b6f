"""Laplace's approximation: a Normal around a MAP estimate whose precision is curvature plus prior."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrolora.guides.full_covariance import MOST_WEIGHTS
from pyrolora.inference.laplace.gaussian import normal_guide
from pyrolora.inference.laplace.posterior import LaplacePosterior
from pyrolora.inference.laplace.precision import (
    GROUPS,
    NormalPrior,
    declared_prior,
    evidence_precision,
    log_evidence,
)
from pyrolora.inference.laplace.structures import Structure
from pyrolora.inference.laplace.summation import flat_eigenvalues, new_structures, sum_curvature
from pyrolora.inference.laplace.validation import best_factor
from pyrolora.inference.logit_gradients import LogitGradients, require_linear
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.settings import check_numbers
from pyrolora.models.tasks import EncodedSplit, Split

logger = logging.getLogger(__name__)

STRUCTURES = ("diag", "kron", "kron_lowrank", "full", "last_layer")
PRECISIONS = ("declared", "evidence", "validation")
# said before a fit and in it
ONLINE_AND_ESTIMATE = "online acts during the MAP fit, and an estimate was passed. Pass none, or set online=0."


@dataclass(frozen=True)
class Laplace:
    """A Normal posterior from the generalised Gauss-Newton matrix at the MAP estimate.

    Usage::

        posterior = Laplace(structure="kron", precision="evidence").fit(model, task.train)
        posterior = Laplace().fit(model, task.train, estimate=map_posterior, validation=task.validation)

    Every site has the precision ``sum_n J_n' H_n J_n + prior precision``; the estimate is this project's own `MAP` under
    the declared prior, or the mean of any posterior. The curvature needs one forward and ``classes - 1`` backwards a batch
    and keeps activations and output gradients, never weights of single examples; any batch size gives the same sum.

    The product B A of a LoRA does not change when A is multiplied and B divided by one matrix. A zero-mean isotropic prior
    breaks that tie except for rotations, so some directions of the posterior are set by the prior alone.

    Source: MacKay 1992; Immer et al., "Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning", 2021
    (``online``); Daxberger et al., "Laplace Redux", 2021; Yang et al., "Bayesian Low-Rank Adaptation for Large
    Language Models", 2024.

    Args:
        structure: ``"diag"``; ``"kron"``, Kronecker factors of each layer; ``"kron_lowrank"``, the same with ``rank``
            eigenvectors of each side; ``"full"``, dense over each site; ``"last_layer"``, dense over ``head.weight``.
        precision: ``"declared"`` uses the prior as declared; ``"evidence"`` replaces its scale by the one that maximises the
            marginal likelihood; ``"validation"`` multiplies the declared precision by the number that minimises the negative
            log-likelihood of validation data.
        group: what shares a precision under ``"evidence"``: a ``"site"``, a ``"layer"`` of a site, or the ``"model"``.
        rank: eigenvectors of each side that ``"kron_lowrank"`` keeps.
        temperature: multiplies the posterior covariance; 1 is Laplace's own.
        sites: glob pattern of the sites that become Normal; the rest stay at the estimate. Layers are told apart by
            several LoRAs with names, as in ``sites="top.*"``.
        estimate: settings of the MAP fit, if none is passed to `fit`.
        online: times that the MAP fit stops, evenly spaced, to move learned prior scales to those of the highest evidence at
            the present estimate; needs ``learned`` priors. With ``precision="declared"`` the scales reached last are used.
        batch_size: examples at once while curvature is summed.
        checkpoint: folder to keep unfinished sums in, or None.

    Raises:
        ValueError: an unknown structure, precision or group (the nearest is offered), or a setting out of range.
    """

    structure: str = field(default="diag", metadata={"help": ", ".join(STRUCTURES)})
    precision: str = field(default="declared", metadata={"help": ", ".join(PRECISIONS)})
    group: str = field(default="site", metadata={"help": "what shares a precision: " + ", ".join(GROUPS)})
    rank: int = field(default=10, metadata={"help": "eigenvectors of each side kept by kron_lowrank"})
    temperature: float = field(default=1.0, metadata={"help": "multiplies the posterior covariance"})
    sites: str | None = field(default=None, metadata={"help": "glob pattern of the sites; None for all it applies to"})
    estimate: MAP = field(default_factory=MAP, metadata={"help": "settings of the MAP fit"})
    online: int = field(default=0, metadata={"help": "evidence updates of learned prior scales during the MAP fit"})
    batch_size: int = field(default=16, metadata={"help": "examples at once"})
    checkpoint: str | Path | None = field(default=None, metadata={"help": "folder of unfinished sums"})

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, valid in (("structure", STRUCTURES), ("precision", PRECISIONS), ("group", GROUPS)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(
                    f"Unknown {name} {value!r} for Laplace. Did you mean {nearest(value, valid)!r}? "
                    f"Choices: {', '.join(valid)}."
                )
        if self.rank < 1 or self.batch_size < 1:
            raise ValueError(f"rank and batch_size must be at least 1; got {self.rank} and {self.batch_size}.")
        if self.online < 0:
            raise ValueError(f"online must not be negative; got {self.online}. 3 is a usual number, 0 is none.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}. 1 is Laplace's own covariance.")

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
        estimate: Posterior | None = None,
        validation: Split | EncodedSplit | None = None,
    ) -> LaplacePosterior:
        """Fit MAP if no estimate is given, then the curvature around it.

        Args:
            model: the model; its declared prior must be Normal on the sites that become Normal.
            data: training data.
            progress: show bars.
            generator: source of the seed of the MAP fit.
            estimate: a posterior of the same sites whose mean is the estimate: MAP, SVI, or another Laplace.
            validation: data for ``precision="validation"``; never the test data.

        Raises:
            ValueError: no site of that pattern, a prior that is not Normal, no validation data where they are needed,
                an estimate of other sites, or a site that the structure cannot take.
        """
        names = self._check_model(model)
        adopted = estimate is not None and model.prior.adopt(estimate.model.prior)
        if not adopted:
            # those of whatever was fitted before mean nothing here
            model.prior.reset_scales()
        priors = declared_prior(model, names)
        if self.precision == "validation" and validation is None:
            raise ValueError(
                "precision='validation' needs data to choose on: pass validation=task.validation to fit, or use "
                "precision='evidence'."
            )
        if self.online and estimate is not None:
            raise ValueError(ONLINE_AND_ESTIMATE)
        structures = new_structures(model, names, self.structure, self.rank)
        _check_priors(structures, priors, self.structure)
        encoded = model.encode(data)
        encoded.require_trainable()
        if estimate is not None and not adopted and model.prior.in_logit_units:
            model.calibrate_prior(encoded)
            priors = declared_prior(model, names)
        if estimate is None:
            estimate = self._estimate(model, encoded, names, progress, generator)
            # a learned scale has moved during the fit
            priors = declared_prior(model, names)
        mean = estimate.mean()
        _check_estimate(model, mean)
        if model.gates(mean, estimate.context):
            raise ValueError(
                f"The estimate is {estimate.progress:.0%} through its training, and its router has not faded: the curvature "
                "would be that of another network. Train it to the end first."
            )
        gradients = LogitGradients(model, mean, tuple(structures))
        log_likelihood = sum_curvature(
            gradients, structures, encoded, batch_size=self.batch_size, checkpoint=self.checkpoint, progress=progress
        )
        eigenvalues = flat_eigenvalues(structures)
        if self.precision == "evidence":
            priors = evidence_precision(mean, priors, eigenvalues, self.group)
        elif self.precision == "validation" and validation is not None:
            factor = best_factor(
                structures,
                priors,
                gradients,
                model.encode(validation),
                temperature=self.temperature,
                batch_size=self.batch_size,
                progress=progress,
            )
            priors = {name: NormalPrior(prior.mean, prior.precision * factor) for name, prior in priors.items()}
        record = {
            **self.to_dict(),
            "sites": list(names),
            "num_data": len(encoded),
            "prior_precision": {name: float(prior.precision.mean()) for name, prior in priors.items()},
            "log_evidence": log_evidence(log_likelihood, mean, priors, eigenvalues),
            "estimate": estimate.record,
            "seed": estimate.record.get("seed"),
        }
        guide = normal_guide(model, mean, structures, priors, self.temperature)
        return LaplacePosterior(model, guide, record)

    def _estimate(
        self,
        model: BayesianModel,
        data: EncodedSplit,
        names: tuple[str, ...],
        progress: bool,
        generator: torch.Generator | None,
    ) -> Posterior:
        run = self.estimate.iterate(model, data, generator=generator)
        run.learns_scales = self.online == 0
        stops = {round(run.engine.steps * (i + 1) / (self.online + 1)) for i in range(self.online)}
        for stats in run.steps(progress=progress):
            if stats.step not in stops:
                continue
            mean = {name: value.detach() for name, value in run.guide.mean().items()}
            structures = new_structures(model, names, self.structure, self.rank)
            sum_curvature(
                LogitGradients(model, mean, names),
                structures,
                data,
                batch_size=self.batch_size,
                checkpoint=None,
                progress=progress,
            )
            best = evidence_precision(mean, declared_prior(model, names), flat_eigenvalues(structures))
            scales = {name: float(prior.precision.rsqrt()) for name, prior in best.items()}
            model.prior.set_scales(scales)
            logger.info("Prior scales by the evidence after step %d: %s", stats.step, scales)
        return run.posterior()

    def _names(self, model: BayesianModel) -> tuple[str, ...]:
        pattern = self.sites or ("head.weight" if self.structure == "last_layer" else "*")
        # a site on a manifold, or one that the likelihood no longer has, is a point unless it is asked for by name
        names = tuple(
            site.name
            for site in model.adapter_sites.values()
            if site.matches(pattern) and ((site.prior is None and not site.transient) or self.sites is not None)
        )
        if not names:
            remedy = (
                " Add LastLayer() to the model's adapters."
                if self.structure == "last_layer"
                else f" Did you mean {nearest(pattern, model.adapter_sites)!r}?"
            )
            raise ValueError(
                f"Laplace found no site matching {pattern!r} among {', '.join(model.adapter_sites)}.{remedy}"
            )
        return names

    def check(self, model: BayesianModel, num_data: int, *, estimated: bool = False) -> None:
        """See `SVI.check`; without an estimate the MAP fit must fit as well."""
        self._check_model(model)
        if estimated and self.online:
            raise ValueError(ONLINE_AND_ESTIMATE)
        if not estimated:
            self.estimate.check(model, num_data)

    def _check_model(self, model: BayesianModel) -> tuple[str, ...]:
        """The sites that become Normal, refused if their priors or shapes do not fit."""
        names = self._names(model)
        declared_prior(model, names)
        if self.online and (fixed := [name for name in names if name not in model.prior.scales]):
            raise ValueError(
                f"online={self.online} moves learned prior scales, and that of {fixed[0]!r} is fixed. Declare "
                "learned(0.1) there, or use precision='evidence', which leaves the estimate as it is."
            )
        if self.online and (many := [name for name in names if model.prior.scales[name].dim()]):
            raise ValueError(
                f"online={self.online} finds one scale a site by the evidence, and {many[0]!r} has "
                f"{model.prior.scales[many[0]].numel()}. Declare learned(0.1) without per= there, or fit with SVI."
            )
        self._check_sites(model, names)
        return names

    def _check_sites(self, model: BayesianModel, names: tuple[str, ...]) -> None:
        """Refuse, before any work or memory is spent, sites that are no linear maps and dense covariances too large."""
        require_linear(model, names)
        for name in names:
            weights = model.sites[name].numel
            if self.structure in ("full", "last_layer") and weights > MOST_WEIGHTS:
                raise ValueError(
                    f"A dense covariance takes a site of at most {MOST_WEIGHTS:,} weights; {name!r} has "
                    f"{weights:,}. Use structure='kron' or 'diag' there."
                )

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        settings = {key: value for key, value in vars(self).items() if key not in ("estimate", "checkpoint")}
        return {"engine": "Laplace", **settings, "estimate": self.estimate.to_dict()}


def _check_priors(structures: Mapping[str, Structure], priors: Mapping[str, NormalPrior], structure: str) -> None:
    for name, prior in priors.items():
        if not structures[name].takes(prior.precision):
            raise ValueError(
                f"structure={structure!r} needs one prior scale for the whole site {name!r}; the declared Normal has scales "
                f"of shape {tuple(prior.precision.shape)}. Declare dist.Normal(0., 0.1) there, or use structure='diag'."
            )


def _check_estimate(model: BayesianModel, mean: Mapping[str, Tensor]) -> None:
    for name, site in model.sites.items():
        if name not in mean or mean[name].shape != site.shape:
            raise ValueError(
                f"The estimate has no value for the site {name!r} of shape {tuple(site.shape)}; its sites are "
                f"{', '.join(mean)}. Pass a posterior of a model with the same adapters, or none to fit MAP here."
            )
