"""Posterior predictive checks: would labels that the model itself draws look like the observed ones?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.inference.evaluation.validation import check_predictions, check_probabilities
from pyrolora.inference.predictive import Predictive
from pyrolora.models.naming import nearest

Statistic = Callable[[Tensor, Tensor], Tensor]


def _share_of(k: int) -> Statistic:
    return lambda labels, mean_probs: (labels == k).double().mean(-1)


def accuracy_of_labels(labels: Tensor, mean_probs: Tensor) -> Tensor:
    """Share of labels that are the most probable class."""
    return (labels == mean_probs.argmax(-1)).double().mean(-1)


def log_score_of_labels(labels: Tensor, mean_probs: Tensor) -> Tensor:
    """Mean log probability of the labels, nats: observed below what was replicated means overconfident."""
    log_probs = mean_probs.clamp_min(torch.finfo(torch.float32).tiny).log()
    return log_probs.gather(-1, labels.mT).mean(0)


NAMED: Mapping[str, Statistic] = {"accuracy": accuracy_of_labels, "log_score": log_score_of_labels}


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """A statistic of the observed labels among those of replicated ones.

    Attributes:
        name: of the statistic.
        observed: its value on the observed labels.
        replicated: its value on each replicated data set, ``(draws,)``.
    """

    name: str
    observed: float
    replicated: Tensor

    @property
    def p_value(self) -> float:
        """Share of replicated values above the observed one, ties counting one half; near 0 or 1 the model misses it."""
        above = (self.replicated > self.observed).double() + (self.replicated == self.observed).double() / 2
        return float(above.mean())


def posterior_predictive_check(
    predictive: Predictive,
    statistics: str | Mapping[str, Statistic] | None = None,
    *,
    replications: int = 20,
    seed: int = 0,
) -> dict[str, PredictiveCheck]:
    """Compare statistics of the observed labels with those of labels drawn from the posterior predictive.

    ``posterior_predictive_check(blob.predict(task.test))["log_score"].p_value``

    Args:
        predictive: with its draws and observed labels.
        statistics: a name, or name -> ``(labels (replicated, rows), mean probabilities (rows, classes)) -> (replicated,)``;
            by default the share of every class, the accuracy and the log score.
        replications: data sets drawn from each weight draw.
        seed: of the labels.

    Raises:
        ValueError: no labels, an unknown statistic, invalid probabilities, or no replication.

    Gelman, Meng and Stern 1996, "Posterior predictive assessment of model fitness via realized discrepancies", section 2.
    """
    probs = check_probabilities(predictive.probs).double()
    if predictive.labels is None:
        raise ValueError("predictive: got one without labels, expected observed ones. Predict a labelled split.")
    if replications < 1:
        raise ValueError(f"replications: got {replications}, expected at least 1; 20 is usual.")
    mean, labels = check_predictions(probs.mean(0), predictive.labels)
    chosen = _chosen(statistics, probs.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    flat = probs.reshape(-1, probs.shape[-1])
    drawn = torch.multinomial(flat, replications, replacement=True, generator=generator)
    replicated = drawn.reshape(*probs.shape[:2], replications).movedim(-1, 0).flatten(0, 1)
    return {
        name: PredictiveCheck(name, float(statistic(labels[None], mean).reshape(())), statistic(replicated, mean))
        for name, statistic in chosen.items()
    }


def _chosen(statistics: str | Mapping[str, Statistic] | None, classes: int) -> Mapping[str, Statistic]:
    shares = {f"share_of_{k}": _share_of(k) for k in range(classes)}
    known = {**NAMED, **shares}
    if statistics is None:
        return known
    if isinstance(statistics, str):
        if statistics not in known:
            raise ValueError(
                f"statistics: got {statistics!r}, expected one of {', '.join(map(repr, known))}. "
                f"Did you mean {nearest(statistics, known)!r}?"
            )
        return {statistics: known[statistics]}
    return statistics
