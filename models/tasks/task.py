"""Task, split and the specification by which a user adds a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from pyrolora.models.tasks.example import Example
from pyrolora.models.tasks.formats import Format, Verbaliser
from pyrolora.models.tasks.readers import Reader
from pyrolora.models.tasks.sources import Files, Hub, Package
from pyrolora.models.tasks.splitting import SplitRule, choose

__all__ = ["Example", "Split", "Task", "TaskSpec"]


@dataclass(frozen=True)
class Split:
    """The examples of train, validation or test.

    Usage: ``len(task.test)``, ``for example in task.test``, ``task.test.subset(200, seed=0)``.

    Args:
        name: "train", "validation" or "test".
        task: name of the task.
        examples: the examples.
        classes: number of classes, or of options at most.
    """

    name: str
    task: str
    examples: tuple[Example, ...]
    classes: int

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def subset(self, size: int, seed: int = 0) -> Split:
        """Return a split of `size` examples, stratified where the labels are classes.

        Usage: ``task.test.subset(200, seed=0)``. The same seed gives the same subset, on every machine.

        Args:
            size: how many, from 1 to ``len(self)``.
            seed: a different seed gives a different subset.

        Raises:
            ValueError: a size out of range.
        """
        if not 1 <= size <= len(self):
            raise ValueError(
                f"A subset of {size} examples was asked of {self.task} {self.name}; it has 1 to {len(self)}."
            )
        return replace(self, examples=choose(self.examples, size, seed))


@dataclass(frozen=True)
class Task:
    """A data set with one way to ask its question.

    Usage: ``task("arc_easy").train``. The three splits are disjoint; choose on validation, report on test.

    Args:
        name: the registered name.
        labels: names of the classes, or letters for the positions of the options.
        format: how the question is asked.
        train: to fit on.
        validation: to choose on.
        test: to report on, the same whatever the seed and the training size.
        description: what it is, and where its splits come from.
        licence: licence of the data.
        tables: tensors that all examples share, by name, such as embeddings of items.
    """

    name: str
    labels: tuple[str, ...]
    format: Format
    train: Split
    validation: Split
    test: Split
    description: str
    licence: str
    tables: Mapping[str, Tensor] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class TaskSpec:
    """All that is needed to add a task; see `pyrolora.models.tasks.registry.register` for a whole example.

    Args:
        name: by which `task` finds it.
        fields: the texts of an example that the prompt may show.
        labels: names of the classes, or letters for the positions of the options.
        format: how the question is asked.
        reader: turns one row into an example.
        sources: where the rows come from when no ``data_dir`` is given; the first one is used.
        files: how the files of a ``data_dir`` are named.
        split: what becomes train, validation and test.
        description: what it is, and where its splits come from.
        licence: licence of the data.

    Raises:
        ValueError: a template field that the examples lack, equal labels, or a verbaliser with another number
            of labels.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    format: Format
    reader: Reader
    sources: tuple[Package | Hub, ...] = ()
    files: Files = field(default_factory=Files)
    split: SplitRule = field(default_factory=SplitRule)
    description: str = ""
    licence: str = "not stated"

    def __post_init__(self) -> None:
        missing = sorted(set(self.format.fields) - set(self.fields))
        if missing:
            raise ValueError(
                f"The template of task {self.name!r} names {missing}, but its examples have the fields "
                f"{list(self.fields)}. "
                "Rename one of them."
            )
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(
                f"Task {self.name!r} has the labels {list(self.labels)}, expected two or more different ones."
            )
        if isinstance(self.format, Verbaliser) and len(self.format.labels) != len(self.labels):
            raise ValueError(
                f"Task {self.name!r} has {len(self.labels)} labels, but its verbaliser has "
                f"{len(self.format.labels)} words. "
                "Give one word for each label, in the same order."
            )
