"""Where the right candidate stands in the order of a prediction."""

import torch
from torch import Tensor

from pyrolora.inference.evaluation.validation import check_predictions


def target_rank(probs: Tensor, labels: Tensor) -> Tensor:
    """Rank of the target, 1 for the first: ``target_rank(predictive.mean_probs, predictive.labels)``.

    A candidate with the target's own probability counts as half before it, so that a prediction that says nothing has the
    rank of chance.

    Args:
        probs: probabilities of the candidates.
        labels: place of the target.

    Shape:
        probs ``(examples, candidates)``; returns ``(examples,)``
    """
    probs, labels = check_predictions(probs, labels)
    own = probs.gather(1, labels[:, None])
    before = (probs > own).sum(1)
    equal = (probs == own).sum(1) - 1
    return 1 + before + equal / 2


def hit_rate(probs: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each target is among the first k, 1 or 0: ``hit_rate(probs, labels, k=1).mean()`` is HR@1.

    Shape:
        see `target_rank`
    """
    _check_k(k)
    return (target_rank(probs, labels) <= k).double()


def ndcg(probs: Tensor, labels: Tensor, k: int | None = None) -> Tensor:
    """Discounted cumulative gain of each example with its one target: ``1 / log2(1 + rank)``, 0 beyond the first k.

    Source: Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques", 2002; the ideal gain is 1.

    Shape:
        see `target_rank`
    """
    rank = target_rank(probs, labels)
    gain = 1 / torch.log2(1 + rank)
    if k is None:
        return gain
    _check_k(k)
    return torch.where(rank <= k, gain, 0)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k counts the first candidates, 1 or more; got {k}. HR@1 has k=1.")
