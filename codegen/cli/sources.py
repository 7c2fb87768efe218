"""What a command works on, and where it puts the result.

Behind the command line. Input: its SPEC argument and flags; output: specs with names and targets,
and the paths that emitted files go to.
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
