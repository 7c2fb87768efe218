"""Random specs for the tests: every argument of the language, sizes small enough to interpret."""

from __future__ import annotations

import dataclasses
import random

from convgen import ConvTransposeSpec, SpecError, find_target
from convgen.compiler import compile_kernel
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import decompose
from convgen.geometry.tile import Tile
from convgen.planning.candidates import rank_tiles
from convgen.rendering.render import KernelSource

DTYPES = ("float32", "float32", "float16", "bfloat16", "float64")
PRECISIONS = ("tf32", "tf32", "tf32x3", "bf16x3", "bf16x6", "ieee")
BEST = 20  # tiles of a form that one is drawn from


def draw(seed: int) -> tuple[ConvTransposeSpec, ConvTransposeSpec]:
    """Return a spec with every size known, and the same with some left to run time."""
    source = random.Random(seed)
    while True:
        try:
            known = _draw_known(source)
        except SpecError:  # such as an output of no elements: draw again
            continue
        return known, _open(source, known) if source.random() < 0.5 else known


def opened(spec: ConvTransposeSpec) -> ConvTransposeSpec:
    """Return `spec` with the batch and every extent left to run time."""
    sizes = (None, spec.in_channels, *(None,) * spec.rank)
    return dataclasses.replace(spec, input=sizes)


def _draw_known(source: random.Random) -> ConvTransposeSpec:
    rank = source.choice((1, 2, 2, 3))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(source.randint(low, high) for _ in range(rank))

    kernel, stride, dilation = (
        axes(1, (7, 4, 3)[rank - 1]),
        axes(1, (6, 3, 3)[rank - 1]),
        axes(1, 4),
    )
    groups = source.choice((1, 1, 1, 2, 3))
    channels = groups * source.choice((1, 2, 3, 5, 17, 20))
    dtype = source.choice(DTYPES)
    return ConvTransposeSpec(
        rank=rank,
        in_channels=channels,
        out_channels=groups * source.choice((1, 2, 3, 7, 18)),
        kernel_size=kernel,
        stride=stride,
        padding=axes(0, 4),
        output_padding=tuple(
            source.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)
        ),
        groups=groups,
        bias=source.random() < 0.5,
        dilation=dilation,
        input=(source.randint(1, 3), channels, *axes(1, (40, 9, 5)[rank - 1])),
        dtype=dtype,
        precision=source.choice(PRECISIONS) if dtype == "float32" else None,
        grid=source.choice((None, 1, 2, 3)),
        layout="channels_first"
        if rank == 1
        else source.choice(("channels_first", "channels_last")),
    )


def _open(source: random.Random, spec: ConvTransposeSpec) -> ConvTransposeSpec:
    """Leave some sizes of `spec` to run time."""
    assert spec.input is not None
    shape = [size if source.random() < 0.4 else None for size in spec.input]
    shape[1] = None
    return dataclasses.replace(
        spec,
        in_channels=spec.in_channels if source.random() < 0.5 else None,
        out_channels=spec.out_channels if source.random() < 0.5 else None,
        input=tuple(shape),
    )


def forms(spec: ConvTransposeSpec) -> dict[str, list[Tile]]:
    """Return the tiles of each form that serves `spec`, best first.

    A form is a family, a span, rows, and whether the kernel reads a copy of the input.
    """
    found: dict[str, list[Tile]] = {}
    target = find_target(spec.target or "rtx4090")
    for candidate in rank_tiles(spec, decompose(spec), target, FAMILIES):
        tile = candidate.tile
        rows = f" rows {tile.rows}" if tile.rows > 1 else ""
        copy = " copy" if tile.relayout else ""
        found.setdefault(f"{tile.family} {tile.span}{rows}{copy}", []).append(tile)
    return found


def each_form(spec: ConvTransposeSpec, seed: int | str = 0) -> dict[str, KernelSource]:
    """Return a file of each form that serves `spec`, each with one of its best tiles.

    The planner takes one of them; the others are a measured choice, or another card, away.
    """
    source = random.Random(seed)
    plain = dataclasses.replace(spec, autotune="none")
    return {
        form: compile_kernel(plain, tile=source.choice(tiles[:BEST]))
        for form, tiles in forms(plain).items()
    }
