"""Common parts of the families that compute an implicit GEMM, output-stationary.

Stages 3 and 5. Input: a `Kernel`; output: the names in `templates/kernels/gemm.py.jinja`. A program
computes BLOCK_M positions of one phase times BLOCK_N output channels; one flat loop over (channel
block, tap) gathers the inputs of these outputs.
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
from ..symbolic.access import Coordinate, TensorIndex, masks_of
from ..symbolic.lines import assignment, bare
from ..symbolic.scribe import LaneText
from ..symbolic.sizes import Sizes
from .builder import Kernel
from .outline import Outline
from .stages import operand_lines
from .texts import AccessText, KernelBody, LoadText, Loop, OperandText


@dataclass(frozen=True, slots=True)
class WeightText(LoadText):
    """A weight tile that a step loads.

    Attributes:
        name: the tile's name.
        step_lines: lines of the step that its address reads.
    """

    name: str
    step_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProductText:
    """A product of a step.

    Attributes:
        acc: name of the accumulator.
        weight: name of the weight.
        settled: whether the kernel waits for the product before it goes on.
    """

    acc: str
    weight: str
    settled: bool


@dataclass(frozen=True, slots=True)
class InputText(OperandText):
    """An input tile that a step loads.

    Attributes:
        shared_lines: lines that the masks of all input tiles share; only the first tile has them.
        comment_lines: comment that names the input row, if there are several tiles.
        weights: weight tiles that are loaded directly after this input tile.
        products: products of this input tile.
    """

    shared_lines: tuple[str, ...]
    comment_lines: tuple[str, ...]
    weights: tuple[WeightText, ...]
    products: tuple[ProductText, ...]


@dataclass(frozen=True, slots=True)
class Reshape:
    """Lines that reshape an input tile for the product, and a comment before the first tile's."""

    lines: tuple[str, ...] = ()
    comment: tuple[str, ...] = ()


UNCHANGED = Reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmContext(KernelBody):
    """The names of `kernels/gemm.py.jinja`: text, flags and tuples of text only.

    Attributes:
        lane_lines: lines that define the lanes over channels.
        inputs: the input tiles of a step, with their weights and products.
        acc_shape: extents of an accumulator.
        bias_lanes: lanes of the bias, one for each column of the accumulator.
    """

    inputs: tuple[InputText, ...]
    lane_lines: tuple[str, ...]
    acc_shape: str
    bias_lanes: str


def weight_coordinates(
    kernel: Kernel, tap: Expr, row: tuple[Expr, Expr], column: tuple[Expr, Expr]
) -> list[Coordinate]:
    """Return coordinates in the packed weight: tap, group, row and column of its matrix.

    `row` and `column` are pairs (index, extent), both within one channel group.
    """
    sizes = kernel.sizes
    groups = Integer(sizes.groups)
    taps = sizes.product(sizes.kernel(axis) for axis, _, _ in kernel.axes)
    (row_index, rows), (column_index, columns) = row, column
    # C_OUT prints shorter than the equal product groups * GROUP_C_OUT.
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
    """Return the accesses of input and weight, and a step's input tiles: one per block row.

    Args:
        outline: the kernel's outline.
        inputs: returns the index of an input row of the row block, counted from that of its tap;
            called with 0 without one.
        order: kinds of the lanes of the input tile's two dimensions.
        weight: the weight's coordinates and the kinds of the lanes of its two dimensions.
        reshape: lines that reshape an input tile for the product.
    """
    kernel, block = outline.kernel, outline.kernel.plan.block
    begin = 0 if block is None else -block.taps.first(0)  # so that a block starts at its row 0
    first = inputs(begin)
    x, lanes = kernel.access_and_lanes("x", first.coordinates(), order)
    w = kernel.access("w", *weight)
    fixed = _is_fixed(outline, first.coordinates())
    if _is_fixed(outline, weight[0]):
        w = _masked_before(w, w.mask_lines)
    if _single_halves(kernel, first) and len(lanes.parts) > 1:  # several positions and channels
        x = _from_starts(x, lanes)
    if block is None:
        if fixed:
            x = _masked_before(x, x.mask_lines)
        only = WeightText("", w.masked, w.mask_lines, "w", w.step_lines)
        one = LoadText("", x.masked, x.mask_lines)
        return x, w, input_tiles(outline, [one], (only,), reshape=reshape)
    w = _with_row(kernel, w, weight[0][0])
    shared, masks = kernel.row_masks("x", map(inputs, block.inputs), order)
    places = [
        LoadText(kernel.offset((row - begin) * first.row_stride()), mask.masked, mask.fresh)
        for row, mask in zip(block.inputs, masks, strict=True)
    ]
    if fixed:  # only what the rows share: each has its own mask at its load
        x = _masked_before(x, shared)
        shared = ()
    weights = _block_weights(w, block)
    return x, w, input_tiles(outline, places, weights, shared, reshape)


def _is_fixed(outline: Outline, coordinates: list[Coordinate]) -> bool:
    """Whether there is a loop and none of its steps changes the mask at these coordinates."""
    kernel = outline.kernel
    masks = masks_of(kernel.scribe.space, coordinates)
    moving = any(mask.index.free_symbols & kernel.loop for mask in masks)
    return outline.steps.loop is not None and not moving


def _masked_before(text: AccessText, lines: tuple[str, ...]) -> AccessText:
    """Return the access with the lines of its mask before the loop."""
    return dataclasses.replace(text, lanes=(*text.lanes, *lines), mask_lines=())


def _single_halves(kernel: Kernel, inputs: TensorIndex) -> bool:
    """Whether 16-bit inputs are loaded one by one, at a channel stride that the plan knows.

    Such loads go through registers: asynchronous copies move at least 32 bits. If ptxas lacks the
    registers for one address per load, it waits for one load before it issues the next. Without
    `_from_starts`, 19 layers took 1.11 times as long in the model's tile (geometric mean;
    `ConvTranspose1d(64, 32, 4, stride=2)` 2.8 times, the least 0.98 times; NVIDIA H200, Triton 3.6,
    2026-11-29).
    """
    plan = kernel.plan
    apart = kernel.scribe.space.number(inputs.channel.stride) is not None
    halves = plan.spec.element.itemsize == 2 and plan.tile.span == 1
    return halves and plan.input_layout == "channels_first" and apart


def _from_starts(x: AccessText, lanes: LaneText) -> AccessText:
    """Return the access with one pointer per position, to which channel offsets are added.

    Channel offsets then fit the immediate field of the load instructions, which saves address
    registers.
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
    """Return the input tiles of a step; the weights are loaded after the first.

    Args:
        outline: the kernel's outline.
        places: the loads of the input tiles, one for each input row of a row block.
        weights: the weight tiles, one for each kernel row of a row block.
        shared: lines that the masks of all input tiles share.
        reshape: lines that reshape an input tile for the product.
        suffix: suffix of a weight's name in the products.
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
    """Return the products of each input row of a row block.

    If the kernel `waits`, it waits for the last product of an input row before it loads the next
    row, unless a later row adds to the same accumulator: waiting for that product covers both.
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
    """Whether loads may overwrite registers of a running product, on Hopper before Triton 3.9.

    Those versions leave the last asynchronous product of an input running during the next load if
    nothing else in the step reads its sum. An input that goes through registers may then be
    overwritten: one that is rounded, grouped, reshaped or passes pointwise stages in the kernel.
    A loop that is not pipelined waits for each product.
    """
    spec = plan.spec
    in_parts = spec.product is not None and not spec.product.rounds  # or not in matrix units
    if not plan.family.products or loop is None or in_parts or spec.dtype == "float64":
        return False
    rounds = spec.product is not None and not copy_rounds(plan)
    return bool(rounds or sizes.span != 1 or spec.before) or not is_run(sizes.box)


def _with_row(kernel: Kernel, w: AccessText, tap: Coordinate) -> AccessText:
    """Return the access with a line that defines `w_row`, the stride of a kernel row."""
    stride = kernel.sizes.kernel(kernel.plan.spec.rank - 1) * tap.stride
    line = assignment("w_row", bare(kernel.scribe.scalar(stride) or "0"), 4)
    return dataclasses.replace(w, lanes=(*w.lanes, line))


def _block_weights(w: AccessText, block: RowBlock) -> tuple[WeightText, ...]:
    """Return the weight tiles of a row block, one for each kernel row."""
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
    """Return the lines that define the lanes `names`: `ci` over BLOCK_K, `co` over BLOCK_N."""
    blocks = {"ci": kernel.sizes.named("BLOCK_K"), "co": kernel.sizes.named("BLOCK_N")}
    return tuple(f"{name} = tl.arange(0, {blocks[name]})" for name in names)
