"""Line breaking of an emitted file: assignments and calls of at most 100 columns.

Stage 5, render. Input: text; output: lines.
"""

from __future__ import annotations

from collections.abc import Iterable

WIDTH = 100  # columns of an emitted line


def bare(text: str) -> str:
    """Return `text` without the parentheses around the whole of it, if it has any."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:-1] if text[0] == "(" and position == len(text) - 1 else text
    return text


def assignment(name: str, text: str, indent: int) -> str:
    """Return `name = text` in lines of at most 100 columns, as ruff would break them."""
    if indent + len(name) + 3 + len(text) <= WIDTH:
        return f"{name} = {text}"
    parts = split(text, "+-")
    if indent + 4 + len(text) <= WIDTH and not (len(parts) == 2 and text.endswith(")")):
        return f"{name} = (\n    {text}\n)"
    if len(parts) == 2 and text.endswith(")"):  # ruff would break it inside these parentheses
        return "\n".join([f"{name} = {parts[0]}", *(f"{name} {p[0]}= {p[2:]}" for p in parts[1:])])
    return f"{name} = (\n    " + "\n    ".join(parts) + "\n)"


def call_text(function: str, arguments: Iterable[str], indent: int) -> str:
    """Return a call in lines of at most 100 columns, as ruff would break them."""
    given = tuple(arguments)
    joined = ", ".join(given)
    if indent + len(function) + len(joined) + 2 <= WIDTH:
        return f"{function}({joined})"
    if indent + 4 + len(joined) <= WIDTH:
        return f"{function}(\n    {joined}\n)"
    return "\n".join([f"{function}(", *(f"    {argument}," for argument in given), ")"])


def tuple_text(values: Iterable[object]) -> str:
    """Return a tuple as text, with the comma that a single element needs."""
    texts = [str(value) for value in values]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def split(text: str, signs: str) -> list[str]:
    """Split `text` before each operator of `signs` that is outside all brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        spaced = character == " " == text[position + 2 : position + 3]
        if depth == 0 and spaced and text[position + 1] in signs:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def count_text(count: int | None) -> str:
    """Return a number of elements as Python, a power of two as one."""
    if count is None or count.bit_count() > 1:
        return str(count)
    return f"2**{count.bit_length() - 1}"
