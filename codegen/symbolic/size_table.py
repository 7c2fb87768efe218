"""The table of a kernel's sizes: the name, value and formula of each.

Stage 3, index. Input: a spec, its phases, and a plan's tiles, grouping, row block and box; output:
`Sizes`. The table is built once and is kept in the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.row_blocks import RowBlock
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from .sizes import AXES, BLOCKS, GROUPS, Size, Sizes
from .space import CeilDiv, FloorDiv, symbol


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeTable:
    """The inputs from which the sizes of a kernel are computed.

    Attributes:
        spec, phases: the layer and its phases.
        tiles: every tile the kernel may be launched with.
        groups: channel groups; a program computes one of them. 1 where a kernel does not
            distinguish them.
        grouping: grouping of the last axis, or None; a span above 1 requires a known extent.
        block: row block of the last axis but one, or None.
        box: images, then positions along each axis, of a tile; empty if a tile is a run of
            flattened positions.
        fold: whether a tile may contain positions of several images.
        prefix: prefix of the names, in the file, of sizes that the tile decides.
        layer_prefix: prefix of those of the layer, which all kernels share.
        extent_prefix: prefix of those that follow from the input's extents, which the kernels of
            two layouts share.
    """

    spec: ConvTransposeSpec
    phases: tuple[AxisPhases, ...]
    tiles: tuple[Tile, ...]
    groups: int
    grouping: Grouping | None
    block: RowBlock | None
    box: tuple[int, ...]
    fold: bool
    prefix: str
    layer_prefix: str
    extent_prefix: str

    def sizes(self) -> Sizes:
        """Return the sizes, each after those its definition reads."""
        table = itertools.chain(
            self._channels(),
            self._inputs(),
            self._outputs(),
            self._phases(),
            self._kernel(),
            self._groups(),
            self._rows(),
            self._taps(),
            self._blocks(),
        )
        sizes = Sizes(
            tuple(table),
            self.spec.rank,
            self.groups,
            self.tiles,
            self.phases,
            self.grouping,
            self.block,
            self.box,
        )
        sizes = sizes.plus(*self._boxes()) if self.box else sizes.plus(*self._even_row(sizes))
        return sizes.plus(*self._counts(sizes))

    def _size(
        self,
        name: str,
        value: int | None,
        definition: Expr | None = None,
        *,
        spelled: bool = False,
        found: Expr | None = None,
        of_layer: bool = False,
        of_extent: bool = False,
    ) -> Size:
        """Return a size with its prefix: of the layer, of the input's extents, or of the tile."""
        prefix = self.extent_prefix if of_extent else self.prefix
        prefix = self.layer_prefix if of_layer else prefix
        return Size(name, value, definition, spelled, found, prefix)

    def _named(self, name: str) -> Symbol:
        """Return the symbol of a size that the tile decides."""
        return symbol(self.prefix + name)

    def _extent(self, name: str) -> Symbol:
        """Return the symbol of a size that follows from the input's extents."""
        return symbol(self.extent_prefix + name)

    def _layer(self, name: str) -> Symbol:
        """Return the symbol of a size of the layer."""
        return symbol(self.layer_prefix + name)

    def _axes(self) -> Iterator[tuple[str, int | None, int | None, AxisPhases]]:
        """Yield the letter of each axis, its extent in input and output, and its phases."""
        letters = map(str.upper, AXES[self.spec.rank])
        extents = self.spec.spatial, self.spec.output_spatial
        return zip(letters, *extents, self.phases, strict=True)

    def _channels(self) -> Iterator[Size]:
        """The batch and the channels; C_IN and C_OUT follow from a group's channels, if grouped."""
        yield self._size("BATCH", self.spec.batch, of_layer=True)
        for end, count in (("IN", self.spec.in_channels), ("OUT", self.spec.out_channels)):
            if self.groups == 1:
                yield self._size(f"C_{end}", count, of_layer=True)
                continue
            found = FloorDiv(self._layer(f"C_{end}"), GROUPS)
            yield self._size(
                f"GROUP_C_{end}", count and count // self.groups, found=found, of_layer=True
            )
            whole = self.groups * self._layer(f"GROUP_C_{end}")
            yield self._size(f"C_{end}", count, whole, of_layer=True)

    def _inputs(self) -> Iterator[Size]:
        for letter, extent, _, _ in self._axes():
            yield self._size(f"{letter}_IN", extent, of_extent=True)

    def _outputs(self) -> Iterator[Size]:
        for letter, _, output, axis in self._axes():
            source = self._extent(f"{letter}_IN")
            definition = axis.stride * source + axis.growth - axis.stride
            yield self._size(f"{letter}_OUT", output, definition, of_extent=True)

    def _phases(self) -> Iterator[Size]:
        for letter, extent, _, axis in self._axes():
            value = extent + axis.extent_growth if extent else None
            definition = self._extent(f"{letter}_IN") + axis.extent_growth
            yield self._size(f"{letter}_PHASE", value, definition, of_extent=True)

    def _kernel(self) -> Iterator[Size]:
        for (letter, *_), extent in zip(self._axes(), self.spec.kernel_size, strict=True):
            yield self._size(f"K{letter}", extent, of_layer=True)

    def _groups(self) -> Iterator[Size]:
        """The sizes of groups along the last axis; a file only prints those that a kernel reads."""
        grouping = self.grouping
        if grouping is None:
            return
        letter, extent, output, _ = list(self._axes())[-1]
        span, source = grouping.span, self._extent(f"{letter}_IN")
        definition = source + grouping.growth
        if span > 1:
            lifted = self._extent(f"{letter}_OUT") + grouping.offset
            definition = CeilDiv(lifted, self._named("PHASES"))
        groups = -(-(output + grouping.offset) // grouping.width) if output else None
        inputs = extent // span if extent else None
        yield self._size("SPAN", span)
        yield self._size("PHASES", grouping.width)
        yield self._size("PHASE_LANES", grouping.lanes)
        yield self._size(f"{letter}_IN_GROUPS", inputs, FloorDiv(source, Integer(span)))
        yield self._size(f"{letter}_GROUPS", groups, definition)
        yield self._size("OFFSET", grouping.offset)
        yield self._size(f"DILATION_{letter}", grouping.axis.dilation, of_layer=True)

    def _rows(self) -> Iterator[Size]:
        """The sizes of row blocks."""
        if self.block is None:
            return
        letter, _, output, _ = list(self._axes())[-2]
        count = None if output is None else -(-output // self.block.rows)
        blocks = CeilDiv(self._extent(f"{letter}_OUT"), self._named("ROWS"))
        yield self._size("ROWS", self.block.rows)
        yield self._size(f"{letter}_BLOCKS", count, blocks)
        yield self._size("ROWS_IN", self.block.advance)

    def _taps(self) -> Iterator[Size]:
        """Taps of the phase with the most, along each axis: ceil(kernel / tap_step).

        Along a grouped axis: the input groups that an output group reads (`Grouping.slack`).
        """
        for number, (letter, _, _, axis) in enumerate(self._axes()):
            extent, step, most = self._layer(f"K{letter}"), Integer(axis.tap_step), axis.most_taps
            last = number == self.spec.rank - 1  # which a tile may group
            if self.grouping is not None and last:
                extent = self.grouping.axis.dilation * (extent - 1) + 1 + self.grouping.slack
                step, most = self._named("PHASES"), self.grouping.taps
            taps = CeilDiv(extent, step)
            yield self._size(f"TAPS_{letter}", most, taps, spelled=True, of_layer=not last)

    def _blocks(self) -> Iterator[Size]:
        """BLOCK_M, BLOCK_N and BLOCK_K; without a value if they differ between tiles."""
        for name in BLOCKS:
            values = {getattr(tile, name.lower()) for tile in self.tiles}
            yield self._size(name, values.pop() if len(values) == 1 else None)

    def _boxes(self) -> Iterator[Size]:
        letters = ["N", *(letter for letter, *_ in self._axes())]
        for letter, extent in zip(letters, self.box, strict=True):
            if extent > 1:
                yield self._size(f"BOX_{letter}", extent)

    def _even_row(self, sizes: Sizes) -> Iterator[Size]:
        """The positions of a row after padding to an even number, if padding is needed."""
        span = 1 if self.grouping is None else self.grouping.span
        if not needs_even_rows(self.spec, span, self.fold):
            return
        last = sizes.rank - 1
        count, name = sizes.count(last), f"{sizes.letter(last)}_ROW"
        known = sizes.space.number(count)
        if known is None or known % 2:
            value = None if known is None else known + 1
            yield self._size(name, value, 2 * CeilDiv(count, Integer(2)))

    def _counts(self, sizes: Sizes) -> Iterator[Size]:
        """The numbers of boxes along each axis, and of blocks of positions and channels."""
        extents = [sizes.named("BATCH"), *map(sizes.count, range(sizes.rank))]
        letters = ["N", *(letter for letter, *_ in self._axes())]
        for letter, extent, each in zip(letters, extents, self.box, strict=False):
            if each > 1:
                yield sizes.count_of(f"{letter.lower()}_tiles", extent, f"BOX_{letter}")
        folded = sizes.named("BATCH") * sizes.positions
        yield sizes.count_of("tiles", sizes.positions, "BLOCK_M")
        yield sizes.count_of("folded_tiles", folded, "BLOCK_M")
        yield sizes.count_of("co_tiles", sizes.group_out, "BLOCK_N")
        yield sizes.count_of("channel_blocks", sizes.group_in, "BLOCK_K")


def needs_even_rows(spec: ConvTransposeSpec, span: int, fold: bool) -> bool:
    """Whether rows are padded to an even number of positions, the extra one masked.

    Triton's axis analysis loses contiguity through `//` and `%` by an odd or unknown number. If it
    then finds no contiguous dimension of a tile, it lays neighbouring threads along the first (3.6)
    or the last one (3.7 to 3.9), and accesses are strided if that is the channels.
    """
    flat = spec.rank > 1 or fold
    return flat and span == 1 and spec.layout == "channels_first"
