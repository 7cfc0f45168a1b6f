"""Uncertainty of a prediction, split by its source, and how well it tells foreign from familiar examples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from pyrolora.inference.evaluation.validation import check_probabilities

# draws closer than this differ by float32 rounding of the forward pass, not by their weights
SAME_DRAW = 1e-6


@dataclass(frozen=True)
class Uncertainty:
    """Entropy of the prediction, ``total = aleatoric + epistemic``, all in nats.

    ``decompose(predictive.probs).epistemic``

    Attributes:
        total: entropy of the mean probabilities.
        aleatoric: mean entropy of the draws; what no further data would remove.
        epistemic: mutual information between the label and the weights; the disagreement of the draws.

    Shape:
        each ``(examples,)``, float64.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


@dataclass(frozen=True)
class OodScore:
    """A score that should be larger on foreign examples.

    Attributes:
        name: key in a report, as ``auroc_<name>/<data set>``.
        title: what a table prints.
        function: ``probs (draws, examples, classes) -> (examples,)``.
        needs_disagreement: whether the score is constant, hence empty, unless draws differ.
    """

    name: str
    title: str
    function: Callable[[Tensor], Tensor]
    needs_disagreement: bool = False

    def undefined_reason(self, *probs: Tensor) -> str | None:
        """Say why this score cannot rank the examples of these predictions, or None if it can.

        Args:
            probs: probabilities of each data set to be compared.

        Shape:
            probs: each ``(draws, examples, classes)``.
        """
        if not self.needs_disagreement:
            return None
        if any(len(draws) == 1 for draws in probs):
            return "undefined for a single draw"
        if all(bool(((draws - draws[:1]).abs() < SAME_DRAW).all()) for draws in probs):
            return "undefined because all draws are the same"
        return None


def decompose(probs: Tensor) -> Uncertainty:
    """Split the predictive entropy into what the draws share and what they disagree about.

    ``split = decompose(predictive.probs); split.epistemic.topk(10)``

    Epistemic is the mean KL divergence from a draw to the mean of the draws: equal to the difference of the
    entropies, without its cancellation, hence never below zero and exactly zero for equal draws.

    Args:
        probs: class probabilities of each draw.

    Shape:
        probs: ``(draws, examples, classes)``. The three results: ``(examples,)`` float64, in nats.

    Raises:
        ValueError: not three dimensions, or invalid probabilities.

    Depeweg et al. 2018, "Decomposition of uncertainty in Bayesian deep learning", equation 5;
    Houlsby et al. 2011, "Bayesian active learning for classification and preference learning" (BALD),
    equation 2.
    """
    probs = _check_draws(probs)
    mean = probs.mean(0)
    total = _entropy(mean)
    aleatoric = _entropy(probs).mean(0)
    epistemic = (torch.xlogy(probs, probs) - torch.xlogy(probs, mean)).sum(-1).mean(0).clamp(min=0)
    return Uncertainty(total, aleatoric, epistemic)


def predictive_entropy(probs: Tensor) -> Tensor:
    """Entropy of the mean probabilities, in nats.

    ``predictive_entropy(predictive.probs)``

    Args:
        probs: class probabilities of each draw.

    Shape:
        probs: ``(draws, examples, classes)``. Returns ``(examples,)`` in 0..log(classes).

    Raises:
        ValueError: not three dimensions, or invalid probabilities.
    """
    return _entropy(_check_draws(probs).mean(0))


def mutual_information(probs: Tensor) -> Tensor:
    """Mutual information between label and weights (BALD), in nats; zero wherever the draws agree.

    ``mutual_information(predictive.probs)``

    One draw has none to disagree with: the result is all zeros and ranks nothing.

    Args:
        probs: class probabilities of each draw.

    Shape:
        probs: ``(draws, examples, classes)``. Returns ``(examples,)``.

    Raises:
        ValueError: not three dimensions, or invalid probabilities.
    """
    return decompose(probs).epistemic


def max_probability_uncertainty(probs: Tensor) -> Tensor:
    """One minus the largest mean probability: 0 when certain, 1 - 1/classes at most.

    ``max_probability_uncertainty(predictive.probs)``

    Args:
        probs: class probabilities of each draw.

    Shape:
        probs: ``(draws, examples, classes)``. Returns ``(examples,)``.

    Raises:
        ValueError: not three dimensions, or invalid probabilities.

    Hendrycks and Gimpel 2017, "A baseline for detecting misclassified and out-of-distribution examples".
    """
    return 1 - _check_draws(probs).mean(0).amax(-1)


OOD_SCORES: dict[str, OodScore] = {
    score.name: score
    for score in (
        OodScore("entropy", "entropy", predictive_entropy),
        OodScore("mutual_information", "mutual information", mutual_information, needs_disagreement=True),
        OodScore("max_probability", "max probability", max_probability_uncertainty),
    )
}


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
    group, familiar = _rank_groups(in_distribution, out_of_distribution)
    empty = torch.zeros(len(in_counts), int(group.max()) + 1, dtype=torch.float64)
    negatives = empty.index_add(1, group[:familiar], in_counts)
    positives = empty.index_add(1, group[familiar:], out_counts)
    below = negatives.cumsum(1) - negatives / 2
    return (positives * below).sum(1) / (in_counts.sum(1) * out_counts.sum(1))


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


def _check_draws(probs: Tensor) -> Tensor:
    probs = check_probabilities(probs)
    if probs.ndim != 3:
        raise ValueError(
            f"probs: got shape {tuple(probs.shape)}, expected (draws, examples, classes). "
            "Pass predictive.probs, or probs[None] for a single draw."
        )
    return probs.double()


def _entropy(probs: Tensor) -> Tensor:
    return -torch.xlogy(probs, probs).sum(-1)
