"""Layers for the tests of the planner: real ones, drawn ones, those of this repository's files.

Input: layers.convgen, drawing.py and the table of pyproject.toml; output: specs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from convgen import ConvTransposeSpec, parse
from convgen.language.parser import parse_document
from convgen.project.table import read_table
from drawing import draw

DTYPES = ("float32", "float16", "bfloat16", "float64")


def named_layers() -> dict[str, ConvTransposeSpec]:
    """Return the layers of layers.convgen by their names, in float32 and channels_first."""
    path = Path(__file__).with_name("layers.convgen")
    rows = parse_document(path.read_text("utf-8")).statements
    return {row.name: row.spec for row in rows if row.name is not None}


def real_layers() -> list[ConvTransposeSpec]:
    """Return the layers of layers.convgen, in float32 and channels_first."""
    return list(named_layers().values())


def drawn_layers(count: int) -> list[ConvTransposeSpec]:
    """Return drawn layers; of half of them some sizes are left to run time."""
    return [draw(seed)[seed % 2] for seed in range(count)]


def listed_layers(root: Path) -> list[ConvTransposeSpec]:
    """Return the layers of the table of the project at `root`, without their targets."""
    return [dataclasses.replace(kernel.spec, target=None) for kernel in read_table(root).kernels]


def in_layouts(spec: ConvTransposeSpec) -> Iterator[ConvTransposeSpec]:
    """Yield a layer in each layout."""
    for layout in ("channels_first", "channels_last")[: min(spec.rank, 2)]:
        yield dataclasses.replace(spec, layout=layout)


def in_dtype(spec: ConvTransposeSpec, dtype: str) -> ConvTransposeSpec:
    """Return a layer in another dtype, with the precision of that dtype."""
    precision = spec.precision if dtype == spec.dtype else None
    return dataclasses.replace(spec, dtype=dtype, precision=precision)


def dtype_of(text: str) -> str:
    """Return the dtype of a layer given as text."""
    return parse(text).dtype
