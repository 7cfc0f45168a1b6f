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
