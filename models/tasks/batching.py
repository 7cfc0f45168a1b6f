"""Splits tokenised once, and batches of close lengths, in the same order for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pyrolora.models.tasks.formats import Format
from pyrolora.models.tasks.prompts import EncodedRow
from pyrolora.models.tasks.task import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_BATCHES = 8  # shuffled examples are sorted by length within this many batches: little padding, still random


def encode(
    split: Split,
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 300,
    padding: Literal["left", "right"] = "left",
) -> EncodedSplit:
    """Tokenise a split, once.

    Usage: ``encode(task.train, task.format, tokenizer)``. To see how a model takes questions from elsewhere,
    encode
    another task's split with the format of the task it was fitted on.

    Args:
        split: the examples.
        format: how they are asked.
        tokenizer: of the backbone.
        max_length: tokens; a longer prompt loses its beginning.
        padding: the side on which shorter rows of a batch are filled.

    Raises:
        TypeError: not a split.
        ValueError: examples that do not fit the format, ambiguous label words, or a bad `padding` or
            `max_length`.
    """
    if isinstance(split, Task):
        raise TypeError(f"encode got the task {split.name!r}, expected one of its splits, such as task.train.")
    if padding not in ("left", "right"):
        raise ValueError(f"padding={padding!r}, expected 'left' or 'right'.")
    if max_length < 1:
        raise ValueError(f"max_length={max_length}, expected the number of tokens, 1 or more.")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise ValueError("The tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token.")
    label_ids = format.label_ids(tokenizer)
    rows = format.encode(tokenizer, split.examples, max_length)
    options = max((len(row.option_lengths) for row in rows), default=0)
    return EncodedSplit(
        name=f"{split.task} {split.name}",
        kind=format.kind,
        rows=tuple(rows),
        labels=torch.tensor([example.label for example in split.examples], dtype=torch.int64),
        classes=len(label_ids) if format.kind == "label" else max(split.classes, options),
        label_ids=label_ids,
        pad_id=int(pad_id),
        padding=padding,
        vectors=stacked_vectors(split),
    )


def stacked_vectors(split: Split) -> dict[str, Tensor]:
    """The vectors that every example has, ``(N, width)`` each: ``stacked_vectors(task.train)["sequence"]``.

    Args:
        split: examples of any kind.

    Raises:
        ValueError: some examples have a vector and others not, or of another width.
    """
    stacked = {}
    for name in dict.fromkeys(name for example in split for name in example.vectors):
        lacking = next((example.id for example in split if name not in example.vectors), None)
        if lacking is not None:
            raise ValueError(
                f"Example {lacking!r} of {split.task} {split.name} has no vector {name!r}, and others have."
            )
        widths = sorted({tuple(example.vectors[name].shape) for example in split})
        if len(widths) > 1 or len(widths[0]) != 1:
            raise ValueError(
                f"The vectors {name!r} of {split.task} {split.name} have the shapes {widths}, expected one dimension and one "
                "width for all."
            )
        stacked[name] = torch.stack([example.vectors[name] for example in split])
    return stacked


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """A tokenised split.

    Usage: ``for batch in encoded.batches(16): ...`` or, to train, ``for batch in encoded.stream(16, seed=0):
    ...``.

    A batch is a plain dict of tensors. Shape (B examples, T tokens of the longest, K options):
        ``input_ids``, ``attention_mask``: (B, T) int64. ``labels``, ``index``: (B,) int64, the class and the
            position
        in the split. Where options are scored also ``segment_ids`` (0 padding, 1 prompt, 2 + k option k) and
        ``position_ids``: (B, T) int64, ``scored``: (B, T) bool, ``option_mask``: (B, K) bool, and
        ``option_lengths``: (B, K) float32, by which an option's log-likelihood is divided (1 where there is
            no option). Where tokens stand for items also ``items``: (B, T) int64, -1 for a word. And
            a tensor (B, width) for each of `vectors`.

    Args:
        name: task and split, for messages.
        kind: "label", "option", "image" or "episode".
        rows: token ids of each example.
        labels: class, or position of the right option, of each example.
        classes: number of classes, or K.
        label_ids: vocabulary row of each class; empty where options are scored.
        pad_id: token id that fills shorter rows.
        padding: the side that is filled.
        vectors: what gates read of each example, by name, (N, width).
    """

    name: str
    kind: Literal["label", "option", "image", "episode"]
    rows: tuple[EncodedRow, ...]
    labels: Tensor
    classes: int
    label_ids: tuple[int, ...]
    pad_id: int
    padding: Literal["left", "right"]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def described(self) -> tuple[object, ...]:
        """What beside its rows makes two splits the same data, for digests."""
        return self.label_ids, self.labels.tolist()

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each example, (N,) int64."""
        return torch.tensor([len(row) for row in self.rows], dtype=torch.int64)

    def require_trainable(self) -> EncodedSplit:
        """Return the split itself if a classifier can be fitted to it.

        Usage: ``encode(task.train, task.format, tokenizer).require_trainable()``.

        Raises:
            ValueError: no examples, labels that are no classes of the format, or one class only.
        """
        if not len(self):
            raise ValueError(f"{self.name} has no examples; give a larger train_size or another data_dir.")
        found = sorted(set(self.labels.tolist()))
        if found[0] < 0 or found[-1] >= self.classes:
            raise ValueError(
                f"{self.name} has the labels {found}, expected 0 to {self.classes - 1}; use the task's own format."
            )
        if self.kind != "option" and len(found) == 1:
            raise ValueError(
                f"{self.name} has one class only ({found[0]}) in {len(self)} examples; a classifier needs "
                "two or more. "
                "Raise train_size or choose another seed."
            )
        return self

    def batches(
        self,
        size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Return batches that hold every example once.

        Usage: ``for batch in encoded.batches(16): probs[batch["index"]] = ...``.

        In order of length, or shuffled: a permutation, sorted by length within chunks of a few batches, and
            the batches
        in random order.

        Args:
            size: examples a batch.
            shuffle: whether the order is random.
            generator: source of the random order, on the CPU; torch's own when None.
            device: where the tensors go.
            drop_last: leave out the examples that do not fill a batch.

        Raises:
            ValueError: a size below 1, or a generator without `shuffle`.
        """
        if generator is not None and not shuffle:
            raise ValueError("A generator was given, but shuffle is False; pass shuffle=True or no generator.")
        return (self.batch(positions, device) for positions in self._order(size, shuffle, generator, drop_last))

    def steps_per_epoch(self, size: int, *, drop_last: bool = False) -> int:
        """Return the number of batches of one epoch."""
        _check_size(size)
        return len(self) // size if drop_last else -(-len(self) // size)

    def stream(
        self,
        size: int,
        *,
        seed: int,
        start: int = 0,
        device: torch.device | str | None = None,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Return shuffled batches without end, from step `start` on.

        Usage: ``itertools.islice(encoded.stream(16, seed=0, start=step), remaining)``.

        The batch of step k depends on (seed, k) alone, so an interrupted run that starts again at its last
        step sees what an uninterrupted one would have seen.

        Args:
            size: examples a batch.
            seed: 0 or more.
            start: the first step, counted from 0.
            device: where the tensors go.
            drop_last: leave out the examples that do not fill a batch, other ones each epoch.

        Raises:
            ValueError: a negative seed or start, or no batch in an epoch.
        """
        if seed < 0 or start < 0:
            raise ValueError(f"seed={seed}, start={start}: expected both to be 0 or more.")
        steps = self.steps_per_epoch(size, drop_last=drop_last)
        if not steps:
            raise ValueError(
                f"{self.name} has {len(self)} examples, too few for a batch of {size}; use a smaller batch."
            )
        return self._endless(size, seed, start, steps, device, drop_last)

    def _endless(
        self, size: int, seed: int, start: int, steps: int, device: torch.device | str | None, drop_last: bool
    ) -> Iterator[dict[str, Tensor]]:
        epoch, skipped = divmod(start, steps)
        while True:
            # a hash of both, so that neighbouring seeds and epochs share no stream of random numbers
            state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(state)
            for positions in self._order(size, True, generator, drop_last)[skipped:]:
                yield self.batch(positions, device)
            epoch, skipped = epoch + 1, 0

    def _order(self, size: int, shuffle: bool, generator: torch.Generator | None, drop_last: bool) -> list[list[int]]:
        """Return the positions of each batch."""
        _check_size(size)
        count = len(self)
        positions = torch.randperm(count, generator=generator).tolist() if shuffle else list(range(count))
        if drop_last:
            positions = positions[: count - count % size]
        chunk = size * CHUNK_BATCHES if shuffle else max(len(positions), 1)
        ordered: list[int] = []
        for begin in range(0, len(positions), chunk):
            ordered.extend(sorted(positions[begin : begin + chunk], key=lambda position: len(self.rows[position])))
        batches = [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
        if shuffle:
            batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def batch(self, positions: list[int], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Return the batch of the examples at these positions of the split.

        Usage: ``encoded.batch([0, 3])``. The keys and shapes are those of the class description.
        """
        rows = [self.rows[position] for position in positions]
        tensors = {
            "input_ids": self._padded([row.input_ids for row in rows], self.pad_id, torch.int64),
            "attention_mask": self._padded([[1] * len(row) for row in rows], 0, torch.int64),
            "labels": self.labels[positions],
            "index": torch.tensor(positions, dtype=torch.int64),
        }
        if self.kind == "option":
            tensors["segment_ids"] = self._padded([row.segment_ids for row in rows], 0, torch.int64)
            tensors["position_ids"] = self._padded([row.position_ids for row in rows], 0, torch.int64)
            tensors["scored"] = self._padded([row.scored for row in rows], False, torch.bool)
            lengths = torch.ones(len(rows), self.classes)
            mask = torch.zeros(len(rows), self.classes, dtype=torch.bool)
            for place, row in enumerate(rows):
                lengths[place, : len(row.option_lengths)] = torch.tensor(row.option_lengths)
                mask[place, : len(row.option_lengths)] = True
            tensors |= {"option_mask": mask, "option_lengths": lengths}
        if any(row.items for row in rows):
            tensors["items"] = self._padded([row.items or [-1] * len(row) for row in rows], -1, torch.int64)
        tensors |= {name: values[positions] for name, values in self.vectors.items()}
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _padded(self, lists: Sequence[Sequence[int]], fill: int, dtype: torch.dtype) -> Tensor:
        width = max(len(entries) for entries in lists)
        padded = torch.full((len(lists), width), fill, dtype=dtype)
        for place, entries in enumerate(lists):
            begin = width - len(entries) if self.padding == "left" else 0
            padded[place, begin : begin + len(entries)] = torch.tensor(entries, dtype=dtype)
        return padded


def row_count(batch: Mapping[str, Tensor]) -> int:
    """Number of examples of a batch of texts or of images."""
    return batch["input_ids" if "input_ids" in batch else "pixel_values"].shape[0]


def independent_rows(batch: Mapping[str, Tensor]) -> int:
    """Number of runs of rows that may each have a draw of weights of its own: examples, or whole episodes."""
    return batch["support_labels"].shape[0] if "support_labels" in batch else row_count(batch)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"A batch of {size} examples was asked for, expected 1 or more.")
