"""The parts of a report beyond the metrics of the test items: each has its columns and the figures of one posterior."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.inference.evaluation.bootstrap import (
    Interval,
    bootstrap_detection,
    bootstrap_mean,
    bootstrap_metrics,
)
from pyrolora.inference.evaluation.conformal import SCORES, conformalise
from pyrolora.inference.evaluation.detection import DETECTION_METRICS
from pyrolora.inference.evaluation.disagreement import rank_correlation
from pyrolora.inference.evaluation.markdown import Column
from pyrolora.inference.evaluation.metrics import Metric, classification_metrics
from pyrolora.inference.evaluation.ood import OOD_SCORES, Scored, decompose

# what is looked at again on shifted data; calibration by class and selection would repeat the same story
SHIFT_METRICS = ("accuracy", "nll", "brier", "ece")


@dataclass(frozen=True)
class Resampling:
    """How intervals over test items are made: ``Resampling(resamples=1000, level=0.95, seed=0)``."""

    resamples: int
    level: float
    seed: int

    def of_mean(self, values: Tensor) -> Interval:
        """Mean over examples with its interval."""
        return bootstrap_mean(values, resamples=self.resamples, level=self.level, seed=self.seed)

    def of_metrics(self, metrics: Iterable[Metric], probs: Tensor, labels: Tensor) -> dict[str, Interval]:
        """Metrics with their intervals, all on the same resamples."""
        return bootstrap_metrics(metrics, probs, labels, resamples=self.resamples, level=self.level, seed=self.seed)


def metric_columns(n_bins: int) -> list[Column]:
    """Columns of the metrics of the test items."""
    return [
        Column(metric.name, metric.title, metric.higher_is_better, metric.section, metric.interval_digits)
        for metric in classification_metrics(n_bins).values()
    ]


UNCERTAINTY_COLUMNS = tuple(
    Column(name, title, None, "Uncertainty of a test item (mean, nats)", 3)
    for name, title in (
        ("entropy_total", "Total"),
        ("entropy_aleatoric", "Aleatoric"),
        ("entropy_epistemic", "Epistemic"),
    )
)


def uncertainty_metrics(prediction: Scored, resampling: Resampling) -> dict[str, Interval]:
    """Mean entropy of the test items, total = aleatoric + epistemic."""
    split = decompose(prediction.probs)
    reason = OOD_SCORES["mutual_information"].undefined_reason(prediction)
    found = {
        "entropy_total": resampling.of_mean(split.total),
        "entropy_aleatoric": resampling.of_mean(split.aleatoric),
    }
    found["entropy_epistemic"] = Interval.undefined(reason) if reason else resampling.of_mean(split.epistemic)
    return found


def ood_columns(other: str) -> list[Column]:
    """Columns of one foreign data set: a table for each measure of a detector, a column for each score."""
    return [
        Column(
            f"{metric.name}_{score.name}/{other}",
            f"{metric.title} {score.title}",
            metric.higher_is_better,
            f"Telling {other} from the test items ({metric.title})",
        )
        for metric in DETECTION_METRICS.values()
        for score in OOD_SCORES.values()
    ]


def ood_metrics(other: str, familiar: Scored, foreign: Scored, resampling: Resampling) -> dict[str, Interval]:
    """How well each score tells one foreign data set from the test items."""
    found: dict[str, Interval] = {}
    for score in OOD_SCORES.values():
        reason = score.undefined_reason(familiar, foreign)
        values = (
            {name: Interval.undefined(reason) for name in DETECTION_METRICS}
            if reason
            else bootstrap_detection(
                score.function(familiar),
                score.function(foreign),
                resamples=resampling.resamples,
                level=resampling.level,
                seed=resampling.seed,
            )
        )
        found |= {f"{name}_{score.name}/{other}": interval for name, interval in values.items()}
    return found


def shift_columns(other: str, n_bins: int) -> list[Column]:
    """Columns of one shifted data set."""
    metrics = classification_metrics(n_bins)
    return [
        Column(
            f"{name}/{other}",
            metrics[name].title,
            metrics[name].higher_is_better,
            f"Shifted to {other}",
            metrics[name].interval_digits,
        )
        for name in SHIFT_METRICS
    ]


def shift_metrics(
    other: str, probs: Tensor, labels: Tensor, n_bins: int, resampling: Resampling
) -> dict[str, Interval]:
    """The main metrics on labelled data from elsewhere."""
    metrics = classification_metrics(n_bins)
    found = resampling.of_metrics([metrics[name] for name in SHIFT_METRICS], probs, labels)
    return {f"{name}/{other}": interval for name, interval in found.items()}


def group_columns(groups: Sequence[tuple[str, int]]) -> list[Column]:
    """Columns of the tasks of a shared label space."""
    section = "Accuracy of each task over the whole label space"
    return [Column(f"accuracy_of/{name}", name, True, section) for name, _ in groups]


def group_metrics(
    probs: Tensor, labels: Tensor, groups: Sequence[tuple[str, int]], resampling: Resampling
) -> dict[str, Interval]:
    """Accuracy of each task; the interval is over its own test items."""
    right, found, first = (probs.argmax(-1) == labels).double(), {}, 0
    for name, size in groups:
        own = right[(labels >= first) & (labels < first + size)]
        found[f"accuracy_of/{name}"] = (
            resampling.of_mean(own) if len(own) else Interval.undefined("no test item is of this task")
        )
        first += size
    return found


def set_columns(miscoverage: float) -> list[Column]:
    """Columns of the conformal sets."""
    section = f"Prediction sets that promise {1 - miscoverage:.0%} coverage"
    titles = {"split": "split", "aps": "APS"}
    return [
        column
        for score in SCORES
        for column in (
            Column(f"set_coverage_{score}", f"Coverage, {titles[score]}", None, section),
            Column(f"set_size_{score}", f"Classes, {titles[score]}", False, section),
        )
    ]


def set_metrics(
    calibration: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], miscoverage: float, resampling: Resampling
) -> dict[str, Interval]:
    """Coverage and size of conformal sets; the intervals are over test items, given the calibration."""
    found: dict[str, Interval] = {}
    for score in SCORES:
        sets = conformalise(*calibration, miscoverage=miscoverage, score=score, seed=resampling.seed).sets(test[0])
        inside = sets.gather(1, test[1][:, None])[:, 0]
        found[f"set_coverage_{score}"] = resampling.of_mean(inside.double())
        found[f"set_size_{score}"] = resampling.of_mean(sets.sum(1).double())
    return found


DISAGREEMENT_COLUMN = Column(
    "human_disagreement", "Spearman with aleatoric uncertainty", True, "Agreement with human disagreement"
)


def disagreement_metrics(probs: Tensor, disagreement: Tensor, resampling: Resampling) -> Mapping[str, Interval]:
    """Rank correlation of aleatoric uncertainty with what people disagree about."""
    interval = rank_correlation(
        decompose(probs).aleatoric,
        torch.as_tensor(disagreement),
        resamples=resampling.resamples,
        level=resampling.level,
        seed=resampling.seed,
    )
    return {DISAGREEMENT_COLUMN.name: interval}
