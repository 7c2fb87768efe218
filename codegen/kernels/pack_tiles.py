"""The tiles of the kernel that packs the weight: their extents, their number, the launch grid.

Stages 3 and 5, beside packing.py. Input: a `KernelPlan` and the `Sizes` of its kernel;
output: a `PackTile`, the sizes with those of the tiles, and the coordinates of the launch grid.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sympy import Expr, Integer

from ..geometry.problem import NOMINAL
from ..language.spec import MEMORY_FORMATS
from ..planning.plan import GridCoordinate, KernelPlan
from ..symbolic.sizes import AXES, Size, Sizes
from ..symbolic.space import CeilDiv
from .builder import ONE
from .packing import packed_grouping, packed_taps

# The packed weight has input channels contiguous, so a tile stores them side by side. It loads, for
# each input channel, the taps of a few output channels if the weight is contiguous, or the output
# channels of a tap if it is in channels_last: each layout has its own tile. Measured on an H200: 11
# layers, 60 tiles each, 2026-11-30.
MOST_INPUTS = 32  # input channels
MOST_TAPS = {1: 16, 2: 64, 4: 64}  # taps or slots, by span
ELEMENTS = (2048, 4096)  # elements of a tile, for weights of up to LARGE elements and larger ones
LARGE = 2**19  # elements; above it there are enough tiles to fill a GPU
ELEMENTS_LAST = 1024  # elements of a tile in channels_last, or with a single tap

# Comment on PACK_TAPS, by the name of the lane along the first axis of a tile.
SLOTS = {
    "tap": "taps of a tile that is packed",
    "slot": "slots of a tile that is packed: tap x output lane x input place",
}


@dataclass(frozen=True, slots=True)
class PackTile:
    """The tile that a program packs; all extents are powers of two.

    Attributes:
        taps, outputs, inputs: taps, output channels and input channels for a contiguous weight.
        last: taps and output channels for a weight in channels_last; None if that is the same
            layout.
    """

    taps: int
    outputs: int
    inputs: int
    last: tuple[int, int] | None


def tile_of(plan: KernelPlan, sizes: Sizes) -> PackTile:
    """Return the tile: contiguous stores along input channels, contiguous loads of the weight."""
    slots, grouping = slot_count(plan), packed_grouping(plan)
    span = 1 if grouping is None else grouping.span
    known = [sizes.space.number(size) for size in (sizes.group_in, sizes.group_out)]
    group_in, group_out = (NOMINAL.channels if size is None else size for size in known)
    taps = min(_power_of_two(slots), MOST_TAPS[span])
    inputs = min(_power_of_two(group_in), MOST_INPUTS)
    most = ELEMENTS[slots * group_in * group_out * sizes.groups > LARGE]
    if slots == 1:
        most = ELEMENTS_LAST
    outputs = max(1, min(_power_of_two(group_out), most // (taps * inputs)))
    if plan.spec.rank not in MEMORY_FORMATS or math.prod(plan.spec.kernel_size) == 1:
        return PackTile(taps, outputs, inputs, None)
    least = min(taps, span)  # a single tap: its slots for the inputs of a group
    wide = max(outputs, min(_power_of_two(group_out), ELEMENTS_LAST // (least * inputs)))
    if group_out % outputs == 0:  # keep tiles within the channels, so that they need no mask
        wide = math.gcd(group_out, wide)
    # Few outputs leave room for more taps, which are neighbours of theirs.
    least = min(taps, max(least, ELEMENTS_LAST // (wide * inputs)))
    return PackTile(taps, outputs, inputs, (least, wide))


def last_output(tile: PackTile, group_out: int) -> int:
    """Return the highest output channel of a tile of either layout, of `group_out` in a group."""
    last = tile.outputs if tile.last is None else tile.last[1]
    return max(-(-group_out // extent) * extent for extent in (tile.outputs, last)) - 1


def slot_count(plan: KernelPlan) -> int:
    """Return the extent of a tile's first axis in the layer: taps, or slots if it is grouped.

    A slot is a combination of tap, output lane and input of a group.
    """
    slots, grouping = packed_taps(plan), packed_grouping(plan)
    return slots if grouping is None else slots * grouping.lanes * grouping.span


def _two(tile: PackTile) -> dict[str, tuple[int, str]]:
    """Return the extents that depend on the weight's layout.

    Returns:
        By the name of the constant for a contiguous weight: the value in channels_last, and the
        name of the variable that holds the chosen one in kernel and launch.
    """
    if tile.last is None:
        return {}
    rows = {
        "PACK_TAPS": (tile.taps, tile.last[0], "taps"),
        "PACK_OUT": (tile.outputs, tile.last[1], "outs"),
    }
    return {name: (last, local) for name, (own, last, local) in rows.items() if own != last}


def block_name(tile: PackTile, constant: str) -> str:
    """Return the kernel's name of an extent: a variable if layouts differ, else `constant`."""
    two = _two(tile)
    return two[constant][1] if constant in two else constant


def block_lines(tile: PackTile, prefix: str) -> tuple[str, ...]:
    """Return the lines of the kernel that choose extents of its tile by the weight's layout."""
    lines = [
        f"{local}: tl.constexpr = {prefix}{constant}_LAST if IS_LAST else {prefix}{constant}"
        for constant, (_, local) in _two(tile).items()
    ]
    why = "# Neighbours in memory are channels of a tap in channels_last, else taps of a channel"
    return (why, *lines) if lines else ()


def extent_lines(tile: PackTile, prefix: str, grid: str) -> tuple[str, ...]:
    """Return the lines of the launch that choose the extents which `grid` reads."""
    return tuple(
        f"{local} = ({prefix}{constant}_LAST if last else {prefix}{constant}).value"
        for constant, (_, local) in _two(tile).items()
        if local in grid
    )


def constant_lines(tile: PackTile, prefix: str, slots: str) -> tuple[str, ...]:
    """Return the lines that define the tile's extents; `slots` is the comment on the first."""
    rows = (
        ("PACK_TAPS", tile.taps, slots),
        ("PACK_OUT", tile.outputs, "its output channels"),
        ("PACK_IN", tile.inputs, "its input channels"),
    )
    two, lines = _two(tile), []
    for name, value, what in rows:
        lines.append(f"{prefix}{name} = tl.constexpr({value})  # {what}")
        if name in two:
            last = f"{prefix}{name}_LAST = tl.constexpr({two[name][0]})"
            lines.append(f"{last}  # the same of a weight in channels_last")
    return tuple(lines)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def with_tiles(plan: KernelPlan, sizes: Sizes, tile: PackTile) -> Sizes:
    """Return the sizes with those of the tiles.

    Of the two numbers that an extent may be the larger number of tiles counts, which is that of
    the smaller tile: taps of channels_last, outputs of a contiguous weight.
    """
    out, tap = block_name(tile, "PACK_OUT"), block_name(tile, "PACK_TAPS")
    taps = tile.taps if tile.last is None else tile.last[0]
    blocks = {"PACK_IN": tile.inputs, out: tile.outputs, tap: taps}
    sizes = sizes.plus(*(Size(name, each, prefix=plan.prefix) for name, each in blocks.items()))
    taps_of_all = sizes.count_of("tap_tiles", _slots_by_name(plan, sizes), tap)
    in_numbers = CeilDiv(Integer(slot_count(plan)), sizes.named(tap))  # the wrapper's: it is short
    return sizes.plus(
        sizes.count_of("in_tiles", sizes.group_in, "PACK_IN"),
        sizes.count_of("out_tiles", sizes.group_out, out),
        dataclasses.replace(taps_of_all, found=in_numbers),
    )


def _slots_by_name(plan: KernelPlan, sizes: Sizes) -> Expr:
    """Return `slot_count` as a product of named sizes."""
    extents = [sizes.named(f"K{letter.upper()}") for letter in AXES[plan.spec.rank]]
    if packed_grouping(plan) is None:
        return math.prod(extents)
    taps = sizes.kernel(sizes.rank - 1)
    return math.prod(extents[:-1], start=ONE) * taps * sizes.lanes * sizes.span


def grid_of(sizes: Sizes) -> tuple[GridCoordinate, ...]:
    """Return the coordinates of the grid's axis; programs that run together share cache lines."""
    first = GridCoordinate("in_tile", sizes.named("in_tiles"))
    every = (
        GridCoordinate("tap_tile", sizes.named("tap_tiles")),
        GridCoordinate("out_tile", sizes.named("out_tiles")),
        first,
        GridCoordinate("group", Integer(sizes.groups)),
    )
    return tuple(each for each in every if sizes.space.number(each.extent) != 1) or (first,)
