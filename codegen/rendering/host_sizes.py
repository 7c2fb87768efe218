"""Sizes as variables of the emitted wrapper: grid, run-time arguments, and the checks on them.

Stage 5, part of render. Input: a `KernelPlan` and its `Sizes`; output: text that computes the same
sizes from the tensors' shapes, on the host.
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
    """A condition that the file was not generated for, what it was, and a line before it."""

    condition: str
    message: str
    setup: str | None = None


class HostNames:
    """The lines of a wrapper that name the sizes it reads, and the texts that read them."""

    def __init__(
        self, plan: KernelPlan, sizes: Sizes, blocks: Mapping[str, int] | None = None
    ) -> None:
        self.plan = plan
        self.sizes = sizes
        self.space = sizes.space
        self.printer = HostPrinter(sizes, blocks)

    def extent(self, coordinates: tuple[GridCoordinate, ...]) -> str:
        """Print the extent of a grid axis."""
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
        """Return the lines that name the sizes which grid and launch read."""
        for axis in self.plan.grid:
            self.extent(axis)
        self.launch_sizes(arguments)  # which names them
        if not self.plan.prefix:
            self.printer.read.discard("C_OUT")  # it has a line already
        return self.shape_lines("x.shape", "shape")

    def shape_lines(self, inputs: str, outputs: str) -> tuple[str, ...]:
        """Return the lines that name the sizes printed so far, from these two shapes."""
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
        """Return the sizes that the launch passes."""
        symbols = {size.text: size.symbol for size in self.sizes.table}
        return tuple(self.printer.text(symbols[name]) for name in arguments)

    def checks(self) -> tuple[Check, ...]:
        """Refuse run-time sizes that int32 offsets inside a tile or a grid axis cannot reach."""
        found = []
        reach = self._reach()
        if reach:
            what = "sizes whose offsets in a tile stay below 2**31"
            # The margin is for the lanes that hang over the end of the positions.
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
        """Bounds of the offsets inside a tile of a tensor that run time decides."""
        largest: dict[Expr, Expr] = {}  # of products of the same sizes
        for product in self._extents():
            count, size = product.as_coeff_Mul()
            if self.space.number(product) is None:
                largest[size] = max(largest.get(size, Integer(0)), count)
        kept: list[Expr] = []  # the larger of two, where the sizes prove which one that is
        for reach in (count * size for size, count in largest.items()):
            if not any(self.space.is_nonnegative(other - reach) for other in kept):
                kept = [other for other in kept if not self.space.is_nonnegative(reach - other)]
                kept.append(reach)
        return [self.printer.text(reach) for reach in kept]

    def _extents(self) -> list[Expr]:
        """Elements from the first of a tile to behind its last: of input, output and weight."""
        sizes, spec = self.sizes, self.plan.spec
        channels_last = spec.layout == "channels_last"
        images = Integer(1)
        if self.plan.fold_batch:  # the tile's images: its positions are known, or it would not fold
            positions = self.space.number(sizes.positions) or 1
            images = Integer(self._most("block_m") // positions + 2)
        inputs, outputs = [], []
        for axis, phases in enumerate(self.plan.phases):
            grows = phases.extent_growth > 0
            count, span = sizes.phase(axis), 1
            if self.plan.grouping is not None and sizes.is_grouped(axis):
                span = self.plan.grouping.span
                known = self.space.number(count)  # as it is with a span above 1
                count = count if known is None else Integer(known)
            if self.plan.block is not None and sizes.is_blocked(axis):  # its extents are known
                count = Integer(self.plan.block.advance * (self.space.number(count) or 0))
            inputs.append(span * count if grows or span > 1 else sizes.input(axis))
            outputs.append(phases.stride * span * count)
        blocks_in = max(map(self.plan.family.input_channels, self.plan.tiles))
        whole = channels_last or self.plan.fold_batch
        depth_in = sizes.groups * sizes.group_in if whole else Integer(blocks_in)
        depth_out = sizes.groups * sizes.group_out if whole else Integer(self._most("block_n"))
        extents = [images * depth_in * math.prod(inputs), images * depth_out * math.prod(outputs)]
        if not self.plan.reads_raw_weight:  # the weight's columns, each with all input channels
            grouping = self.plan.grouping
            columns = self._most("block_n") * (grouping.lanes * grouping.span if grouping else 1)
            extents.append(columns * sizes.group_in)
        return extents


def _reach_text(products: list[str]) -> str:
    """Return the assignment of `reach`, broken as by ruff."""
    if len(products) == 1:
        return f"reach = {products[0]}"
    line = f"reach = max({', '.join(products)})"
    broken = "reach = max(\n" + "".join(f"    {product},\n" for product in products) + ")"
    return line if len(line) + 4 <= WIDTH else broken


def grid_text(extents: list[str], tuned: bool) -> str:
    """Return the assignment of `grid`, a function where blocks are tuned, broken as by ruff."""
    broken = [
        extent if len(f"        {extent},") <= WIDTH else "\n    ".join(split(extent, "*"))
        for extent in extents
    ]
    exploded = "(\n" + "".join(f"    {extent},\n" for extent in broken) + ")"
    if tuned:
        return f"grid = lambda META: (  # noqa: E731{exploded[1:]}"
    line = f"grid = ({', '.join(extents)}{',' if len(extents) == 1 else ''})"
    return line if len(line) + 4 <= WIDTH else f"grid = {exploded}"
