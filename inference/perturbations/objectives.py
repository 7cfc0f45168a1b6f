"""What an attack on pixels makes large."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.naming import nearest

DIRECTIONS = ("code", "paper")

Predict = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], Tensor]


def divergence(clean: Tensor, adversarial: Tensor, direction: str = "code") -> Tensor:
    """KL between the class probabilities of clean and of attacked rows: ``divergence(logits, attacked_logits)``.

    Args:
        clean: logits of the clean rows.
        adversarial: logits of the same rows, attacked.
        direction: ``"code"``, ``KL(clean || adversarial)`` as the released AMT and TRADES have it; ``"paper"``,
            ``KL(adversarial || clean)`` as AMT's equation 5 is printed.

    Shape:
        ``(..., classes)`` twice; returns ``(...)``, nats

    Raises:
        ValueError: an unknown direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(
            f"Unknown direction {direction!r} of the divergence. Did you mean {nearest(direction, DIRECTIONS)!r}? "
            f"Directions: {', '.join(DIRECTIONS)}."
        )
    first, second = clean.log_softmax(-1), adversarial.log_softmax(-1)
    if direction == "paper":
        first, second = second, first
    return functional.kl_div(second, first, reduction="none", log_target=True).sum(-1)


def divergence_objective(predict: Predict, images: Tensor, direction: str = "code") -> Objective:
    """The sum over rows of `divergence` from the clean prediction, which is fixed.

    Its gradient at the clean images is zero, so an attack with it must start elsewhere.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES), 2019, equation 5.

    Args:
        predict: from images to logits.
        images: the clean images.
        direction: see `divergence`.
    """
    with torch.no_grad():
        clean = predict(images)
    return lambda attacked: divergence(clean, predict(attacked), direction).sum()


def cross_entropy_objective(predict: Predict, labels: Tensor) -> Objective:
    """The sum over rows of the cross-entropy of the true labels.

    Args:
        predict: from images to logits.
        labels: classes.

    Shape:
        logits ``(..., classes)``, labels ``(...)``
    """

    def objective(attacked: Tensor) -> Tensor:
        logits = predict(attacked)
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")

    return objective
