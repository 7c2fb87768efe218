"""`[tool.convgen]` of a pyproject.toml: what a project wants to have generated.

Input: the root of a project; output: a `Table`, every word of it checked.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import ProjectError, read_text
from .language import NamedSpec, check_name, parse, parse_document
from .spec import ConvTransposeSpec, SpecError, check_target, nearest, shown
from .targets import DEFAULT_TARGET

KEYS = ("output", "target", "specs", "choices", "kernel")
KERNEL_KEYS = ("name", "spec", "target")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One file of a project: where it goes, and what is compiled for which target."""

    path: Path
    spec: ConvTransposeSpec
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What the table says.

    Attributes:
        output: the folder for the files.
        choices: the file of measured choices, None without one.
        kernels: in order of their paths.
    """

    output: Path
    choices: Path | None
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel as the table or a document names it; `target` is the nearest one said for it."""

    name: str
    spec: ConvTransposeSpec
    target: str | None


def read_table(root: Path) -> Table:
    """Return the table of the project at `root`.

    Raises:
        ProjectError: there is no readable table, or it says something wrong.
    """
    table = _table(root)
    output = _inside(root, table.get("output"), "output")
    targets = table.get("target", DEFAULT_TARGET)
    several = isinstance(targets, list)
    common = tuple(check_target(target) for target in (targets if several else [targets]))
    if not common:
        raise ProjectError("target of [tool.convgen] names no GPU", "target")
    kernels: list[Kernel] = []
    for row in _rows(root, table):
        for target in common if row.target is None else (row.target,):
            chosen = check_target(target)
            stem = f"{row.name}_{chosen}" if several else row.name
            kernels.append(Kernel(output / f"{stem}.py", row.spec, chosen))
    paths = [kernel.path for kernel in kernels]
    for path in sorted(set(paths)):
        if paths.count(path) > 1:
            raise ProjectError(f"two kernels are called {path.stem}", "name")
    choices = table.get("choices")
    return Table(
        output=output,
        choices=None if choices is None else _inside(root, choices, "choices"),
        kernels=tuple(sorted(kernels, key=lambda kernel: kernel.path)),
    )


def _table(root: Path) -> dict[str, Any]:
    path = root / "pyproject.toml"
    if not path.exists():
        raise ProjectError(f"there is no {path}")
    try:
        document = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ProjectError(f"cannot read {path}: {error}") from None
    tools = document.get("tool")
    table = tools.get("convgen") if isinstance(tools, dict) else None
    if not isinstance(table, dict):
        raise ProjectError(f"{path} has no table [tool.convgen]")
    _check_keys(table, KEYS, "[tool.convgen]")
    return table


def _check_keys(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise ProjectError(
                f"{where} has no key {shown(key)}{nearest(key, known)}; it has {', '.join(known)}",
                key,
            )


def _inside(root: Path, value: object, key: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ProjectError(f"[tool.convgen] needs {key}, a path inside the project", key)
    path = root / value
    if not path.resolve().is_relative_to(root.resolve()):
        raise ProjectError(f"{key} must stay inside the project, got {shown(value)}", key)
    return path


def _rows(root: Path, table: dict[str, Any]) -> Iterator[Row]:
    for entry in _list(table, "specs"):
        path = _inside(root, entry, "specs")
        statements, target = read_document(path)
        for statement in statements:
            if statement.name is None:
                raise ProjectError(f"{path}: {statement.spec} needs a name: `name = …`", "specs")
            yield Row(statement.name, statement.spec, statement.spec.target or target)
    for row in _list(table, "kernel"):
        if not isinstance(row, dict) or not {"name", "spec"} <= set(row):
            raise ProjectError("[[tool.convgen.kernel]] needs name and spec", "kernel")
        _check_keys(row, KERNEL_KEYS, "[[tool.convgen.kernel]]")
        if not isinstance(row["name"], str) or not isinstance(row["spec"], str):
            raise ProjectError("name and spec of [[tool.convgen.kernel]] must be strings", "kernel")
        spec = parse(row["spec"])
        yield Row(check_name(row["name"]), spec, spec.target or row.get("target"))


def _list(table: dict[str, Any], key: str) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise ProjectError(f"{key} of [tool.convgen] must be a list, got {shown(value)}", key)
    return value


def read_document(path: Path) -> tuple[tuple[NamedSpec, ...], str | None]:
    """Return statements and target of a `.convgen` file; raises ProjectError naming it."""
    text = read_text(path)
    try:
        document = parse_document(text)
    except SpecError as error:
        raise ProjectError(f"{path}: {error}", error.argument) from None
    return document.statements, document.target
