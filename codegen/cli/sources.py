"""The paths that emitted files are written to.

Part of the command line. Input: statements, the SPEC argument and -o; output: a checked path for
each statement.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SpecError, visible
from ..files import check_output
from ..project.statements import SUFFIX, Statement
from ..rendering.header import is_as_generated, is_generated


def destinations(
    statements: list[Statement], text: str | None, output: str | None, *, force: bool
) -> list[Path | None]:
    """Return the path of each statement's file, None for stdout.

    Raises:
        SpecError: -o is missing or names no folder where one is needed, or a layer has no name.
        MachineError: a path cannot be written.
        ProjectError: without `force`, a file there was not made by convgen or was edited since.
    """
    several = len(statements) > 1
    if output in (None, "-"):
        if several:
            raise SpecError(f"{len(statements)} statements need -o FOLDER", "output")
        return [None]
    path = Path(output or "")
    is_document = (text or "").endswith(SUFFIX)
    folder = os.path.isdir(path) or (output or "").endswith(("/", os.sep))
    if not several and not is_document and not folder:
        return [_free(path, force)]
    file = "is" if os.path.exists(path) else "is named like" if path.suffix == ".py" else ""
    if file and not os.path.isdir(path):
        why = "SPEC is a .convgen file" if is_document else "it ends in a slash"
        raise SpecError(
            f"-o {path} must be a folder, as {why}, but it {file} a file",
            "output",
        )
    for statement in statements:
        if statement.name is None:
            layer = visible(str(statement.spec))
            raise SpecError(f"{layer} needs a name: `name = …`, to be written to a folder")
    return [_free(path / f"{statement.name}.py", force) for statement in statements]


def _free(path: Path, force: bool) -> Path:
    """Return `path`; raises as `destinations` if an emitted file must not be written there."""
    check_output(path, _somebody_s, force=force)
    return path


def _somebody_s(text: str) -> str | None:
    """Return why a file with this text must not be overwritten, None if it may be."""
    if not is_generated(text):
        return "was not made by convgen"
    return None if is_as_generated(text) else "was edited since convgen made it"
