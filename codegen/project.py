"""Projects: `[tool.convgen]` of a pyproject.toml to files, and files to a folder.

The driver for many kernels. Input: the root of a project; output: a `Build`, path to text. `check`
compares a build with the disk and `write` is the one function that writes it.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .choices import Choices, read_choices
from .compiler import compile_kernel
from .language import NamedSpec, check_name, parse, parse_document
from .render import body_is_intact, is_generated
from .spec import ConvTransposeSpec, SpecError, check_target, nearest, shown
from .targets import DEFAULT_TARGET, find_target

_SHOWN = 4096  # characters of a path that an error shows: no system opens a longer one
KEYS = ("output", "target", "specs", "choices", "kernel")
KERNEL_KEYS = ("name", "spec", "target")


class ProjectError(SpecError):
    """A project that cannot be built: its table, a file it names, or a folder in the way."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One file of a build: where it goes, and what is compiled for which target."""

    path: Path
    spec: ConvTransposeSpec
    target: str


@dataclass(frozen=True, slots=True)
class Build:
    """The files of a project.

    Attributes:
        output: the folder they go to.
        texts: path to text, in order of the paths.
    """

    output: Path
    texts: dict[Path, str]


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


def read_project(root: Path) -> tuple[Path, tuple[Kernel, ...]]:
    """Return output folder and kernels of the project at `root`.

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
    for name, spec, nearer in _kernels(root, table):
        for target in common if nearer is None else (nearer,):
            chosen = check_target(target)
            stem = f"{name}_{chosen}" if several else name
            kernels.append(Kernel(output / f"{stem}.py", spec, chosen))
    paths = [kernel.path for kernel in kernels]
    for path in sorted(set(paths)):
        if paths.count(path) > 1:
            raise ProjectError(f"two kernels are called {path.stem}", "name")
    return output, tuple(sorted(kernels, key=lambda kernel: kernel.path))


def generate(root: Path) -> Build:
    """Compile every kernel of the project at `root`; raises as `read_project`."""
    output, kernels = read_project(root)
    choices = project_choices(root)
    texts = {
        k.path: compile_kernel(k.spec, find_target(k.target), choices=choices).text for k in kernels
    }
    return Build(output, texts)


def project_choices(root: Path) -> Choices | None:
    """Return the measured choices that the table names, if it does; raises as `read_project`."""
    named = _table(root).get("choices")
    return None if named is None else read_choices(_inside(root, named, "choices"))


def check(build: Build) -> Drift:
    """Compare a build with the disk."""
    missing = tuple(path for path in build.texts if not path.is_file())
    changed = tuple(
        path for path, text in build.texts.items() if path.is_file() and on_disk(path) != text
    )
    return Drift(missing, changed, _extra(build))


def write(build: Build, *, force: bool = False) -> Drift:
    """Bring the folder in line with the build; return what was done, as the drift it had.

    Raises:
        ProjectError: a file in the way was not made by convgen or was edited since; nothing is
            written then, unless `force`.
    """
    drift = check(build)
    for path in drift.changed:
        if not force and not body_is_intact(on_disk(path)):
            raise ProjectError(
                f"{path} was not generated, or was edited since; --force overwrites it"
            )
    for path in (*drift.missing, *drift.changed):
        write_text(path, build.texts[path])
    removed = tuple(path for path in drift.extra if body_is_intact(on_disk(path)))
    for path in removed:
        path.unlink()
    kept = tuple(path for path in drift.extra if path not in removed)
    return Drift(drift.missing, drift.changed, removed, kept)


def on_disk(path: Path) -> str:
    """Return the text of a file that may be anybody's; raises ProjectError if it has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises ProjectError if the folder does not allow it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(temporary, 0o644)  # mkstemp's own is 0600
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ProjectError(f"cannot write {str(path)[:_SHOWN]}: {error.strerror}") from None


def _extra(build: Build) -> tuple[Path, ...]:
    """Generated files in the output folder that no kernel names."""
    if not build.output.is_dir():
        return ()
    found = [path for path in sorted(build.output.glob("*.py")) if path not in build.texts]
    return tuple(path for path in found if path.is_file() and is_generated(on_disk(path)))


def _table(root: Path) -> dict[str, Any]:
    path = root / "pyproject.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProjectError(f"there is no {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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


def _kernels(root: Path, table: dict[str, Any]) -> list[tuple[str, ConvTransposeSpec, str | None]]:
    """Return (name, spec, the nearest target said for it) of every kernel the table names."""
    found: list[tuple[str, ConvTransposeSpec, str | None]] = []
    for entry in _list(table, "specs"):
        path = _inside(root, entry, "specs")
        document = read_document(path)
        for statement in document[0]:
            if statement.name is None:
                raise ProjectError(f"{path}: {statement.spec} needs a name: `name = …`", "specs")
            found.append((statement.name, statement.spec, statement.spec.target or document[1]))
    for row in _list(table, "kernel"):
        if not isinstance(row, dict) or not {"name", "spec"} <= set(row):
            raise ProjectError("[[tool.convgen.kernel]] needs name and spec", "kernel")
        _check_keys(row, KERNEL_KEYS, "[[tool.convgen.kernel]]")
        if not isinstance(row["name"], str) or not isinstance(row["spec"], str):
            raise ProjectError("name and spec of [[tool.convgen.kernel]] must be strings", "kernel")
        spec = parse(row["spec"])
        found.append((check_name(row["name"]), spec, spec.target or row.get("target")))
    return found


def _list(table: dict[str, Any], key: str) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise ProjectError(f"{key} of [tool.convgen] must be a list, got {shown(value)}", key)
    return value


def read_document(path: Path) -> tuple[tuple[NamedSpec, ...], str | None]:
    """Return statements and target of a `.convgen` file; raises ProjectError naming it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ProjectError(f"cannot read {str(path)[:_SHOWN]}: {reason}") from None
    try:
        document = parse_document(text)
    except SpecError as error:
        raise ProjectError(f"{path}: {error}", error.argument) from None
    return document.statements, document.target
