"""Text on which an adapter looks at the network before anything is fitted."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pyrolora.models.backbones import Backbone
from pyrolora.models.naming import suggestion
from pyrolora.models.tasks import encode, names, task

Batch = Mapping[str, Tensor]

ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Calibration:
    """Examples of the task that a model is built for, as an adapter sees them.

    Attributes:
        batches: ``batches(samples, seed)`` gives that many training examples, drawn by the seed, in batches.
        loss: mean negative log-likelihood of a batch under the frozen network, nats; it keeps its graph.
        label_ids: token of each class; empty where options are scored.
        tables: tensors that all examples share; see `Task`.
    """

    batches: Callable[[int, int], Iterator[Batch]]
    loss: Callable[[Batch], Tensor]
    label_ids: tuple[int, ...] = ()
    tables: Mapping[str, Tensor] = field(default_factory=dict)


def calibration_batches(
    backbone: Backbone, source: str | None, own: Calibration | None, samples: int, seed: int, tokens: int = 512
) -> Iterator[Batch]:
    """Batches from a text file, another task's training examples, or the model's own task.

    Args:
        backbone: whose tokenizer reads the text.
        source: a text file, the name of a task, or None for the model's own.
        own: examples of the model's own task.
        samples: rows in all.
        seed: decides which.
        tokens: length of a row cut from a text file.

    Raises:
        ValueError: no own task to fall back on, an unknown name, or a file shorter than one token.
    """
    if source is None:
        if own is None:
            raise ValueError(
                'There is no task to calibrate on. Name one, or a text file, as in calibration="notes.txt".'
            )
        return own.batches(samples, seed)
    if source in names():
        other = task(source)
        split = other.train if len(other.train) <= samples else other.train.subset(samples, seed=seed)
        return encode(split, other.format, backbone.tokenizer).batches(ROWS_AT_ONCE)
    if Path(source).is_file():
        return _windows(backbone, Path(source), samples, seed, tokens)
    raise ValueError(
        f"The calibration source {source!r} is neither a file nor a task.{suggestion(source, names())} "
        "Give a text file, the name of a task, or None for the model's own task."
    )


def _windows(backbone: Backbone, file: Path, samples: int, seed: int, tokens: int) -> Iterator[Batch]:
    """Rows of equal length from all over a text, without overlap while there is enough of it."""
    ids = torch.tensor(backbone.tokenizer(file.read_text(encoding="utf-8"))["input_ids"], dtype=torch.int64)
    if len(ids) == 0:
        raise ValueError(f"The calibration text {str(file)!r} is empty.")
    tokens = min(tokens, len(ids))
    starts = torch.arange(0, len(ids) - tokens + 1, tokens)
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:samples]
    for chosen in starts[order].split(ROWS_AT_ONCE):
        rows = torch.stack([ids[start : start + tokens] for start in chosen.tolist()])
        yield {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
