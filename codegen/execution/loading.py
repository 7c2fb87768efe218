"""Loading an emitted file as a module, and laying out tensors for it.

Used by verify, bench, tune, by compiling to machine code and by the tests; needs torch and triton,
which the compiler does not. Input: the text of a file; output: the module.
"""

from __future__ import annotations

import importlib.util
import linecache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import check_private, write_text
from ..language.spec import MEMORY_FORMATS


def load_module(text: str, name: str, folder: Path) -> ModuleType:
    """Write an emitted file into `folder`, where debuggers look for it, and load it.

    Raises:
        ProjectError: others may write into `folder`.
    """
    check_private(folder)
    path = folder / f"{name}.py"
    write_text(path, text)
    return module_of(text, path, name)


def module_of(text: str, path: Path, name: str) -> ModuleType:
    """Return the module that the emitted file `text`, which belongs at `path`, is under a name.

    Nothing is read from `path`, nor compiled code from beside it: what runs is `text`, and Triton,
    which asks for the lines of a kernel, gets those of `text` too.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Without a time of change the entry is never compared with the disk.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    return module


def laid_out(tensor: Any, layout: str) -> Any:
    """Return a tensor, dense as torch makes one, in a layout of the language."""
    import torch

    if layout != "channels_last":
        return tensor
    return tensor.contiguous(memory_format=getattr(torch, MEMORY_FORMATS[tensor.dim() - 2]))
