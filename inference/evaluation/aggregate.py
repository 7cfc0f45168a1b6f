"""From the rows of single seeds to one line a method: the mean over seeds and how far it can be trusted."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from scipy import stats

from pyrolora.inference.evaluation.bootstrap import Interval
from pyrolora.inference.evaluation.calibration import CalibrationTable
from pyrolora.inference.evaluation.cost import Cost
from pyrolora.inference.evaluation.selective import RiskCoverage


@dataclass(frozen=True)
class Row:
    """One method under one seed.

    Attributes:
        method: name of the posterior.
        seed: of the prediction and the resampling.
        kind: kind of prediction, such as ``"mc"``.
        draws: posterior draws that the probabilities are the mean of.
        examples: number of test items.
        metrics: metric name -> value with its bootstrap interval over test items.
        calibration: ``"width"`` and ``"mass"`` -> table of confidence against accuracy.
        risk_coverage: error rate against the share of items answered.
        predict_seconds: wall time of predicting the test items.
        ood_examples: name of each foreign data set -> its number of items.
        shift_examples: name of each shifted data set -> its number of items.
        cost: wall time and peak memory of the fit, if measured.
    """

    method: str
    seed: int
    kind: str
    draws: int
    examples: int
    metrics: Mapping[str, Interval]
    calibration: Mapping[str, CalibrationTable]
    risk_coverage: RiskCoverage
    predict_seconds: float
    ood_examples: Mapping[str, int]
    shift_examples: Mapping[str, int]
    cost: Cost | None = None


@dataclass(frozen=True)
class Summary:
    """One method over all its seeds.

    Attributes:
        method: name of the posterior.
        rows: the rows it was made from, one a seed.
        metrics: metric name -> mean over seeds. For two seeds or more the interval is Student's t across
            seeds (how much another fit would differ); for one it is the bootstrap over test items (how much
            another test set would).
        calibration: strategy -> table averaged over seeds.
        risk_coverage: curve averaged over seeds.
        predict_seconds: mean over seeds.
        fit_seconds: mean over seeds; None if any seed was not measured.
        peak_memory_bytes: largest of the seeds; None if any seed was not measured.
    """

    method: str
    rows: tuple[Row, ...]
    metrics: Mapping[str, Interval]
    calibration: Mapping[str, CalibrationTable]
    risk_coverage: RiskCoverage
    predict_seconds: float
    fit_seconds: float | None
    peak_memory_bytes: int | None

    @property
    def across_seeds(self) -> bool:
        """Whether the intervals are across seeds rather than over test items."""
        return len(self.rows) > 1


def summarise(rows: Iterable[Row], level: float = 0.95) -> list[Summary]:
    """Gather rows by method, in the order in which methods first appear.

    ``summarise(report.rows)[0].metrics["nll"]``

    Args:
        rows: any number of seeds of any number of methods.
        level: probability that the intervals across seeds are to cover.
    """
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(row)
    return [_summarise_method(name, tuple(found), level) for name, found in methods.items()]


def mean_over_seeds(intervals: Iterable[Interval], level: float = 0.95) -> Interval:
    """Mean of a metric over seeds with Student's t-interval; a single seed keeps its own interval.

    ``mean_over_seeds([Interval(0.5, 0.4, 0.6), Interval(0.6, 0.5, 0.7)])  # 0.55 [-0.09, 1.19]``

    It takes the values of independent fits for normal. It is honest about few seeds, hence wide, and may
    leave the range of the metric.

    Args:
        intervals: the metric under each seed.
        level: probability that the interval is to cover.

    Raises:
        ValueError: no seed at all.
    """
    seeds = list(intervals)
    if not seeds:
        raise ValueError("intervals: got none, expected the metric of at least one seed. Evaluate a posterior first.")
    if len(seeds) == 1:
        return seeds[0]
    for interval in seeds:
        if not interval.defined:
            return Interval.undefined(interval.note or "undefined under one of the seeds")
    values = torch.tensor([interval.value for interval in seeds], dtype=torch.float64)
    mean = float(values.mean())
    reach = float(stats.t.ppf((1 + level) / 2, len(seeds) - 1)) * float(values.std()) / math.sqrt(len(seeds))
    return Interval(mean, mean - reach, mean + reach)


def _summarise_method(method: str, rows: tuple[Row, ...], level: float) -> Summary:
    costs = [row.cost for row in rows if row.cost is not None]
    measured = len(costs) == len(rows)
    return Summary(
        method=method,
        rows=rows,
        metrics={name: mean_over_seeds((row.metrics[name] for row in rows), level) for name in rows[0].metrics},
        calibration={name: _mean_table([row.calibration[name] for row in rows]) for name in rows[0].calibration},
        risk_coverage=_mean_curve([row.risk_coverage for row in rows]),
        predict_seconds=sum(row.predict_seconds for row in rows) / len(rows),
        fit_seconds=sum(cost.seconds for cost in costs) / len(rows) if measured else None,
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs) if measured else None,
    )


def _mean_curve(curves: list[RiskCoverage]) -> RiskCoverage:
    # the seeds judge the same items, and so share their coverages
    return RiskCoverage(curves[0].coverage, torch.stack([curve.risk for curve in curves]).mean(0))


def _mean_table(tables: list[CalibrationTable]) -> CalibrationTable:
    if len(tables) == 1:
        return tables[0]
    # counts are averaged, not added: the seeds judge the same items, and bands must not narrow as if they did
    # not
    count = torch.stack([table.count for table in tables])

    def weighted(values: list[torch.Tensor]) -> torch.Tensor:
        return (torch.stack(values).nan_to_num() * count).sum(0) / count.sum(0)

    return CalibrationTable(
        edges=torch.stack([table.edges for table in tables]).mean(0),
        confidence=weighted([table.confidence for table in tables]),
        accuracy=weighted([table.accuracy for table in tables]),
        count=count.mean(0),
        strategy=tables[0].strategy,
    )
