"""Errors that a user can mend, by where: an argument, the project, the machine.

Used by every stage. Input: a fault; output: an exception whose text names the argument, its value
and what is allowed, and the text of values in it. Other exceptions are faults of convgen's own.
"""

from __future__ import annotations

import difflib
import operator
from typing import Any


class ConvgenError(ValueError):
    """Something that whoever called can mend; the classes below say where.

    Attributes:
        argument: the argument at fault, None where it is none in particular.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class SpecError(ConvgenError):
    """In an argument: a description, or an option, that convgen has no kernel for."""


class ProjectError(ConvgenError):
    """In a project: its table, a file that it names, or a file in the way."""


class EditedError(ProjectError):
    """A file that a build would overwrite is somebody's work; a command exits with 1, as drift."""


class MachineError(ConvgenError):
    """In the machine: no GPU, no torch, a place that cannot be written."""


def text_of(value: Any) -> str | None:
    """Return `value` as an exact str, None if it is no text."""
    # Not isinstance, which believes what an object says of its class.
    return str.__str__(value) if issubclass(type(value), str) else None


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
