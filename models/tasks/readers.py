"""Readers: how one row of a data set becomes an example.

A reader is any callable from a `Row` to an `Example`, or to None for a row that is not of its task; these are the common
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyrolora.models.naming import suggestion
from pyrolora.models.tasks.example import Example, Row
from pyrolora.models.tasks.prompts import list_options

Reader = Callable[[Row], Example | None]


def class_index(row: Row, column: str, names: Sequence[str]) -> int:
    """Return the class that a column gives by name, by number or as true and false.

    Usage: ``class_index(row, "label", ("negative", "positive"))``.

    Raises:
        ValueError: no label, or one that is no class; names the row, the classes and the nearest.
    """
    value = row[column]
    text = str(value).strip().casefold()
    by_name = {name.strip().casefold(): index for index, name in enumerate(names)}
    if text in by_name:
        return by_name[text]
    if isinstance(value, bool):
        return int(value)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise row.error(
        f"has the label {value!r}, expected one of {list(names)} or a number from 0 to {len(names) - 1}."
        f"{suggestion(str(value), names)} Correct the label"
    )


def text_reader(names: Sequence[str], label: str = "label", **columns: str) -> Reader:
    """Return a reader of texts with a class.

    Usage: ``text_reader(("negative", "positive"), label="sentiment", text="review")``.

    Args:
        names: the classes, in order.
        label: the column of the label: a class name, its number, or true and false.
        columns: field name to column; ``text="text"`` when left out.
    """
    taken = columns or {"text": "text"}

    def read(row: Row) -> Example:
        fields = {name: str(row[column]) for name, column in taken.items()}
        return Example(fields, class_index(row, label, names), id=str(row.get("id") or ""))

    return read


def only(classes: Sequence[str], column: str, read: Reader) -> Reader:
    """Return a reader that leaves out rows whose column names none of some classes.

    Usage: ``only(("transfer", "balance"), "intent", text_reader(("transfer", "balance"), label="intent"))``.

    Args:
        classes: values of the column that stay.
        column: the column.
        read: reader of the rows that stay.
    """
    kept = frozenset(classes)
    return lambda row: read(row) if row[column] in kept else None


def choice_reader(question: str = "question", choices: str = "choices", answer: str = "answerKey") -> Reader:
    """Return a reader of questions with options.

    Usage: ``choice_reader(question="question_stem")`` reads OpenBookQA.

    The options may be ``{"text": [...], "label": [...]}`` with the answer as one of the labels (ARC,
    OpenBookQA), or a list, or columns ``choice0``, ``choice1``, ..., with the answer as a position from 0
    (MMLU).

    Args:
        question: column of the question; the field is always named ``question``, so that one task's prompt
            can ask another's questions.
        choices: column of the options.
        answer: column of the right option.
    """

    def read(row: Row) -> Example:
        texts, keys = _options(row, choices)
        given = str(row[answer]).strip()
        if given not in keys:
            raise row.error(f"has the answer {given!r}, expected one of {keys}. Correct the answer")
        fields = {"question": str(row[question])}
        return Example(fields, keys.index(given), options=tuple(texts), id=str(row.get("id") or ""))

    return read


def listing_reader(read: Reader, line: str, letters: Sequence[str], heading: str, choices: str = "choices") -> Reader:
    """Return a reader that also writes the options out, one a line, as the field ``listing`` that `Letter` shows.

    Usage: ``listing_reader(choice_reader(), "{letter}) {text}", "ABCDE", "Choices:")``.

    Every option stands under the name that it has in the data, such as 1 to 4 in some rows of ARC, and under its letter where
    it has none.

    Args:
        read: the reader of everything else.
        line: how one option is listed, with ``{letter}`` and ``{text}``.
        letters: one for each position.
        heading: the line above.
        choices: column of the options.
    """

    def listed(row: Row) -> Example | None:
        example = read(row)
        if example is None:
            return None
        texts, keys = _options(row, choices)
        names = keys if isinstance(row.get(choices), Mapping) else letters
        listing = list_options(line, names, texts, heading)
        return replace(example, fields={**example.fields, "listing": listing})

    return listed


def _options(row: Row, column: str) -> tuple[list[str], list[str]]:
    """Return the texts of the options and the keys by which the answer names them."""
    held: Any = row.get(column)
    if isinstance(held, Mapping):
        return [str(text) for text in held["text"]], [str(key) for key in held["label"]]
    if held is None:
        numbered = [name for name in (f"choice{number}" for number in range(26)) if name in row.values]
        held = [row[name] for name in numbered or (column,)]
    return [str(text) for text in held], [str(position) for position in range(len(held))]


def blank_reader(row: Row) -> Example:
    """Read a sentence with a blank and two options for it (WinoGrande).

    Usage: ``TaskSpec(..., reader=blank_reader)``.

    Raises:
        ValueError: an answer that is neither 1 nor 2, such as the empty one of the unlabelled official test
            rows.
    """
    given = str(row["answer"])
    if given not in ("1", "2"):
        raise row.error(f"has the answer {given!r}, expected '1' or '2'. Correct the answer")
    options = (str(row["option1"]), str(row["option2"]))
    return Example({"sentence": str(row["sentence"])}, int(given) - 1, options=options, id=str(row.get("qID") or ""))


def headline_reader(names: Sequence[str]) -> Reader:
    """Return a reader that keeps the first line of a text: the headline of a news article.

    Usage: ``headline_reader(("business", "sport"))``.
    """

    def read(row: Row) -> Example:
        lines = [line.strip() for line in str(row["text"]).splitlines() if line.strip()]
        if not lines:
            raise row.error("has a text of white space only. Take the row out")
        return Example({"text": lines[0]}, class_index(row, "label", names), id=str(row.get("id") or ""))

    return read


def crowd_reader(names: Sequence[str]) -> Reader:
    """Return a reader of crowd-labelled texts, whose agreement becomes the attribute ``agreement``.

    Usage: ``crowd_reader(("negative", "neutral", "positive"))``.

    The attribute (a share from 0 to 1) is absent where the agreement was not recorded.
    """

    def read(row: Row) -> Example:
        agreement = row.get("confidence")
        return Example(
            {"text": " ".join(str(row["text"]).split())},
            class_index(row, "sentiment", names),
            attributes={} if agreement in (None, "") else {"agreement": float(agreement)},
        )

    return read
