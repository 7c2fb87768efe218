"""The names in the templates of the kernel that copies the input, as text.

Stages 3 and 5. Input: a `KernelPlan` and the `Sizes` of its kernel; output: a `RelayoutText`, in
which every expression is already printed. A program copies a tile of an image: COPY_CHANNELS
channels at COPY_POSITIONS positions.
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
from ..symbolic.lines import call_text, tuple_text
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, Size, Sizes
from .host_sizes import HostNames, grid_text
from .size_lines import list_text, size_lines

ORDER = ("ci", "position")  # dimensions of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayoutText:
    """The names in `kernels/relayout.py.jinja` and `parts/relayout.jinja`, as text.

    Attributes:
        kernel: name of the kernel that copies.
        function: name of the function that launches it.
        prefix: prefix of its constants.
        what: words for the input in question.
        copied: words that describe the copy, printed after "copy" in comments.
        triton_dtype: element type of the tensors, in comments.
        x_shape, copy_shape: axes of the tensors, in comments.
        positions, channels: extents of a tile.
        arguments: sizes that are arguments of the kernel.
        argument_names: their names, as a list in text; empty if there are none.
        sizes: what the launch passes for them, as a tuple in text.
        launch: the launch.
        locals: lines that define the numbers of tiles that the program's coordinates need.
        program_lines: lines that define the program's coordinates.
        lane_lines: lines that define the lanes over channels and positions.
        x_lines: lines that define the pointers into the input, and the mask.
        copy_lines: lines that define the pointers into the copy.
        x_pointers, copy_pointers: pointers of a load and a store, as text.
        masked: whether loads and stores take the mask.
        transposes: whether the copy's layout differs from the input's.
        rounds: whether the copy is rounded to TF32.
        format: torch's name of the copy's memory format; empty if torch has none.
        shape_names: lines that assign the sizes which the grid reads.
        grid: line that defines the launch grid.
    """

    kernel: str
    function: str
    prefix: str
    what: str
    copied: str
    triton_dtype: str
    x_shape: str
    copy_shape: str
    positions: str
    channels: str
    arguments: tuple[str, ...]
    argument_names: str
    sizes: str
    launch: str
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
    """Return the names in the templates of the input copy; None for a plan without one."""
    if not plan.tile.relayout:
        return None
    tile = copy_tile(plan.spec)
    sizes = _with_tiles(sizes, tile, plan.prefix)
    grid = _grid(sizes)
    kernel = Kernel(dataclasses.replace(plan, grid=(grid,)), sizes, Scribe(sizes.space))
    program: list[str] = []
    define_program(kernel, program)
    lanes: list[str] = []
    ci = _lane(kernel, lanes, "ci", ("ci_tile", "channel_tiles", "COPY_CHANNELS"))
    position = _lane(kernel, lanes, "position", ("tile", "position_tiles", "COPY_POSITIONS"))
    inputs, channels = _inputs(sizes), sizes.named("C_IN")
    kernel_name = f"{copy_name(plan.spec)}{plan.suffix}_kernel"
    transposes = plan.spec.layout == "channels_first"
    of_ci, of_position = (inputs, ONE) if transposes else (ONE, channels)
    x = kernel.access("x", _coordinates(kernel, (ci, of_ci), (position, of_position)), ORDER)
    copy = kernel.access("copy", _coordinates(kernel, (ci, ONE), (position, channels)), ORDER)
    _, arguments, local_lines = size_lines(sizes, kernel.scribe)
    host = HostNames(kernel.plan, sizes)
    programs, given = host.extent(grid), host.launch_sizes(arguments)
    spatial = ", ".join(f"{letter.upper()}_IN" for letter in AXES[plan.spec.rank])
    copy_shape = f"[BATCH, {spatial}, C_IN]"
    return RelayoutText(
        kernel=kernel_name,
        function=f"_start_copy{plan.suffix}",
        prefix=plan.prefix,
        what=_what(plan.inputs_text),
        copied=copy_text(plan.spec),
        transposes=transposes,
        triton_dtype=triton_dtype,
        x_shape=f"[BATCH, C_IN, {spatial}]" if transposes else copy_shape,
        copy_shape=copy_shape,
        positions=str(tile.positions),
        channels=str(tile.channels),
        arguments=arguments,
        argument_names=list_text(arguments) if arguments else "",
        sizes=tuple_text(given),
        launch=call_text(
            f"compiled = {kernel_name}[grid]",
            ("x", "copy", *given, "num_warps=4", "enable_fp_fusion=True"),
            indent=8,
        ),
        locals=local_lines,
        program_lines=tuple(program),
        lane_lines=tuple(lanes),
        x_lines=(*([x.base] if x.base else []), *x.lanes, *x.mask_lines),
        copy_lines=(*([copy.base] if copy.base else []), *(copy.lanes if transposes else ())),
        x_pointers=f"{x.pointer} + x_lanes",
        copy_pointers=f"{copy.pointer} + {'copy' if transposes else 'x'}_lanes",
        masked=x.masked,  # input and copy have the same elements
        rounds=copy_rounds(plan),
        format=MEMORY_FORMATS.get(plan.spec.rank, ""),
        shape_names=host.shape_lines("x.shape", "x.shape"),
        grid=grid_text([programs], tuned=False),
    )


def _what(inputs: str) -> str:
    """Return words for what is copied, from those for the inputs that the kernel computes."""
    return {"": "the input", "channels_last": "an input in channels_last"}.get(inputs, inputs)


def _with_tiles(sizes: Sizes, tile: CopyTile, prefix: str) -> Sizes:
    """Return the sizes with those of the copy's tiles, whose names in the file have the prefix."""
    extents = {"COPY_POSITIONS": tile.positions, "COPY_CHANNELS": tile.channels}
    sizes = sizes.plus(*(Size(name, each, prefix=prefix) for name, each in extents.items()))
    return sizes.plus(
        sizes.count_of("position_tiles", _inputs(sizes), "COPY_POSITIONS"),
        sizes.count_of("channel_tiles", sizes.named("C_IN"), "COPY_CHANNELS"),
    )


def _inputs(sizes: Sizes) -> Expr:
    """Return the positions of one image of the input: the product of its spatial extents."""
    return math.prod((sizes.input(axis) for axis in range(sizes.rank)), start=Integer(1))


def _grid(sizes: Sizes) -> tuple[GridCoordinate, ...]:
    """Return the coordinates of the grid's axis: those of more than one value, at least one.

    Channel tiles vary fastest, so that programs that run together store to the same cache lines.
    """
    tile = GridCoordinate("tile", sizes.named("position_tiles"))
    every = (
        GridCoordinate("ci_tile", sizes.named("channel_tiles")),
        tile,
        GridCoordinate("image", sizes.named("BATCH")),
    )
    return tuple(each for each in every if sizes.space.number(each.extent) != 1) or (tile,)


def _lane(kernel: Kernel, lines: list[str], name: str, tile: tuple[str, str, str]) -> Expr:
    """Define the lanes over a block of this program's tile.

    `tile` has three names: the program's coordinate, the number of tiles, the extent of a tile.
    """
    coordinate, count, block = tile
    start = kernel.coordinate(coordinate) * kernel.sizes.named(block)
    begin = f"{kernel.scribe.text(start)} + " if start != 0 else ""
    lines.append(f"{name} = {begin}tl.arange(0, {kernel.sizes.named(block)})")
    high = kernel.sizes.named(count) * kernel.sizes.named(block) - 1
    return kernel.scribe.name(name, 0, high, name)


def _coordinates(
    kernel: Kernel, channel: tuple[Expr, Expr], position: tuple[Expr, Expr]
) -> list[Coordinate]:
    """Return coordinates in the input or the copy, from pairs (index, stride in elements)."""
    sizes = kernel.sizes
    channels, inputs = sizes.named("C_IN"), _inputs(sizes)
    return [
        Coordinate(kernel.coordinate("image"), sizes.named("BATCH"), channels * inputs),
        Coordinate(channel[0], channels, channel[1]),
        Coordinate(position[0], inputs, position[1]),
    ]
