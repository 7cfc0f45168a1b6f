"""Judge any number of posteriors on the same held-out examples."""

import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrolora.inference.evaluation.aggregate import Row
from pyrolora.inference.evaluation.bootstrap import Interval, bootstrap_auroc, bootstrap_metrics
from pyrolora.inference.evaluation.calibration import STRATEGIES, calibration_curve
from pyrolora.inference.evaluation.cost import Cost
from pyrolora.inference.evaluation.markdown import Column
from pyrolora.inference.evaluation.metrics import classification_metrics
from pyrolora.inference.evaluation.ood import OOD_SCORES
from pyrolora.inference.evaluation.report import Report
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
            posteriors, invalid probabilities (the method and the row are named), or foreign predictions over
            other classes.
    """
    if not posteriors:
        raise ValueError("posteriors: got an empty mapping, expected {name: posterior}. Fit at least one first.")
    if draws < 1:
        raise ValueError(f"draws: got {draws}, expected at least 1; 10 is usual.")
    ood, costs = ood or {}, costs or {}
    _check_cost_names(costs, posteriors)
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

        start = time.perf_counter()
        familiar = predict(data)
        seconds = time.perf_counter() - start
        probs, labels = _check_familiar(name, familiar, truth)
        truth = labels
        foreign = {other: _check_foreign(name, other, predict(examples), probs) for other, examples in ood.items()}
        mean = probs.double().mean(0).to(probs.dtype)
        metrics = bootstrap_metrics(
            classification_metrics(n_bins).values(), mean, labels, resamples=resamples, level=LEVEL, seed=seed
        )
        for other, draws_of_other in foreign.items():
            metrics |= _ood_metrics(other, probs, draws_of_other, resamples, seed)
        rows.append(
            Row(
                method=name,
                seed=seed,
                kind=familiar.kind,
                draws=len(probs),
                examples=len(labels),
                metrics=metrics,
                calibration={strategy: calibration_curve(mean, labels, n_bins, strategy) for strategy in STRATEGIES},
                predict_seconds=seconds,
                ood_examples={other: draws_of_other.shape[1] for other, draws_of_other in foreign.items()},
                cost=costs.get(name),
            )
        )
    return Report(tuple(rows), _columns(n_bins, ood), n_bins, resamples, LEVEL)


def _columns(n_bins: int, ood: Mapping[str, Any]) -> tuple[Column, ...]:
    columns = [
        Column(metric.name, metric.title, metric.higher_is_better, interval_digits=metric.interval_digits)
        for metric in classification_metrics(n_bins).values()
    ]
    for other in ood:
        section = f"Telling {other} from the test items (AUROC)"
        columns += [
            Column(f"auroc_{score.name}/{other}", f"AUROC {score.title}", True, section)
            for score in OOD_SCORES.values()
        ]
    return tuple(columns)


def _ood_metrics(other: str, familiar: Tensor, foreign: Tensor, resamples: int, seed: int) -> dict[str, Interval]:
    metrics = {}
    for score in OOD_SCORES.values():
        reason = score.undefined_reason(familiar, foreign)
        metrics[f"auroc_{score.name}/{other}"] = (
            Interval.undefined(reason)
            if reason
            else bootstrap_auroc(
                score.function(familiar), score.function(foreign), resamples=resamples, level=LEVEL, seed=seed
            )
        )
    return metrics


def _check_familiar(name: str, prediction: Prediction, truth: Tensor | None) -> tuple[Tensor, Tensor]:
    source = f"posterior {name!r}"
    probs = _check_draws(source, prediction)
    if prediction.labels is None:
        raise ValueError(
            f"{source}: got predictions without labels, expected labelled examples. Evaluate on a split "
            "whose items all have one."
        )
    _, labels = check_predictions(probs.mean(0), prediction.labels, source=source)
    if truth is not None and not torch.equal(labels, truth):
        raise ValueError(
            f"{source}: got labels that differ from those of the posterior before it, expected the same "
            "items in the same order. Let predict return rows in the order of the data."
        )
    return probs, labels


def _check_foreign(name: str, other: str, prediction: Prediction, familiar: Tensor) -> Tensor:
    source = f"posterior {name!r} on {other!r}"
    probs = _check_draws(source, prediction)
    if probs.shape[2] != familiar.shape[2]:
        raise ValueError(
            f"{source}: got {probs.shape[2]} classes, expected {familiar.shape[2]} as on the test items: "
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
