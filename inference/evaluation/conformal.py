"""Conformal prediction sets from the probabilities of any posterior: split conformal and APS."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.inference.evaluation.validation import check_predictions, check_probabilities
from pyrolora.models.naming import nearest

SCORES = ("split", "aps")


@dataclass(frozen=True)
class SetQuality:
    """What prediction sets are worth on labelled examples.

    ``conformal.judge(test.mean_probs, test.labels).coverage``

    Attributes:
        coverage: share of sets that hold the true class.
        mean_size: classes in a set, on average.
        empty: share of sets without any class.
    """

    coverage: float
    mean_size: float
    empty: float


@dataclass(frozen=True)
class ConformalSets:
    """Sets of classes that hold the true one with a promised probability, whatever the model's mistakes.

    Usage::

        conformal = conformalise(held_out.mean_probs, held_out.labels, miscoverage=0.1, score="aps")
        conformal.sets(test.mean_probs)          # (examples, classes) of booleans

    The promise is marginal and holds for examples exchangeable with those of the calibration, which must not have served to
    fit or choose anything else.

    Attributes:
        score: ``"split"`` or ``"aps"``.
        miscoverage: promised share of sets without the true class, at most.
        threshold: largest score that is let in; infinite where the calibration set is too small for the promise, and every
            set then holds every class.
        seed: of the random numbers that break APS's ties; None for sets without randomness.
    """

    score: str
    miscoverage: float
    threshold: float
    seed: int | None = None

    def sets(self, probs: Tensor) -> Tensor:
        """Which classes are in the set of each example.

        Args:
            probs: class probabilities, already averaged over draws.

        Shape:
            probs: ``(examples, classes)``. Returns the same shape, bool.

        Raises:
            ValueError: invalid probabilities.
        """
        probs = _checked(probs)
        if math.isinf(self.threshold):
            return torch.ones_like(probs, dtype=torch.bool)
        return _scores(probs, self.score, _uniform(len(probs), self.seed, stream=1)) <= self.threshold

    def judge(self, probs: Tensor, labels: Tensor) -> SetQuality:
        """Coverage and size of the sets of labelled examples.

        Args:
            probs: class probabilities, already averaged over draws.
            labels: true classes.

        Shape:
            probs: ``(examples, classes)``. labels: ``(examples,)``.

        Raises:
            ValueError: invalid probabilities or labels.
        """
        probs, labels = check_predictions(probs, labels)
        sets = self.sets(probs)
        size = sets.sum(1).double()
        inside = sets.gather(1, labels[:, None]).double()
        return SetQuality(float(inside.mean()), float(size.mean()), float((size == 0).double().mean()))


def conformalise(
    probs: Tensor, labels: Tensor, *, miscoverage: float = 0.1, score: str = "split", seed: int | None = 0
) -> ConformalSets:
    """Choose the threshold on calibration data.

    ``conformalise(held_out.mean_probs, held_out.labels, miscoverage=0.1)``

    With ``n`` calibration examples the threshold is the ``ceil((n + 1)(1 - miscoverage))``-th smallest score of a true class.

    Args:
        probs: class probabilities of calibration examples, already averaged over draws.
        labels: true classes.
        miscoverage: share of sets that may miss the true class, strictly between 0 and 1.
        score: ``"split"``, one minus the probability of a class: the smallest sets on average. ``"aps"``, the probability of
            all likelier classes: larger sets, which adapt to hard examples.
        seed: of the random share of a class's own probability that makes APS exact; None leaves it out, which makes its sets
            larger than needed.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``.

    Raises:
        ValueError: invalid probabilities or labels, an unknown score, or a miscoverage out of range.

    Vovk, Gammerman and Shafer 2005; Sadinle, Lei and Wasserman 2019 (split, equation 6); Romano, Sesia and Candes 2020,
    "Classification with valid and adaptive coverage", equations 5 to 8 (APS).
    """
    if score not in SCORES:
        raise ValueError(
            f"score: got {score!r}, expected one of {', '.join(map(repr, SCORES))}. Did you mean {nearest(score, SCORES)!r}?"
        )
    if not 0 < miscoverage < 1:
        raise ValueError(f"miscoverage: got {miscoverage!r}, expected a share strictly between 0 and 1, such as 0.1.")
    probs, labels = check_predictions(probs, labels)
    scores = _scores(probs.double(), score, _uniform(len(probs), seed, stream=0))
    true_scores = scores.gather(1, labels[:, None])[:, 0].sort().values
    # rounded, for (n + 1)(1 - miscoverage) may come out a little above the whole number it is
    rank = math.ceil(round((len(labels) + 1) * (1 - miscoverage), 9))
    threshold = float(true_scores[rank - 1]) if rank <= len(labels) else math.inf
    return ConformalSets(score, miscoverage, threshold, seed)


def _checked(probs: Tensor) -> Tensor:
    probs = check_probabilities(probs)
    if probs.ndim != 2:
        raise ValueError(
            f"probs: got shape {tuple(probs.shape)}, expected (examples, classes). Average the draws first: probs.mean(0)."
        )
    return probs.double()


def _uniform(examples: int, seed: int | None, *, stream: int) -> Tensor:
    if seed is None:
        return torch.ones(examples, 1, dtype=torch.float64)
    # the calibration examples and those judged later must not share their random numbers
    generator = torch.Generator().manual_seed(2 * seed + stream)
    return torch.rand(examples, 1, generator=generator, dtype=torch.float64)


def _scores(probs: Tensor, score: str, uniform: Tensor) -> Tensor:
    """Conformity score of every class of every example, small for what belongs in the set."""
    if score == "split":
        return 1 - probs
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    likelier = ordered.cumsum(1) - ordered
    return torch.empty_like(probs).scatter_(1, order, likelier + uniform * ordered)
