"""Calibration of the top label: expected calibration error and the table behind a reliability diagram."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from pyrolora.inference.evaluation.validation import check_predictions

STRATEGIES = ("width", "mass")


@dataclass(frozen=True, eq=False)
class CalibrationTable:
    """Confidence against accuracy, bin by bin.

    ``table = calibration_curve(probs, labels, n_bins=15); table.accuracy - table.confidence``

    A bin is right-open, the last one closed; bins of equal mass reach from the smallest confidence to the
    largest. An empty bin has count 0 and NaN for confidence and accuracy.

    Shape:
        edges: ``(bins + 1,)``. confidence, accuracy, count: ``(bins,)``, all float64. ``count`` is fractional
        only in a table averaged over seeds.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    strategy: str

    @property
    def n_bins(self) -> int:
        """Number of bins, empty ones included."""
        return len(self.count)

    @property
    def expected_calibration_error(self) -> float:
        """Mean over examples of |accuracy - confidence| of their bin (L1, in 0..1)."""
        filled = self.count > 0
        gaps = (self.accuracy - self.confidence).abs()[filled]
        return float((gaps * self.count[filled]).sum() / self.count.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists for JSON, with None where a bin is empty."""
        return {
            "strategy": self.strategy,
            "edges": self.edges.tolist(),
            "confidence": [None if value != value else value for value in self.confidence.tolist()],
            "accuracy": [None if value != value else value for value in self.accuracy.tolist()],
            "count": self.count.tolist(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "CalibrationTable":
        """Read what `to_dict` returned."""

        def column(name: str) -> Tensor:
            values = [float("nan") if value is None else value for value in saved[name]]
            return torch.tensor(values, dtype=torch.float64)

        return cls(column("edges"), column("confidence"), column("accuracy"), column("count"), saved["strategy"])


def ece_equal_width(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Expected calibration error over bins of equal width: L1, of the top label's confidence.

    ``ece_equal_width(predictive.mean_probs, predictive.labels)``

    The number is torchmetrics' `CalibrationError(norm="l1")`, which the BLoB and Laplace-LoRA results use. A
    confidence of exactly 1 falls there into a bin of its own above the last one; `calibration_curve` counts
    it in the last.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        n_bins: number of bins between 0 and 1.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: invalid probabilities or labels, or fewer than one bin.

    Guo et al. 2017, "On calibration of modern neural networks", equation 3.
    """
    probs, labels = check_predictions(probs, labels)
    _check_bins(n_bins)
    return multiclass_calibration_error(probs, labels, num_classes=probs.shape[1], n_bins=n_bins, norm="l1").double()


def ece_equal_mass(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Expected calibration error over bins of equally many examples: L1, of the top label's confidence.

    ``ece_equal_mass(predictive.mean_probs, predictive.labels)``

    The example at place ``i`` in the order of confidence goes to bin ``floor(i * n_bins / examples)``, so bin
    sizes differ by at most one. Equal confidences follow the first of their group: the value never depends on
    the order of the rows, and bins may then be uneven or empty. With fewer examples than bins each is its own
    bin.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        n_bins: number of bins.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: invalid probabilities or labels, or fewer than one bin.

    Nixon et al. 2019, "Measuring calibration in deep learning" (adaptive calibration error, top label).
    """
    probs, labels = check_predictions(probs, labels)
    once = torch.ones(1, len(labels), dtype=torch.float64)
    return resampled_ece_equal_mass(probs, labels, once, n_bins)[0]


def maximum_calibration_error(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Largest |accuracy - confidence| of any bin of equal width that holds examples, of the top label.

    ``maximum_calibration_error(predictive.mean_probs, predictive.labels)``

    The number is torchmetrics' `CalibrationError(norm="max")`. A bin with one wrong answer reaches its whole confidence:
    on a small test set this is noise, and the interval says so.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        n_bins: number of bins between 0 and 1.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: invalid probabilities or labels, or fewer than one bin.

    Guo et al. 2017, "On calibration of modern neural networks", equation 5.
    """
    probs, labels = check_predictions(probs, labels)
    once = torch.ones(1, len(labels), dtype=torch.float64)
    return resampled_maximum_calibration_error(probs, labels, once, n_bins)[0]


def classwise_ece(probs: Tensor, labels: Tensor, n_bins: int = 15, strategy: str = "width") -> Tensor:
    """Expected calibration error of every class's own probability, averaged over classes (L1).

    ``classwise_ece(predictive.mean_probs, predictive.labels, strategy="mass")``

    Unlike the top label's it sees a class that is systematically given too much or too little. With bins of equal mass it is
    the adaptive calibration error. A class that no example has counts like any other: its probabilities should be small.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        n_bins: number of bins of each class.
        strategy: ``"width"`` for equal steps of probability, ``"mass"`` for equally many examples in each bin.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: invalid probabilities or labels, an unknown strategy, or fewer than one bin.

    Kull et al. 2019, "Beyond temperature scaling", section 2 (width); Nixon et al. 2019, "Measuring calibration in deep
    learning", equation 3 (mass, without a threshold).
    """
    probs, labels = check_predictions(probs, labels)
    _check_strategy(strategy)
    once = torch.ones(1, len(labels), dtype=torch.float64)
    return resampled_classwise_ece(probs, labels, once, n_bins, strategy)[0]


def resampled_maximum_calibration_error(probs: Tensor, labels: Tensor, counts: Tensor, n_bins: int = 15) -> Tensor:
    """`maximum_calibration_error` of many resamples at once; arguments as `resampled_ece_equal_width`."""
    _check_bins(n_bins)
    confidence, correct = _top_label(probs, labels)
    inside = torch.nn.functional.one_hot(_width_bins(confidence, n_bins), n_bins + 1).double()
    gaps = counts @ (inside * (correct - confidence.double())[:, None])
    # an empty bin has a gap of exactly zero
    return (gaps.abs() / (counts @ inside).clamp(min=1)).amax(1)


def resampled_classwise_ece(
    probs: Tensor, labels: Tensor, counts: Tensor, n_bins: int = 15, strategy: str = "width"
) -> Tensor:
    """`classwise_ece` of many resamples at once; arguments as `resampled_ece_equal_width`."""
    _check_bins(n_bins)
    error = _resampled_width_error if strategy == "width" else _resampled_mass_error
    each = [error(probs[:, k].contiguous(), (labels == k).double(), counts, n_bins) for k in range(probs.shape[1])]
    return torch.stack(each).mean(0)


def resampled_ece_equal_width(probs: Tensor, labels: Tensor, counts: Tensor, n_bins: int = 15) -> Tensor:
    """`ece_equal_width` of many resamples at once.

    The share of a bin times its |accuracy - confidence| is |sum of (correct - confidence)| / examples, and an
    example never changes its bin, so all resamples are one matrix product.

    Args:
        probs: checked class probabilities.
        labels: true classes.
        counts: how often each example occurs in each resample.
        n_bins: number of bins.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. counts: ``(resamples, examples)`` float64.
        Returns ``(resamples,)``.
    """
    _check_bins(n_bins)
    return _resampled_width_error(*_top_label(probs, labels), counts, n_bins)


def resampled_ece_equal_mass(probs: Tensor, labels: Tensor, counts: Tensor, n_bins: int = 15) -> Tensor:
    """`ece_equal_mass` of many resamples at once; every resample draws its own bin edges.

    Args:
        probs: checked class probabilities.
        labels: true classes.
        counts: how often each example occurs in each resample.
        n_bins: number of bins.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. counts: ``(resamples, examples)`` float64.
        Returns ``(resamples,)``.
    """
    _check_bins(n_bins)
    return _resampled_mass_error(*_top_label(probs, labels), counts, n_bins)


def calibration_curve(probs: Tensor, labels: Tensor, n_bins: int = 15, strategy: str = "width") -> CalibrationTable:
    """Tabulate mean confidence and accuracy of the top label per bin.

    ``table = calibration_curve(predictive.mean_probs, predictive.labels, n_bins=10, strategy="mass")``

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.
        n_bins: number of bins.
        strategy: ``"width"`` for equal steps of confidence, ``"mass"`` for equally many examples in each bin.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``.

    Raises:
        ValueError: invalid probabilities or labels, an unknown strategy, or fewer than one bin.
    """
    probs, labels = check_predictions(probs, labels)
    _check_bins(n_bins)
    _check_strategy(strategy)
    confidence, correct = _top_label(probs, labels)
    if strategy == "width":
        edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
        bins = _width_bins(confidence, n_bins).clamp(max=n_bins - 1)
    else:
        confidence, order = confidence.sort()
        correct = correct[order]
        bins = _mass_bins(confidence, torch.ones(1, len(confidence), dtype=torch.float64), n_bins)[0]
        # a bin starts at its smallest confidence, an empty one where the next starts: it has no width
        first = torch.searchsorted(bins, torch.arange(n_bins))
        edges = torch.cat([confidence, confidence[-1:]]).double()[first]
        edges = torch.cat([edges, confidence[-1:].double()])
    count = torch.bincount(bins, minlength=n_bins).double()
    return CalibrationTable(
        edges=edges,
        confidence=torch.bincount(bins, weights=confidence.double(), minlength=n_bins) / count,
        accuracy=torch.bincount(bins, weights=correct, minlength=n_bins) / count,
        count=count,
        strategy=strategy,
    )


def _top_label(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, predicted = probs.max(1)
    return confidence, (predicted == labels).double()


def _resampled_width_error(confidence: Tensor, correct: Tensor, counts: Tensor, n_bins: int) -> Tensor:
    # one column more than bins: torchmetrics' own bin for a confidence of exactly 1
    gaps = torch.zeros(len(confidence), n_bins + 1, dtype=torch.float64)
    gaps.scatter_(1, _width_bins(confidence, n_bins)[:, None], (correct - confidence.double())[:, None])
    return (counts @ gaps).abs().sum(1) / counts.sum(1)


def _resampled_mass_error(confidence: Tensor, correct: Tensor, counts: Tensor, n_bins: int) -> Tensor:
    confidence, order = confidence.sort()
    gaps = (correct[order] - confidence.double()) * counts[:, order]
    bins = _mass_bins(confidence, counts[:, order], n_bins)
    summed = torch.zeros(len(counts), n_bins, dtype=torch.float64).scatter_add_(1, bins, gaps)
    return summed.abs().sum(1) / counts.sum(1)


def _width_bins(confidence: Tensor, n_bins: int) -> Tensor:
    # edges in the confidences' own precision, as torchmetrics has them: float64 edges would move 0.7 a bin
    # down
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype)
    return torch.bucketize(confidence, edges, right=True) - 1


def _mass_bins(confidence: Tensor, counts: Tensor, n_bins: int) -> Tensor:
    """Bin of each example in each resample, for ascending confidence and counts in the same order."""
    before = counts.cumsum(1) - counts
    first_of_group = torch.searchsorted(confidence.contiguous(), confidence.contiguous())
    places = before[:, first_of_group] * n_bins
    # what comes after the last example drawn has a place past the end, and a count of zero
    return torch.div(places, counts.sum(1, keepdim=True), rounding_mode="floor").clamp(max=n_bins - 1).long()


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(map(repr, STRATEGIES))}.")


def _check_bins(n_bins: int) -> None:
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"n_bins: got {n_bins!r}, expected a whole number of at least 1, such as 15.")
