"""The nearest valid name, for every message that answers a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` valid names close to the one that came.

    Usage: ``nearest("arc_esy", names())``.

    A name that holds every underscore-separated part of what came is taken first: ``mmlu_chem`` is far from
    ``mmlu_college_chemistry`` in edit distance, and yet it is what was meant.

    Args:
        name: what the user wrote.
        valid: the names that exist.
        count: how many to return at most.

    Returns:
        The names, best first; empty when nothing is close.
    """
    candidates = list(valid)
    parts = [part for part in name.lower().split("_") if part]
    holding = [candidate for candidate in candidates if parts and all(part in candidate for part in parts)]
    close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.6)
    return list(dict.fromkeys([*holding, *close]))[:count]


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return a sentence such as ``" Did you mean 'arc_easy'?"``, or nothing when no name is close.

    Usage: ``raise ValueError(f"No task {name!r}.{suggestion(name, names())}")``.
    """
    found = nearest(name, valid)
    return f" Did you mean {' or '.join(repr(candidate) for candidate in found)}?" if found else ""
