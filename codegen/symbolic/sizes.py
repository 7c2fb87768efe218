"""Names of the sizes in an emitted file, and where each one's value comes from.

Stage 3, part of index. Input: a `KernelPlan`; output: `Sizes`, the size symbols of its `Space`. A
size that the spec knows is a module constant, one it leaves open is an argument of the kernel, and
one that follows from others at run time is a local of the kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from ..geometry.boxes import box_of
from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.problem import NOMINAL_BATCH
from ..geometry.row_blocks import RowBlock
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from .space import FloorDiv, Space, symbol

AXES = {1: ("l",), 2: ("h", "w"), 3: ("d", "h", "w")}  # torch's letters for (N, C, …)
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
BOXES = ("BOX_N", "BOX_D", "BOX_H", "BOX_W", "BOX_L")  # positions of a tile along an axis
COPY_BLOCKS = ("COPY_POSITIONS", "COPY_CHANNELS")  # of the kernel that copies the input
PACK_BLOCKS = ("PACK_TAPS", "PACK_OUT", "PACK_IN")  # of the kernel that packs the weight


@dataclass(frozen=True, slots=True)
class Size:
    """A named size.

    Attributes:
        name: what the compiler calls it.
        value: the number, or None at run time.
        definition: an expression of other sizes; None for a constant or an argument.
        block: with it the size is ceil(definition / block).
        origin: what the value follows from, (a, b) for ceil(a / b); None where it stands alone.
        prefix: of a kernel that shares its file with another, whose sizes have the same names.
    """

    name: str
    value: int | None
    definition: Expr | None = None
    block: str | None = None
    origin: tuple[Expr, Expr] | None = None
    prefix: str = ""

    @property
    def text(self) -> str:
        """Its name in the file; locals of a kernel, in lower case, have no prefix."""
        return self.prefix + self.name if self.name.isupper() else self.name

    @property
    def symbol(self) -> Symbol:
        """The sympy symbol of this size."""
        return symbol(self.text)


@dataclass(frozen=True, slots=True)
class Sizes:
    """All sizes of one kernel, in the order in which a file would define them."""

    table: tuple[Size, ...]
    rank: int
    groups: int
    tiles: tuple[Tile, ...]
    phases: tuple[AxisPhases, ...]
    grouping: Grouping | None
    block: RowBlock | None
    box: tuple[int, ...] = ()

    @property
    def values(self) -> dict[Symbol, Expr | None]:
        """Each size as a number, an expression in other sizes, or None: what a `Space` takes."""
        result: dict[Symbol, Expr | None] = {}
        for size in self.table:
            exact = size.definition if size.block is None else None
            result[size.symbol] = Integer(size.value) if size.value is not None else exact
        return result

    @property
    def least(self) -> dict[Symbol, int]:
        """Smallest run-time inputs: those that leave an output, which the wrapper demands."""
        return {
            self.input(axis): 1 + max(0, -phases.extent_growth)
            for axis, phases in enumerate(self.phases)
        }

    @property
    def space(self) -> Space:
        """The space of these sizes."""
        return Space(self.values, self.least)

    def named(self, name: str) -> Expr:
        """Return the symbol of the size called `name`; raises KeyError if there is none."""
        for size in self.table:
            if size.name == name:
                return size.symbol
        raise KeyError(name)

    def letter(self, axis: int) -> str:
        """Return the capital letter of a spatial axis."""
        return AXES[self.rank][axis].upper()

    def input(self, axis: int) -> Expr:
        """Input extent of a spatial axis."""
        return self.named(f"{self.letter(axis)}_IN")

    def output(self, axis: int) -> Expr:
        """Output extent of a spatial axis."""
        return self.named(f"{self.letter(axis)}_OUT")

    def phase(self, axis: int) -> Expr:
        """Positions along a spatial axis: `count` of them, on the last one perhaps one more."""
        name = f"{self.letter(axis)}_ROW"
        padded = axis == self.rank - 1 and any(size.name == name for size in self.table)
        return self.named(name) if padded else self.count(axis)

    def count(self, axis: int) -> Expr:
        """Outputs of a phase along a spatial axis, groups of outputs, blocks of rows."""
        if self.is_blocked(axis):
            return self.named(f"{self.letter(axis)}_BLOCKS")
        if self.is_grouped(axis):
            return self.named(f"{self.letter(axis)}_GROUPS")
        if self.phases[axis].stride == 1:
            return self.output(axis)
        return self.named(f"{self.letter(axis)}_PHASE")

    def kernel(self, axis: int) -> Expr:
        """Extent of a spatial axis in the packed weight: of the kernel, or of the group's taps."""
        grouped = self.grouping is not None and self.is_grouped(axis)
        if self.grouping is not None and grouped and not self.grouping.unrolled:
            return (
                Integer(1) if self.grouping.taps == 1 else self.named(f"TAPS_{self.letter(axis)}")
            )
        return self.named(f"K{self.letter(axis)}")

    def is_grouped(self, axis: int) -> bool:
        """Whether a spatial axis is taken in groups; only the last one may be."""
        return self.grouping is not None and axis == self.rank - 1

    def is_blocked(self, axis: int) -> bool:
        """Whether a program has blocks of a spatial axis; only the last one but one may be."""
        return self.block is not None and axis == self.rank - 2

    @property
    def span(self) -> Expr:
        """Inputs of a group."""
        grouped = self.grouping is not None and self.grouping.span > 1
        return self.named("SPAN") if grouped else Integer(1)

    @property
    def lanes(self) -> Expr:
        """Lanes for the outputs of a group, a power of two."""
        if self.grouping is None or self.grouping.lanes == 1:
            return Integer(1)
        whole = self.grouping.lanes == self.grouping.width
        return self.named("PHASES" if whole else "PHASE_LANES")

    def taps(self, axis: int) -> Expr | None:
        """Taps along a spatial axis of every phase outside gaps, None if phases differ."""
        phases = self.phases[axis]
        if self.is_blocked(axis):
            return Integer(1)
        if self.grouping is not None and self.is_grouped(axis):
            return Integer(1) if self.grouping.unrolled else self.kernel(axis)
        if phases.kernel % phases.tap_step:
            return None
        if phases.most_taps == 1:
            return Integer(1)
        return (
            self.kernel(axis) if phases.tap_step == 1 else self.named(f"TAPS_{self.letter(axis)}")
        )

    @property
    def group_in(self) -> Expr:
        """Input channels of a group."""
        return self.named("C_IN" if self.groups == 1 else "GROUP_C_IN")

    @property
    def group_out(self) -> Expr:
        """Output channels of a group."""
        return self.named("C_OUT" if self.groups == 1 else "GROUP_C_OUT")

    def product(self, extents: Iterable[Expr]) -> Expr:
        """Return the product of some sizes, 1 for none."""
        return math.prod(extents, start=Integer(1))

    @property
    def positions(self) -> Expr:
        """Outputs of one phase of one image and channel."""
        return self.product(self.phase(axis) for axis in range(self.rank))

    def strides(self, extents: list[Expr], channels: Expr, channels_last: bool) -> list[Expr]:
        """Return element strides of (image, channel, spatial…) of a dense tensor."""
        inner = channels if channels_last else Integer(1)
        spatial = [inner * self.product(extents[axis + 1 :]) for axis in range(self.rank)]
        channel = Integer(1) if channels_last else self.product(extents)
        return [channels * self.product(extents), channel, *spatial]

    def is_multiple(self, size: Expr, block: str) -> bool:
        """Whether every tile's `block` divides `size`, as far as the plan knows."""
        known = {
            entry.symbol: Integer(entry.value) for entry in self.table if entry.value is not None
        }
        value = size.xreplace(known)
        blocks = {getattr(tile, block.lower()) for tile in self.tiles}
        return value.is_Integer and all(int(value) % entry == 0 for entry in blocks)


def make_sizes(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    tiles: tuple[Tile, ...],
    grouping: Grouping | None,
    block: RowBlock | None,
    *,
    depthwise: bool,
    boxed: bool,
    fold: bool,
    prefix: str,
) -> Sizes:
    """Return the sizes of a kernel for `spec` that runs with any of `tiles`.

    A `grouping` with a span above 1 needs a known last extent, a `block` a known last but one. A
    `depthwise` kernel's programs take several channels, each a group; a `boxed` one's have boxes of
    positions. With `fold` images share tiles. The names in the file begin with `prefix`.
    """
    groups = 1 if depthwise else spec.groups
    table = [Size("BATCH", spec.batch), *_channels(spec, groups)]
    letters = [letter.upper() for letter in AXES[spec.rank]]
    outputs = spec.output_spatial
    for letter, size in zip(letters, spec.spatial, strict=True):
        table.append(Size(f"{letter}_IN", size))
    for letter, size, axis in zip(letters, outputs, phases, strict=True):
        source = symbol(f"{letter}_IN")
        definition = None if size else axis.stride * source + axis.growth - axis.stride
        table.append(Size(f"{letter}_OUT", size, definition))
    for letter, size, axis in zip(letters, spec.spatial, phases, strict=True):
        source = symbol(f"{letter}_IN")
        value = size + axis.extent_growth if size else None
        definition = None if size else source + axis.extent_growth
        table.append(Size(f"{letter}_PHASE", value, definition))
    table += [Size(f"K{letter}", k) for letter, k in zip(letters, spec.kernel_size, strict=True)]
    if grouping is not None:
        table += _group_sizes(spec, grouping)
    if block is not None:
        table += _row_sizes(spec, block)
    taps = [_taps(letter, axis) for letter, axis in zip(letters, phases, strict=True)]
    if grouping is not None:
        taps[-1] = _group_taps(letters[-1], grouping)
    table += taps
    for name in BLOCKS:
        values = {getattr(tile, name.lower()) for tile in tiles}
        table.append(Size(name, values.pop() if len(values) == 1 else None))
    sizes = Sizes(tuple(table), spec.rank, groups, tiles, phases, grouping, block)
    if boxed:
        sizes = _with_box(sizes, spec)
        table = list(sizes.table)
    elif needs_even_rows(spec, 1 if grouping is None else grouping.span, fold):
        table += _even_row(sizes)
        sizes = dataclasses.replace(sizes, table=tuple(table))
    counts = (
        ("tiles", sizes.positions, "BLOCK_M"),
        ("folded_tiles", sizes.named("BATCH") * sizes.positions, "BLOCK_M"),
        ("co_tiles", sizes.group_out, "BLOCK_N"),
        ("channel_blocks", sizes.group_in, "BLOCK_K"),
    )
    table += [_count(sizes, *count) for count in counts]
    return dataclasses.replace(sizes, table=_prefixed(table, prefix))


def _with_box(sizes: Sizes, spec: ConvTransposeSpec) -> Sizes:
    """Return the sizes with the extents of a tile's box, and how many of them an axis has."""
    batch, table = sizes.named("BATCH"), list(sizes.table)
    counts = {"N": batch} | {sizes.letter(axis): sizes.count(axis) for axis in range(sizes.rank)}
    known = [sizes.space.number(count) for count in counts.values()]
    extents = tuple(NOMINAL_BATCH if number is None else number for number in known)
    box = box_of(extents, sizes.tiles[0].block_m, sizes.block is not None)
    for (letter, count), extent, each, number in zip(
        counts.items(), extents, box, known, strict=True
    ):
        if each > 1:
            tiles = None if number is None else -(-extent // each)
            name = f"BOX_{letter}"
            table += [Size(name, each), Size(f"{letter.lower()}_tiles", tiles, count, name)]
    return dataclasses.replace(sizes, table=tuple(table), box=box)


def needs_even_rows(spec: ConvTransposeSpec, span: int, fold: bool) -> bool:
    """Whether the positions of a row must be an even number, of which one may have no output.

    Triton's axis analysis loses a run through `//` and `%` by an odd or unknown number. Where it
    then sees no run along either dimension of a tile, it takes neighbouring threads along the first
    (3.6) or the last one (3.7 to 3.9), and strides through memory if that is the channels.
    """
    flat = spec.rank > 1 or fold
    return flat and span == 1 and spec.layout == "channels_first"


def _even_row(sizes: Sizes) -> list[Size]:
    """Return the positions of a row, where they are more than its phase has outputs or groups."""
    last = sizes.rank - 1
    count, name = sizes.count(last), f"{sizes.letter(last)}_ROW"
    known = sizes.space.number(count)
    if known is None:
        return [Size(name, None, 2 * FloorDiv(count + 1, Integer(2)))]
    return [Size(name, known + 1)] if known % 2 else []


def _prefixed(table: list[Size], prefix: str) -> tuple[Size, ...]:
    """Return the sizes with a prefix, in each other's definitions too."""
    named = [dataclasses.replace(size, prefix=prefix) for size in table]
    symbols = {old.symbol: new.symbol for old, new in zip(table, named, strict=True)}
    return tuple(_renamed(size, symbols) for size in named)


def _renamed(size: Size, symbols: dict[Symbol, Symbol]) -> Size:
    """Return the size with other symbols in what it follows from."""
    definition, origin = size.definition, size.origin
    if definition is not None:
        definition = definition.xreplace(symbols)
    if origin is not None:
        origin = origin[0].xreplace(symbols), origin[1].xreplace(symbols)
    return dataclasses.replace(size, definition=definition, origin=origin)


def _group_sizes(spec: ConvTransposeSpec, grouping: Grouping) -> list[Size]:
    """The sizes of groups along the last axis; what no kernel reads is printed nowhere."""
    letter = AXES[spec.rank][-1].upper()
    size, output = spec.spatial[-1], spec.output_spatial[-1]
    definition = None if size else symbol(f"{letter}_IN") + grouping.growth
    groups = -(-(output + grouping.offset) // grouping.width) if output else None
    return [
        Size("SPAN", grouping.span),
        Size("PHASES", grouping.width),
        Size("PHASE_LANES", grouping.lanes),
        Size(f"{letter}_IN_GROUPS", size // grouping.span if size else None),
        Size(f"{letter}_GROUPS", groups, definition),
        Size("OFFSET", grouping.offset),
        Size(f"DILATION_{letter}", grouping.axis.dilation),
    ]


def _taps(letter: str, axis: AxisPhases) -> Size:
    """Taps of the phases that have most: they are `tap_step` kernel indices apart."""
    origin = symbol(f"K{letter}"), Integer(axis.tap_step)
    return Size(f"TAPS_{letter}", axis.most_taps, origin=origin)


def _group_taps(letter: str, grouping: Grouping) -> Size:
    """Groups of inputs that a group of outputs reads, by `Grouping.slack`."""
    reach = grouping.axis.dilation * (symbol(f"K{letter}") - 1) + 1 + grouping.slack
    origin = reach, symbol("PHASES") if grouping.width > 1 else Integer(1)
    return Size(f"TAPS_{letter}", grouping.taps, origin=origin)


def _row_sizes(spec: ConvTransposeSpec, block: RowBlock) -> list[Size]:
    letter, output = AXES[spec.rank][-2].upper(), spec.output_spatial[-2]
    assert output is not None
    table = [Size("ROWS", block.rows), Size(f"{letter}_BLOCKS", -(-output // block.rows))]
    return [*table, Size("ROWS_IN", block.advance)]


def _channels(spec: ConvTransposeSpec, groups: int) -> list[Size]:
    """The channels; with groups those of a group are the primary sizes."""
    counts = {"IN": spec.in_channels, "OUT": spec.out_channels}
    if groups == 1:
        return [Size(f"C_{end}", count) for end, count in counts.items()]
    table = []
    for end, count in counts.items():
        table.append(Size(f"GROUP_C_{end}", count and count // groups))
        definition = None if count else groups * symbol(f"GROUP_C_{end}")
        table.append(Size(f"C_{end}", count, definition))
    return table


def _count(sizes: Sizes, name: str, extent: Expr, block: str) -> Size:
    """A number of blocks: known only if the extent is, and the same for every tile."""
    known = {size.symbol: Integer(size.value) for size in sizes.table if size.value is not None}
    value = extent.xreplace(known)
    counts = {-(-int(value) // getattr(t, block.lower())) for t in sizes.tiles if value.is_Integer}
    return Size(name, counts.pop() if len(counts) == 1 else None, extent, block)
