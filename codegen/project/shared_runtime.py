"""The file `_runtime.py` that the kernels of a package share.

Part of a build. Input: the emitted files of a package; output: the text of the runtime, which is
`templates/runtime.py` as the body of a function that a kernel's file calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..rendering.fold import RECORD, Value, fold, read_source
from ..rendering.glue import runtime_text
from ..rendering.header import HEADER_LINE, with_hash
from ..rendering.render import KernelSource, environment
from ..version import __version__
from .unread import names_read, without_unread

# What a kernel's file always states.
_REQUIRED = (
    *("INPUT_SHAPE", "WEIGHT_SHAPE", "STRIDE", "PADDING", "OUTPUT_PADDING", "GROUPS", "DILATION"),
    *("GEOMETRY", "DTYPE", "LAYOUT", "HAS_BIAS", "NAMESPACE", "_start"),
)
# What it has if its layer needs it.
_OPTIONAL = (
    *("CONFIGS", "_torch", "_start_pack", "_start_gradient", "_start_pack_for_gradient"),
    *("_start_copy", "_descriptors", "_mismatch_of_sizes", "_serves_gradient", "PLANS"),
)
# What it has if it is not one.
_COUNTS = ("PACKED_TAPS", "LANES", "PLACES")
# What its lines import, by the name that they then read.
_IMPORTS = (
    {
        "functools": "import functools",
        "hashlib": "import hashlib",
        "json": "import json",
        "math": "import math",
        "warnings": "import warnings",
        "Path": "from pathlib import Path",
    },
    {
        "torch": "import torch",
        "nn": "import torch.nn as nn",
        "F": "import torch.nn.functional as F",
        "triton": "import triton",
        "_empty_strided_cuda": "from torch._C._dynamo.guards import _empty_strided_cuda",
        "conv_flop_count": (
            "from torch.utils.flop_counter import conv_flop_count, register_flop_formula"
        ),
        "get_cache_manager": "from triton.runtime.cache import get_cache_manager",
        "TensorDescriptor": "from triton.tools.tensor_descriptor import TensorDescriptor",
    },
)
_TITLES = {
    "derived": "what follows from it",
    "devices": "devices, and launches that were made",
    "functions": "functions",
    "launch": "packing and launch",
    "plans": "which kernel computes a call",
    "checks": "checks",
    "modes": "modes",
    "gradients": "gradients",
    "backward": "gradients, as torch asks for them",
    "operator": "operator",
    "registration": "registration",
    "layer": "layer",
}
_WORDS = {
    "the geometry of this file's spec": "the geometry of the kernel's spec",
    "with this file's spec as its": "with the kernel's spec as its",
    "functional.conv_transpose2d": "functional.conv_transposeNd",
    "conv_transpose2d": "conv_transpose",
    "ConvTranspose2d": "ConvTransposeNd",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the runtime: what its ruler says, and its lines."""

    title: str
    text: str


def runtime_source(sources: Sequence[KernelSource], *, precompiled: bool) -> str:
    """Return the text of the runtime for the files in `sources`, rendered to share it.

    With `precompiled` some of them have machine code beside them.
    """
    several = any(source.glue.file["SEVERAL"] for source in sources)
    values: dict[str, Value] = {
        "REPEATS": True,
        "UNPIPELINED": any(source.glue.file["UNPIPELINED"] for source in sources),
        "HAS_PACKING": any(source.glue.file["HAS_PACKING"] for source in sources),
        "PRECOMPILED": precompiled,
        "INPUT_AXES": "[BATCH, C_IN, spatial axes]",
        "KERNEL_AXES": "kernel size",
        "BIAS_AXES": "[C_out], or None: as the kernel's file was generated",
        "PACKED_WEIGHT": "Returns a new tensor, as the kernel that packs describes it.",
        "STAGES": None,
        "COPIED": "",
    }
    values = _common_flags(sources) | _of_plans(sources, several=several) | values
    text = fold(read_source(runtime_text(), frozenset(values)), values, _WORDS)
    titles = {name: title for name, title in _TITLES.items() if name != "plans" or several}
    used = [text[name] for name in titles if name != "derived"]
    text["derived"] = without_unread(text["derived"], used)
    read = names_read([text["derived"], *used])
    helpers = sorted({name for source in sources for name in source.helpers})
    body = (
        environment()
        .get_template("shared_runtime.py.jinja")
        .render(
            imports=_imports("".join(text[name] for name in titles), device=bool(helpers)),
            precompiled=precompiled,
            interpreted="to_bfloat16" in helpers,
            helpers=helpers,
            stages=text["stages"],
            record=text["record"] if several else "",
            required=[name for name in _REQUIRED if name in read],
            optional=[name for name in _OPTIONAL if name in read],
            counts=[name for name in _COUNTS if name in read],
            sections=[Section(title, _nested(text[name])) for name, title in titles.items()],
        )
    )
    return with_hash(f"{HEADER_LINE}{__version__}. DO NOT EDIT.\n", f"\n{body}")


def _imports(text: str, *, device: bool) -> list[str]:
    """Return the imports that lines read; `device`: there are functions for kernels beside them."""
    standard, others = (
        [line for name, line in group.items() if re.search(rf"\b{name}\b", text)]
        for group in _IMPORTS
    )
    if device:
        others.insert(others.index("import triton") + 1, "import triton.language as tl")
    return [*standard, "", *others]


def _common_flags(sources: Sequence[KernelSource]) -> dict[str, bool]:
    """Return the flags that are the same for all kernels: the runtime needs no branch on them."""
    first, *others = [_flags(source) for source in sources]
    return {
        name: value
        for name, value in first.items()
        if all(other[name] == value for other in others)
    }


def _flags(source: KernelSource) -> dict[str, bool]:
    flags = {n: value for n, value in source.glue.file.items() if isinstance(value, bool)}
    # A standalone file without these has parameters without defaults.
    return flags | {"OPEN_CHANNELS": source.plan.spec.out_channels is None}


def _of_plans(sources: Sequence[KernelSource], *, several: bool) -> dict[str, Value]:
    """Return what is read from `plan`: flags that all kernels share, else the name in the file.

    If a file has several kernels, the others are read from records.
    """
    kernels = [kernel for source in sources for kernel in source.glue.kernels]
    found: dict[str, Value] = {} if several else {RECORD: None}
    for name, value in kernels[0].items():
        if isinstance(value, bool) and all(kernel[name] == value for kernel in kernels):
            found[f"{RECORD}.{name}"] = value
        elif not several:
            found[f"{RECORD}.{name}"] = name if name.isupper() else f"_{name}"
    return found


def _nested(text: str) -> str:
    """Return lines with one empty line between functions, as it is inside of a function."""
    return text.replace("\n\n\n", "\n\n")
