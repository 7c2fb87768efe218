"""What flows out of planning: the tile, the launch grid and what they cost on a target.

Stage 4, plan. Input: a spec, its phases and a `GpuTarget`; output: a `KernelPlan`. Every figure is
computed from the spec and the target's row, none is asked of a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sympy import Expr

from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.row_blocks import RowBlock
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..symbolic.sizes import Sizes
from ..tables.targets import GpuTarget
from .family import Family

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, technical specifications


@dataclass(frozen=True, slots=True)
class MeasuredGradient:
    """A tile of the kernel for the input's gradient: its time, and that of torch's operator."""

    tile: Tile
    ms: float
    torch_ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A tile that was measured.

    Attributes:
        tile: it.
        ms: its time in milliseconds.
        tried: of how many it was the fastest.
        device: on which.
        gradient: what was measured for the gradient of the input, None if nothing was.
    """

    tile: Tile
    ms: float
    tried: int
    device: str
    gradient: MeasuredGradient | None = None


@dataclass(frozen=True, slots=True)
class GridCoordinate:
    """A number that the launch grid hands a program: its name, and how many values it takes."""

    name: str
    extent: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one call costs, by the model.

    Attributes:
        programs: programs launched.
        occupancy: programs resident on an SM.
        waves: programs over (SMs x occupancy).
        tail: part of the last wave's slots that stand empty, 0 to 1.
        flops: floating-point operations of the layer: 2 a product, no wasted tap counted.
        dram_bytes: input, packed weight and output, each moved once.
        l2_bytes: what the programs ask for and write, taps and re-reads counted.
        roofline_ms: max(flops / rate, dram_bytes / bandwidth).
        bound: which of the two it is.
        model_ms: the model's time for this tile; it ranks tiles and is no prediction of a clock.
    """

    programs: int
    occupancy: int
    waves: float
    tail: float
    flops: int
    dram_bytes: int
    l2_bytes: int
    roofline_ms: float
    bound: str
    model_ms: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tile that was considered, with its cost."""

    tile: Tile
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """Everything a family needs to print a kernel.

    Attributes:
        spec: the layer, sizes known or not.
        target: the GPU it is planned for.
        family: what computes it.
        families: those whose tiles were ranked.
        phases: one entry a spatial axis.
        sizes: the sizes of its kernel.
        grouping: of the last axis, where the family groups it.
        block: of the last axis but one, where a program has several of its rows.
        tile: the tile of the launch; with autotune, the first of `tuned`.
        tuned: the tiles that the emitted file tries on its first call, empty without autotune.
        fold_batch: images are flattened into the positions, so that small ones share a tile.
        grid: the coordinates on each launch axis, fastest first.
        cost: of the spec's sizes, or of nominal ones where it leaves them to run time.
        nominal: sizes were left to run time and stand at nominal values in `cost`.
        rank: returns `ranking`, which takes longer than the rest of the plan.
        measured: what was measured for the spec, None if nothing was or a tile was given.
        choices_digest: hash of the file of choices that was given, None without one.
        unmeasured: the package has a measured tile for the spec, which was not to be used.
        grid_reason: why this grid.
        prefix: what the names of its sizes begin with in the file; empty for the layer itself.
        gradient: of the kernel that gives the gradient of the input; None where torch gives it.
    """

    spec: ConvTransposeSpec
    target: GpuTarget
    family: Family
    families: tuple[Family, ...]
    phases: tuple[AxisPhases, ...]
    sizes: Sizes
    grouping: Grouping | None
    block: RowBlock | None
    tile: Tile
    tuned: tuple[Tile, ...]
    fold_batch: bool
    grid: tuple[tuple[GridCoordinate, ...], ...]
    cost: Cost
    nominal: bool
    rank: Callable[[], tuple[Candidate, ...]] = field(compare=False, repr=False)
    measured: Measured | None
    choices_digest: str | None
    unmeasured: bool
    grid_reason: str
    prefix: str = ""
    gradient: KernelPlan | None = None

    @property
    def ranking(self) -> tuple[Candidate, ...]:
        """The candidates of the tile, best first."""
        return self.rank()

    @property
    def input_layout(self) -> str:
        """The layout that the kernel reads: the spec's, or that of the copy made before."""
        return "channels_last" if self.tile.relayout else self.spec.layout

    @property
    def rounds(self) -> bool:
        """Whether its operands are rounded to TF32 before they are multiplied."""
        product = self.spec.product if self.family.products else None
        return product is not None and product.rounds

    @property
    def reads_raw_weight(self) -> bool:
        """Whether its kernel reads the weight as torch lays it, so that nothing is packed.

        Programs of depthwise layers read a few weights, whatever their order.
        """
        return not self.family.packs

    @property
    def grid_text(self) -> str:
        """The grid's axes as text."""
        axes = [" * ".join(coordinate.name for coordinate in axis) for axis in self.grid]
        return f"({', '.join(axes)})"

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Every tile the file may run with."""
        return self.tuned or (self.tile,)
