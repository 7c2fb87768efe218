"""The end of an emitted kernel: what becomes of its sums, and where they are stored.

Stages 3 and 5, common to the families. Input: a `Kernel`, the index of the outputs and how the
family has its sums; output: the tiles that are stored, one, or those of the rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..language.spec import ConvTransposeSpec
from ..symbolic.access import TensorIndex
from ..symbolic.lines import WIDTH, assignment
from .builder import Kernel
from .stages import bias_value, cast, stage_lines
from .texts import AccessText, StoreText


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a family has the sums of a tile, and how it stores them.

    Attributes:
        shape: extents of an accumulator.
        order: lanes of the two dimensions of the output's tile.
        laid: returns an accumulator of a name as the output's tile.
        lane_lines: the lines of the lanes of `order`, where nothing has defined them yet.
        added: the lanes are added to the pointer one by one, which takes up to 50 registers a
            thread less than summed first, for stores of whole groups (Triton 3.6 to 3.9, sm_90).
        flat: extents of the output's tile where it is stored in one dimension, None where in two.
    """

    shape: str
    order: tuple[str, ...]
    laid: Callable[[str], str] = str
    lane_lines: tuple[str, ...] = ()
    added: bool = False
    flat: tuple[str, str] | None = None


def single_result(kernel: Kernel, *, flat: bool = False) -> Result:
    """Return the result of single outputs, [positions, channels], in the output's layout.

    In channels_first outputs that are `stride` apart lie `flat`: Triton sees a run along neither
    dimension of such a tile, and lets neighbouring threads store along the first (3.6) or the last
    one (3.7 to 3.9), so that there is but one.
    """
    rows, columns = (str(kernel.sizes.named(name)) for name in ("BLOCK_M", "BLOCK_N"))
    shape = f"{rows}, {columns}"
    if kernel.plan.spec.layout == "channels_last":
        return Result(shape=shape, order=("position", "co"))
    if not flat:
        return Result(shape=shape, order=("co", "position"), laid=lambda acc: f"tl.trans({acc})")
    return Result(
        shape=shape,
        order=("co", "position"),
        laid=lambda acc: f"tl.trans({acc}).reshape({columns} * {rows})",
        flat=(columns, rows),
    )


def stores(
    kernel: Kernel, outputs: Callable[[int], TensorIndex], result: Result
) -> tuple[AccessText, tuple[StoreText, ...]]:
    """Return the output's access and the tiles that are stored.

    Args:
        kernel: the kernel.
        outputs: the index of a row of the block, row 0 without one.
        result: the family's sums.
    """
    first, block = outputs(0), kernel.plan.block
    y, lanes = kernel.access_and_lanes("y", first.coordinates(), result.order)
    at = "y_pointers" if result.added else f"{y.pointer} + {lanes.name}"
    places = [*result.lane_lines, *([y.base] if y.base else [])]
    places += lanes.before if result.added else y.lanes
    pointers = _pointer_lines(result, f"{y.pointer} + {lanes.text()}")
    if block is None:
        lines = (*places, *y.mask_lines, *pointers, *_flat_mask(result, y.mask_lines))
        return y, (_tile(kernel.plan.spec, result, "acc", at, (), lines, masked=y.masked),)
    rows = range(block.rows)
    shared, masks = kernel.row_masks("y", map(outputs, rows), result.order)
    reached = {row for pairs in block.inputs.values() for row, _ in pairs}
    tiles = []
    for row, mask in enumerate(masks):
        once = ((*places, *shared), pointers) if row == 0 else ((), ())
        gap = "" if row in reached else ", which no input reaches"
        tiles.append(
            _tile(
                kernel.plan.spec,
                result,
                acc=f"acc_{row}" if row in reached else "",
                at=f"{at}{kernel.offset(row * first.row_stride())}",
                begin=(f"# Row {row} of the block{gap}",),
                lines=(*once[0], *mask.fresh, *once[1], *_flat_mask(result, mask.fresh)),
                masked=mask.masked,
            )
        )
    return y, tuple(tiles)


def _tile(
    spec: ConvTransposeSpec,
    result: Result,
    acc: str,
    at: str,
    begin: tuple[str, ...],
    lines: tuple[str, ...],
    *,
    masked: bool,
) -> StoreText:
    """Return a tile: its accumulator through the stages, its place, and what it stores there.

    The stages work on `acc`. A tile without an accumulator is of outputs that no input reaches:
    bias and stages only.
    """
    if not (acc or spec.after or spec.bias):
        return StoreText(acc, (*begin, *lines), at, "0.0", masked)
    name = "acc" if spec.after or not acc else acc
    source = acc or _unreached(spec, result.shape)
    start = (*begin, *(f"{name} = {source}",) * (name != source))
    value = cast(spec, result.laid(name))
    if len(f"    tl.store({at}, {value}, mask=y_mask)") > WIDTH:
        lines += (f"acc = {result.laid(name)}",)
        value = cast(spec, "acc")
    return StoreText(acc, (*start, *stage_lines("acc", spec.after), *lines), at, value, masked)


def _unreached(spec: ConvTransposeSpec, shape: str) -> str:
    """Return the sum of outputs that no input reaches, of a `shape` with channels as columns."""
    if spec.bias:
        return f"tl.broadcast_to({bias_value(spec)}[None, :], ({shape}))"
    return f"tl.zeros(({shape}), dtype=tl.{spec.element.accumulator})"


def _pointer_lines(result: Result, pointers: str) -> tuple[str, ...]:
    """Return the lines that make of the access what the tiles are stored at."""
    if result.added:
        return (assignment("y_pointers", pointers, 4),)
    if result.flat is None:
        return ()
    return (
        "# In one dimension, along which neighbouring threads store neighbours of a row",
        f"y_lanes = y_lanes.reshape({' * '.join(result.flat)})",
    )


def _flat_mask(result: Result, mask_lines: tuple[str, ...]) -> tuple[str, ...]:
    """Return the line that brings a mask, where it is new, into the one dimension of a tile."""
    if result.flat is None or not mask_lines:
        return ()
    shape, flat = ", ".join(result.flat), " * ".join(result.flat)
    return (f"y_mask = tl.broadcast_to(y_mask, ({shape})).reshape({flat})",)
