"""Statements: specs with names and targets, from text, a `.convgen` file or flags.

Input: the SPEC argument and flags of a command, or the path of a `.convgen` file; output: a
`Statement` for each layer and target.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ProjectError, SpecError, shown
from ..files import read_text
from ..language.parser import MAX_TEXT, NamedSpec, parse_document
from ..language.spec import ConvTransposeSpec, check_target
from ..tables.targets import DEFAULT_TARGET, GpuTarget, find_target

SUFFIX = ".convgen"
_INTEGERS = ("rank", "groups", "in_channels", "out_channels", "grid")
_TUPLES = ("kernel_size", "stride", "padding", "output_padding", "dilation", "input")


@dataclass(frozen=True, slots=True)
class Statement:
    """A spec to work on.

    Attributes:
        name: its name in the document, None if it has none.
        spec: the spec.
        target: the GPU to compile for: of --target, else of the spec, the document or the default.
    """

    name: str | None
    spec: ConvTransposeSpec
    target: GpuTarget


def resolve(text: str | None, flags: dict[str, Any]) -> list[Statement]:
    """Return the statements that a command works on.

    Args:
        text: the argument SPEC: a spec, several lines of them, or the path of a `.convgen` file;
            None if it was not given.
        flags: value of each flag, by argument of the spec; None if it was not given.

    Raises:
        SpecError: SPEC or a flag is wrong.
        ProjectError: the file is wrong or cannot be read.
    """
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
        raise SpecError(f"{names} cannot be combined with SPEC; write arguments in SPEC")
    elif text.endswith(SUFFIX):
        statements, default = read_document(Path(text))
        found = [(statement.name, statement.spec) for statement in statements]
    elif os.path.exists(text):
        kind = "a folder" if os.path.isdir(text) else "a file with another suffix"
        raise SpecError(f"SPEC must be text or a {SUFFIX} file; {text} is {kind}")
    else:
        document = parse_document(text)
        found = [(statement.name, statement.spec) for statement in document.statements]
        default = document.target
    if not found:
        raise SpecError(f"{text if text and text.endswith(SUFFIX) else 'SPEC'} contains no layer")
    return [
        Statement(name, spec, find_target(said or spec.target or default or DEFAULT_TARGET))
        for name, spec in found
    ]


def resolve_for(text: str | None, flags: dict[str, Any], targets: str | None) -> list[Statement]:
    """Return the statements of `resolve` for each of several targets.

    Args:
        text: as in `resolve`.
        flags: as in `resolve`; their `target` is ignored.
        targets: names separated by commas; None for each statement's own target.

    Raises:
        SpecError: SPEC, a flag or a target is wrong.
        ProjectError: the file is wrong or cannot be read.
    """
    names = [] if targets is None else [name.strip() for name in targets.split(",")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"--target: {twice} is listed twice", "target")
    asked: Sequence[str | None] = names or (None,)
    return [found for name in asked for found in resolve(text, {**flags, "target": name})]


def read_document(path: Path) -> tuple[tuple[NamedSpec, ...], str | None]:
    """Return the statements and the target of a `.convgen` file; raises ProjectError naming it."""
    text = read_text(path, MAX_TEXT)
    try:
        document = parse_document(text)
    except SpecError as error:
        raise ProjectError(f"{path}: {error}", error.argument) from None
    return document.statements, document.target


def spec_from_flags(flags: dict[str, Any]) -> ConvTransposeSpec:
    """Return the spec that flags describe.

    Args:
        flags: value of each flag, by argument of the spec; None if it was not given. `target` is
            ignored.

    Raises:
        SpecError: no kernel size is given, or a flag is wrong; then the message starts with the
            flag.
    """
    given = {name: value for name, value in flags.items() if value is not None and name != "target"}
    if "kernel_size" not in given:
        raise SpecError("give a spec, a .convgen file, or --k with a kernel size", "kernel_size")
    try:
        values = {name: _value(name, value) for name, value in given.items()}
        return ConvTransposeSpec(**{"rank": 2, **values})
    except SpecError as error:
        flag = f"--{(error.argument or 'k').replace('_', '-')}"
        raise SpecError(f"{flag}: {error}", error.argument) from None


def _value(name: str, text: Any) -> Any:
    if name in _INTEGERS:
        return _integer(name, text)
    if name == "rungs":
        try:
            return tuple(_numbers(name, part) for part in text.split(";"))
        except SpecError:
            said = f"rungs must be inputs such as 8,64,16,16;8,64,32,32, got {shown(text)}"
            raise SpecError(said, name) from None
    if name not in _TUPLES:
        return text
    numbers = _numbers(name, text)
    return numbers[0] if len(numbers) == 1 and name != "input" else numbers


def _numbers(name: str, text: str) -> tuple[int | None, ...]:
    """Return numbers between commas, in brackets or not; sizes may be none."""
    text = text.strip()
    if text[:1] == "(" and text[-1:] == ")":
        text = text[1:-1].strip()
    parts = text.removesuffix(",").split(",")
    return tuple(_integer(name, part, none=name in ("input", "rungs")) for part in parts)


def _integer(name: str, text: str, none: bool = False) -> int | None:
    text = text.strip()
    if none and text.lower() in ("none", "?"):
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise SpecError(f"{name} must be an integer, got {shown(text)}", name)
    return int(text)
