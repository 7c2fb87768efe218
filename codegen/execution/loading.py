"""Loading an emitted file as a module, and laying out tensors for it.

Beside the stages, used by verify, bench, tune and the tests; needs torch and triton. Input: the
text of an emitted file; output: the module.
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


def laid_out(tensor: Any, layout: str) -> Any:
    """Return a contiguous tensor [N, C, spatial…] in a layout of the language."""
    import torch

    if layout != "channels_last":
        return tensor
    return tensor.contiguous(memory_format=getattr(torch, MEMORY_FORMATS[tensor.dim() - 2]))
