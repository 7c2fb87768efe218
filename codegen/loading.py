"""Importing an emitted file, and laying out tensors for it.

Used by verify, bench, tune, by compiling to machine code and by the tests; needs torch and triton,
which the compiler does not. Input: the text of a file; output: the module.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from .spec import MEMORY_FORMATS


def load_module(text: str, name: str, folder: Path) -> ModuleType:
    """Write an emitted file into `folder`, where Triton reads its source, and import it."""
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return import_file(path, name)


def import_file(path: Path, name: str) -> ModuleType:
    """Import an emitted file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def laid_out(tensor: Any, layout: str) -> Any:
    """Return a tensor, dense as torch makes one, in a layout of the language."""
    import torch

    if layout != "channels_last":
        return tensor
    return tensor.contiguous(memory_format=getattr(torch, MEMORY_FORMATS[tensor.dim() - 2]))
