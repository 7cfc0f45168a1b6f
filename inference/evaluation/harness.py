"""Judge any number of posteriors on the same held-out examples."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrolora.inference.evaluation.aggregate import Row
from pyrolora.inference.evaluation.calibration import STRATEGIES, calibration_curve
from pyrolora.inference.evaluation.cost import Cost
from pyrolora.inference.evaluation.metrics import classification_metrics
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.evaluation.sections import (
    DISAGREEMENT_COLUMN,
    UNCERTAINTY_COLUMNS,
    Resampling,
    disagreement_metrics,
    group_columns,
    group_metrics,
    metric_columns,
    ood_columns,
    ood_metrics,
    set_columns,
    set_metrics,
    shift_columns,
    shift_metrics,
    uncertainty_metrics,
)
from pyrolora.inference.evaluation.selective import risk_coverage_curve
from pyrolora.inference.evaluation.validation import check_predictions, check_probabilities
from pyrolora.models.naming import nearest

LEVEL = 0.95

logger = logging.getLogger(__name__)


class Prediction(Protocol):
    """The part of a predictive distribution that is judged."""

    @property
    def probs(self) -> Tensor:
        """Class probabilities of each draw, ``(draws, examples, classes)``."""

    @property
    def kind(self) -> str:
        """How the draws came about, such as ``"mc"``."""

    @property
    def labels(self) -> Tensor | None:
        """True classes, ``(examples,)``, where they are known."""


class Predicts(Protocol):
    """The part of a posterior that the harness needs."""

    def predict(
        self,
        data: Any,
        *,
        draws: int = 10,
        kind: str | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Prediction:
        """Return class probabilities, rows in the order of the data."""


def evaluate(
    posteriors: Mapping[str, Predicts],
    data: Any,
    *,
    ood: Mapping[str, Any] | None = None,
    shift: Mapping[str, Any] | None = None,
    calibration: Any = None,
    miscoverage: float = 0.1,
    disagreement: Tensor | None = None,
    groups: Sequence[tuple[str, int]] = (),
    draws: int = 10,
    kind: str | None = None,
    n_bins: int = 15,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    costs: Mapping[str, Cost] | None = None,
    progress: bool = True,
) -> Report:
    """Predict with every posterior and return metrics with intervals, calibration tables and costs.

    ``report = evaluate({"mle": mle, "blob": blob}, task.test, ood={"chem": chem.test})``

    Every posterior, and every data set, gets a generator of the same seed: methods differ by their draws'
    distribution, not by luck, and a foreign example is met by the same weights as a familiar one. All methods
    share the bootstrap resamples.

    Args:
        posteriors: name -> posterior, in the order of the table.
        data: labelled held-out examples, as the posteriors' ``predict`` takes them.
        ood: name -> foreign examples that the scores should tell from ``data``; their labels are not used.
        shift: name -> labelled examples of the same classes from elsewhere.
        calibration: labelled examples that calibrate conformal prediction sets, such as ``task.validation``; none, no sets.
            The promise of the sets is exact only if nothing else was chosen on them.
        miscoverage: share of sets that may miss the true class.
        disagreement: of people about each example of ``data``, such as `human_disagreement` of it.
        groups: name and number of classes of the tasks that share the label space, in their order, such as
            ``task.format.groups`` of a joined task; each gets its accuracy.
        draws: posterior draws to average over.
        kind: kind of prediction; None leaves it to each posterior.
        n_bins: bins of the calibration errors.
        resamples: bootstrap resamples behind each interval.
        seed: of the draws and the resamples.
        batch_size: examples in one forward pass.
        costs: name -> what its fit cost, from `measure_cost`; methods may be missing.
        progress: show the progress of each prediction.

    Returns:
        A `Report` with one row a posterior.

    Raises:
        ValueError: no posteriors, a cost for an unknown one, labels that are missing or differ between
            posteriors, invalid probabilities (the method and the row are named), or foreign or shifted predictions over
            other classes.
    """
    if not posteriors:
        raise ValueError("posteriors: got an empty mapping, expected {name: posterior}. Fit at least one first.")
    if draws < 1:
        raise ValueError(f"draws: got {draws}, expected at least 1; 10 is usual.")
    ood, shift, costs = ood or {}, shift or {}, costs or {}
    if both := sorted(ood.keys() & shift.keys()):
        raise ValueError(
            f"shift: got {both[0]!r}, which ood has as well, expected different names. Rename one of them."
        )
    _check_cost_names(costs, posteriors)
    resampling = Resampling(resamples, LEVEL, seed)
    rows: list[Row] = []
    truth: Tensor | None = None
    for name, posterior in posteriors.items():
        logger.info("evaluating %s", name)

        def predict(examples: Any, posterior: Predicts = posterior) -> Prediction:
            return posterior.predict(
                examples,
                draws=draws,
                kind=kind,
                generator=torch.Generator().manual_seed(seed),
                batch_size=batch_size,
                progress=progress,
            )

        source = f"posterior {name!r}"
        start = time.perf_counter()
        familiar = predict(data)
        seconds = time.perf_counter() - start
        mean, labels = _check_familiar(source, familiar, truth)
        truth = labels
        metrics = resampling.of_metrics(classification_metrics(n_bins).values(), mean, labels)
        metrics |= uncertainty_metrics(familiar, resampling)
        sizes = {}
        for other, examples in ood.items():
            foreign = predict(examples)
            sizes[other] = _check_classes(f"{source} on {other!r}", foreign, mean).shape[1]
            metrics |= ood_metrics(other, familiar, foreign, resampling)
        shifted_sizes = {}
        for other, examples in shift.items():
            shifted, its_labels = _check_labelled(f"{source} on {other!r}", predict(examples), mean)
            shifted_sizes[other] = len(its_labels)
            metrics |= shift_metrics(other, shifted, its_labels, n_bins, resampling)
        if calibration is not None:
            held_out = _check_labelled(f"{source} on the calibration examples", predict(calibration), mean)
            metrics |= set_metrics(held_out, (mean, labels), miscoverage, resampling)
        metrics |= group_metrics(mean, labels, groups, resampling)
        if disagreement is not None:
            metrics |= disagreement_metrics(familiar.probs, disagreement, resampling)
        rows.append(
            Row(
                method=name,
                seed=seed,
                kind=familiar.kind,
                draws=len(familiar.probs),
                examples=len(labels),
                metrics=metrics,
                calibration={strategy: calibration_curve(mean, labels, n_bins, strategy) for strategy in STRATEGIES},
                risk_coverage=risk_coverage_curve(mean, labels),
                predict_seconds=seconds,
                ood_examples=sizes,
                shift_examples=shifted_sizes,
                cost=costs.get(name),
            )
        )
    columns = [*metric_columns(n_bins), *UNCERTAINTY_COLUMNS]
    columns += [column for other in ood for column in ood_columns(other)]
    columns += [column for other in shift for column in shift_columns(other, n_bins)]
    columns += set_columns(miscoverage) if calibration is not None else []
    columns += group_columns(groups)
    columns += [DISAGREEMENT_COLUMN] if disagreement is not None else []
    return Report(tuple(rows), tuple(columns), n_bins, resamples, LEVEL)


def _check_familiar(source: str, prediction: Prediction, truth: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, labels = _check_labelled(source, prediction)
    if truth is not None and not torch.equal(labels, truth):
        raise ValueError(
            f"{source}: got labels that differ from those of the posterior before it, expected the same "
            "items in the same order. Let predict return rows in the order of the data."
        )
    return mean, labels


def _check_labelled(source: str, prediction: Prediction, familiar: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean probabilities and labels."""
    probs = _check_draws(source, prediction) if familiar is None else _check_classes(source, prediction, familiar)
    if prediction.labels is None:
        raise ValueError(
            f"{source}: got predictions without labels, expected labelled examples. Evaluate on a split "
            "whose items all have one."
        )
    return check_predictions(probs.double().mean(0).to(probs.dtype), prediction.labels, source=source)


def _check_classes(source: str, prediction: Prediction, familiar: Tensor) -> Tensor:
    probs = _check_draws(source, prediction)
    if probs.shape[2] != familiar.shape[1]:
        raise ValueError(
            f"{source}: got {probs.shape[2]} classes, expected {familiar.shape[1]} as on the test items: "
            "entropies over different classes do not compare. Predict foreign items over the test task's "
            "classes."
        )
    return probs


def _check_draws(source: str, prediction: Prediction) -> Tensor:
    probs = check_probabilities(prediction.probs, source=source)
    if probs.ndim != 3:
        raise ValueError(
            f"{source}: got probs of shape {tuple(probs.shape)}, expected (draws, examples, classes). Use "
            "probs[None] for one draw."
        )
    return probs


def _check_cost_names(costs: Mapping[str, Cost], posteriors: Mapping[str, Predicts]) -> None:
    for name in costs:
        if name not in posteriors:
            raise ValueError(
                f"costs: got {name!r}, expected one of {', '.join(map(repr, posteriors))}. "
                f"Did you mean {nearest(name, posteriors)!r}?"
            )
