"""Sizes in the emitted wrapper: the launch grid, run-time arguments, and checks on sizes.

Stage 5, render. Input: a `KernelPlan` and its `Sizes`; output: text that computes these sizes from
the tensors' shapes, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sympy import Expr, Integer

from ..planning.plan import GRID_LIMITS, GridCoordinate, KernelPlan
from ..symbolic.lines import WIDTH, split
from ..symbolic.sizes import Sizes
from .host_printer import POSITIONS, HostPrinter, extent_names


@dataclass(frozen=True, slots=True)
class Check:
    """A run-time check of the wrapper.

    Attributes:
        condition: Python condition under which the wrapper rejects the sizes.
        message: sizes that the file supports.
        setup: line before the condition that assigns a name it reads; None if there is none.
    """

    condition: str
    message: str
    setup: str | None = None


class HostNames:
    """Prints the sizes of one kernel for the wrapper, and the lines that assign their names.

    Args:
        plan: the kernel's plan.
        sizes: the kernel's sizes.
        blocks: numbers to print for tuned blocks, instead of entries of `META`.
    """

    def __init__(
        self, plan: KernelPlan, sizes: Sizes, blocks: Mapping[str, int] | None = None
    ) -> None:
        self.plan = plan
        self.sizes = sizes
        self.space = sizes.space
        self.printer = HostPrinter(sizes, blocks)

    def extent(self, coordinates: tuple[GridCoordinate, ...]) -> str:
        """Return the number of programs along a grid axis, as text."""
        live = [c.extent for c in coordinates if self.space.number(c.extent) != 1]
        numbers = [int(extent) for extent in live if extent.is_Integer]
        texts = [self.printer.text(extent) for extent in live if not extent.is_Integer]
        count = 1
        for number in numbers:
            count *= number
        if count > 1:
            texts.insert(0, str(count))
        return " * ".join(texts) or "1"

    def launch_names(self, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """Return the lines that assign the sizes which the grid and the launch read."""
        for axis in self.plan.grid:
            self.extent(axis)
        self.launch_sizes(arguments)  # printing records the names in `printer.read`
        return self.shape_lines("x.shape", "y.shape")

    def shape_lines(self, inputs: str, outputs: str) -> tuple[str, ...]:
        """Return the lines that assign the sizes printed so far.

        `inputs` and `outputs` are the texts of the input's and the output's shape.
        """
        lines, read = [], self.printer.read
        positions = self.printer.text(self.sizes.positions) if POSITIONS.name in read else None
        for end, source in (("IN", inputs), ("OUT", outputs)):
            names = extent_names(self.sizes.rank, end)
            shown = [name in read and (name != "BATCH" or end == "IN") for name in names]
            if sum(shown) == 1:
                place = shown.index(True)
                lines.append(f"{names[place].lower()} = {source}[{place}]")
            elif any(shown):
                texts = [n.lower() if each else "_" for n, each in zip(names, shown, strict=True)]
                lines.append(f"{', '.join(texts)} = {source}")
        if positions is not None:
            lines.append(f"positions = {positions}")
        return tuple(lines)

    def launch_sizes(self, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """Return the text of each size that the launch passes, for the names in `arguments`."""
        symbols = {size.text: size.symbol for size in self.sizes.table}
        return tuple(self.printer.text(symbols[name]) for name in arguments)

    def checks(self) -> tuple[Check, ...]:
        """Return the checks that reject run-time sizes too large for the kernel.

        Offsets inside a tile must fit int32, and a grid axis has a limited number of programs. All
        inputs of a kernel for small ones are within these limits.
        """
        if self.plan.most is not None:
            return ()
        found = []
        reach = self._reach()
        if reach:
            counted = "positions and " if self.sizes.box else ""
            what = f"sizes whose {counted}offsets in a tile stay below 2**31"
            # The margin of 2**16 covers masked lanes beyond the last position.
            found.append(Check("reach >= 2**31 - 2**16", what, _reach_text(reach)))
        for number, axis in enumerate(self.plan.grid):
            live = [c.extent for c in axis if self.space.number(c.extent) is None]
            if number and live:
                extent = self.extent(axis)
                limit = GRID_LIMITS[number]
                what = f"at most {limit} programs on axis {number} of the grid"
                found.append(Check(f"{extent} > {limit}", what))
        return tuple(found)

    def _most(self, block: str) -> int:
        return max(int(getattr(tile, block)) for tile in self.plan.tiles)

    def _reach(self) -> list[str]:
        """Return upper bounds of the offsets inside a tile, as text, if run time decides them."""
        largest: dict[Expr, Expr] = {}  # by product of sizes, its largest coefficient
        for product in self._extents():
            count, size = product.as_coeff_Mul()
            if self.space.number(product) is None:
                largest[size] = max(largest.get(size, Integer(0)), count)
        kept: list[Expr] = []  # without bounds that are provably at most another one
        for reach in (count * size for size, count in largest.items()):
            if not any(self.space.is_nonnegative(other - reach) for other in kept):
                kept = [other for other in kept if not self.space.is_nonnegative(reach - other)]
                kept.append(reach)
        return [self.printer.text(reach) for reach in kept]

    def _extents(self) -> list[Expr]:
        """Return the memory that a tile spans in input, output and weight, in elements."""
        sizes, spec = self.sizes, self.plan.spec
        images = Integer(1)
        if self.plan.fold_batch:  # images of a tile; folding requires known positions
            positions = self.space.number(sizes.positions) or 1
            images = Integer(self._most("block_m") // positions + 2)
        inputs, outputs = [], []
        for axis, phases in enumerate(self.plan.phases):
            grows = phases.extent_growth > 0
            count, span = sizes.phase(axis), 1
            if self.plan.grouping is not None and sizes.is_grouped(axis):
                span = self.plan.grouping.span
                known = self.space.number(count)  # always known with a span above 1
                count = count if known is None else Integer(known)
            if self.plan.block is not None and sizes.is_blocked(axis):
                known = self.space.number(count)
                count = self.plan.block.advance * (count if known is None else Integer(known))
            inputs.append(span * count if grows or span > 1 else sizes.input(axis))
            outputs.append(phases.stride * span * count)
        if sizes.box:
            return self._extents_of_boxes(inputs, outputs)
        blocks_in = max(map(self.plan.family.input_channels, self.plan.tiles))
        last_in, last_out = (
            layout == "channels_last" or self.plan.fold_batch
            for layout in (self.plan.input_layout, spec.layout)
        )
        depth_in = sizes.groups * sizes.group_in if last_in else Integer(blocks_in)
        depth_out = sizes.groups * sizes.group_out if last_out else Integer(self._most("block_n"))
        extents = [images * depth_in * math.prod(inputs), images * depth_out * math.prod(outputs)]
        if not self.plan.reads_raw_weight:  # a row of the packed weight has all input channels
            grouping = self.plan.grouping
            columns = self._most("block_n") * (grouping.lanes * grouping.span if grouping else 1)
            extents.append(columns * sizes.group_in)
        return extents

    def _extents_of_boxes(self, inputs: list[Expr], outputs: list[Expr]) -> list[Expr]:
        """Return what `_extents` does, for tiles that are boxes of images and `outputs`.

        Inputs and weights have no offsets: they are read at coordinates, and a copy of the input
        has offsets in a whole image. The offset of an output in its tile spans what lies inside the
        outermost axis along which a tile is more than one position; what is outside of that is an
        int64 base. Programs, and positions along each axis, are counted in int32 all the same.
        """
        sizes, block, images = self.sizes, self.plan.block, self.sizes.box[0]
        last = self.plan.spec.layout == "channels_last"
        tile = [
            whole if extent > 1 else block.rows if block and sizes.is_blocked(axis) else 1
            for axis, (whole, extent) in enumerate(zip(outputs, sizes.box[1:], strict=True))
        ]
        stored, channels = outputs, sizes.groups * sizes.group_out
        if images == 1 and last:
            first = next((axis for axis, extent in enumerate(tile) if extent != 1), 0)
            stored = [tile[first], *outputs[first + 1 :]]
        elif images == 1:  # neighbouring channels are a plane apart
            channels = Integer(self._most("block_n"))
        depth_in = sizes.groups * sizes.group_in if self.plan.tile.relayout else 1
        extents = [images * channels * math.prod(stored), depth_in * math.prod(inputs)]
        return [*extents, math.prod(outputs), *([sizes.named("BATCH")] if images > 1 else [])]


def _reach_text(products: list[str]) -> str:
    """Return the assignment of `reach`, with ruff's line breaks."""
    if len(products) == 1:
        return f"reach = {products[0]}"
    line = f"reach = max({', '.join(products)})"
    broken = "reach = max(\n" + "".join(f"    {product},\n" for product in products) + ")"
    return line if len(line) + 4 <= WIDTH else broken


def grid_text(extents: list[str], tuned: bool) -> str:
    """Return the assignment of `grid`, a function if blocks are tuned, with ruff's line breaks."""
    broken = [
        extent if len(f"        {extent},") <= WIDTH else "\n    ".join(split(extent, "*"))
        for extent in extents
    ]
    exploded = "(\n" + "".join(f"    {extent},\n" for extent in broken) + ")"
    if tuned:
        return f"grid = lambda META: (  # noqa: E731{exploded[1:]}"
    line = f"grid = ({', '.join(extents)}{',' if len(extents) == 1 else ''})"
    return line if len(line) + 4 <= WIDTH else f"grid = {exploded}"
