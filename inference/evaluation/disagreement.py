"""Whether a model is unsure where people are: rank correlation of its aleatoric uncertainty with human disagreement."""

import math

import torch
from scipy import stats
from torch import Tensor

from pyrolora.inference.evaluation.bootstrap import Interval, percentile_interval, resample_counts
from pyrolora.models.naming import nearest
from pyrolora.models.tasks import Split


def human_disagreement(split: Split, attribute: str = "agreement") -> Tensor:
    """One minus the share of annotators who agreed on each example's label: ``human_disagreement(task.test)``.

    Args:
        split: examples of which at least one carries the attribute.
        attribute: its name.

    Shape:
        ``(examples,)`` float64 in 0..1, NaN for an example whose votes were not kept.

    Raises:
        ValueError: no example with the attribute; the nearest name is offered.
    """
    known = sorted({name for example in split for name in example.attributes})
    if attribute not in known:
        near = (
            f"Did you mean {nearest(attribute, known)!r}?"
            if known
            else "Use a task that keeps its votes, crowd_tweets."
        )
        raise ValueError(
            f"{split.task} {split.name}: no example has the attribute {attribute!r}; they have {', '.join(known) or 'none'}. "
            f"{near}"
        )
    agreed = [example.attributes.get(attribute, math.nan) for example in split]
    return 1 - torch.tensor(agreed, dtype=torch.float64)


def rank_correlation(
    uncertainty: Tensor, disagreement: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Spearman's rank correlation with its bootstrap interval over examples.

    ``rank_correlation(decompose(predictive.probs).aleatoric, human_disagreement(task.test))``

    Args:
        uncertainty: of the model, such as `Uncertainty.aleatoric`, nats.
        disagreement: of people, such as `human_disagreement`; examples where it is NaN, for want of votes, are left out.
        resamples: number of resamples.
        level: probability that the interval is to cover.
        seed: of the resampling.

    Shape:
        both ``(examples,)``

    Returns:
        The correlation, -1 to 1; undefined, with a note, where either is the same for all examples.

    Raises:
        ValueError: lengths that differ, or an uncertainty that is not finite.
    """
    uncertainty, disagreement = uncertainty.detach().cpu().double(), disagreement.detach().cpu().double()
    if uncertainty.ndim != 1 or uncertainty.shape != disagreement.shape:
        raise ValueError(
            f"disagreement: got shape {tuple(disagreement.shape)} for uncertainties of shape {tuple(uncertainty.shape)}, "
            "expected one number of each for every example, in the same order."
        )
    if not uncertainty.isfinite().all():
        row = int((~uncertainty.isfinite()).nonzero()[0])
        raise ValueError(f"uncertainty: row {row} is {float(uncertainty[row])}, expected a finite number.")
    voted = ~disagreement.isnan()
    uncertainty, disagreement = uncertainty[voted], disagreement[voted]
    for name, values in (("uncertainty", uncertainty), ("disagreement", disagreement)):
        if len(values) < 2 or bool((values == values[0]).all()):
            return Interval.undefined(f"undefined because the {name} is the same for all examples")
    generator = torch.Generator().manual_seed(seed)
    blocks = resample_counts(len(uncertainty), resamples, level=level, generator=generator)
    resampled = [_weighted_spearman(uncertainty, disagreement, counts) for counts in blocks]
    value = float(stats.spearmanr(uncertainty.numpy(), disagreement.numpy()).statistic)
    # a resample of equals has no correlation; the interval is of those that have one
    return percentile_interval(value, [one[one.isfinite()] for one in resampled], level)


def _weighted_spearman(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Spearman's correlation of every resample: Pearson's of the mid-ranks that each resample gives."""
    ranks = [_mid_ranks(values, counts) for values in (first, second)]
    total = counts.sum(1, keepdim=True)
    centred = [rank - (counts * rank).sum(1, keepdim=True) / total for rank in ranks]
    covariance = (counts * centred[0] * centred[1]).sum(1)
    return covariance / ((counts * centred[0] ** 2).sum(1) * (counts * centred[1] ** 2).sum(1)).sqrt()


def _mid_ranks(values: Tensor, counts: Tensor) -> Tensor:
    group = torch.unique(values, return_inverse=True)[1]
    sizes = torch.zeros(len(counts), int(group.max()) + 1, dtype=torch.float64).index_add(1, group, counts)
    return (sizes.cumsum(1) - sizes / 2)[:, group]
