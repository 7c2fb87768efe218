"""Common code of the build backends' hooks: generate a project's files, or end the build.

Beside the stages; hatch.py, pep517.py and setuptools_hook.py call it. Input: the root of a project;
output: its files on disk, and a `Generated` that names them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConvgenError, visible, visible_lines


@dataclass(frozen=True, slots=True)
class Generated:
    """The files that a wheel or sdist must contain, relative to the root of the project.

    Attributes:
        output: the folder of the generated files.
        files: the generated files, for wheel and sdist.
        sources: the files that the table names (`.convgen` documents, choices): for the sdist, so
            that a wheel can be built from it.
    """

    output: Path
    files: tuple[Path, ...]
    sources: tuple[Path, ...]


@contextlib.contextmanager
def errors_end_the_build() -> Iterator[None]:
    """End the build, without a traceback, when convgen raises an error.

    Raises:
        SystemExit: with the error's message, which build frontends show.
    """
    try:
        yield
    except ConvgenError as error:
        raise SystemExit(f"convgen: error: {visible_lines(str(error))}") from None


def generate_into(root: Path) -> Generated:
    """Generate the files of the project at `root`; write only those that differ.

    Raises:
        SystemExit: the files cannot be generated, or one to overwrite was edited.
    """
    from .build import generate, write  # sympy and jinja2 load here

    with errors_end_the_build():
        build = generate(root)
        drift = write(build)
        for verb, paths in (("removed", drift.extra), ("kept (edited)", drift.kept)):
            for path in paths:
                name = visible(str(path), 4096)
                print(f"convgen: {verb} {name}, which no kernel names", file=sys.stderr)
        return Generated(
            output=_relative(build.output, root),
            files=tuple(_relative(path, root) for path in build.contents),
            sources=tuple(_relative(path, root) for path in build.sources),
        )


def _relative(path: Path, root: Path) -> Path:
    return Path(os.path.relpath(path, root))  # Path.relative_to does not simplify `a/../b`
