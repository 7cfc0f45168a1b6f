"""Next-item tasks over a folder of prepared windows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyrolora.models.recommendation.hybrid import HybridScoring
from pyrolora.models.recommendation.preparation import ITEM_TABLE, ITEMS, VECTORS
from pyrolora.models.recommendation.windows import CANDIDATES
from pyrolora.models.tasks.example import Example, Row
from pyrolora.models.tasks.option_scoring import OptionScoring
from pyrolora.models.tasks.sources import Files, Parts
from pyrolora.models.tasks.splitting import SplitRule
from pyrolora.models.tasks.task import TaskSpec

PROMPT = "Taken so far, one a line:\n{history}\nNext is one of:\n{candidates}\nNext:"
ITEM_PROMPT = "{history} among {candidates} next"


@dataclass(frozen=True)
class PreparedWindows(Files):
    """The files of a folder that `Preparation.prepare` wrote, with titles and vectors put into the rows."""

    def read(self, data_dir: Path, parts: Iterable[str], optional: Iterable[str] = ()) -> Parts:
        """See `Files.read`.

        Raises:
            FileNotFoundError: the folder was not prepared; the command that does it is given.
        """
        if not (data_dir / ITEMS).is_file() or not (data_dir / VECTORS).is_file():
            raise FileNotFoundError(
                f"{str(data_dir)!r} holds no prepared windows ({ITEMS} and {VECTORS} are missing). Make them with: pyrolora "
                f"windows movielens-100k --out {data_dir}"
            )
        parts = tuple(parts)
        found = super().read(data_dir, parts, optional)
        titles = json.loads((data_dir / ITEMS).read_text(encoding="utf-8"))["titles"]
        vectors = load_file(data_dir / VECTORS)
        for part, rows in found.items():
            own = {name.removeprefix(f"{part}/"): rest for name, rest in vectors.items() if name.startswith(f"{part}/")}
            for name, values in own.items():
                if len(values) != len(rows):
                    raise ValueError(
                        f"{VECTORS} has {len(values)} vectors {name!r} for the {len(rows)} windows of {part}; the folder was "
                        "changed by hand. Prepare it again."
                    )
            length = max((len(row["history"]) for row in rows), default=0)
            found[part] = [
                Row(
                    {**row.values, "titles": titles, "length": length, "vectors": {k: v[i] for k, v in own.items()}},
                    row.origin,
                    row.number,
                )
                for i, row in enumerate(rows)
            ]
        return found

    def tables(self, data_dir: Path) -> dict[str, Tensor]:
        """See `Files.tables`: the encoder's item embeddings."""
        return {ITEM_TABLE: load_file(data_dir / VECTORS)[ITEM_TABLE]}


def window_reader(row: Row) -> Example:
    """Read a window whose items are shown by their titles.

    Raises:
        ValueError: an item that has no title, candidates without the right item at the label's place, or a candidate that
            stands in the history.
    """
    return _example(row, row["titles"])


def item_reader(row: Row) -> Example:
    """Read a window whose items are shown by their numbers, as ``i17``; see `window_reader`."""
    return _example(row, [f"i{number}" for number in range(len(row["titles"]))])


def _example(row: Row, shown: list[str]) -> Example:
    history, candidates, label = list(row["history"]), list(row["candidates"]), int(row["label"])
    for number in (*history, *candidates):
        if not 0 <= number < len(shown):
            raise row.error(f"has the item {number}, expected 0 to {len(shown) - 1}. Prepare the folder again")
    if not history:
        raise row.error("has an empty history. Take the row out")
    if not 0 <= label < len(candidates) or candidates.count(candidates[label]) != 1:
        raise row.error(
            f"has the label {label}, which is not the place of one of {len(candidates)} candidates that stands there once. "
            "The target must be among the candidates, exactly once"
        )
    if taken := sorted(set(history) & set(candidates)):
        raise row.error(f"has candidates of the history: {taken}. Take other candidates")
    padded = [-1] * (row.get("length", len(history)) - len(history)) + history
    return Example(
        {"history": "\n".join(shown[i] for i in history), "candidates": "\n".join(shown[i] for i in candidates)},
        label,
        options=tuple(shown[i] for i in candidates),
        id=str(row["id"]),
        vectors={**row.get("vectors", {}), **_numbers(padded, candidates)},
    )


def _numbers(history: list[int], candidates: list[int]) -> dict[str, torch.Tensor]:
    return {"history_items": torch.tensor(history), "candidate_items": torch.tensor(candidates)}


_ABOUT = (
    "Which of 20 candidates comes next after a window of a user's items, from a folder that `pyrolora windows` prepared; "
    "users of validation and test are not in train. "
)
_FORMATS = {
    "next_item": (OptionScoring(PROMPT, ending="\n"), window_reader, "Titles as text."),
    "next_item_hybrid": (HybridScoring(PROMPT, ending="\n"), window_reader, "Titles with a slot for ItemProjector."),
    "next_item_tokens": (OptionScoring(ITEM_PROMPT), item_reader, "Items as tokens of an item network."),
}


def next_item_specs() -> tuple[TaskSpec, ...]:
    """The tasks ``next_item``, ``next_item_hybrid`` and ``next_item_tokens``, and each with unusual users as its test."""
    made = []
    for name, (asked, reader, shown) in _FORMATS.items():
        for suffix, test in (("", "test"), ("_unusual", "unusual")):
            made.append(
                TaskSpec(
                    name=name + suffix,
                    fields=("history", "candidates"),
                    labels=tuple(str(place) for place in range(1, CANDIDATES + 1)),
                    format=asked,
                    reader=reader,
                    files=PreparedWindows(),
                    split=SplitRule(test=test),
                    description=_ABOUT + shown,
                    licence="that of the interactions; MovieLens-100K: research use, no redistribution",
                )
            )
    return tuple(made)
