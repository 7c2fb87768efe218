"""Lines that give values to names, without those that nobody reads.

Part of a build. Input: statements, and the lines that follow them; output: the statements that
are left. Comments and layout stay as they were written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence


def names_read(texts: Iterable[str]) -> set[str]:
    """Return the names that Python source reads; attributes of those are none.

    Raises:
        SyntaxError: a text is no source of Python's.
    """
    return {name for text in texts for name in _read_by(ast.parse(text))}


def without_unread(text: str, followers: Iterable[str]) -> str:
    """Return statements without assignments to, and functions of, names that are not read later.

    Args:
        text: assignments, functions, and `if` without `else` around assignments.
        followers: the sources of what reads those names.

    Raises:
        SyntaxError: a text is no source of Python's.
    """
    lines = text.split("\n")
    gone: set[int] = set()
    _mark_unread(ast.parse(text).body, names_read(followers), gone)
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in gone)


def _mark_unread(body: Sequence[ast.stmt], read: set[str], gone: set[int]) -> bool:
    """Add the numbers of the lines to leave out to `gone`, and what the others read to `read`.

    From the last to the first: what is left out may be what read an earlier name. Returns whether
    anything stays.
    """
    stays = False
    for statement in reversed(body):
        if isinstance(statement, ast.If):
            kept = _mark_unread(statement.body, read, gone)
            needs = _read_by(statement.test)
        else:
            kept = not (given := _given_by(statement)) or bool(given & read)
            needs = _read_by(statement)
        if kept:
            read |= needs
        else:
            gone |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
        stays |= kept
    return stays


def _given_by(statement: ast.stmt) -> set[str]:
    """Return the names that a statement gives a value."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    nodes = (node for target in targets for node in ast.walk(target))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _read_by(tree: ast.AST) -> set[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
