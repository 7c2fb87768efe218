"""`[tool.convgen]` of a pyproject.toml: which kernels a project wants to have generated.

Input: the root of a project; output: a `Table`, all of whose values are checked.
"""

from __future__ import annotations

import builtins
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import table_at, toml_of
from ..errors import ConvgenError, ProjectError, SpecError, nearest, shown, visible
from ..files import read_text
from ..language.parser import check_name, parse
from ..language.spec import NO_CHOICES, ConvTransposeSpec, check_target
from ..tables.targets import ARCHITECTURES, DEFAULT_TARGET, TARGETS, find_target
from .statements import read_document

KEYS = (
    *("output", "target", "specs", "choices", "license", "runtime", "aot", "build-backend"),
    "kernel",
)
KERNEL_KEYS = ("name", "spec", "target", "class-name")
BACKEND = "setuptools.build_meta"
RUNTIMES = ("standalone", "shared")
LICENSE = r"[A-Za-z0-9 .+()-]{1,200}"  # an SPDX expression
# Names that the generated __init__.py uses itself.
TAKEN = ("FILES", "OWN", "importlib", "math", "nn", "torch")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a project for one target: one generated file.

    Attributes:
        path: the file.
        name: the kernel's name; the files of one kernel for several targets share it.
        spec: the layer.
        target: name of the GPU to compile for.
        class_name: name of the layer class in the package, None if it has none.
    """

    path: Path
    name: str
    spec: ConvTransposeSpec
    target: str
    class_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The content of `[tool.convgen]`.

    Attributes:
        output: the folder for the generated files.
        several: whether `target` is a list. Each kernel then has a file for each target, and the
            package picks one at run time.
        choices: the file of measured tiles; None for those that ship with convgen, ``none`` for the
            cost model only.
        license: an SPDX expression for the headers of the files, None for no such line.
        shared: the kernels' files share `_runtime.py`; else each file is complete.
        aot: the architectures to ship machine code for, such as ``sm_90``.
        build_backend: the backend that the wrapper backend (pep517.py) delegates to.
        kernels: sorted by name, then path.
        sources: the files that the table names: `.convgen` documents and the choices file.
    """

    output: Path
    several: bool
    choices: Path | None
    license: str | None
    shared: bool
    aot: tuple[str, ...]
    build_backend: str
    kernels: tuple[Kernel, ...]
    sources: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel as the table or a document describes it.

    Attributes:
        name: its name.
        spec: the layer.
        target: its own target, else that of its document; None for the targets of the table.
        class_name: name of the layer class in the package, None if it has none.
    """

    name: str
    spec: ConvTransposeSpec
    target: str | None
    class_name: str | None = None


def has_table(root: Path) -> bool:
    """Whether the project at `root` has `[tool.convgen]`; False if pyproject.toml cannot be read.

    The setuptools plugin calls this in builds of every project, so it must be fast and not fail.
    """
    try:
        text = read_text(root / "pyproject.toml")
        # The search for "convgen" spares builds of other projects the slow parsing of TOML.
        return "convgen" in text and "convgen" in table_at(toml_of(text), "tool")
    except ConvgenError:
        return False


def read_table(root: Path) -> Table:
    """Return the table of the project at `root`.

    Raises:
        ProjectError: the table is missing or cannot be read, or a value in it is wrong.
        SpecError: `target` names an unknown GPU.
    """
    table = _table(root)
    output = _inside(root, table.get("output"), "output")
    targets = table.get("target", DEFAULT_TARGET)
    several = isinstance(targets, list)
    common = tuple(check_target(target) for target in (targets if several else [targets]))
    if not common:
        raise ProjectError("target of [tool.convgen] names no GPU", "target")
    for target, count in Counter(common).items():
        if count > 1:
            raise ProjectError(f"target of [tool.convgen] names {target} twice", "target")
    kernels: list[Kernel] = []
    for row in _rows(root, table):
        for target in common if row.target is None else (row.target,):
            chosen = check_target(target)
            stem = f"{row.name}_{chosen}" if several else row.name
            path = output / f"{stem}.py"
            kernels.append(Kernel(path, row.name, row.spec, chosen, row.class_name))
    _check_names(kernels, several=several)
    given = table.get("choices")
    measured = [] if given in (None, NO_CHOICES) else [_inside(root, given, "choices")]
    documents = [_inside(root, entry, "specs") for entry in _list(table, "specs")]
    return Table(
        output=output,
        several=several,
        choices=measured[0] if measured else given and Path(NO_CHOICES),
        license=_text(table, "license", LICENSE, "an SPDX expression such as MIT"),
        shared=_text(table, "runtime", "|".join(RUNTIMES), " or ".join(RUNTIMES)) == RUNTIMES[1],
        aot=tuple(_architectures(_list(table, "aot"))),
        build_backend=_backend(table),
        kernels=tuple(sorted(kernels, key=lambda kernel: (kernel.name, kernel.path))),
        sources=tuple(dict.fromkeys([*documents, *measured])),
    )


def read_build_backend(root: Path) -> str:
    """Return the backend that pep517.py delegates to; the table's other keys are not checked.

    Raises:
        ProjectError: the table is missing or cannot be read, or `build-backend` is wrong.
    """
    return _backend(_table(root))


def _backend(table: dict[str, Any]) -> str:
    what = "a backend such as flit_core.buildapi"
    return _text(table, "build-backend", r"[\w.]+(:[\w.]+)?", what) or BACKEND


def _architectures(names: list[Any]) -> Iterator[str]:
    for number, name in enumerate(names):
        if not isinstance(name, str) or name not in ARCHITECTURES:
            hint = nearest(name, ARCHITECTURES) if isinstance(name, str) else ""
            if name in [target.name for target in TARGETS]:
                hint = f", which is {find_target(name).arch}"
            known = ", ".join(ARCHITECTURES)
            raise ProjectError(
                f"aot of [tool.convgen] must list some of {known}; got {shown(name)}{hint}", "aot"
            )
        if name in names[:number]:
            raise ProjectError(f"aot of [tool.convgen] names {name} twice", "aot")
        yield name


def _check_names(kernels: list[Kernel], *, several: bool) -> None:
    """Raise ProjectError if a name is used twice, or is one that `__init__.py` itself uses."""
    stems = {kernel.path.stem for kernel in kernels}
    folded = Counter(kernel.path.stem.lower() for kernel in kernels)
    owners: dict[str, tuple[str, ConvTransposeSpec, str | None]] = {}
    for kernel in kernels:
        if folded[kernel.path.stem.lower()] > 1:  # the same file where case is ignored
            named = sorted({each for each in stems if each.lower() == kernel.path.stem.lower()})
            hint = ", which are one file where case is ignored" * (len(named) > 1)
            raise ProjectError(f"two kernels are called {' and '.join(named)}{hint}", "name")
        layer = dataclasses.replace(kernel.spec, target=None)
        owner = (kernel.name, layer, kernel.class_name)
        for key, name in (("name", kernel.name), ("class-name", kernel.class_name)):
            # __init__.py defines a kernel's name only if there are several targets.
            said = several or key == "class-name"
            used = said and (name in TAKEN or name in dir(builtins) or name in stems)
            other = name is not None and owners.setdefault(name, owner) != owner
            if used or other or (key == "class-name" and name == kernel.name):
                raise ProjectError(f"{key} {name} is taken", key)


def _text(table: dict[str, Any], key: str, pattern: str, what: str) -> str | None:
    value = table.get(key)
    if value is None or (isinstance(value, str) and re.fullmatch(pattern, value)):
        return value
    raise ProjectError(f"{key} of [tool.convgen] must be {what}, got {shown(value)}", key)


def _table(root: Path) -> dict[str, Any]:
    path = root / "pyproject.toml"
    if not path.exists():
        raise ProjectError(f"there is no {path}")
    try:
        text = read_text(path)
        document = toml_of(text)
    except SpecError as error:
        raise ProjectError(f"cannot read {path}: {error}") from None
    table = table_at(document, "tool").get("convgen")
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
    if not isinstance(value, str) or not value or not value.isprintable():
        got = "" if value is None else f", got {shown(value)}"
        raise ProjectError(f"[tool.convgen] needs {key}, a path inside the project{got}", key)
    path = root / value
    try:
        real, home = path.resolve(), root.resolve()
        real.stat()
    except FileNotFoundError:
        pass  # a folder that a build will make
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links
        reason = error.strerror if isinstance(error, OSError) else "it is a circular link"
        raise ProjectError(f"cannot use {key}, {shown(value)}: {reason}", key) from None
    if not real.is_relative_to(home):
        where = f", which is {real}" if path.is_symlink() else ""
        raise ProjectError(f"{key} must stay inside the project, got {shown(value)}{where}", key)
    return path


def _rows(root: Path, table: dict[str, Any]) -> Iterator[Row]:
    for entry in _list(table, "specs"):
        path = _inside(root, entry, "specs")
        statements, target = read_document(path)
        for statement in statements:
            if statement.name is None:
                layer = visible(str(statement.spec))
                raise ProjectError(f"{path}: {layer} needs a name: `name = …`", "specs")
            yield Row(statement.name, statement.spec, statement.spec.target or target)
    for number, row in enumerate(_list(table, "kernel"), 1):
        where = f"[[tool.convgen.kernel]] number {number}"
        if isinstance(row, dict) and isinstance(row.get("name"), str):
            where = f"[[tool.convgen.kernel]] {shown(row['name'])}"
        try:
            yield _row(row)
        except ConvgenError as error:
            raise ProjectError(f"{where}: {error}", error.argument) from None


def _row(row: object) -> Row:
    if not isinstance(row, dict) or not {"name", "spec"} <= set(row):
        raise ProjectError("it needs name and spec", "kernel")
    _check_keys(row, KERNEL_KEYS, "it")
    for key, value in row.items():
        if not isinstance(value, str):
            raise ProjectError(f"{key} must be a string, got {shown(value)}", key)
    spec, class_name = parse(row["spec"]), row.get("class-name")
    if class_name is not None:
        check_name(class_name)
    target = spec.target or row.get("target")
    if target is not None:
        check_target(target)
    return Row(check_name(row["name"]), spec, target, class_name)


def _list(table: dict[str, Any], key: str) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        hint = ", written [[tool.convgen.kernel]]" if key == "kernel" else ""
        raise ProjectError(f"{key} of [tool.convgen] must be a list{hint}, got {shown(value)}", key)
    return value
