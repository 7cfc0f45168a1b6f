"""Temperature scaling: one number, chosen on validation data, by which the logits of any posterior are divided."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pyrolora.inference.evaluation.validation import check_predictions, check_probabilities
from pyrolora.inference.posterior import Posterior
from pyrolora.models.program import BayesianModel
from pyrolora.models.settings import check_numbers
from pyrolora.models.tasks import EncodedSplit, Split

# natural logarithm of the temperatures that are tried: a twentieth to twenty
LOG_BOUNDS = (-3.0, 3.0)
# a fall of the NLL by less than this, in nats, is none
FLAT = 1e-7

logger = logging.getLogger(__name__)


def fit_temperature(probs: Tensor, labels: Tensor) -> float:
    """Temperature with the smallest NLL of the mean over draws: ``fit_temperature(predictive.probs, predictive.labels)``.

    The logits of every draw are divided by it, then the draws are averaged, as a tempered posterior predicts.

    Args:
        probs: class probabilities of each draw, on validation data.
        labels: true classes.

    Shape:
        probs: ``(draws, examples, classes)``. labels: ``(examples,)``.

    Raises:
        ValueError: invalid probabilities or labels, or examples without a single error, which name no temperature.

    Guo et al. 2017, "On calibration of modern neural networks", section 4.2.
    """
    probs = check_probabilities(probs)
    if probs.ndim != 3:
        raise ValueError(
            f"probs: got shape {tuple(probs.shape)}, expected (draws, examples, classes). Pass predictive.probs, or "
            "probs[None] for one draw."
        )
    _, labels = check_predictions(probs.mean(0), labels)
    logits = probs.double().clamp(min=torch.finfo(torch.float32).tiny).log()
    index = labels.expand(len(probs), -1)[..., None]

    def loss(log_temperature: float) -> float:
        log_probs = (logits / math.exp(log_temperature)).log_softmax(-1).gather(-1, index)[..., 0]
        return -float((log_probs.logsumexp(0) - math.log(len(probs))).mean())

    found = minimize_scalar(loss, bounds=LOG_BOUNDS, method="bounded", options={"xatol": 1e-6})
    coldest, hottest = map(loss, LOG_BOUNDS)
    if coldest <= found.fun + FLAT:
        raise ValueError(
            f"labels: got {len(labels)} examples whose NLL keeps falling as the temperature goes to zero, one is expected: "
            "every label is the most probable one. Choose the temperature on data with some errors."
        )
    if hottest <= found.fun + FLAT:
        logger.warning(
            "The NLL of %d examples keeps falling as the temperature grows: the model knows nothing about them. The largest "
            "one tried, %.3g, is taken.", len(labels), math.exp(LOG_BOUNDS[1])
        )  # fmt: skip
        return math.exp(LOG_BOUNDS[1])
    return math.exp(found.x)


def temperature_scaled(
    posterior: Posterior,
    validation: Split | EncodedSplit,
    *,
    draws: int = 10,
    kind: str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Posterior:
    """The same posterior, predicting with the temperature that fits validation data best.

    ``scaled = temperature_scaled(map_estimate, task.validation); scaled.logit_temperature``

    Args:
        posterior: any posterior; it stays as it is.
        validation: labelled examples to choose on, never the test data.
        draws: weight draws of the prediction.
        kind: kind of prediction; the posterior's own by default.
        generator: seeds the draws.
        progress: show a bar.

    Raises:
        ValueError: data without labels, or see `fit_temperature`.
    """
    plain = type(posterior)(posterior.model, posterior.guide, {**posterior.record, "logit_temperature": 1.0})
    predictive = plain.predict(validation, draws=draws, kind=kind, generator=generator, progress=progress)
    if predictive.labels is None:
        raise ValueError("validation: got examples without labels, expected labelled ones. Pass task.validation.")
    temperature = fit_temperature(predictive.probs, predictive.labels)
    return type(posterior)(posterior.model, posterior.guide, {**posterior.record, "logit_temperature": temperature})


@dataclass(frozen=True)
class TemperatureScaling:
    """The engine form of `temperature_scaled`, which takes another engine's posterior as its estimate.

    Usage::

        TemperatureScaling().fit(model, task.train, estimate=map_estimate, validation=task.validation)

    Args:
        draws: weight draws with which the temperature is chosen.

    Raises:
        ValueError: fewer than one draw.
    """

    draws: int = field(default=10, metadata={"help": "weight draws with which the temperature is chosen"})

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1; got {self.draws!r}. 10 is usual.")

    def check(self, model: BayesianModel, num_data: int, *, estimated: bool = False) -> None:
        """See `SVI.check`: any model is fine, its posterior comes from elsewhere."""
        if not estimated:
            raise ValueError("TemperatureScaling scales a fitted posterior, and no estimate is named. Give it one.")

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
        estimate: Posterior | None = None,
        validation: Split | EncodedSplit | None = None,
    ) -> Posterior:
        """Choose the temperature of an estimate.

        Args:
            model: the model of the estimate.
            data: not used; the weights are fitted already.
            progress: show a bar.
            generator: seeds the draws.
            estimate: the posterior to be scaled.
            validation: labelled examples to choose on.

        Raises:
            ValueError: no estimate, no validation data, or see `fit_temperature`.
        """
        if estimate is None or validation is None:
            missing = "estimate=" if estimate is None else "validation="
            raise ValueError(f"TemperatureScaling scales a fitted posterior on validation data; pass {missing} to fit.")
        return temperature_scaled(estimate, validation, draws=self.draws, generator=generator, progress=progress)

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        return {"engine": "TemperatureScaling", "draws": self.draws}
