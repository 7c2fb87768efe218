"""What a command works on, and where it puts the result.

Behind the command line. Input: its SPEC argument and flags; output: specs with names and targets,
and the paths that emitted files go to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SpecError, visible
from .files import check_output
from .flags import spec_from_flags
from .language.parser import parse_document
from .language.spec import ConvTransposeSpec, check_target
from .rendering.header import is_as_generated, is_generated
from .table import read_document
from .tables.targets import DEFAULT_TARGET, GpuTarget, find_target

SUFFIX = ".convgen"


@dataclass(frozen=True, slots=True)
class Statement:
    """A spec to work on, with its name, if any, and the target that is nearest to it."""

    name: str | None
    spec: ConvTransposeSpec
    target: GpuTarget


def resolve(text: str | None, flags: dict[str, Any]) -> list[Statement]:
    """Return what SPEC and the flags ask for; raises SpecError."""
    try:
        said = None if flags["target"] is None else check_target(flags["target"])
    except SpecError as error:
        raise SpecError(f"--target: {error}", "target") from None
    others = sorted(n for n, v in flags.items() if v is not None and n != "target")
    found: list[tuple[str | None, ConvTransposeSpec]]
    default: str | None = None
    if text is None:
        found = [(None, spec_from_flags(flags))]
    elif others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise SpecError(f"a spec says it all: {names} cannot be given beside it")
    elif text.endswith(SUFFIX):
        statements, default = read_document(Path(text))
        found = [(statement.name, statement.spec) for statement in statements]
    elif os.path.exists(text):
        kind = "a folder" if os.path.isdir(text) else "a file, whose name does not end so"
        raise SpecError(f"a spec is text or a {SUFFIX} file; {text} is {kind}")
    else:
        document = parse_document(text)
        found = [(statement.name, statement.spec) for statement in document.statements]
        default = document.target
    if not found:
        raise SpecError("there is no layer in the spec")
    return [
        Statement(name, spec, find_target(said or spec.target or default or DEFAULT_TARGET))
        for name, spec in found
    ]


def resolve_for(text: str | None, flags: dict[str, Any], targets: str | None) -> list[Statement]:
    """Return what SPEC and the flags ask for, once for each of a list of targets; None: its own."""
    names = [] if targets is None else [name.strip() for name in targets.split(",")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"--target: {twice} stands there twice", "target")
    asked: Sequence[str | None] = names or (None,)
    return [found for name in asked for found in resolve(text, {**flags, "target": name})]


def destinations(
    statements: list[Statement], text: str | None, output: str | None, *, force: bool
) -> list[Path | None]:
    """Return the path each statement's file goes to, None for stdout.

    Raises:
        SpecError: there is no place for a file.
        ProjectError: it cannot be written there, or a file in the way was not made by convgen, or
            was edited since, and `force` does not say to overwrite it.
    """
    several = len(statements) > 1
    if output in (None, "-"):
        if several:
            raise SpecError(f"{len(statements)} statements need -o FOLDER", "output")
        return [None]
    path = Path(output or "")
    if not several and not (text or "").endswith(SUFFIX) and not os.path.isdir(path):
        return [_free(path, force)]
    file = "is" if os.path.exists(path) else "is named like" if path.suffix == ".py" else ""
    if file and not os.path.isdir(path):
        raise SpecError(
            f"-o {path}: the layers of a file go to a folder, and this {file} a file", "output"
        )
    for statement in statements:
        if statement.name is None:
            layer = visible(str(statement.spec))
            raise SpecError(f"{layer} needs a name: `name = …`, to be written to a folder")
    return [_free(path / f"{statement.name}.py", force) for statement in statements]


def _free(path: Path, force: bool) -> Path:
    """Return `path` if an emitted file may be written there."""
    check_output(path, _somebody_s, force=force)
    return path


def _somebody_s(text: str) -> str | None:
    """Return why an emitted file must not take the place of a file of `text`, None if it may."""
    if not is_generated(text):
        return "was not made by convgen"
    return None if is_as_generated(text) else "was edited since convgen made it"
