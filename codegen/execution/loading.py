"""Writing an emitted file and loading it as a module, and laying out tensors for it.

Beside the stages, used by verify, bench, tune, `replace_layers` and the tests; needs torch and
triton. Input: the text of an emitted file; output: the module.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import linecache
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import EditedError, ProjectError, visible
from ..files import check_private, is_regular, make_folder, on_disk, write_text
from ..language.spec import MEMORY_FORMATS, ConvTransposeSpec

# Folder by process id: a fork inherits the entry of its parent, whose folder may be removed first.
_OWN: dict[int, Path] = {}


def load_module(text: str, name: str, folder: Path) -> ModuleType:
    """Write an emitted file into `folder`, where debuggers look for it, and load it.

    Raises:
        ProjectError: other users may write to `folder`.
    """
    check_private(folder)
    path = folder / f"{name}.py"
    write_text(path, text)
    return module_of(text, path, name)


def module_of(text: str, path: Path, name: str) -> ModuleType:
    """Return a module made from the emitted file `text`, whose place is `path`.

    Neither `path` nor a .pyc file beside it is read: `text` itself runs, and Triton gets the source
    lines of kernels from `text` too.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # An entry with mtime None is never compared with the disk.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    return module


def kept_module(
    spec: ConvTransposeSpec, text: str, folder: str | os.PathLike[str] | None
) -> ModuleType:
    """Return the module of a spec's file `text`; write the file and load it where not yet done.

    Without a `folder` the file lies in one that is removed when the process ends.

    Raises:
        EditedError: the file exists with another content.
        ProjectError: other users may change it.
        MachineError: it cannot be written.
    """
    try:
        home = Path(folder or _own_folder()).resolve()
    except (OSError, RuntimeError) as error:  # a link in a circle
        raise ProjectError(f"cannot write {folder}: {visible(str(error))}") from None
    make_folder(home)
    check_private(home)
    path = home / f"{_stem(spec, text)}.py"
    if not os.path.lexists(path):
        write_text(path, text, private=True)
    elif not is_regular(path) or on_disk(path) != text:
        raise EditedError(f"{path} was edited: move it, or give another folder")
    check_private(path)  # unpickling imports this file
    name = _module_name(path) if folder else path.stem
    if name not in sys.modules:
        sys.modules[name] = module_of(text, path, name)  # where pickle looks classes up
    return sys.modules[name]


def _own_folder() -> Path:
    """Return a folder that is removed when this process ends; a new one if it has vanished."""
    process = os.getpid()
    try:
        check_private(_OWN[process])
    except (KeyError, ProjectError):
        _OWN[process] = Path(tempfile.mkdtemp(prefix="convgen_"))
        atexit.register(_remove, _OWN[process], process)
    return _OWN[process]


def _remove(folder: Path, process: int) -> None:
    """Remove the folder of a process when it ends, but not when a fork of it ends."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _stem(spec: ConvTransposeSpec, text: str) -> str:
    """Return a readable file name, made unique by a hash."""

    def axes(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values if len(set(values)) > 1 else values[:1]))

    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return (
        f"conv_transpose{spec.rank}d_{spec.in_channels}_{spec.out_channels}"
        f"_k{axes(spec.kernel_size)}_s{axes(spec.stride)}_{spec.dtype}_{digest}"
    )


def _module_name(path: Path) -> str:
    """Return the shortest name by which a file can be imported, its stem if there is none."""
    names = []
    for root in (Path(entry).resolve() for entry in sys.path):
        if path.is_relative_to(root):
            parts = path.relative_to(root).with_suffix("").parts
            if all(part.isidentifier() for part in parts):
                names.append(".".join(parts))
    return min(names, key=lambda name: name.count("."), default=path.stem)


def laid_out(tensor: Any, layout: str) -> Any:
    """Return a tensor [N, C, spatial…], dense in a layout of the language; copies if it is not."""
    import torch

    if layout != "channels_last":
        return tensor.contiguous()
    return tensor.contiguous(memory_format=getattr(torch, MEMORY_FORMATS[tensor.dim() - 2]))
