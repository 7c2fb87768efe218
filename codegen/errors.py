"""Errors that a user can mend, by where the fault lies: argument, project, model or machine.

Used by every stage. Input: a fault; output: an exception whose message names the argument, its
value and what is allowed. The functions below print values safely in messages. Any other exception
is a bug of convgen.
"""

from __future__ import annotations

import difflib
import operator
from typing import Any


class ConvgenError(ValueError):
    """An error that the caller can mend; its subclasses say where.

    Attributes:
        argument: the argument at fault, None if no single argument is.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class SpecError(ConvgenError):
    """An argument is wrong: a description or an option that convgen has no kernel for."""


class ProjectError(ConvgenError):
    """The project is wrong: its table, a file that the table names, or a file in the way."""


class EditedError(ProjectError):
    """A file that a build would overwrite was edited by hand; commands exit with 1."""


class ModelError(ConvgenError):
    """The code of a user's model raised an exception, the `__cause__`; commands exit with 1."""


class MachineError(ConvgenError):
    """The machine lacks something: a GPU, torch, or the right to write to a path."""


def text_of(value: Any) -> str | None:
    """Return `value` as an exact str, None if it is not a str."""
    # Not isinstance: an object can lie to it through __class__.
    return str.__str__(value) if issubclass(type(value), str) else None


def visible(text: str, most: int = 200) -> str:
    """Return untrusted text, escaped for a terminal and cut to `most` characters."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."


def visible_lines(text: str) -> str:
    """Return a message, escaped line by line: it may quote untrusted text."""
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
    except Exception:  # nested too deeply, or raised by the type's own __repr__
        text = f"a value of type {type(value).__name__}"
    return visible(text, 60)


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Return ` (did you mean …?)` for a name close to one in `known`, else nothing."""
    close = difflib.get_close_matches(name[:40], known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
