"""Percentile bootstrap over examples: an interval for a metric, and for the difference of two methods.

A resample is kept as counts, how often each example was drawn, so a metric of a thousand resamples is a
matrix product or a scatter instead of a thousand calls.

The calibration error is biased upwards under resampling: every resample adds its own noise to each bin, and
an absolute value turns noise into error. Its percentile interval therefore sits high and, for a
well-calibrated model, may lie wholly above the value itself. Read it as a range of what a further data set
might show, and compare methods by `paired_difference`, where most of that bias cancels.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrolora.inference.evaluation.detection import DETECTION_METRICS, DetectionMetric
from pyrolora.inference.evaluation.metrics import Metric, find_metric
from pyrolora.inference.evaluation.validation import check_predictions

# numbers in one block of counts: 16 MB in float64, whatever the size of the data set
BLOCK_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A value with the interval around it.

    ``Interval(0.544, 0.51, 0.58)``

    Attributes:
        value: the metric on all examples.
        low: lower end.
        high: upper end.
        note: why the value is NaN, where it is.
    """

    value: float
    low: float
    high: float
    note: str | None = None

    @classmethod
    def undefined(cls, reason: str) -> "Interval":
        """Return an interval of NaN that says why there is no value."""
        return cls(math.nan, math.nan, math.nan, reason)

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON, with None for NaN."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {key: None if math.isnan(number) else number for key, number in numbers.items()} | {"note": self.note}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Interval":
        """Read what `to_dict` returned."""
        value, low, high = (math.nan if saved[key] is None else saved[key] for key in ("value", "low", "high"))
        return cls(value, low, high, saved["note"])


def bootstrap_metrics(
    metrics: Iterable[Metric],
    probs: Tensor,
    labels: Tensor,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap of several metrics on the same resamples of examples.

    ``bootstrap_metrics(classification_metrics(15).values(), probs, labels)["nll"]``

    Args:
        metrics: what to compute.
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        resamples: number of resamples.
        level: probability that the interval is to cover.
        seed: of the resampling; equal seeds and sizes give equal resamples.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``.

    Returns:
        metric name -> `Interval`.

    Raises:
        ValueError: invalid probabilities or labels, or too few resamples for the level.

    Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3.
    """
    probs, labels = check_predictions(probs, labels)
    chosen = list(metrics)
    values: dict[str, list[Tensor]] = {metric.name: [] for metric in chosen}
    for counts in resample_counts(len(labels), resamples, level=level, generator=torch.Generator().manual_seed(seed)):
        for metric in chosen:
            values[metric.name].append(metric.resampled(probs, labels, counts))
    return {
        metric.name: percentile_interval(float(metric.function(probs, labels)), values[metric.name], level)
        for metric in chosen
    }


def bootstrap_mean(values: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean over examples with its percentile bootstrap: ``bootstrap_mean(decompose(predictive.probs).epistemic)``.

    Args:
        values: one number an example.
        resamples: number of resamples.
        level: probability that the interval is to cover.
        seed: of the resampling.

    Shape:
        values: ``(examples,)``

    Raises:
        ValueError: no values, or too few resamples for the level.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: got shape {tuple(values.shape)}, expected (examples,) with at least one example.")
    values = values.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    blocks = resample_counts(len(values), resamples, level=level, generator=generator)
    return percentile_interval(float(values.mean()), [counts @ values / len(values) for counts in blocks], level)


def bootstrap_detection(
    in_distribution: Tensor,
    out_of_distribution: Tensor,
    metrics: Iterable[DetectionMetric] | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap of a detector; familiar and foreign examples are resampled each among themselves.

    ``bootstrap_detection(predictive_entropy(test.probs), predictive_entropy(foreign.probs))["auroc"]``

    Args:
        in_distribution: scores of familiar examples.
        out_of_distribution: scores of foreign examples (positive).
        metrics: what to compute on the same resamples; AUROC, AUPR and FPR95 by default.
        resamples: number of resamples.
        level: probability that the interval is to cover.
        seed: of the resampling.

    Shape:
        in_distribution: ``(familiar,)``. out_of_distribution: ``(foreign,)``.

    Returns:
        metric name -> `Interval`.

    Raises:
        ValueError: an empty set, a score that is not finite, or too few resamples for the level.
    """
    chosen = list(DETECTION_METRICS.values() if metrics is None else metrics)
    found = {metric.name: float(metric.function(in_distribution, out_of_distribution)) for metric in chosen}
    familiar, foreign = len(in_distribution), len(out_of_distribution)
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, list[Tensor]] = {metric.name: [] for metric in chosen}
    for counts in resample_counts((familiar, foreign), resamples, level=level, generator=generator):
        for metric in chosen:
            values[metric.name].append(
                metric.resampled(in_distribution, out_of_distribution, counts[:, :familiar], counts[:, familiar:])
            )
    return {name: percentile_interval(found[name], values[name], level) for name in found}


def paired_difference(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    metric: str | Metric = "nll",
    *,
    n_bins: int = 15,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Difference ``metric(first) - metric(second)`` of two methods on the same examples, with its interval.

    ``paired_difference(blob.mean_probs, mle.mean_probs, mle.labels, "nll")  # below zero: blob is better``

    Both methods see the same resamples, so what makes an example hard for both cancels. The interval is much
    tighter than
    the two single intervals suggest: these may overlap where the difference is beyond doubt.

    Args:
        first: class probabilities of one method.
        second: class probabilities of the other, rows in the same order.
        labels: true classes.
        metric: a name from `classification_metrics`, or a `Metric`.
        n_bins: number of bins when a calibration error is asked for by name.
        resamples: number of resamples.
        level: probability that the interval is to cover.
        seed: of the resampling.

    Shape:
        first, second: ``(examples, classes)``. labels: ``(examples,)``.

    Raises:
        ValueError: an unknown metric, invalid probabilities or labels, or too few resamples for the level.
    """
    chosen = find_metric(metric, n_bins) if isinstance(metric, str) else metric
    first, labels = check_predictions(first, labels, source="first")
    second, labels = check_predictions(second, labels, source="second")
    value = float(chosen.function(first, labels) - chosen.function(second, labels))
    differences = [
        chosen.resampled(first, labels, counts) - chosen.resampled(second, labels, counts)
        for counts in resample_counts(
            len(labels), resamples, level=level, generator=torch.Generator().manual_seed(seed)
        )
    ]
    return percentile_interval(value, differences, level)


def resample_counts(
    examples: int | tuple[int, ...], resamples: int, *, level: float, generator: torch.Generator
) -> Iterator[Tensor]:
    """Draw resamples with replacement, in blocks of bounded memory.

    Args:
        examples: size of the data set, or of each stratum: strata are resampled apart and their counts put
            side by side.
        resamples: how many in all.
        level: of the interval they are for; a tail with less than one resample in it is refused.
        generator: source of randomness.

    Yields:
        How often each example occurs, ``(resamples of this block, examples)`` float64.

    Raises:
        ValueError: a level outside (0, 1), or too few resamples for it.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a probability strictly between 0 and 1, such as 0.95.")
    fewest = math.ceil(round(2 / (1 - level), 6))
    if resamples < fewest:
        raise ValueError(
            f"resamples: got {resamples}, expected at least {fewest}, so that each tail of a {level:.0%} "
            "interval holds one. The usual number is 1000."
        )
    strata = (examples,) if isinstance(examples, int) else examples
    block = max(1, BLOCK_ELEMENTS // sum(strata))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        yield torch.cat([_counts(size, rows, generator) for size in strata], dim=1)


def _counts(size: int, rows: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(size, (rows, size), generator=generator)
    return torch.zeros(rows, size, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, 1).double().expand(rows, size)
    )


def percentile_interval(value: float, resampled: list[Tensor], level: float) -> Interval:
    """A value with the quantiles of its resamples: ``percentile_interval(0.5, [values], level=0.95)``."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(resampled).quantile(tails).tolist()
    return Interval(value, low, high)
