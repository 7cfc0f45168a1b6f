"""One question with its answer, and the row of a file from which it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyrolora.models.naming import suggestion


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Usage: ``Example({"text": "Shares fall in London"}, label=0)``.

    Args:
        fields: the texts that a prompt template may name, by field name.
        label: the class, or the position of the right option, counted from 0.
        options: the answers to choose from; empty where the labels are classes shared by all examples.
        attributes: numbers known about the example that no prompt shows, such as the share of annotators
            who agreed on the label.
        id: a name that stays with the example through splitting and shuffling.
        vectors: tensors of one dimension that adapters' gates read, by the name that a batch gives them, such as
            the state of a sequence model.
    """

    fields: Mapping[str, str]
    label: int
    options: tuple[str, ...] = ()
    attributes: Mapping[str, float] = field(default_factory=dict)
    id: str = ""
    vectors: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def content(self) -> str:
        """All that is asked, without case and spacing: two examples with equal content are duplicates."""
        texts = [text for _, text in sorted(self.fields.items())]
        return "\x1f".join(" ".join(text.casefold().split()) for text in (*texts, *self.options))


@dataclass(frozen=True)
class Row:
    """One row of a file or a hub data set, which can say where it stands when something is wrong with it.

    Usage: ``row["question"]`` in a reader; a missing or empty column raises with the columns that exist.

    Args:
        values: column name to value.
        origin: the file, or the hub id and split.
        number: position in the origin, counted from 1.
    """

    values: Mapping[str, Any]
    origin: str
    number: int

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            raise self.error(
                f"has no column {column!r}.{suggestion(column, self.values)} "
                "Rename the column or give the task a reader of its own"
            )
        value = self.values[column]
        if value is None or value == "":
            raise self.error(f"has an empty {column!r}. Fill it in or take the row out")
        return value

    def get(self, column: str, default: Any = None) -> Any:
        """Return the value of a column that may be missing."""
        return self.values.get(column, default)

    def error(self, problem: str) -> ValueError:
        """Return (not raise) an error that names the row, the problem and the columns at hand."""
        return ValueError(
            f"Row {self.number} of {self.origin} {problem}; the row's columns are {sorted(map(str, self.values))}."
        )
