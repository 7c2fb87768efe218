"""The names of the templates of the input's copy, as text.

Stages 3 and 5, beside kernel_names.py. Input: a `KernelPlan` and the `Sizes` of its kernel; output:
a `RelayoutText`, in which every expression is already printed. A program of the copy takes a tile
of an image: COPY_CHANNELS channels of COPY_POSITIONS positions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sympy import Expr, Integer

from ..kernels.builder import ONE, Kernel, define_program
from ..language.spec import MEMORY_FORMATS
from ..planning.input_copy import CopyTile, copy_name, copy_rounds, copy_text, copy_tile
from ..planning.plan import GridCoordinate, KernelPlan
from ..symbolic.access import Coordinate
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, Size, Sizes
from .host_sizes import HostNames, grid_text
from .size_lines import size_lines

ORDER = ("ci", "position")  # dimensions of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayoutText:
    """The names of `kernels/relayout.py.jinja` and `parts/relayout.jinja`, as text.

    Attributes:
        kernel, function: the names of the kernel that copies and of what launches it.
        copied: what the copy is, after the word.
        triton_dtype: the element type in comments.
        x_shape, copy_shape: the tensors' axes.
        positions, channels: extents of a tile.
        locals: the lines of the numbers of tiles, where the program's place needs them.
        program_lines: the program's coordinates.
        lane_lines: the channels and the positions of its tile.
        x_lines: the tile's place in the input, and the mask of its elements.
        copy_lines: its place in the copy.
        x_pointers, copy_pointers: where the elements lie.
        masked: the mask says which elements exist; else all do.
        transposes: the copy is in another layout than the input.
        rounds: it is rounded to TF32.
        format: torch's name of its memory format, empty where torch has none.
        shape_names: the lines that name the sizes which the grid reads.
        grid: the line that defines the launch grid.
    """

    kernel: str
    function: str
    copied: str
    triton_dtype: str
    x_shape: str
    copy_shape: str
    positions: str
    channels: str
    locals: tuple[str, ...]
    program_lines: tuple[str, ...]
    lane_lines: tuple[str, ...]
    x_lines: tuple[str, ...]
    copy_lines: tuple[str, ...]
    x_pointers: str
    copy_pointers: str
    masked: bool
    transposes: bool
    rounds: bool
    format: str
    shape_names: tuple[str, ...]
    grid: str


def relayout_text(plan: KernelPlan, sizes: Sizes, triton_dtype: str) -> RelayoutText | None:
    """Return the names of the templates of the copy, None for a plan without one."""
    if not plan.tile.relayout:
        return None
    tile = copy_tile(plan.spec)
    sizes = _with_tiles(sizes, tile)
    grid = _grid(sizes)
    kernel = Kernel(dataclasses.replace(plan, grid=(grid,)), sizes, Scribe(sizes.space))
    program: list[str] = []
    define_program(kernel, program)
    lanes: list[str] = []
    ci = _lane(kernel, lanes, "ci", ("ci_tile", "channel_tiles", "COPY_CHANNELS"))
    position = _lane(kernel, lanes, "position", ("tile", "position_tiles", "COPY_POSITIONS"))
    inputs, channels = _inputs(sizes), sizes.named("C_IN")
    name, transposes = copy_name(plan.spec), plan.spec.layout == "channels_first"
    of_ci, of_position = (inputs, ONE) if transposes else (ONE, channels)
    x = kernel.access("x", _coordinates(kernel, (ci, of_ci), (position, of_position)), ORDER)
    copy = kernel.access("copy", _coordinates(kernel, (ci, ONE), (position, channels)), ORDER)
    host = HostNames(kernel.plan, sizes)
    programs = host.extent(grid)
    spatial = ", ".join(f"{letter.upper()}_IN" for letter in AXES[plan.spec.rank])
    copy_shape = f"[BATCH, {spatial}, C_IN]"
    return RelayoutText(
        kernel=f"{name}_kernel",
        function="_in_channels_last" if transposes else "_rounded",
        copied=copy_text(plan.spec),
        transposes=transposes,
        triton_dtype=triton_dtype,
        x_shape=f"[BATCH, C_IN, {spatial}]" if transposes else copy_shape,
        copy_shape=copy_shape,
        positions=str(tile.positions),
        channels=str(tile.channels),
        locals=size_lines(sizes, kernel.scribe)[-1],
        program_lines=tuple(program),
        lane_lines=tuple(lanes),
        x_lines=(*([x.base] if x.base else []), *x.lanes, *x.mask_lines),
        copy_lines=(*([copy.base] if copy.base else []), *(copy.lanes if transposes else ())),
        x_pointers=f"{x.pointer} + x_lanes",
        copy_pointers=f"{copy.pointer} + {'copy' if transposes else 'x'}_lanes",
        masked=x.masked,  # they are the same elements in both
        rounds=copy_rounds(plan),
        format=MEMORY_FORMATS.get(plan.spec.rank, ""),
        shape_names=host.shape_lines("x.shape", "x.shape"),
        grid=grid_text([programs], tuned=False),
    )


def _with_tiles(sizes: Sizes, tile: CopyTile) -> Sizes:
    """Return the sizes with those of the copy's tiles, all of which are known."""
    sizes = sizes.plus(Size("COPY_POSITIONS", tile.positions), Size("COPY_CHANNELS", tile.channels))
    return sizes.plus(
        sizes.count_of("position_tiles", _inputs(sizes), "COPY_POSITIONS"),
        sizes.count_of("channel_tiles", sizes.named("C_IN"), "COPY_CHANNELS"),
    )


def _inputs(sizes: Sizes) -> Expr:
    """Inputs of one channel of one image."""
    return math.prod((sizes.input(axis) for axis in range(sizes.rank)), start=Integer(1))


def _grid(sizes: Sizes) -> tuple[GridCoordinate, ...]:
    """Return what the programs are numbered by: what takes more than one value, one at least.

    Those that run together should store to the same lines: tiles of channels vary fastest.
    """
    tile = GridCoordinate("tile", sizes.named("position_tiles"))
    every = (
        GridCoordinate("ci_tile", sizes.named("channel_tiles")),
        tile,
        GridCoordinate("image", sizes.named("BATCH")),
    )
    return tuple(each for each in every if sizes.space.number(each.extent) != 1) or (tile,)


def _lane(kernel: Kernel, lines: list[str], name: str, tile: tuple[str, str, str]) -> Expr:
    """Define the lane over a block, of this program's tile; `tile`: it, their number, the block."""
    coordinate, count, block = tile
    start = kernel.coordinate(coordinate) * kernel.sizes.named(block)
    begin = f"{kernel.scribe.text(start)} + " if start != 0 else ""
    lines.append(f"{name} = {begin}tl.arange(0, {block})")
    high = kernel.sizes.named(count) * kernel.sizes.named(block) - 1
    return kernel.scribe.name(name, 0, high, name)


def _coordinates(
    kernel: Kernel, channel: tuple[Expr, Expr], position: tuple[Expr, Expr]
) -> list[Coordinate]:
    """Return coordinates in input or copy; channel and position come with their strides there."""
    sizes = kernel.sizes
    channels, inputs = sizes.named("C_IN"), _inputs(sizes)
    return [
        Coordinate(kernel.coordinate("image"), sizes.named("BATCH"), channels * inputs),
        Coordinate(channel[0], channels, channel[1]),
        Coordinate(position[0], inputs, position[1]),
    ]
