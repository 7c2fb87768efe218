"""Checks of the values that users pass.

Stage 1, called by every reader of user input. Input: any value; output: an exact `int`, `float`,
`str` or tuple, or a `SpecError` whose message is safe to print.

Subclasses (an `IntEnum`, a numpy integer, a `str` enum) are converted to the plain type, because
the values are printed into emitted files: a subclass's own `repr`, `str`, `==` or `hash` is never
called. True and False are not integers here, although Python's bool is an int.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from .errors import SpecError, nearest, shown, text_of


def integer_of(value: Any) -> int | None:
    """Return `value` as an exact int, None if it is not an integer (True and False are not)."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except Exception:  # no __index__, or a user's __index__ that raises anything
        return None


def number_of(value: Any) -> float | None:
    """Return `value` as an exact float, None if it is not a finite number."""
    number = integer_of(value)
    try:
        if number is not None or issubclass(type(value), float):
            found = float(value if number is None else number)
            return found if math.isfinite(found) else None
    except Exception:  # an integer too large, or a user's __float__ that raises anything
        pass
    return None


def entries_of(value: Any) -> tuple[Any, ...] | None:
    """Return a tuple or list as an exact tuple, None if `value` is neither."""
    return tuple(value) if issubclass(type(value), (tuple, list)) else None


def check_integer(argument: str, value: object, low: int, high: int) -> int:
    """Return `value` as an exact int; raises SpecError if it is not one from `low` to `high`."""
    number = integer_of(value)
    if number is None or not low <= number <= high:
        raise SpecError(
            f"{argument} must be an integer from {low} to {high}, got {shown(value)}", argument
        )
    return number


def check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return `value` as an exact str; raises SpecError if it is not in `allowed`."""
    text = text_of(value)
    if text is None or text not in allowed:
        hint = "" if text is None else nearest(text, allowed)
        raise SpecError(
            f"{argument} must be one of {', '.join(allowed)}, got {shown(value)}{hint}", argument
        )
    return text
