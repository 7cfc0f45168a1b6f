"""Selective prediction: what is answered first when a model may abstain, and what it then gets wrong."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrolora.inference.evaluation.validation import check_predictions

# points of a curve that is kept: a picture needs no more, whatever the size of the test set
CURVE_POINTS = 100


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Error rate among the most confident examples, against how many are answered.

    ``curve = risk_coverage_curve(probs, labels); curve.risk[curve.coverage <= 0.8][-1]``

    Shape:
        coverage, risk: ``(points,)`` float64 in 0..1, coverage ascending to 1.
    """

    coverage: Tensor
    risk: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists for JSON."""
        return {"coverage": self.coverage.tolist(), "risk": self.risk.tolist()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RiskCoverage":
        """Read what `to_dict` returned."""
        return cls(*(torch.tensor(saved[name], dtype=torch.float64) for name in ("coverage", "risk")))


def risk_coverage_curve(
    probs: Tensor, labels: Tensor, *, uncertainty: Tensor | None = None, points: int = CURVE_POINTS
) -> RiskCoverage:
    """Error rate of the share of examples that is answered, most confident first.

    ``risk_coverage_curve(predictive.mean_probs, predictive.labels).risk``

    Examples of equal confidence are answered in random order: the curve is the expectation over it, so it does not depend
    on the order of the rows.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        uncertainty: ranks the examples, least first; one minus the top probability by default.
        points: number of evenly spaced coverages, the last of them 1.

    Shape:
        probs: ``(examples, classes)``. labels, uncertainty: ``(examples,)``.

    Raises:
        ValueError: invalid probabilities or labels, uncertainties that are not one finite number an example, or no points.

    Geifman and El-Yaniv 2017, "Selective classification for deep neural networks", section 2.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ValueError(f"points: got {points!r}, expected a whole number of at least 1, such as {CURVE_POINTS}.")
    probs, labels = check_predictions(probs, labels)
    group, wrong = _groups(probs, labels, uncertainty)
    count = torch.bincount(group).double()
    errors = torch.bincount(group, weights=wrong)
    answered = torch.linspace(0, len(labels), points + 1, dtype=torch.float64)[1:].ceil().unique()
    # errors grow linearly inside a group of equals
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), count.cumsum(0)])
    found = torch.cat([torch.zeros(1, dtype=torch.float64), errors.cumsum(0)])
    inside = torch.searchsorted(ends, answered) - 1
    risk = (found[inside] + errors[inside] * (answered - ends[inside]) / count[inside]) / answered
    return RiskCoverage(answered / len(labels), risk)


def area_under_risk_coverage(probs: Tensor, labels: Tensor, *, uncertainty: Tensor | None = None) -> Tensor:
    """AURC: mean error rate over all coverages ``1/n, 2/n, ..., 1``; smaller is better, the error rate itself is chance.

    ``area_under_risk_coverage(predictive.mean_probs, predictive.labels)``

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        uncertainty: ranks the examples, least first; one minus the top probability by default.

    Shape:
        probs: ``(examples, classes)``. labels, uncertainty: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: as `risk_coverage_curve`.

    Geifman, Uziel and El-Yaniv 2019, "Bias-reduced uncertainty estimation for deep neural classifiers", equation 2;
    equal confidences count by the expectation over their order.
    """
    probs, labels = check_predictions(probs, labels)
    once = torch.ones(1, len(labels), dtype=torch.float64)
    return _areas(*_groups(probs, labels, uncertainty), once)[0]


def coverage_at_risk(probs: Tensor, labels: Tensor, risk: float = 0.05, *, uncertainty: Tensor | None = None) -> Tensor:
    """Largest share of examples that can be answered with an error rate of at most ``risk`` among them.

    ``coverage_at_risk(predictive.mean_probs, predictive.labels, risk=0.05)``

    A threshold answers all examples of one confidence or none; 0 where not even the most confident can be answered.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        risk: error rate that is borne, 0 to 1.
        uncertainty: ranks the examples, least first; one minus the top probability by default.

    Shape:
        probs: ``(examples, classes)``. labels, uncertainty: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: a risk outside 0..1, besides what `risk_coverage_curve` refuses.
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk: got {risk!r}, expected an error rate from 0 to 1, such as 0.05.")
    probs, labels = check_predictions(probs, labels)
    once = torch.ones(1, len(labels), dtype=torch.float64)
    return _coverages(*_groups(probs, labels, uncertainty), once, risk)[0]


def resampled_area(probs: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """`area_under_risk_coverage` of many resamples at once.

    Args:
        probs: checked class probabilities.
        labels: true classes.
        counts: how often each example occurs in each resample.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. counts: ``(resamples, examples)`` float64 of whole numbers.
        Returns ``(resamples,)``.
    """
    return _areas(*_groups(probs, labels, None), counts)


def resampled_coverage(probs: Tensor, labels: Tensor, counts: Tensor, risk: float = 0.05) -> Tensor:
    """`coverage_at_risk` of many resamples at once; arguments as `resampled_area`."""
    return _coverages(*_groups(probs, labels, None), counts, risk)


def _groups(probs: Tensor, labels: Tensor, uncertainty: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rank of each example's uncertainty, equals sharing one, and whether its top label is wrong."""
    confidence, predicted = probs.max(1)
    if uncertainty is None:
        uncertainty = -confidence
    uncertainty = uncertainty.detach().cpu()
    if uncertainty.shape != labels.shape or not uncertainty.isfinite().all():
        raise ValueError(
            f"uncertainty: got shape {tuple(uncertainty.shape)} for {len(labels)} examples, expected one finite number for "
            "each. Use decompose(predictive.probs).total, for instance."
        )
    return torch.unique(uncertainty, return_inverse=True)[1], (predicted != labels).double()


def _sums(group: Tensor, wrong: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Examples and errors of each group in each resample."""
    empty = torch.zeros(len(counts), int(group.max()) + 1, dtype=torch.float64)
    return empty.index_add(1, group, counts), empty.index_add(1, group, counts * wrong)


def _areas(group: Tensor, wrong: Tensor, counts: Tensor) -> Tensor:
    count, errors = _sums(group, wrong, counts)
    total = counts.sum(1)
    harmonic = torch.cat([torch.zeros(1), torch.arange(1, int(total.max()) + 1).double().reciprocal()]).cumsum(0)
    after = count.cumsum(1)
    before, errors_before = after - count, errors.cumsum(1) - errors
    rate = torch.where(count > 0, errors / count.clamp(min=1), 0.0)
    # the j-th of a group of equals adds (E + rate j) / (N + j), which sums to this
    tail = harmonic[after.long()] - harmonic[before.long()]
    return (errors + (errors_before - rate * before) * tail).sum(1) / total


def _coverages(group: Tensor, wrong: Tensor, counts: Tensor, risk: float) -> Tensor:
    count, errors = _sums(group, wrong, counts)
    answered, errors = count.cumsum(1), errors.cumsum(1)
    # whole numbers compared: 0.05 * 20 is a little more than 1 in floating point, or a little less
    allowed = errors <= risk * answered + math.ulp(1.0) * answered
    return torch.where(allowed, answered, 0.0).amax(1) / counts.sum(1)
