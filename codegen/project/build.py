"""Builds: generate all files of a project, compare them with the disk, write them.

The driver for many kernels. Input: the root of a project; output: a `Build`, the content of each
file. `check` compares a build with the disk; only `write` writes it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..compiler import compile_kernel
from ..errors import EditedError, ProjectError
from ..families.registry import FAMILIES
from ..files import bytes_on_disk, is_regular, on_disk, only_writer, remove, write_bytes
from ..planning.choices import choices_for
from ..rendering.header import around_hash, is_as_generated, is_generated, with_hash
from ..rendering.render import RUNTIME
from ..tables.targets import find_target
from .package import (
    MANIFEST,
    manifest_is_intact,
    manifest_text,
    needs_package,
    package_text,
    read_precompiled,
)
from .precompile import CUBIN, is_sealed, jobs, precompile, seal_is_intact
from .shared_runtime import runtime_source
from .table import Kernel, Table, read_table


@dataclass(frozen=True, slots=True)
class Build:
    """The generated files of a project.

    Attributes:
        output: the folder for the files.
        texts: text of each text file, by path: kernels, `__init__.py` if there is one, manifest.
        cubins: content of each machine code file, by path; empty without `aot`.
        sources: the files that the table names: `.convgen` documents and the choices file.
    """

    output: Path
    texts: dict[Path, str]
    cubins: dict[Path, bytes]
    sources: tuple[Path, ...]

    @property
    def contents(self) -> dict[Path, str | bytes]:
        """All files, in the order to write them: the manifest last, because it lists the others."""
        return {**self.cubins, **self.texts}


@dataclass(frozen=True, slots=True)
class Drift:
    """How the output folder differs from a build; all empty if it does not.

    Attributes:
        missing: files of the build that do not exist.
        changed: files of the build that exist with other content, or are links. Builds never make
            links, and the file that a link leads to may be outside the project.
        extra: generated files that are not in the build; those that `write` removed, if it
            returned this.
        kept: generated files not in the build that `write` did not remove: they were edited.
    """

    missing: tuple[Path, ...]
    changed: tuple[Path, ...]
    extra: tuple[Path, ...]
    kept: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed or self.extra or self.kept)


def generate(
    root: Path,
    shown: Callable[[Sequence[Kernel]], AbstractContextManager[Iterable[Kernel]]] = nullcontext,
) -> Build:
    """Compile every kernel of the project at `root`.

    `shown` wraps the loop over the kernels, to show a progress bar for example.

    Raises:
        ConvgenError: the table is wrong, or a kernel cannot be generated or precompiled.
    """
    table = read_table(root)
    choices = choices_for(table.choices, {kernel.target for kernel in table.kernels}, FAMILIES)
    shipping = {job.kernel for job in jobs(table)}
    texts, sources = {}, []
    with shown(table.kernels) as kernels:
        for kernel in kernels:
            target, precompiled = find_target(kernel.target), kernel in shipping
            source = compile_kernel(
                kernel.spec,
                target,
                choices=choices,
                precompiled=precompiled,
                shared=table.shared,
            )
            sources.append(source)
            texts[kernel.path] = _licensed(source.text, table.license)
    if sources and table.shared:
        runtime = runtime_source(sources, precompiled=bool(shipping))
        texts[table.output / RUNTIME] = _licensed(runtime, table.license)
    cubins = precompile(table, texts)
    package = package_text(table)
    if package is not None:
        texts[table.output / "__init__.py"] = _licensed(package, table.license)
    named = {path.name: text for path, text in texts.items()}
    shipped = {path.name: cubin.row for path, cubin in cubins.items()}
    texts[table.output / MANIFEST] = manifest_text(table, named, shipped)
    contents = {path: cubin.content for path, cubin in cubins.items()}
    return Build(table.output, texts, contents, table.sources)


def files(table: Table) -> list[Path]:
    """Return the paths that a build of `table` would write, without compiling anything."""
    paths = [kernel.path for kernel in table.kernels]
    paths += [table.output / "__init__.py"] * needs_package(table)
    paths += [table.output / RUNTIME] * (table.shared and bool(table.kernels))
    paths += [job.path for job in jobs(table)]
    return sorted([*paths, table.output / MANIFEST])


def _licensed(text: str, license: str | None) -> str:
    """Return a generated file with a licence line inserted below the header's first line."""
    parts = around_hash(text)
    if license is None or parts is None:
        return text
    first, _, below = parts[0].partition("\n")
    return with_hash(f"{first}\n# SPDX-License-Identifier: {license}\n{below}", parts[1])


def is_intact(path: Path) -> bool:
    """Whether the file at `path` is unchanged since a build wrote it; links are followed."""
    if not path.is_file():
        return False
    if path.suffix == CUBIN:
        return seal_is_intact(bytes_on_disk(path))
    text = on_disk(path)
    return manifest_is_intact(text) if path.name == MANIFEST else is_as_generated(text)


def check(build: Build) -> Drift:
    """Compare a build with the disk; raises ProjectError if the output folder cannot be read."""
    try:
        missing = tuple(
            path for path in build.contents if not (is_regular(path) or path.is_symlink())
        )
        changed = tuple(
            path
            for path, content in build.contents.items()
            if path not in missing and _differs(path, content)
        )
        return Drift(missing, changed, _extra(build))
    except OSError as error:
        raise ProjectError(f"cannot read {build.output}: {error.strerror}") from None


def _differs(path: Path, content: str | bytes) -> bool:
    if path.is_symlink():
        return True
    return content != (on_disk(path) if isinstance(content, str) else bytes_on_disk(path))


def write(build: Build, *, force: bool = False) -> Drift:
    """Make the output folder match the build; return what was written, removed and kept.

    Raises:
        EditedError: a file to overwrite, or the file that a link in its place leads to, was not
            made by convgen or was edited since. Nothing is written then. Never raised with `force`.
        ProjectError: a folder, device or pipe is in the place of a file, or the output folder
            cannot be read.
        MachineError: a file cannot be written.
    """
    with only_writer(build.output):
        drift = check(build)
        for path in drift.missing:
            if os.path.lexists(path):
                kind = "a folder" if path.is_dir() else "a device or a pipe"
                raise ProjectError(f"{path} is {kind}, but a generated file must go there")
        for path in drift.changed:
            if not force and not is_intact(path):
                raise EditedError(
                    f"{path} was not generated, or was edited since; "
                    "`convgen build --force` overwrites it"
                )
        for path in (*drift.missing, *drift.changed):
            content = build.contents[path]
            write_bytes(path, content.encode() if isinstance(content, str) else content)
        removed = tuple(path for path in drift.extra if is_intact(path))
        for path in removed:
            remove(path)
    kept = tuple(path for path in drift.extra if path not in removed)
    return Drift(drift.missing, drift.changed, removed, kept)


def _extra(build: Build) -> tuple[Path, ...]:
    """Return the generated files in the output folder that are not in the build."""
    found = [
        path
        for pattern in ("*.py", f"*.sm_*{CUBIN}")
        for path in sorted(build.output.glob(pattern))
        if path not in build.contents and is_regular(path)
    ]
    listed = read_precompiled(build.output / MANIFEST)
    return tuple(path for path in found if path.name in listed or _is_ours(path))


def _is_ours(path: Path) -> bool:
    if path.suffix == CUBIN:
        return is_sealed(bytes_on_disk(path))
    return is_generated(on_disk(path))


def generated_below(folder: Path) -> list[Path]:
    """Return the files that builds wrote anywhere below `folder`, edited kernels included.

    Raises:
        ProjectError: a file cannot be read.
    """
    files = [path for path in sorted(folder.rglob("*")) if is_regular(path)]
    kernels = [path for path in files if path.suffix in (".py", CUBIN) and _is_ours(path)]
    return kernels + [path for path in files if path.name == MANIFEST and is_intact(path)]


def unified_diff(build: Build, drift: Drift) -> str:
    """Return the diff from the disk to the build; links and machine code are only named."""
    lines: list[str] = []
    for path in (*drift.missing, *drift.changed, *drift.extra):
        if path.is_symlink():
            lines.append(f"a link, not a file: {path}\n")
            continue
        if path.suffix == CUBIN:
            lines.append(f"machine code differs: {path}\n")
            continue
        old = on_disk(path).splitlines(True) if is_regular(path) else []
        new = build.texts.get(path, "").splitlines(True)
        lines += difflib.unified_diff(old, new, str(path), str(path))
    return "".join(lines)
