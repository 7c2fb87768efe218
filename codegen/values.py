"""What users give: made plain, checked and shown.

Stage 1, below every door. Input: any value; output: an exact `int` or `str`, or a `SpecError` whose
text is safe to print.

Numbers of an `IntEnum`, of numpy and the like, and text of a `str` enum count as what they stand
for; what their types make of `repr`, `str`, `==` and `hash` is never asked, as emitted files are
made of them. Truth values are no numbers here, although Python counts them as such.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from .errors import SpecError, nearest, shown, text_of


def integer_of(value: Any) -> int | None:
    """Return `value` as an exact int, None if it is no integer (True and False are none)."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except Exception:  # there is no __index__, or it is anybody's
        return None


def number_of(value: Any) -> float | None:
    """Return `value` as an exact, finite float, None if it is no such number."""
    number = integer_of(value)
    try:
        if number is not None or issubclass(type(value), float):
            found = float(value if number is None else number)
            return found if math.isfinite(found) else None
    except Exception:  # too large an integer, or __float__ is anybody's
        pass
    return None


def entries_of(value: Any) -> tuple[Any, ...] | None:
    """Return a tuple or list as an exact tuple, None if `value` is neither."""
    return tuple(value) if issubclass(type(value), (tuple, list)) else None


def check_integer(argument: str, value: object, low: int, high: int) -> int:
    """Return `value` as an exact int from `low` to `high`; raises SpecError."""
    number = integer_of(value)
    if number is None or not low <= number <= high:
        raise SpecError(
            f"{argument} must be an integer from {low} to {high}, got {shown(value)}", argument
        )
    return number


def check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return the entry of `allowed` that `value` spells; raises SpecError."""
    text = text_of(value)
    if text is None or text not in allowed:
        hint = "" if text is None else nearest(text, allowed)
        raise SpecError(
            f"{argument} must be one of {', '.join(allowed)}, got {shown(value)}{hint}", argument
        )
    return text
