"""Few-shot episodes: N classes, K labelled images of each, and queries to be told apart, drawn without end from a seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from pyrolora.models.settings import check_numbers
from pyrolora.models.tasks.augmentation import Augmentation
from pyrolora.models.tasks.example import Example
from pyrolora.models.tasks.images import KEPT_BYTES, EncodedImages, ImageClasses, encode_images
from pyrolora.models.tasks.task import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUERIES = 15
# episodes of train, validation and test; 600 test episodes are usual in the field
COUNTS = (2000, 100, 600)
NAMED = re.compile(r"(?P<task>.+):(?P<ways>\d+)w(?P<shots>\d+)s((?P<queries>\d+)q)?")


@dataclass(frozen=True)
class EpisodeClasses:
    """The classes of an episode, numbered anew in each: which of ``ways`` classes is the query's?

    Usage: ``EpisodeClasses(ways=5, shots=1, queries=15)``.

    Args:
        ways: classes of an episode.
        shots: labelled images of each class.
        queries: images of each class to be told apart.
        scale: inverse temperature of the cosines with the classes' prototypes.
        bias: added to every cosine; no probability depends on it.

    Raises:
        ValueError: fewer than two classes, one image or one query, a broken count, or a scale that is not positive.
    """

    kind: ClassVar[Literal["episode"]] = "episode"
    fields: ClassVar[tuple[str, ...]] = ("image",)

    ways: int = 5
    shots: int = 1
    queries: int = QUERIES
    scale: float = 10.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"An episode needs {name} of at least {least}; got {getattr(self, name)}. Usual are 5 ways, 1 or 5 shots "
                    f"and {QUERIES} queries."
                )
        if not self.scale > 0:
            raise ValueError(f"The scale of the cosines must be positive; got {self.scale}. It usually starts at 10.")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, which mean nothing beyond their episode."""
        return tuple(f"class {way}" for way in range(self.ways))

    @property
    def rows(self) -> int:
        """Queries of one episode."""
        return self.ways * self.queries

    def prompt(self, example: Example) -> str:
        """There is no text before the answer."""
        return ""

    def label_ids(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
        """The classes by number: they have no rows in a vocabulary."""
        return tuple(range(self.ways))

    def encode(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> NoReturn:
        """Images become no tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError("These episodes are of images, which a tokenizer cannot read. Use a vision backbone.")


@dataclass(frozen=True)
class EpisodeSplit(Split):
    """Episodes drawn from a pool of images; its length is the number of queries in all of them.

    Usage: ``len(task.test)``, ``task.test.subset(750)``.

    Args:
        examples: the images that episodes are drawn from, with their classes.
        classes: classes of an episode.
        count: number of episodes.
        rows_each: queries of one episode.
        seed: decides the episodes; the i-th depends on the seed and i alone.
        shots: labelled images of each class; a model that was tuned with another number answers by prototypes of these.
    """

    count: int = COUNTS[-1]
    rows_each: int = 5 * QUERIES
    seed: int = 0
    shots: int = 1

    def __len__(self) -> int:
        return self.count * self.rows_each

    def subset(self, size: int, seed: int = 0) -> EpisodeSplit:
        """As many episodes as ``size`` queries fill, other ones under another seed; see `Split.subset`.

        Raises:
            ValueError: less than one episode, or more than there are.
        """
        count = size // self.rows_each
        if not 1 <= count <= self.count:
            raise ValueError(
                f"A subset of {size} queries was asked of {self.task} {self.name}, whose {self.count} episodes have "
                f"{self.rows_each} each; ask for {self.rows_each} to {len(self)}."
            )
        mixed = _mixed(self.seed, seed) if seed else self.seed
        return replace(self, count=count, seed=mixed)


def episodic(
    task: Task,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = QUERIES,
    counts: tuple[int, int, int] = COUNTS,
    held_out: float = 0.0,
    seed: int = 0,
) -> Task:
    """Few-shot episodes over the classes of an image task: ``episodic(task("omniglot", data_dir), ways=5, shots=1)``.

    All images of the task are one pool. By default every split draws its episodes from all classes, which is right where a
    domain is only trained on, or only tested on; with ``held_out`` the classes of the three splits are disjoint.

    Args:
        task: an image task.
        ways: see `EpisodeClasses`.
        shots: see `EpisodeClasses`.
        queries: see `EpisodeClasses`.
        counts: episodes of train, validation and test.
        held_out: share of the classes for validation, and the same for test; 0 for all classes everywhere.
        seed: decides which classes are held out, and the episodes.

    Raises:
        ValueError: a task of another kind, too few classes or images, or a count or share out of range.
    """
    form = EpisodeClasses(ways, shots, queries)
    if not isinstance(task.format, ImageClasses):
        raise ValueError(
            f"The task {task.name!r} is asked as {task.format.kind}; episodes are drawn from images of classes."
        )
    if not 0 <= held_out < 0.5:
        raise ValueError(f"held_out is a share of the classes in [0, 0.5); got {held_out}. Try 0.2, or 0 for all.")
    if min(counts) < 1:
        raise ValueError(f"Every split needs at least one episode; got counts={counts}.")
    pool = (*task.train.examples, *task.validation.examples, *task.test.examples)
    classes = np.array(sorted({example.label for example in pool}))
    shares = [classes] * 3
    if held_out:
        size = max(ways, round(held_out * len(classes)))
        mixed = np.random.default_rng([seed, len(classes)]).permutation(classes)
        shares = [mixed[2 * size :], mixed[:size], mixed[size : 2 * size]]
    splits: list[EpisodeSplit] = []
    for number, (name, kept, count) in enumerate(zip(("train", "validation", "test"), shares, counts, strict=True)):
        chosen = set(kept.tolist())
        examples = tuple(example for example in pool if example.label in chosen)
        _check_pool(examples, form, f"{task.name} {name}")
        splits.append(EpisodeSplit(name, task.name, examples, ways, count, form.rows, _mixed(seed, number), shots))
    named = f"{task.name}:{ways}w{shots}s{queries}q"
    train, validation, test = splits
    return Task(named, form.labels, form, train, validation, test, description=task.description, licence=task.licence)


def named_episodes(name: str) -> tuple[str, tuple[int, int, int]] | None:
    """The task in a name such as ``omniglot:5w1s`` or ``mnist:5w5s10q``, and ways, shots and queries; None in any other."""
    found = NAMED.fullmatch(name)
    if found is None:
        return None
    return found["task"], (int(found["ways"]), int(found["shots"]), int(found["queries"] or QUERIES))


def _check_pool(examples: Sequence[Example], form: EpisodeClasses, name: str) -> None:
    sizes: dict[int, int] = {}
    for example in examples:
        sizes[example.label] = sizes.get(example.label, 0) + 1
    if len(sizes) < form.ways:
        raise ValueError(
            f"{name} has {len(sizes)} classes, and an episode takes {form.ways}. Ask for fewer ways, or hold fewer "
            "classes out."
        )
    needed = form.shots + form.queries
    label, fewest = min(sizes.items(), key=lambda entry: entry[1])
    if fewest < needed:
        raise ValueError(
            f"{name} has {fewest} images of the class {label}, and an episode takes {form.shots} shots and {form.queries} "
            f"queries of each. Ask for at most {fewest} together, or leave classes of fewer than {needed} images out."
        )


@dataclass(frozen=True, eq=False)
class EncodedEpisodes(EncodedImages):
    """Episodes at a network's size.

    A batch holds whole episodes, E of them with S = ways * shots labelled images and Q = ways * queries queries:
    ``support`` ``(E, S, channels, size, size)`` float32 in [0, 1], ``support_labels`` ``(E, S)``; of the queries, episode by
    episode, ``pixel_values`` ``(E * Q, channels, size, size)``, and ``labels`` and ``index``, ``(E * Q,)``.

    Args:
        classes_of: class of every image of the pool.
        form: ways, shots and queries.
        count: number of episodes.
        seed: decides them.
    """

    classes_of: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    form: EpisodeClasses = field(default_factory=EpisodeClasses)
    count: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return self.count * self.form.rows

    @property
    def described(self) -> tuple[object, ...]:
        """See `EncodedSplit.described`: what decides the episodes."""
        return self.form, self.count, self.seed, self.classes_of.tolist()

    @cached_property
    def _members(self) -> list[np.ndarray]:
        """Positions in the pool of every class's images."""
        classes = self.classes_of.numpy()
        return [np.flatnonzero(classes == label) for label in np.unique(classes)]

    @cached_property
    def _pool(self) -> Tensor | None:
        """All images, where they fit."""
        first = self._image(0)
        if len(self.rows) * first.numel() > KEPT_BYTES:
            return None
        return torch.stack([self._image(position) for position in range(len(self.rows))])

    def episode(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the pool of an episode's labelled images and of its queries, disjoint.

        Shape:
            ``(ways, shots)`` and ``(ways, queries)``
        """
        chance = np.random.default_rng([self.seed, number])
        chosen = chance.choice(len(self._members), self.form.ways, replace=False)
        needed = self.form.shots + self.form.queries
        drawn = np.stack([chance.choice(self._members[place], needed, replace=False) for place in chosen])
        return drawn[:, : self.form.shots], drawn[:, self.form.shots :]

    def batch(self, positions: list[int], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """See `EncodedSplit.batch`; the positions are queries, of whole episodes.

        Raises:
            ValueError: part of an episode.
        """
        numbers = self._whole(positions)
        pairs = [self.episode(number) for number in numbers]
        support, queries = (np.stack(part).reshape(len(numbers), -1) for part in zip(*pairs, strict=True))
        local = torch.arange(self.form.ways)
        tensors = {
            "support": self._images(support, device),
            "support_labels": local.repeat_interleave(self.form.shots).repeat(len(numbers), 1),
            "pixel_values": self._images(queries, device).flatten(0, 1),
            "labels": local.repeat_interleave(self.form.queries).repeat(len(numbers)),
            "index": torch.tensor(positions, dtype=torch.int64),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _whole(self, positions: list[int]) -> list[int]:
        """The episodes that positions of queries make up."""
        rows = self.form.rows
        numbers = [position // rows for position in positions[::rows]]
        if positions != [number * rows + row for number in numbers for row in range(rows)]:
            raise ValueError(f"Positions of {self.name} must be whole episodes of {rows} queries in their order.")
        return numbers

    def _images(self, positions: np.ndarray, device: torch.device | str | None) -> Tensor:
        flat = positions.flatten()
        pool = self._pool
        images = (
            torch.stack([self._image(int(place)) for place in flat]) if pool is None else pool[torch.from_numpy(flat)]
        )
        return (images.to(device).float() / 255).unflatten(0, positions.shape)

    def steps_per_epoch(self, size: int, *, drop_last: bool = False) -> int:
        """See `EncodedSplit.steps_per_epoch`; a batch holds as many episodes as ``size`` queries fill, at least one."""
        super().steps_per_epoch(size)
        together = self._together(size)
        return self.count // together if drop_last else -(-self.count // together)

    def _together(self, size: int) -> int:
        return max(1, size // self.form.rows)

    def _order(self, size: int, shuffle: bool, generator: torch.Generator | None, drop_last: bool) -> list[list[int]]:
        together, rows = self._together(size), self.form.rows
        order = torch.randperm(self.count, generator=generator).tolist() if shuffle else list(range(self.count))
        if drop_last:
            order = order[: self.count - self.count % together]
        return [
            [number * rows + row for number in order[first : first + together] for row in range(rows)]
            for first in range(0, len(order), together)
        ]


def encode_episodes(split: Split, form: EpisodeClasses, *, channels: int, size: int, tokens: int) -> EncodedEpisodes:
    """Put episodes to a network's size: ``encode_episodes(task.test, task.format, channels=1, size=28, tokens=17)``.

    Args:
        split: episodes, of this task or of another one, with any number of shots: prototypes are means of however many.
        form: the format that the model was made for; its ways and queries are the split's as well.
        channels: see `encode_images`.
        size: see `encode_images`.
        tokens: see `encode_images`.

    Raises:
        ValueError: a split that is none of episodes, or whose episodes have another format.
    """
    if not isinstance(split, EpisodeSplit):
        named = named_episodes(split.task)
        remedy = (
            f"Name the task '{split.task}:{form.ways}w{form.shots}s', or make it with episodic(task)."
            if named is None
            else "Single images cannot be classified without labelled ones beside them: give a split of "
            f"task({split.task!r}), or judge the posterior with 'pyrolora episodes'."
        )
        raise ValueError(f"{split.task} {split.name} is no split of episodes. {remedy}")
    if split.rows_each != form.rows or split.classes != form.ways:
        raise ValueError(
            f"{split.task} {split.name} has episodes of {split.classes} classes and {split.rows_each} queries, and the "
            f"model's have {form.ways} and {form.rows}. Draw both with the same ways and queries; shots may differ."
        )
    form = replace(form, shots=split.shots)
    _check_pool(split.examples, form, f"{split.task} {split.name}")
    images = encode_images(split, ImageClasses(form.labels), channels=channels, size=size, tokens=tokens)
    return EncodedEpisodes(
        name=images.name,
        kind="episode",
        rows=images.rows,
        labels=torch.arange(form.ways).repeat_interleave(form.queries).repeat(split.count),
        classes=form.ways,
        label_ids=form.label_ids(None),
        pad_id=0,
        padding="right",
        classes_of=images.labels,
        form=form,
        count=split.count,
        seed=split.seed,
    )


@dataclass(frozen=True, eq=False)
class SupportEpisodes(EncodedEpisodes):
    """The labelled images of one episode as data to tune on: augmented copies of them are the queries.

    Step by step the copies are others; the labelled images, and so the classes, stay. Nothing of the episode's own queries is
    seen. Made by `support_of`.

    Args:
        support: the labelled images.
        augmentation: makes the queries of them.
    """

    support: Tensor = field(default_factory=lambda: torch.zeros(0))
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def described(self) -> tuple[object, ...]:
        """See `EncodedSplit.described`."""
        return *super().described, self.augmentation, hashlib.sha256(self.support.numpy().tobytes()).hexdigest()

    def batch(self, positions: list[int], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """See `EncodedEpisodes.batch`."""
        numbers = self._whole(positions)
        copies = [
            self.augmentation(self.support, torch.Generator().manual_seed(_mixed(self.seed, number)))
            for number in numbers
        ]
        labels = torch.arange(self.form.ways).repeat_interleave(self.form.shots)
        tensors = {
            "support": self.support.expand(len(numbers), *self.support.shape),
            "support_labels": labels.repeat(len(numbers), 1),
            "pixel_values": torch.cat(copies),
            "labels": labels.repeat(len(numbers)),
            "index": torch.tensor(positions, dtype=torch.int64),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def support_of(
    encoded: EncodedEpisodes, number: int, augmentation: Augmentation | None = None, *, count: int = 100
) -> SupportEpisodes:
    """What may be tuned on before an episode's queries are answered: ``support_of(model.encode(target.test), 0)``.

    Source: Hu et al., "Pushing the Limits of Simple Pipelines for Few-Shot Learning", 2022, section 3.3: the labelled images
    are the support, augmented copies of them the queries.

    Args:
        encoded: episodes.
        number: which of them.
        augmentation: makes queries of the labelled images.
        count: how many times; the size of the data that a likelihood is scaled to is this times the labelled images.

    Raises:
        TypeError: episodes that no network's size was given to.
        ValueError: no such episode.
    """
    if not isinstance(encoded, EncodedEpisodes):
        raise TypeError(
            f"support_of got an object of {type(encoded).__name__}, expected encoded episodes, such as "
            "model.encode(task.test)."
        )
    if not 0 <= number < encoded.count:
        raise ValueError(f"{encoded.name} has the episodes 0 to {encoded.count - 1}; got {number}.")
    rows = encoded.form.rows
    support = encoded.batch(list(range(number * rows, (number + 1) * rows)))["support"][0]
    form = replace(encoded.form, queries=encoded.form.shots)
    return SupportEpisodes(
        name=f"support of {encoded.name} {number}",
        kind="episode",
        rows=encoded.rows,
        labels=torch.arange(form.ways).repeat_interleave(form.shots).repeat(count),
        classes=form.ways,
        label_ids=encoded.label_ids,
        pad_id=0,
        padding="right",
        classes_of=encoded.classes_of,
        form=form,
        count=count,
        seed=_mixed(encoded.seed, number),
        support=support,
        augmentation=Augmentation() if augmentation is None else augmentation,
    )


def _mixed(*seeds: int) -> int:
    return int(np.random.SeedSequence(list(seeds)).generate_state(1)[0])
