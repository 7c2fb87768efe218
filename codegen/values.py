"""What users give: made plain, checked and shown.

Stage 1, below every door. Input: any value; output: an exact `int` or `str`, or a `SpecError` whose
text is safe to print.

Numbers of an `IntEnum`, of numpy and the like, and text of a `str` enum count as what they stand
for; what their types make of `repr`, `str`, `==` and `hash` is never asked, as emitted files are
made of them. Truth values are no numbers here, although Python counts them as such.
"""

from __future__ import annotations

import difflib
import math
import operator
from typing import Any


class SpecError(ValueError):
    """A description that is not a transposed convolution convgen can emit.

    Attributes:
        argument: the argument at fault, None if it is the whole text.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


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


def text_of(value: Any) -> str | None:
    """Return `value` as an exact str, None if it is no text."""
    # Not isinstance, which believes what an object says of its class.
    return str.__str__(value) if issubclass(type(value), str) else None


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


def visible(text: str, most: int = 200) -> str:
    """Return text of somebody else's as a terminal may have it: escaped, of `most` characters."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."


def visible_lines(text: str) -> str:
    """Return a message of lines as a terminal may have it: what others wrote is quoted in it."""
    return "\n".join(visible(line, 5000) for line in text.split("\n")[:50])


def shown(value: Any) -> str:
    """Return `value` as an error message prints it: printable, and never longer than a line."""
    plain = text_of(value) or value
    if issubclass(type(value), int) and not isinstance(value, bool):
        plain = operator.index(value)
        if abs(plain) >= 10**30:
            return "an integer of more than 30 digits"
    try:
        text = repr(plain)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a value with a number of more than 4300 digits"
    except Exception:  # nested too deeply, or a type's own
        text = f"a value of type {type(value).__name__}"
    return visible(text, 60)


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Return ` (did you mean …?)` for a name close to one in `known`, else nothing."""
    close = difflib.get_close_matches(name[:40], known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


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
