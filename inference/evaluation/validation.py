"""What every metric demands of its input, checked once and reported by row."""

import torch
from torch import Tensor

# float32 softmax sums to one within 1e-6; probabilities averaged in half precision stay within this
SUM_TOLERANCE = 1e-3


def check_probabilities(probs: Tensor, *, source: str = "probs") -> Tensor:
    """Return the probabilities detached, on the CPU and in at least float32, or say which row is wrong.

    ``probs = check_probabilities(predictive.probs.mean(0), source="posterior 'blob'")``

    Args:
        probs: class probabilities; the last dimension holds the classes.
        source: whose probabilities these are, for the message.

    Shape:
        probs: ``(..., examples, classes)``; the same shape is returned.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: no examples, fewer than two classes, NaN, a value outside [0, 1] or a row that does not
            sum to one.
    """
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        came = f"a tensor of {probs.dtype}" if isinstance(probs, Tensor) else type(probs).__name__
        raise TypeError(
            f"{source}: got {came}, expected a floating-point tensor of class probabilities. "
            "Apply softmax to logits, or torch.as_tensor to an array, first."
        )
    if probs.ndim < 2 or probs.numel() == 0 or probs.shape[-1] < 2:
        raise ValueError(
            f"{source}: got shape {tuple(probs.shape)}, expected (..., examples, classes) with at least one "
            "example and two classes. For a binary model give both columns, [1 - p, p]."
        )
    probs = probs.detach().cpu()
    if probs.dtype not in (torch.float32, torch.float64):
        probs = probs.float()
    rows = probs.reshape(-1, probs.shape[-1])
    _refuse(
        rows.isnan().any(1),
        probs,
        source,
        "holds NaN",
        "The fit has probably diverged: look at its loss, or lower the learning rate.",
    )
    _refuse(
        ((rows < 0) | (rows > 1 + SUM_TOLERANCE)).any(1),
        probs,
        source,
        "leaves [0, 1]",
        "These look like logits: apply softmax over the last dimension first.",
    )
    _refuse(
        (rows.sum(1) - 1).abs() > SUM_TOLERANCE,
        probs,
        source,
        f"does not sum to one within {SUM_TOLERANCE:g}",
        "Restrict the logits to the classes before the softmax, not after it.",
    )
    return probs.clamp(max=1.0)  # torchmetrics takes anything above one, even by rounding, for a logit


def check_predictions(probs: Tensor, labels: Tensor, *, source: str = "probs") -> tuple[Tensor, Tensor]:
    """Check probabilities together with the labels that they are judged by.

    ``probs, labels = check_predictions(probs, labels)``

    Args:
        probs: class probabilities, one row an example.
        labels: index of the true class of each example.
        source: whose probabilities these are, for the message.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``, any integer type; returned as int64.

    Raises:
        TypeError: labels that are not integers.
        ValueError: lengths that differ or a label outside the classes, besides all that `check_probabilities`
            refuses.
    """
    probs = check_probabilities(probs, source=source)
    if probs.ndim != 2:
        raise ValueError(
            f"{source}: got shape {tuple(probs.shape)}, expected (examples, classes). "
            "Average the draws first: probs.mean(0)."
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        came = f"a tensor of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"{source}: got labels as {came}, expected a tensor of class indices. Use torch.as_tensor(labels).long()."
        )
    if labels.shape != probs.shape[:1]:
        raise ValueError(
            f"{source}: got labels of shape {tuple(labels.shape)} for {len(probs)} rows of probabilities, "
            f"expected ({len(probs)},). Give one label for each row, in the same order."
        )
    labels = labels.detach().cpu().long()
    outside = (labels < 0) | (labels >= probs.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{source}: label {int(labels[row])} of row {row} is not one of the {probs.shape[1]} classes "
            f"0..{probs.shape[1] - 1}. Drop unlabelled rows, or predict with the task that these labels "
            "belong to."
        )
    return probs, labels


def _refuse(wrong: Tensor, probs: Tensor, source: str, what: str, remedy: str) -> None:
    if not wrong.any():
        return
    flat = int(wrong.nonzero()[0])
    examples = probs.shape[-2]
    where = f"row {flat % examples}" + (f" of draw {flat // examples}" if probs.ndim > 2 else "")
    values = [round(value, 4) for value in probs.reshape(-1, probs.shape[-1])[flat][:6].tolist()]
    more = ", ..." if probs.shape[-1] > 6 else ""
    came = f"[{', '.join(map(str, values))}{more}]"
    raise ValueError(
        f"{source}: {where} {what}: {came} ({int(wrong.sum())} such rows); expected probabilities. {remedy}"
    )
