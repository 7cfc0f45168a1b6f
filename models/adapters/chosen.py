"""The adapters of a model: those that a user gave, and what its task asks for beside them."""

from collections.abc import Sequence

from pyrolora.models.adapters.base import PROGRESS, Adapter
from pyrolora.models.adapters.label_lora import LabelLoRA
from pyrolora.models.adapters.last_layer import LastLayer
from pyrolora.models.adapters.lora import LoRA
from pyrolora.models.tasks import Task


def adapters_for(task: Task, adapter: Adapter | Sequence[Adapter] | None) -> tuple[Adapter, ...]:
    """The adapters of a model of a task: ``adapters_for(task, [LoRA(rank=8), LastLayer()])``.

    Args:
        task: the task; classes of images have no words, so one of images gets a `LastLayer` if there is none.
        adapter: one adapter, several, or None for ``LoRA()``.

    Raises:
        TypeError: an adapter that is none.
        ValueError: an empty list, a `LastLayer` or `LabelLoRA` for classes that are other ones in every episode, or a
            gate that reads a vector of each example of them.
    """
    adapters = _as_adapters(adapter)
    has_head = any(isinstance(one, LastLayer) for one in adapters)
    if task.format.kind == "image" and not has_head:
        # without a head all logits would stay zero
        return (*adapters, LastLayer())
    rows = [type(one).__name__ for one in adapters if isinstance(one, LastLayer | LabelLoRA)]
    if task.format.kind == "episode" and rows:
        raise ValueError(
            f"The classes of {task.name!r} are other ones in every episode, and {rows[0]}() has a row for each class. Leave "
            "it out: queries are compared with prototypes."
        )
    for one in adapters:
        # labelled images and queries go through the network side by side, and no entry of a batch has a row for each
        if task.format.kind == "episode" and (read := [key for key in one.context_keys if key != PROGRESS]):
            raise ValueError(
                f"The gate of {type(one).__name__} reads {read[0]!r} of each example, and the episodes of {task.name!r} "
                "carry images alone. Use it on a task of classes, or LoRAPool here."
            )
    return adapters


def _as_adapters(adapter: Adapter | Sequence[Adapter] | None) -> tuple[Adapter, ...]:
    if adapter is None:
        return (LoRA(),)
    adapters = tuple(adapter) if isinstance(adapter, list | tuple) else (adapter,)
    for one in adapters:
        if not isinstance(one, Adapter):
            given = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise TypeError(f"An adapter is {given}; expected an instance such as LoRA(rank=8), or a list of them.")
    if not adapters:
        raise ValueError("The list of adapters is empty. Give one such as LoRA(rank=8), or leave it out for LoRA().")
    return adapters
