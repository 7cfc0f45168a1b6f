"""Nearest valid name, for error messages that offer a remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to what was typed: ``nearest("bolb", ["blob", "map"])`` gives ``"blob"``.

    Args:
        name: what came.
        valid: the names that would have been right.

    Returns:
        The closest of them, however far, or None if there are none.
    """
    matches = get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return matches[0] if matches else None


def close_names(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Valid names that could have been meant, of many: ``close_names("arc_esy", names())``.

    A name that holds every underscore-separated part of what came is taken first: ``mmlu_chem`` is far from
    ``mmlu_college_chemistry`` in edit distance, and yet it is what was meant.

    Args:
        name: what came.
        valid: the names that would have been right.
        count: how many to return at most.

    Returns:
        The names, best first; empty when nothing is close.
    """
    candidates = list(valid)
    parts = [part for part in name.lower().split("_") if part]
    holding = [candidate for candidate in candidates if parts and all(part in candidate for part in parts)]
    close = get_close_matches(name, candidates, n=count, cutoff=0.6)
    return list(dict.fromkeys([*holding, *close]))[:count]


def suggestion(name: str, valid: Iterable[str]) -> str:
    """A sentence such as ``" Did you mean 'arc_easy'?"``, or nothing when no name is close.

    Usage: ``raise ValueError(f"No task {name!r}.{suggestion(name, names())}")``.
    """
    found = close_names(name, valid)
    return f" Did you mean {' or '.join(repr(candidate) for candidate in found)}?" if found else ""
