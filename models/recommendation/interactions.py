"""Who took what, when: interaction logs from MovieLens-100K or from a user's own CSV file."""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyrolora.models.naming import suggestion
from pyrolora.models.tasks.example import Row
from pyrolora.models.tasks.sources import Package, Parts, number_rows

# ratings below say that somebody did not like an item; with 3 the released test windows come out, with 1 they do not
LIKED = 3.0
MOVIELENS = "movielens-100k"


@dataclass(frozen=True)
class Interactions:
    """Every user's items in the order of time.

    Usage::

        interactions = read_interactions("movielens-100k")           # or "visits.csv"
        interactions.of_user["196"]                                   # positions in interactions.titles

    Attributes:
        titles: a text for each item; items are numbered by their place here.
        item_names: the name of each item in its source.
        of_user: user -> numbers of the items, earliest first; ties keep the order of the file.
    """

    titles: tuple[str, ...]
    item_names: tuple[str, ...]
    of_user: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return sum(len(items) for items in self.of_user.values())


def read_interactions(source: str | Path, liked: float = LIKED) -> Interactions:
    """Read interactions: ``read_interactions("movielens-100k")`` or ``read_interactions("visits.csv")``.

    A CSV file has the columns ``user``, ``item`` and ``timestamp`` (a number), and may have ``title`` (what a prompt shows,
    by default the item) and ``rating``.

    Args:
        source: ``"movielens-100k"``, read from the installed package ``recbole`` without importing it, or a CSV file.
        liked: interactions with a lower rating are left out; without ratings all count.

    Raises:
        FileNotFoundError: no such file, or the package is missing; the command that installs it is given.
        ValueError: a row that lacks a column or holds no number where one belongs, or no interaction is left.
    """
    if str(source) == MOVIELENS:
        parts = Package("recbole", "1.2.1", read=read_movielens).read_parts()
        return _ordered(parts["interactions"], liked)
    path = Path(source)
    if not path.is_file():
        near = [entry.name for entry in path.parent.glob("*.csv")] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"There are no interactions at {str(source)!r}.{suggestion(path.name, near)} Give a CSV file with the columns "
            f"user, item and timestamp, or {MOVIELENS!r}."
        )
    # spreadsheets put a byte order mark before the first column's name
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _ordered(number_rows(csv.DictReader(file), path.name), liked)


def read_movielens(folder: Path) -> Parts:
    """Rows of MovieLens-100K as recbole packs it: one part "interactions".

    Raises:
        FileNotFoundError: no such files where version 1.2.1 has them.
    """
    base = folder / "dataset_example" / "ml-100k"
    titles = {}
    for entry in _atomic_file(base / "ml-100k.item"):
        name, year = entry["movie_title:token_seq"], entry["release_year:token"]
        # films of one name are told apart by their year
        titles[entry["item_id:token"]] = f"{_article_first(name)} ({year})" if year.isdigit() else _article_first(name)
    records = [
        {
            "user": entry["user_id:token"],
            "item": entry["item_id:token"],
            "title": titles[entry["item_id:token"]],
            "rating": entry["rating:float"],
            "timestamp": entry["timestamp:float"],
        }
        for entry in _atomic_file(base / "ml-100k.inter")
    ]
    return {"interactions": number_rows(records, "ml-100k.inter")}


def _atomic_file(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _article_first(title: str) -> str:
    moved = re.fullmatch(r"(.+), (The|A|An|Les|Le|La|Il|Das|Der|Die|El)", title)
    return f"{moved[2]} {moved[1]}" if moved else title


def _ordered(rows: Sequence[Row], liked: float) -> Interactions:
    numbers: dict[str, int] = {}
    titles: list[str] = []
    found: dict[str, list[tuple[float, int, int]]] = {}
    for row in rows:
        rating = row.get("rating")
        if rating not in (None, "") and _number(row, "rating") < liked:
            continue
        item = str(row["item"])
        if item not in numbers:
            numbers[item] = len(titles)
            titles.append(" ".join(str(row.get("title") or item).split()))
        found.setdefault(str(row["user"]), []).append((_number(row, "timestamp"), row.number, numbers[item]))
    if not found:
        raise ValueError(f"No interaction is left of {len(rows)} rows (those rated below {liked} are left out).")
    of_user = {user: np.array([item for _, _, item in sorted(events)]) for user, events in found.items()}
    return Interactions(tuple(titles), tuple(numbers), of_user)


def _number(row: Row, column: str) -> float:
    try:
        number = float(row[column])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise row.error(f"has the {column} {row[column]!r}, expected a number. Write times as seconds")
    return number
