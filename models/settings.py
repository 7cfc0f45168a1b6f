"""Numbers among the settings of a dataclass: whole where they count, finite everywhere."""

import math
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args

WRITTEN: dict[str, Any] = {"int": int, "float": float, "int | None": int | None, "float | None": float | None}


def check_numbers(settings: Any) -> None:
    """Refuse settings that are not of the kind of number that their annotation names: ``check_numbers(self)``.

    Belongs first into the ``__post_init__`` of a dataclass, so that the checks of ranges after it compare numbers. A setting
    annotated ``int`` must be whole, one annotated ``float`` finite; None passes where the annotation allows it, and
    settings of other types are left alone.

    Args:
        settings: an instance of a dataclass.

    Raises:
        ValueError: a setting that is no such number.
    """
    which: Any = type(settings)
    for name, (kind, optional) in _numbers(which).items():
        value = getattr(settings, name)
        if value is None and optional:
            continue
        where = f"The setting {name!r} of {type(settings).__name__}"
        number = isinstance(value, Real) and not isinstance(value, bool)
        if kind is int and not (number and isinstance(value, Integral)):
            near = f" Give {max(1, round(value))}." if number and math.isfinite(value) else " Give one such as 1."
            raise ValueError(f"{where} is a whole number{' or None' if optional else ''}; got {value!r}.{near}")
        if kind is float and not (number and math.isfinite(value)):
            what = "not finite" if number else f"a {type(value).__name__}"
            raise ValueError(
                f"{where} is a finite number{' or None' if optional else ''}; got {value!r}, which is {what}."
                f"{_usual(settings, name)}"
            )


@cache
def _numbers(kind: Any) -> dict[str, tuple[type, bool]]:
    """Setting -> ``int`` or ``float``, and whether it may be None."""
    found: dict[str, tuple[type, bool]] = {}
    for entry in fields(kind):
        # a module may keep its annotations as text, and with names that exist for type checkers only
        hint = WRITTEN.get(entry.type, Any) if isinstance(entry.type, str) else entry.type
        parts = set(get_args(hint)) or {hint}
        if (numbers := parts - {NoneType}) and numbers <= {int, float}:
            found[entry.name] = (float if float in numbers else int, NoneType in parts)
    return found


def _usual(settings: Any, name: str) -> str:
    """The default as a remedy, where there is one."""
    default = next(entry.default for entry in fields(settings) if entry.name == name)
    return f" The default is {default}." if isinstance(default, Real) or default is None else ""
