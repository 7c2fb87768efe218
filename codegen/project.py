"""Projects: the table of a project to files, and files to its folder.

The driver for many kernels. Input: the root of a project; output: a `Build`, path to text. `check`
compares a build with the disk and `write` is the one function that writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .choices import choices_for
from .compiler import compile_kernel
from .files import ProjectError, on_disk, write_text
from .package import MANIFEST, manifest_is_intact, manifest_text, needs_package, package_text
from .render import body_is_intact, is_generated
from .table import Table, read_table
from .targets import find_target


@dataclass(frozen=True, slots=True)
class Build:
    """The files of a project.

    Attributes:
        output: the folder they go to.
        texts: path to text, in order of the paths.
        sources: what the table names beside pyproject.toml: documents and choices.
    """

    output: Path
    texts: dict[Path, str]
    sources: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Drift:
    """How a folder differs from its build; all empty if it does not.

    Attributes:
        missing: files of the build that are not there.
        changed: files of the build that are there with another text.
        extra: generated files that no kernel names.
        kept: those of them that `write` left in place, as they were edited since.
    """

    missing: tuple[Path, ...]
    changed: tuple[Path, ...]
    extra: tuple[Path, ...]
    kept: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed or self.extra or self.kept)


def generate(root: Path) -> Build:
    """Compile every kernel of the project at `root`; raises as `read_table`."""
    table = read_table(root)
    choices = choices_for(table.choices, {kernel.target for kernel in table.kernels})
    texts = {}
    for kernel in table.kernels:
        text = compile_kernel(kernel.spec, find_target(kernel.target), choices=choices).text
        texts[kernel.path] = _licensed(text, table.license)
    package = package_text(table)
    if package is not None:
        texts[table.output / "__init__.py"] = _licensed(package, table.license)
    named = {path.name: text for path, text in texts.items()}
    texts[table.output / MANIFEST] = manifest_text(table, named)
    return Build(table.output, texts, table.sources)


def files(table: Table) -> list[Path]:
    """Return the files that a build of `table` has, without compiling it."""
    paths = [kernel.path for kernel in table.kernels]
    paths += [table.output / "__init__.py"] * needs_package(table)
    return sorted([*paths, table.output / MANIFEST])


def _licensed(text: str, license: str | None) -> str:
    """Return a generated file with its licence below the first line of the header."""
    if license is None:
        return text
    first, _, rest = text.partition("\n")
    return f"{first}\n# SPDX-License-Identifier: {license}\n{rest}"


def is_intact(path: Path) -> bool:
    """Whether the file at `path` is as a build wrote it."""
    text = on_disk(path)
    return manifest_is_intact(text) if path.name == MANIFEST else body_is_intact(text)


def check(build: Build) -> Drift:
    """Compare a build with the disk; raises ProjectError if its folder cannot be read."""
    try:
        missing = tuple(path for path in build.texts if not path.is_file())
        changed = tuple(
            path for path, text in build.texts.items() if path.is_file() and on_disk(path) != text
        )
        return Drift(missing, changed, _extra(build))
    except OSError as error:
        raise ProjectError(f"cannot read {build.output}: {error.strerror}") from None


def write(build: Build, *, force: bool = False) -> Drift:
    """Bring the folder in line with the build; return what was done, as the drift it had.

    Raises:
        ProjectError: a file in the way was not made by convgen or was edited since; nothing is
            written then, unless `force`.
    """
    drift = check(build)
    for path in drift.missing:
        if path.is_dir():
            raise ProjectError(f"{path} is a folder; a file has to go there")
    for path in drift.changed:
        if not force and not is_intact(path):
            raise ProjectError(
                f"{path} was not generated, or was edited since; "
                "`convgen build --force` overwrites it"
            )
    for path in (*drift.missing, *drift.changed):
        write_text(path, build.texts[path])
    removed = tuple(path for path in drift.extra if body_is_intact(on_disk(path)))
    for path in removed:
        path.unlink(missing_ok=True)  # another build may have been here
    kept = tuple(path for path in drift.extra if path not in removed)
    return Drift(drift.missing, drift.changed, removed, kept)


def _extra(build: Build) -> tuple[Path, ...]:
    """Generated files in the output folder that no kernel names."""
    if not build.output.is_dir():
        return ()
    found = [path for path in sorted(build.output.glob("*.py")) if path not in build.texts]
    return tuple(path for path in found if path.is_file() and is_generated(on_disk(path)))
