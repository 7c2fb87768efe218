"""The files that go with a project's kernels: the package's `__init__.py` and the manifest.

The last part of a build. Input: a `Table` and the text of each kernel; output: the text of both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ProjectError
from ..files import is_regular, on_disk
from ..rendering.header import HEADER_LINE, with_hash
from ..rendering.render import RUNTIME, environment
from ..tables.targets import find_target
from ..version import __version__
from .table import Kernel, Table

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class FileText:
    """A kernel's file for one target, with the properties of the target that the package picks by.

    Attributes:
        stem: the file's name without the suffix.
        capability: compute capability of the target, 89 for 8.9.
        sms: streaming multiprocessors of the target.
        shared: shared memory that a block of the target can have, in bytes.
    """

    stem: str
    capability: int
    sms: int
    shared: int


@dataclass(frozen=True, slots=True)
class KernelText:
    """A kernel of the package.

    Attributes:
        name: name of its function.
        class_name: name of its layer class in the package, None if it has none.
        op: name of its function in the emitted files.
        layer: torch's class of such layers.
        files: one for each target.
    """

    name: str
    class_name: str | None
    op: str
    layer: str
    files: tuple[FileText, ...]


def needs_package(table: Table) -> bool:
    """Whether the output folder gets an `__init__.py`: to pick a target, or to name a class."""
    return table.several or any(kernel.class_name is not None for kernel in table.kernels)


def package_text(table: Table) -> str | None:
    """Return the text of `__init__.py`, None if `table` needs no such file."""
    if not needs_package(table):
        return None
    kernels = tuple(
        _kernel(list(group)) for _, group in itertools.groupby(table.kernels, lambda k: k.name)
    )
    names = [k.class_name for k in kernels if k.class_name is not None]
    if table.several:
        names += [kernel.name for kernel in kernels]
        summary = "The kernels of this package; each call uses the file for its GPU."
    else:
        summary = "The layers of this package."
    body = (
        environment()
        .get_template("package.py.jinja")
        .render(
            summary=summary,
            several=table.several,
            kernels=kernels,
            names=", ".join(f'"{name}"' for name in sorted(names)),
        )
    )
    return with_hash(f"{HEADER_LINE}{__version__}. DO NOT EDIT.\n", f"\n{body}")


def _kernel(files: list[Kernel]) -> KernelText:
    first, rank = files[0], files[0].spec.rank
    return KernelText(
        name=first.name,
        class_name=first.class_name,
        op=f"conv_transpose{rank}d",
        layer=f"ConvTranspose{rank}d",
        files=tuple(map(_file, files)),
    )


def _file(kernel: Kernel) -> FileText:
    target = find_target(kernel.target)
    major, minor = target.compute_capability
    return FileText(
        stem=kernel.path.stem,
        capability=10 * major + minor,
        sms=target.sms,
        shared=target.shared_per_block,
    )


def manifest_text(table: Table, texts: dict[str, str], cubins: dict[str, dict[str, Any]]) -> str:
    """Return the text of the manifest: name, target, spec and hash of each kernel's file.

    Args:
        table: the project's table.
        texts: text of each generated file, by file name.
        cubins: manifest row of each machine code file, by file name.
    """
    rows = [
        {
            "file": kernel.path.name,
            "name": kernel.name,
            "target": kernel.target,
            "spec": str(kernel.spec),
            "sha256": _digest(texts[kernel.path.name]),
        }
        for kernel in table.kernels
    ]
    content = {"schema": SCHEMA, "generator": f"convgen {__version__}", "kernels": rows}
    if RUNTIME in texts:
        content["runtime"] = {"file": RUNTIME, "sha256": _digest(texts[RUNTIME])}
    if table.aot:
        content["precompiled"] = cubins
    return json.dumps(content | {"sha256": _digest(json.dumps(content))}, indent=2) + "\n"


def manifest_is_intact(text: str) -> bool:
    """Whether `text` is a manifest, unchanged since it was written."""
    return _content(text) is not None


def read_precompiled(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of machine code files in the manifest at `path`, by file name.

    Empty if there is no manifest, or an edited one.

    Raises:
        ProjectError: the manifest cannot be read.
    """
    try:
        content = _content(on_disk(path)) if is_regular(path) else None
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None
    rows = (content or {}).get("precompiled")
    if not isinstance(rows, dict):
        return {}
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


def _content(text: str) -> dict[str, Any] | None:
    """Return the content of a manifest, None if `text` is no manifest or was edited."""
    try:
        content: Any = json.loads(text)
        digest = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return content if digest == _digest(json.dumps(content)) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
