"""Paired permutation test: would the difference of two methods survive if their answers were swapped at random?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.inference.evaluation.bootstrap import BLOCK_ELEMENTS
from pyrolora.inference.evaluation.metrics import Metric, find_metric
from pyrolora.inference.evaluation.validation import check_predictions

# a difference that differs from the observed one by rounding is not smaller
ROUNDING = 1e-12


@dataclass(frozen=True)
class PermutationTest:
    """Outcome of a paired permutation test.

    Attributes:
        difference: ``metric(first) - metric(second)``.
        p_value: two-sided; the smallest that can come out is ``1 / (permutations + 1)``.
        permutations: random swaps behind it.
    """

    difference: float
    p_value: float
    permutations: int


def paired_permutation_test(
    first: Tensor | Sequence[Tensor],
    second: Tensor | Sequence[Tensor],
    labels: Tensor,
    metric: str | Metric = "nll",
    *,
    n_bins: int = 15,
    permutations: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Test whether two methods differ in a metric on the same examples.

    ``paired_permutation_test(blob.mean_probs, mle.mean_probs, mle.labels, "brier").p_value``

    Under the hypothesis that the methods are exchangeable example by example, swapping their answers to any of the examples
    changes nothing; the p-value is the share of random swaps with a difference at least as large. Metrics that are no means
    over examples, such as a calibration error, are computed anew for every swap.

    Args:
        first: class probabilities of one method, or one tensor for each seed: the difference is then the mean over seeds, and
            a swap concerns an example under all seeds at once, so it speaks of other test items, not of other fits.
        second: those of the other, rows (and seeds) in the same order.
        labels: true classes.
        metric: a name from `classification_metrics`, or a `Metric`.
        n_bins: number of bins when a calibration error is asked for by name.
        permutations: number of random swaps.
        seed: of the swaps.

    Shape:
        first, second: each ``(examples, classes)``. labels: ``(examples,)``.

    Raises:
        ValueError: an unknown metric, invalid probabilities or labels, different numbers of seeds, or no permutations.

    Good 2005, "Permutation, parametric and bootstrap tests of hypotheses", section 3.6.2; Phipson and Smyth 2010, for
    the one that is added.
    """
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 1:
        raise ValueError(f"permutations: got {permutations!r}, expected a whole number of at least 1, such as 9999.")
    chosen = find_metric(metric, n_bins) if isinstance(metric, str) else metric
    seeds_of_first = [first] if isinstance(first, Tensor) else list(first)
    seeds_of_second = [second] if isinstance(second, Tensor) else list(second)
    if len(seeds_of_first) != len(seeds_of_second) or not seeds_of_first:
        raise ValueError(
            f"second: got {len(seeds_of_second)} seeds, expected {len(seeds_of_first) or 'at least one'} as of the first. "
            "Give both methods under the same seeds."
        )
    pairs = []
    for one, other in zip(seeds_of_first, seeds_of_second, strict=True):
        one, labels = check_predictions(one, labels, source="first")
        other, labels = check_predictions(other, labels, source="second")
        if one.shape != other.shape:
            raise ValueError(
                f"second: got probabilities of shape {tuple(other.shape)}, expected {tuple(one.shape)} as of the first. "
                "Compare methods on the same examples and classes."
            )
        pairs.append(torch.cat([one, other.to(one.dtype)]))
    both = torch.cat([labels, labels])
    examples = len(labels)

    def differences(of_first: Tensor) -> Tensor:
        """Mean over seeds for selections ``(selections, examples)`` of 1 where the first method answers as itself."""
        swapped = torch.cat([of_first, 1 - of_first], 1), torch.cat([1 - of_first, of_first], 1)
        each = [chosen.resampled(pair, both, swapped[0]) - chosen.resampled(pair, both, swapped[1]) for pair in pairs]
        return torch.stack(each).mean(0)

    observed = float(differences(torch.ones(1, examples, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(seed)
    block = max(1, BLOCK_ELEMENTS // (2 * examples))
    reached = 0
    for start in range(0, permutations, block):
        rows = min(block, permutations - start)
        kept = torch.randint(2, (rows, examples), generator=generator).double()
        reached += int((differences(kept).abs() >= abs(observed) - ROUNDING).sum())
    return PermutationTest(observed, (reached + 1) / (permutations + 1), permutations)
