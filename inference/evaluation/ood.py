"""Uncertainty of a prediction, split by its source, and the scores by which foreign examples may be told apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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


class Scored(Protocol):
    """The part of a predictive distribution that scores are made of."""

    @property
    def probs(self) -> Tensor:
        """Class probabilities of each draw, ``(draws, examples, classes)``."""


@dataclass(frozen=True)
class OodScore:
    """A score that should be larger on foreign examples.

    Attributes:
        name: key in a report, as ``auroc_<name>/<data set>``.
        title: what a table prints.
        function: from a prediction to ``(examples,)``.
        needs_disagreement: whether the score is constant, hence empty, unless draws differ.
        needs_energy: whether the score is made of what the softmax throws away.
    """

    name: str
    title: str
    function: Callable[["Scored"], Tensor]
    needs_disagreement: bool = False
    needs_energy: bool = False

    def undefined_reason(self, *predictions: "Scored") -> str | None:
        """Say why this score cannot rank the examples of these predictions, or None if it can.

        Args:
            predictions: those of each data set to be compared.
        """
        if self.needs_energy and any(getattr(one, "energy", None) is None for one in predictions):
            return "undefined for a prediction that keeps no logits"
        if not self.needs_disagreement:
            return None
        probs = [one.probs for one in predictions]
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


def energy_score(prediction: Scored) -> Tensor:
    """Free energy of the logits, minus their log-sum-exp, averaged over draws, in nats: larger where all logits are small.

    ``energy_score(posterior.predict(task.test))``

    It sees what the softmax throws away. For labels that are words of a vocabulary the logits are those of the label words.

    Args:
        prediction: a `Predictive` that kept its energies.

    Shape:
        Returns ``(examples,)``.

    Raises:
        ValueError: the prediction kept no energies, as a linearised one does not.

    Liu et al. 2020, "Energy-based out-of-distribution detection", equation 4, at temperature 1.
    """
    energy: Tensor | None = getattr(prediction, "energy", None)
    if energy is None:
        raise ValueError(
            "prediction: got one without energies, expected one that came through the network. Predict with kind='mc' or "
            "kind='mean'."
        )
    return energy.detach().cpu().double().mean(0)


OOD_SCORES: dict[str, OodScore] = {
    score.name: score
    for score in (
        OodScore("entropy", "entropy", lambda prediction: predictive_entropy(prediction.probs)),
        OodScore(
            "mutual_information",
            "mutual information",
            lambda prediction: mutual_information(prediction.probs),
            needs_disagreement=True,
        ),
        OodScore(
            "max_probability", "max probability", lambda prediction: max_probability_uncertainty(prediction.probs)
        ),
        OodScore("energy", "energy", energy_score, needs_energy=True),
    )
}


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
