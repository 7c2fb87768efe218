"""Names of the sizes in an emitted file, and the source of each one's value.

Stage 3, index. Input: the rows of `size_table.py`; output: `Sizes`, the size symbols of a kernel's
`Space`. A size that the spec fixes is a module constant, one that the spec leaves open is an
argument of the kernel, and one computed from these at run time is a local of the kernel. Kernel
and wrapper print the same definition of a size, whether or not its value is known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from sympy import Expr, Integer, Symbol

from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.row_blocks import RowBlock
from ..geometry.tile import Tile
from .space import CeilDiv, Space, floors, symbol

AXES = {1: ("l",), 2: ("h", "w"), 3: ("d", "h", "w")}  # torch's letters for (N, C, …)
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
# Prefixes of names in the file, which add up: of a rung, of sizes that a kernel's tile decides for
# large and small inputs, and for channels_last beside channels_first, of the input's gradient.
RUNG = "RUNG{}_"
LARGE, SMALL = "LARGE_", "SMALL_"
OF_LAYOUT = "", "LAST_"
GRADIENT = "GRAD_"
GROUPS = symbol("GROUPS")  # the layer's channel groups, always a constant of the file


@dataclass(frozen=True, slots=True)
class Size:
    """A named size.

    Attributes:
        name: the compiler's name for it.
        value: its value; None if only run time decides it.
        definition: its formula in other sizes, also if `value` is known; None if it has none.
        spelled: whether the file prints a constant's definition instead of its number.
        found: the wrapper's formula, in extents of tensors, for an argument that is not one of
            them; None if the argument is an extent itself.
        prefix: prefix of the name in the file, which tells apart the equal names of two kernels
            in one file.
    """

    name: str
    value: int | None
    definition: Expr | None = None
    spelled: bool = False
    found: Expr | None = None
    prefix: str = ""

    @property
    def text(self) -> str:
        """Its name in the file, without the prefix if it is a count (a local of the kernel)."""
        return self.name if self.name.islower() else self.prefix + self.name

    @property
    def is_count(self) -> bool:
        """Whether it is a number of blocks: named in lower case, and a local of the kernel."""
        return self.name.islower() and self.definition is not None

    @property
    def symbol(self) -> Symbol:
        """The sympy symbol of this size."""
        return symbol(self.text)


@dataclass(frozen=True, slots=True)
class Sizes:
    """All sizes of one kernel, in the order in which a file would define them.

    Attributes:
        table: the sizes.
        rank: number of spatial axes.
        groups, tiles, phases, grouping, block, box: as in `SizeTable`.
        symbols: symbol of each size, by the size's name.
    """

    table: tuple[Size, ...]
    rank: int
    groups: int
    tiles: tuple[Tile, ...]
    phases: tuple[AxisPhases, ...]
    grouping: Grouping | None
    block: RowBlock | None
    box: tuple[int, ...] = ()
    symbols: dict[str, Symbol] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Build `symbols` once, because nearly every method looks one up."""
        object.__setattr__(self, "symbols", {size.name: size.symbol for size in self.table})

    @property
    def values(self) -> dict[Symbol, Expr | None]:
        """Each size as a number, an expression in other sizes, or None: `Space.sizes`.

        A number of blocks that run time decides is None even if its definition is known.
        """
        result: dict[Symbol, Expr | None] = {}
        for name, size in zip(self.symbols.values(), self.table, strict=True):
            if size.value is not None:
                result[name] = Integer(size.value)
            elif size.definition is None or size.is_count:
                result[name] = None
            else:
                result[name] = floors(size.definition.xreplace(self._known))
        return result

    @property
    def least(self) -> dict[Symbol, int]:
        """Lower bound of each input extent: the smallest with at least one output.

        The wrapper enforces it for extents that are left to run time.
        """
        return {
            self.input(axis): 1 + max(0, -phases.extent_growth)
            for axis, phases in enumerate(self.phases)
        }

    @property
    def space(self) -> Space:
        """The space of these sizes."""
        return Space(self.values, self.least)

    def named(self, name: str) -> Expr:
        """Return the symbol of the size `name`; raises KeyError if there is none."""
        return self.symbols[name]

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
        """Positions along a spatial axis: `count`, plus one if the last axis is padded to even."""
        name = f"{self.letter(axis)}_ROW"
        padded = axis == self.rank - 1 and name in self.symbols
        return self.named(name) if padded else self.count(axis)

    def count(self, axis: int) -> Expr:
        """Row blocks or output groups along a spatial axis, else the outputs of one phase."""
        if self.is_blocked(axis):
            return self.named(f"{self.letter(axis)}_BLOCKS")
        if self.is_grouped(axis):
            return self.named(f"{self.letter(axis)}_GROUPS")
        if self.phases[axis].stride == 1:
            return self.output(axis)
        return self.named(f"{self.letter(axis)}_PHASE")

    def kernel(self, axis: int) -> Expr:
        """Extent of a spatial axis in the packed weight: kernel size, or taps of a grouped axis."""
        grouped = self.grouping is not None and self.is_grouped(axis)
        if self.grouping is not None and grouped and not self.grouping.unrolled:
            return (
                Integer(1) if self.grouping.taps == 1 else self.named(f"TAPS_{self.letter(axis)}")
            )
        return self.named(f"K{self.letter(axis)}")

    def is_grouped(self, axis: int) -> bool:
        """Whether a spatial axis is grouped; only the last one can be."""
        return self.grouping is not None and axis == self.rank - 1

    def is_blocked(self, axis: int) -> bool:
        """Whether a spatial axis is split into row blocks; only the last but one can be."""
        return self.block is not None and axis == self.rank - 2

    @property
    def span(self) -> Expr:
        """Inputs of a group along the last axis; 1 without grouping."""
        grouped = self.grouping is not None and self.grouping.span > 1
        return self.named("SPAN") if grouped else Integer(1)

    @property
    def lanes(self) -> Expr:
        """Lanes for the outputs of a group along the last axis, a power of two."""
        if self.grouping is None or self.grouping.lanes == 1:
            return Integer(1)
        whole = self.grouping.lanes == self.grouping.width
        return self.named("PHASES" if whole else "PHASE_LANES")

    def taps(self, axis: int) -> Expr | None:
        """Taps of each phase (gaps aside) along a spatial axis; None if phases differ."""
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
        """Input channels of a channel group."""
        return self.named("C_IN" if self.groups == 1 else "GROUP_C_IN")

    @property
    def group_out(self) -> Expr:
        """Output channels of a channel group."""
        return self.named("C_OUT" if self.groups == 1 else "GROUP_C_OUT")

    def product(self, extents: Iterable[Expr]) -> Expr:
        """Return the product of `extents`, 1 if there are none."""
        return math.prod(extents, start=Integer(1))

    @property
    def positions(self) -> Expr:
        """Positions of one image and phase: the product of `phase` over the axes."""
        return self.product(self.phase(axis) for axis in range(self.rank))

    def strides(self, extents: list[Expr], channels: Expr, layout: str) -> list[Expr]:
        """Return the strides of (image, channel, spatial…) in a dense tensor, in elements.

        Raises KeyError for a `layout` that is not in `LAYOUTS`.
        """
        pixels = self.product(extents)
        channel, inner = {
            "channels_first": (pixels, Integer(1)),
            "channels_last": (Integer(1), channels),
        }[layout]
        spatial = [inner * self.product(extents[axis + 1 :]) for axis in range(self.rank)]
        return [channels * pixels, channel, *spatial]

    def is_multiple(self, size: Expr, block: str) -> bool:
        """Whether `size` is known and divisible by `block` (the name of one) of every tile."""
        value = size.xreplace(self._known)
        blocks = {getattr(tile, block.lower()) for tile in self.tiles}
        return value.is_Integer and all(int(value) % entry == 0 for entry in blocks)

    @property
    def _known(self) -> dict[Symbol, Expr]:
        sizes = zip(self.symbols.values(), self.table, strict=True)
        return {name: Integer(size.value) for name, size in sizes if size.value is not None}

    @property
    def box_extents(self) -> tuple[Expr, ...]:
        """Extents of a tile's box: images, then positions along each axis; () without boxes."""
        letters = ["N", *map(self.letter, range(self.rank))]
        extents = zip(letters, self.box, strict=False)
        return tuple(self.named(f"BOX_{each}") if n > 1 else Integer(1) for each, n in extents)

    def count_of(self, name: str, extent: Expr, block: str) -> Size:
        """Return `name` = ceil(extent / block), with a value if all tiles have the same one."""
        known, each = self._known, self.named(block)
        of_tiles = block in BLOCKS
        blocks = [getattr(tile, block.lower()) if of_tiles else known[each] for tile in self.tiles]
        value = extent.xreplace(known)
        counts = {-(-int(value) // int(block)) for block in blocks if value.is_Integer}
        return Size(name, counts.pop() if len(counts) == 1 else None, CeilDiv(extent, each))

    def plus(self, *sizes: Size) -> Sizes:
        """Return these sizes followed by `sizes`."""
        return dataclasses.replace(self, table=(*self.table, *sizes))
