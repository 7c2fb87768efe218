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
from ..symbolic.access import Coordinate, TensorIndex
from ..symbolic.lines import assignment, bare
from ..symbolic.scribe import LaneText
from ..symbolic.sizes import Sizes
from .builder import Kernel
from .outline import Outline
from .stages import operand_lines
from .texts import AccessText, KernelBody, LoadText, Loop, OperandText


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
    settled: bool


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


@dataclass(frozen=True, slots=True)
class Reshape:
    """What brings an input tile into the product's shape: lines, and a comment on the first."""

    lines: tuple[str, ...] = ()
    comment: tuple[str, ...] = ()


UNCHANGED = Reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmContext(KernelBody):
    """The names of `kernels/gemm.py.jinja`: text, flags and tuples of text only.

    Attributes:
        lane_lines: the lanes over channels.
        inputs: the tiles at x, with what they are multiplied by.
        acc_shape: extents of the product.
        bias_lanes: the bias of each of its columns.
    """

    inputs: tuple[InputText, ...]
    lane_lines: tuple[str, ...]
    acc_shape: str
    bias_lanes: str


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
    outline: Outline,
    inputs: Callable[[int], TensorIndex],
    order: tuple[str, ...],
    weight: tuple[list[Coordinate], tuple[str, ...]],
    reshape: Reshape = UNCHANGED,
) -> tuple[AccessText, AccessText, tuple[InputText, ...]]:
    """Return the accesses of input and weight, and the input tiles: one, or those of a block.

    Args:
        outline: the kernel's.
        inputs: the index of a row of the block, row 0 without one.
        order: lanes of the tile's two dimensions.
        weight: the weight's coordinates and the lanes of its two dimensions.
        reshape: what brings an input tile into the product's shape.
    """
    kernel, first = outline.kernel, inputs(0)
    x, lanes = kernel.access_and_lanes("x", first.coordinates(), order)
    w = kernel.access("w", *weight)
    if _single_halves(kernel, first) and len(lanes.parts) > 1:  # several positions and channels
        x = _from_starts(x, lanes)
    block = kernel.plan.block
    if block is None:
        only = WeightText("", w.masked, w.mask_lines, "w", w.step_lines)
        one = LoadText("", x.masked, x.mask_lines)
        return x, w, input_tiles(outline, [one], (only,), reshape=reshape)
    w = _with_row(kernel, w, weight[0][0])
    shared, masks = kernel.row_masks("x", map(inputs, block.inputs), order)
    places = [
        LoadText(kernel.offset(row * first.row_stride()), mask.masked, mask.fresh)
        for row, mask in zip(block.inputs, masks, strict=True)
    ]
    weights = _block_weights(w, block)
    return x, w, input_tiles(outline, places, weights, shared, reshape)


def _single_halves(kernel: Kernel, inputs: TensorIndex) -> bool:
    """Whether inputs of 16 bits may come one by one, channels a known number of elements apart.

    They pass through registers, as asynchronous copies have 32 bits at least. Where ptxas has too
    few for an address of each, it waits for one before it loads the next: without `_from_starts`
    19 layers took 1.11 times as long in the model's tile (geometric mean; `ConvTranspose1d(64, 32,
    4, stride=2)` 2.8 times, none less than 0.98; NVIDIA H200, Triton 3.6, 2026-11-29).
    """
    plan = kernel.plan
    apart = kernel.scribe.space.number(inputs.channel.stride) is not None
    halves = plan.spec.element.itemsize == 2 and plan.tile.span == 1
    return halves and plan.input_layout == "channels_first" and apart


def _from_starts(x: AccessText, lanes: LaneText) -> AccessText:
    """Return the access with pointers to where the positions start.

    From there the channels of a position are constants, which the instructions of its loads hold,
    so that a thread has few addresses.
    """
    position, channel = lanes.parts
    named = channel.text.isidentifier()
    return dataclasses.replace(
        x,
        lanes=(
            *lanes.before,
            "# A pointer a position: its channels are constants away, which load instructions hold",
            assignment("x_starts", f"{x.pointer} + {position.spread()}", 4),
            *(() if named else (assignment("x_ci", channel.text, 4),)),
        ),
        pointer="x_starts",
        added=channel.spread() if named else f"x_ci{channel.index}",
    )


def input_tiles(
    outline: Outline,
    places: list[LoadText],
    weights: tuple[WeightText, ...],
    shared: tuple[str, ...] = (),
    reshape: Reshape = UNCHANGED,
    suffix: str = "",
) -> tuple[InputText, ...]:
    """Return the input tiles of a step, of which the first one loads the weights.

    Args:
        outline: the kernel's.
        places: what each one loads, one or those of a block of rows.
        weights: the weights, of all kernel rows of a block.
        shared: the lines of what the masks of several share.
        reshape: what brings an input tile into the product's shape.
        suffix: what the name of a weight ends with in a product.
    """
    kernel, plan, block = outline.kernel, outline.kernel.plan, outline.kernel.plan.block
    waits = plan.target.is_hopper and is_overtaken(plan, kernel.sizes, outline.steps.loop)
    comments: list[tuple[str, ...]] = [()]
    products: list[tuple[ProductText, ...]] = [(ProductText("acc", f"w{suffix}", waits),)]
    if block is not None:
        rows, first = block.inputs.items(), block.taps.first(0)
        comments = [(f"# Input row {first + row} of the block, for {_rows(p)}",) for row, p in rows]
        products = _block_products(block, suffix, waits)
    return tuple(
        InputText(
            offset=place.offset,
            masked=place.masked,
            mask_lines=place.mask_lines,
            lines=(
                *operand_lines(plan, place.masked, () if number else [w.name for w in weights]),
                *(() if number else reshape.comment),
                *reshape.lines,
            ),
            shared_lines=() if number else shared,
            comment_lines=comments[number],
            weights=() if number else weights,
            products=products[number],
        )
        for number, place in enumerate(places)
    )


def _block_products(block: RowBlock, suffix: str, waits: bool) -> list[tuple[ProductText, ...]]:
    """Return the products of each input of a block.

    Where it `waits` for products, the last one of an input is waited for before another is loaded,
    unless a later input adds to the same sum: its product then waits for both.
    """
    inputs, each = list(block.inputs.values()), []
    for number, pairs in enumerate(inputs):
        later = {output for others in inputs[number + 1 :] for output, _ in others}
        last = len(pairs) - 1
        each.append(
            tuple(
                ProductText(
                    f"acc_{output}",
                    f"w_{index}{suffix}",
                    settled=waits and place == last and output not in later,
                )
                for place, (output, index) in enumerate(pairs)
            )
        )
    return each


def is_overtaken(plan: KernelPlan, sizes: Sizes, loop: Loop | None) -> bool:
    """Whether loads may overwrite what products still read, on a Hopper with Triton before 3.9.

    That lets the last products that read an input, whose sums nothing else in the step reads, run
    on while others are loaded. Where these lie in registers they may be the same. A loop that is
    not pipelined waits for each product.
    """
    spec = plan.spec
    in_parts = spec.product is not None and not spec.product.rounds  # or not in matrix units
    if not plan.family.products or loop is None or in_parts or spec.dtype == "float64":
        return False
    rounds = spec.product is not None and not copy_rounds(plan)
    return bool(rounds or sizes.span != 1 or spec.before) or not is_run(sizes.box)


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
