"""How well a score tells foreign examples (positive) from familiar ones: AUROC, AUPR, FPR95."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

RECALL = 0.95


@dataclass(frozen=True)
class DetectionMetric:
    """One measure of a detector.

    Attributes:
        name: key in a report, as ``<name>_<score>/<data set>``.
        title: what a table prints.
        higher_is_better: which end is the good one.
        function: ``(familiar scores, foreign scores) -> scalar``.
        resampled: the same of many resamples, see `resampled_auroc`.
    """

    name: str
    title: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    resampled: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def auroc(in_distribution: Tensor, out_of_distribution: Tensor) -> Tensor:
    """Area under the ROC curve of telling foreign examples (positive) from familiar ones by a score.

    ``auroc(predictive_entropy(test.probs), predictive_entropy(foreign.probs))``

    Equals the probability that a foreign example scores above a familiar one, ties counting one half. 0.5 is
    no better than chance.

    Args:
        in_distribution: scores of familiar examples.
        out_of_distribution: scores of foreign examples.

    Shape:
        in_distribution: ``(familiar,)``. out_of_distribution: ``(foreign,)``. Returns a float64 scalar in
            0..1.

    Raises:
        ValueError: an empty set, or a score that is not finite.
    """
    group, familiar = _rank_groups(in_distribution, out_of_distribution)
    positive = (torch.arange(len(group)) >= familiar).long()
    # torchmetrics puts a sigmoid over anything outside [0, 1], which merges large scores: give it ranks
    return binary_auroc(group.double() / (int(group.max()) + 1), positive).double()


def average_precision(in_distribution: Tensor, out_of_distribution: Tensor) -> Tensor:
    """AUPR: precision averaged over the recall of foreign examples (positive), by thresholds on a score.

    ``average_precision(predictive_entropy(test.probs), predictive_entropy(foreign.probs))``

    Chance is the share of foreign examples, so it compares only between equal mixtures.

    Args:
        in_distribution: scores of familiar examples.
        out_of_distribution: scores of foreign examples.

    Shape:
        in_distribution: ``(familiar,)``. out_of_distribution: ``(foreign,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: an empty set, or a score that is not finite.

    Davis and Goadrich 2006, "The relationship between precision-recall and ROC curves"; the sum over thresholds, without
    interpolation.
    """
    return resampled_average_precision(
        in_distribution, out_of_distribution, *_once(in_distribution, out_of_distribution)
    )[0]


def false_positive_rate(in_distribution: Tensor, out_of_distribution: Tensor) -> Tensor:
    """FPR95: share of familiar examples rejected by the strictest threshold that catches 95 % of the foreign ones.

    ``false_positive_rate(predictive_entropy(test.probs), predictive_entropy(foreign.probs))``

    Foreign examples are the positives here, as they are for `auroc`; some papers take the familiar ones.

    Args:
        in_distribution: scores of familiar examples.
        out_of_distribution: scores of foreign examples.

    Shape:
        in_distribution: ``(familiar,)``. out_of_distribution: ``(foreign,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: an empty set, or a score that is not finite.

    Liang et al. 2018, "Enhancing the reliability of out-of-distribution image detection in neural networks", section 4.
    """
    return resampled_false_positive_rate(
        in_distribution, out_of_distribution, *_once(in_distribution, out_of_distribution)
    )[0]


def resampled_auroc(
    in_distribution: Tensor, out_of_distribution: Tensor, in_counts: Tensor, out_counts: Tensor
) -> Tensor:
    """`auroc` of many resamples at once, through its form as a rank statistic (Mann and Whitney).

    Args:
        in_distribution: scores of familiar examples.
        out_of_distribution: scores of foreign examples.
        in_counts: how often each familiar example occurs in each resample.
        out_counts: how often each foreign example occurs in each resample.

    Shape:
        in_distribution: ``(familiar,)``. out_of_distribution: ``(foreign,)``. in_counts: ``(resamples,
            familiar)``.
        out_counts: ``(resamples, foreign)``, both float64. Returns ``(resamples,)``.

    Raises:
        ValueError: an empty set, or a score that is not finite.
    """
    negatives, positives = _group_sums(in_distribution, out_of_distribution, in_counts, out_counts)
    below = negatives.cumsum(1) - negatives / 2
    return (positives * below).sum(1) / (in_counts.sum(1) * out_counts.sum(1))


def resampled_average_precision(
    in_distribution: Tensor, out_of_distribution: Tensor, in_counts: Tensor, out_counts: Tensor
) -> Tensor:
    """`average_precision` of many resamples at once; arguments as `resampled_auroc`."""
    negatives, positives = _group_sums(in_distribution, out_of_distribution, in_counts, out_counts)
    caught, alarms = _from_the_top(positives), _from_the_top(positives + negatives)
    # a group without any example of a resample adds nothing, whatever its precision is called
    return (positives * caught / alarms.clamp(min=1)).sum(1) / out_counts.sum(1)


def resampled_false_positive_rate(
    in_distribution: Tensor, out_of_distribution: Tensor, in_counts: Tensor, out_counts: Tensor
) -> Tensor:
    """`false_positive_rate` of many resamples at once; arguments as `resampled_auroc`."""
    negatives, positives = _group_sums(in_distribution, out_of_distribution, in_counts, out_counts)
    recall = _from_the_top(positives) / out_counts.sum(1, keepdim=True)
    rejected = _from_the_top(negatives) / in_counts.sum(1, keepdim=True)
    return torch.where(recall >= RECALL, rejected, 1.0).amin(1)


DETECTION_METRICS: dict[str, DetectionMetric] = {
    metric.name: metric
    for metric in (
        DetectionMetric("auroc", "AUROC", True, auroc, resampled_auroc),
        DetectionMetric("aupr", "AUPR", True, average_precision, resampled_average_precision),
        DetectionMetric("fpr95", "FPR95", False, false_positive_rate, resampled_false_positive_rate),
    )
}


def _once(*scores: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ones(1, len(one), dtype=torch.float64) for one in scores)


def _from_the_top(sums: Tensor) -> Tensor:
    return sums.flip(1).cumsum(1).flip(1)


def _group_sums(
    in_distribution: Tensor, out_of_distribution: Tensor, in_counts: Tensor, out_counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Familiar and foreign examples at each distinct score, ascending, in each resample."""
    group, familiar = _rank_groups(in_distribution, out_of_distribution)
    empty = torch.zeros(len(in_counts), int(group.max()) + 1, dtype=torch.float64)
    return empty.index_add(1, group[:familiar], in_counts), empty.index_add(1, group[familiar:], out_counts)


def _rank_groups(in_distribution: Tensor, out_of_distribution: Tensor) -> tuple[Tensor, int]:
    for name, scores in (("in_distribution", in_distribution), ("out_of_distribution", out_of_distribution)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(
                f"{name}: got scores of shape {tuple(scores.shape)}, expected (examples,) with at least one example."
            )
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(
                f"{name}: the score of row {row} is {float(scores[row])}, expected a finite number. Check "
                "its probabilities."
            )
    pooled = torch.cat([in_distribution.detach().cpu().double(), out_of_distribution.detach().cpu().double()])
    return torch.unique(pooled, return_inverse=True)[1], len(in_distribution)
