"""Tasks by name: `task` builds one, `register` adds one, `names` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pyrolora.models.naming import suggestion
from pyrolora.models.tasks.catalogue import SHIPPED
from pyrolora.models.tasks.episodes import episodic, named_episodes
from pyrolora.models.tasks.example import Example, Row
from pyrolora.models.tasks.image_tasks import SHIPPED_IMAGES, ImageTaskSpec, joined
from pyrolora.models.tasks.readers import Reader
from pyrolora.models.tasks.sources import Package, Parts
from pyrolora.models.tasks.task import Split, Task, TaskSpec

Spec = TypeVar("Spec", TaskSpec, ImageTaskSpec)
_SPECS: dict[str, TaskSpec | ImageTaskSpec] = {spec.name: spec for spec in SHIPPED}
_SPECS.update({spec.name: spec for spec in SHIPPED_IMAGES})
_OWN = frozenset(_SPECS)


def names() -> tuple[str, ...]:
    """Return the names that `task` knows, in alphabetical order."""
    return tuple(sorted(_SPECS))


def register(spec: Spec) -> Spec:
    r"""Add a task.

    Usage: write the rows to ``train.jsonl`` and so on, and say how to read and ask them.

    >>> from pyrolora.models.tasks import Hub, SplitRule, TaskSpec, Verbaliser, register, text_reader
    >>> reviews = register(
    ...     TaskSpec(
    ...         name="gadget_reviews",
    ...         fields=("text",),
    ...         labels=("negative", "positive"),
    ...         format=Verbaliser("Review: {text}\nSentiment:", labels=(" negative", " positive")),
    ...         reader=text_reader(("negative", "positive"), label="stars", text="review"),
    ...         sources=(Hub("me/gadget-reviews"),),
    ...         split=SplitRule(train="train", validation=200, test="test"),
    ...         description="Reviews of gadgets; validation is held out of train.",
    ...         licence="CC0-1.0",
    ...     )
    ... )

    From then on ``task("gadget_reviews", data_dir="reviews")`` reads ``reviews/train.jsonl`` and
    ``reviews/test.jsonl``,
    and without ``data_dir`` the hub. A reader is any callable from a `Row` to an `Example`, or to None for a
    row that is to be left out.

    Args:
        spec: the task, of text or of images. It replaces one that was registered under the same name before.

    Returns:
        The same specification.

    Raises:
        ValueError: the name is that of a task that comes with the library.
    """
    if spec.name in _OWN:
        raise ValueError(f"The task {spec.name!r} comes with the library; give this one another name.")
    _SPECS[spec.name] = spec
    return spec


def task(name: str, data_dir: str | Path | None = None, train_size: int | None = None, seed: int = 0) -> Task:
    """Return a task with its three disjoint splits.

    Usage: ``task("bbc_headlines", train_size=300, seed=1)``.

    Validation and test are the same whatever `train_size` and `seed`, so that results over seeds can be
    compared.

    Args:
        name: one of `names`; several image tasks joined by ``+``, as in ``"digits+mnist"``, share one label space; with
            ``:5w1s`` behind it, an image task becomes few-shot episodes of 5 ways and 1 shot (``:5w1s10q`` of 10 queries a
            class), see `episodic`.
        data_dir: a folder with the data set's files (or its parent), with the hub's columns; without it the
            rows come from the asset package or the hub.
        train_size: how many training examples to keep, in equal proportion from each class; all when None.
        seed: which of them; without `train_size` it changes nothing.

    Raises:
        ValueError: an unknown name (says the nearest), a row without its label, or a `train_size` out of
            range.
        FileNotFoundError: no data; says how to get them.
    """
    if (episodes := named_episodes(name)) is not None:
        named, (ways, shots, queries) = episodes
        made = episodic(task(named, data_dir), ways=ways, shots=shots, queries=queries)
    else:
        made = joined([_task(one, data_dir) for one in name.split("+")]) if "+" in name else _task(name, data_dir)
    return made if train_size is None else replace(made, train=made.train.subset(train_size, seed))


def _task(name: str, data_dir: str | Path | None) -> Task:
    if name not in _SPECS:
        raise ValueError(f"There is no task {name!r}.{suggestion(name, _SPECS)} names() lists all {len(_SPECS)}.")
    spec = _SPECS[name]
    if isinstance(spec, ImageTaskSpec):
        return spec.build(None if data_dir is None else Path(data_dir))
    rows = _read_rows(spec, None if data_dir is None else Path(data_dir))
    examples = {part: _read_examples(spec.reader, part, rows.get(part, [])) for part in spec.split.parts}
    splits = {
        split: Split(split, name, chosen, len(spec.labels)) for split, chosen in spec.split.divide(examples).items()
    }
    tables = {} if data_dir is None else spec.files.tables(Path(data_dir))
    return Task(
        name, spec.labels, spec.format, **splits, description=spec.description, licence=spec.licence, tables=tables
    )


def _read_rows(spec: TaskSpec, data_dir: Path | None) -> Parts:
    parts, optional = spec.split.parts, spec.split.optional
    if data_dir is not None:
        return spec.files.read(data_dir, parts, optional)
    if not spec.sources:
        raise FileNotFoundError(
            f"The task {spec.name!r} is read from local files only: pass data_dir=, a folder with the parts "
            f"{list(parts)}. "
            f"{spec.description}"
        )
    source = spec.sources[0]
    return source.read_parts() if isinstance(source, Package) else source.read(parts, optional)


def _read_examples(reader: Reader, part: str, rows: Sequence[Row]) -> list[Example]:
    read = ((row, reader(row)) for row in rows)
    return [
        example if example.id else replace(example, id=f"{part}/{row.number}")
        for row, example in read
        if example is not None
    ]
