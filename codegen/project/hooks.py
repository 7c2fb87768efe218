"""What the build hooks share: bring a project up to date, or end the build.

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
    """What a build has to ship, as paths from the root of the project.

    Attributes:
        output: the folder of the generated files.
        files: the generated files: for the wheel, and for the sdist.
        sources: what they are made of beside pyproject.toml: for the sdist, which must build.
    """

    output: Path
    files: tuple[Path, ...]
    sources: tuple[Path, ...]


@contextlib.contextmanager
def errors_end_the_build() -> Iterator[None]:
    """Turn an error of the project into the exit of the build.

    Raises:
        SystemExit: with the message; a build frontend shows it, without a traceback of ours.
    """
    try:
        yield
    except ConvgenError as error:
        raise SystemExit(f"convgen: error: {visible_lines(str(error))}") from None


def generate_into(root: Path) -> Generated:
    """Generate the files of the project at `root` into it, touching only what differs.

    Raises:
        SystemExit: the table is wrong, or a file in the way is somebody's work.
    """
    from .build import generate, write  # sympy and jinja2 load here

    with errors_end_the_build():
        build = generate(root)
        drift = write(build)
        for verb, paths in (("removed", drift.extra), ("kept the edited", drift.kept)):
            for path in paths:
                name = visible(str(path), 4096)
                print(f"convgen: {verb} {name}, which no kernel names", file=sys.stderr)
        return Generated(
            output=_relative(build.output, root),
            files=tuple(_relative(path, root) for path in build.contents),
            sources=tuple(_relative(path, root) for path in build.sources),
        )


def _relative(path: Path, root: Path) -> Path:
    return Path(os.path.relpath(path, root))  # relative_to would leave `a/../b`
