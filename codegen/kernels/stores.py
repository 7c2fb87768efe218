"""The end of an emitted kernel: pointwise stages on the accumulators, and their stores.

Stages 3 and 5, common to the families. Input: a `Kernel`, the index of the outputs, and the
family's `Result`; output: the stored tiles, one for each output row of a row block.
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
    """The shape of a family's accumulators, and how they are stored.

    Attributes:
        shape: extents of an accumulator, as text.
        order: kinds of the lanes of the stored tile's two dimensions.
        laid: returns the text that turns the accumulator of a given name into the stored tile.
        lane_lines: lines that define the lanes of `order`, if no earlier line does.
        added: whether the lanes of each dimension are added to the pointer separately. For stores
            of whole groups this takes up to 50 registers a thread less than adding their sum
            (Triton 3.6 to 3.9, sm_90).
        flat: extents of a tile that is flattened for the store; None if it is stored in two
            dimensions.
    """

    shape: str
    order: tuple[str, ...]
    laid: Callable[[str], str] = str
    lane_lines: tuple[str, ...] = ()
    added: bool = False
    flat: tuple[str, str] | None = None


def single_result(kernel: Kernel, *, flat: bool = False) -> Result:
    """Return the result for accumulators [positions, channels] of single outputs.

    In channels_first, set `flat` if neighbouring positions are `stride` outputs apart. Triton finds
    no contiguous dimension in such a tile and lays neighbouring threads along the first (3.6) or
    the last one (3.7 to 3.9); a flattened tile leaves it no choice.
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
    """Return the output's access and the stored tiles.

    Args:
        kernel: the kernel.
        outputs: returns the index of an output row of the row block; called with 0 without one.
        result: the family's accumulators.
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
    """Return a stored tile: the stages on its accumulator, its pointers, the stored value.

    The stages work on `acc`. A tile whose outputs no input reaches has no accumulator (`acc` is
    empty): it stores the bias, after the stages.
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
    """Return the accumulator of outputs that no input reaches: the bias, or zeros, in `shape`."""
    if spec.bias:
        return f"tl.broadcast_to({bias_value(spec)}[None, :], ({shape}))"
    return f"tl.zeros(({shape}), dtype=tl.{spec.element.accumulator})"


def _pointer_lines(result: Result, pointers: str) -> tuple[str, ...]:
    """Return the lines that convert the access's lanes to the form in which tiles are stored."""
    if result.added:
        return (assignment("y_pointers", pointers, 4),)
    if result.flat is None:
        return ()
    return (
        "# In one dimension, along which neighbouring threads store neighbours of a row",
        f"y_lanes = y_lanes.reshape({' * '.join(result.flat)})",
    )


def _flat_mask(result: Result, mask_lines: tuple[str, ...]) -> tuple[str, ...]:
    """Return the line that flattens a new mask, for a tile that is stored flattened."""
    if result.flat is None or not mask_lines:
        return ()
    shape, flat = ", ".join(result.flat), " * ".join(result.flat)
    return (f"y_mask = tl.broadcast_to(y_mask, ({shape})).reshape({flat})",)
