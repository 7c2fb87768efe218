"""What the families share that are an implicit GEMM, output-stationary.

Stages 3 and 5. Input: a `Kernel`; output: the names of the template, the packed weight's layout. A
program computes BLOCK_M positions of one phase times BLOCK_N channels; one flat loop over (channel
block, tap) gathers the inputs that reach them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from sympy import Expr, Integer

from ..geometry.boxes import is_run
from ..geometry.row_blocks import RowBlock
from ..planning.input_copy import copy_rounds
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate
from ..symbolic.lines import assignment, bare
from ..symbolic.sizes import Sizes
from .builder import Kernel, row_offset
from .texts import AccessText, LoadText, Loop, OperandText, StoreText


@dataclass(frozen=True, slots=True)
class WeightText(LoadText):
    """One of the weight tiles of a step: its name, and what it needs of the step."""

    name: str
    step_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProductText:
    """A product of a step: the names of its accumulator and weight; whether it is waited for."""

    acc: str
    weight: str
    settled: bool = False


@dataclass(frozen=True, slots=True)
class InputText(OperandText):
    """One of the input tiles of a step.

    Attributes:
        shared_lines: before the first of several, what the masks of all share.
        comment_lines: which of several it is.
        weights: the weights that are loaded after it.
        products: what it is multiplied for.
    """

    shared_lines: tuple[str, ...]
    comment_lines: tuple[str, ...]
    weights: tuple[WeightText, ...]
    products: tuple[ProductText, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmContext:
    """The names of `kernels/gemm.py.jinja`: text, flags and tuples of text only.

    Attributes:
        program_lines: the program's coordinates, from its ids.
        phase_lines: what the phase fixes: taps, shifts and residues.
        position_lines: the outputs of the tile, along the image.
        step_lines: tap and channel block of a step; empty if there is but one step.
        loop: the loop over the steps, None for one step, which needs no loop.
        lane_lines: the lanes over channels.
        x, w, y, bias: the accesses.
        inputs, outputs: the tiles at x and y.
        acc_shape: extents of the product.
        bias_lanes: the bias of each of its columns.
        y_pointers: where the elements go.
        result: the accumulator `acc` as it is stored, in the output's shape.
    """

    program_lines: tuple[str, ...]
    phase_lines: tuple[str, ...]
    position_lines: tuple[str, ...]
    step_lines: tuple[str, ...]
    loop: Loop | None
    lane_lines: tuple[str, ...]
    x: AccessText
    w: AccessText
    y: AccessText
    bias: AccessText
    inputs: tuple[InputText, ...]
    outputs: tuple[StoreText, ...]
    acc_shape: str
    bias_lanes: str
    y_pointers: str
    result: str


def weight_coordinates(
    kernel: Kernel, tap: Expr, row: tuple[Expr, Expr], column: tuple[Expr, Expr]
) -> list[Coordinate]:
    """Return coordinates in the packed weight: tap, group, row and column of its matrix.

    Rows and columns come with the extent they have in a group.
    """
    sizes = kernel.sizes
    groups = Integer(sizes.groups)
    taps = sizes.product(sizes.kernel(axis) for axis, _, _ in kernel.axes)
    (row_index, rows), (column_index, columns) = row, column
    # C_OUT has a name of its own: groups * GROUP_C_OUT would be the longer text.
    all_rows = rows * sizes.named("C_OUT") / sizes.group_out
    return [
        Coordinate(tap, taps, all_rows * columns, looped=True),
        Coordinate(kernel.coordinate("group"), groups, rows * columns),
        Coordinate(row_index, rows, columns),
        Coordinate(column_index, columns, Integer(1)),
    ]


def loads(
    kernel: Kernel,
    coordinates: Callable[[int], list[Coordinate]],
    order: tuple[str, ...],
    weight: tuple[list[Coordinate], tuple[str, ...]],
    comment: tuple[str, ...] = (),
    lines: tuple[str, ...] = (),
) -> tuple[AccessText, AccessText, tuple[InputText, ...]]:
    """Return the accesses of input and weight, and the input tiles: one, or those of a block.

    Args:
        kernel: the kernel.
        coordinates: the input's, of a row of the block, row 0 without one.
        order: lanes of the tile's two dimensions.
        weight: the weight's coordinates and the lanes of its two dimensions.
        comment: what the first of `lines` is for.
        lines: what brings an input tile into the product's shape.
    """
    first = coordinates(0)
    x, w = kernel.access("x", first, order), kernel.access("w", *weight)
    if _single_halves(kernel, first):
        x = _from_starts(x)
    block = kernel.plan.block
    if block is None:
        only = WeightText("", w.masked, w.mask_lines, "w", w.step_lines)
        one = LoadText("", x.masked, x.mask_lines)
        return x, w, input_tiles(block, [one], (only,), comment, lines)
    w = _with_row(kernel, w, weight[0][0])
    shared, masks = kernel.row_masks("x", map(coordinates, block.inputs), order)
    places = [
        LoadText(row_offset(kernel, first, row), mask.masked, mask.fresh)
        for row, mask in zip(block.inputs, masks, strict=True)
    ]
    first_tile, *others = input_tiles(block, places, _block_weights(w, block), comment, lines)
    return x, w, (dataclasses.replace(first_tile, shared_lines=shared), *others)


def _single_halves(kernel: Kernel, coordinates: list[Coordinate]) -> bool:
    """Whether inputs of 16 bits may come one by one, channels a known number of elements apart.

    They pass through registers, as asynchronous copies have 32 bits at least. Where ptxas has too
    few for an address of each, it waits for one before it loads the next: without `_from_starts`
    19 layers took 1.11 times as long in the model's tile (geometric mean; `ConvTranspose1d(64, 32,
    4, stride=2)` 2.8 times, none less than 0.98; NVIDIA H200, Triton 3.6, 2026-11-29).
    """
    plan, channel = kernel.plan, coordinates[2]
    apart = kernel.scribe.space.number(channel.stride) is not None
    halves = plan.spec.element.itemsize == 2 and plan.tile.span == 1
    return halves and plan.input_layout == "channels_first" and apart


def _from_starts(x: AccessText) -> AccessText:
    """Return the access with pointers to where the positions start.

    From there the channels of a position are constants, which the instructions of its loads hold,
    so that a thread has few addresses.
    """
    *parts, lanes = x.lanes
    position, plus, channel = lanes.partition(" = ")[2].partition("[:, None] + ")
    if not plus:  # one position, or one channel
        return x
    way = channel.removesuffix("[None, :]")
    named = way.isidentifier()
    return dataclasses.replace(
        x,
        lanes=(
            *parts,
            "# A pointer a position: its channels are constants away, which load instructions hold",
            assignment("x_starts", f"{x.pointer} + {position}[:, None]", 4),
            *(() if named else (assignment("x_ci", bare(way), 4),)),
        ),
        pointer="x_starts",
        added=channel if named else "x_ci[None, :]",
    )


def input_tiles(
    block: RowBlock | None,
    places: list[LoadText],
    weights: tuple[WeightText, ...],
    comment: tuple[str, ...] = (),
    lines: tuple[str, ...] = (),
    suffix: str = "",
) -> tuple[InputText, ...]:
    """Return the input tiles of a step, of which the first one loads the weights.

    Args:
        block: the block of rows whose inputs they are, None for a single one.
        places: what each one loads.
        weights: the weights, of all kernel rows of a block.
        comment: what the first of `lines` is for.
        lines: what brings an input tile into the product's shape.
        suffix: what the name of a weight ends with in a product.
    """
    whole = (*comment, *lines)
    if block is None:
        only, product = places[0], (ProductText("acc", f"w{suffix}"),)
        parts = only.offset, only.masked, only.mask_lines
        return (InputText(*parts, whole, (), (), weights, product),)
    tiles, first = [], block.taps.first(0)
    for number, (place, (row, pairs)) in enumerate(zip(places, block.inputs.items(), strict=True)):
        tiles.append(
            InputText(
                offset=place.offset,
                masked=place.masked,
                mask_lines=place.mask_lines,
                lines=lines if number else whole,
                shared_lines=(),
                comment_lines=(f"# Input row {first + row} of the block, for {_rows(pairs)}",),
                weights=() if number else weights,
                products=tuple(ProductText(f"acc_{o}", f"w_{index}{suffix}") for o, index in pairs),
            )
        )
    return tuple(tiles)


def is_overtaken(plan: KernelPlan, sizes: Sizes, context: GemmContext) -> bool:
    """Whether loads may overwrite what products still read, on a Hopper with Triton before 3.9.

    That lets the last products that read an input, whose sums nothing else in the step reads, run
    on while others are loaded. Where these lie in registers they may be the same. A loop that is
    not pipelined waits for each product.
    """
    spec = plan.spec
    in_parts = spec.product is not None and not spec.product.rounds  # or not in matrix units
    if context.loop is None or in_parts or spec.dtype == "float64":
        return False
    rounds = spec.product is not None and not copy_rounds(plan)
    reordered = any(tile.lines for tile in context.inputs)
    return bool(rounds or reordered or spec.before) or not is_run(sizes.box)


def settled(context: GemmContext) -> GemmContext:
    """Return the context with products that are waited for before another input is loaded."""
    tiles: list[InputText] = []
    later: set[str] = set()
    for tile in reversed(context.inputs):
        *others, last = tile.products
        last = dataclasses.replace(last, settled=last.acc not in later)
        later |= {product.acc for product in tile.products}
        tiles.insert(0, dataclasses.replace(tile, products=(*others, last)))
    return dataclasses.replace(context, inputs=tuple(tiles))


def _with_row(kernel: Kernel, w: AccessText, tap: Coordinate) -> AccessText:
    """Return the access with a line that names the way from a row of the kernel to the next."""
    stride = kernel.sizes.kernel(kernel.plan.spec.rank - 1) * tap.stride
    line = assignment("w_row", bare(kernel.scribe.scalar(stride) or "0"), 4)
    return dataclasses.replace(w, lanes=(*w.lanes, line))


def _block_weights(w: AccessText, block: RowBlock) -> tuple[WeightText, ...]:
    """Return the weights of all taps of a block."""
    weights = []
    for index in range(block.axis.kernel):
        once = (w.mask_lines, w.step_lines) if index == 0 else ((), ())
        offset = ("", " + w_row")[index] if index < 2 else f" + {index} * w_row"
        weights.append(WeightText(offset, w.masked, once[0], f"w_{index}", once[1]))
    return tuple(weights)


def _rows(pairs: tuple[tuple[int, int], ...]) -> str:
    rows = ", ".join(f"{row} with w_{index}" for row, index in pairs)
    return f"output row{'s' * (len(pairs) > 1)} {rows}"


def channel_lanes(kernel: Kernel, *names: str) -> tuple[str, ...]:
    """Return the lines of lanes over the blocks of input and output channels."""
    blocks = {"ci": kernel.sizes.named("BLOCK_K"), "co": kernel.sizes.named("BLOCK_N")}
    return tuple(f"{name} = tl.arange(0, {blocks[name]})" for name in names)
