"""What flows out of planning: the tile, the launch grid and what they cost on a target.

Stage 4, plan. Input: a spec, its phases and a `GpuTarget`; output: a `KernelPlan`. Every figure is
computed from the spec and the target's row, none is asked of a machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from sympy import Expr

from .errors import SpecError, shown, text_of
from .grouping import Grouping
from .language.spec import ConvTransposeSpec
from .phases import AxisPhases
from .rows import RowBlock
from .tables.targets import GpuTarget
from .values import check_integer

# Sizes that a spec leaves to run time stand at these while a tile is chosen.
NOMINAL_BATCH = 8
NOMINAL_CHANNELS = 64
NOMINAL_SPATIAL = {1: 8192, 2: 128, 3: 32}
SINGLE = ("gather", "window")  # families whose positions are single outputs, not groups of a row
DEPTHWISE = ("direct", "stencil")  # families whose channels are groups of their own
# Of a tile's numbers, from what no kernel has less of to what no GPU or kernel has more of.
TILE_RANGES = (
    *((block, 1, 1024) for block in ("block_m", "block_n", "block_k")),
    ("num_warps", 1, 32),  # 1024 threads a block
    ("num_stages", 1, 16),
    ("span", 1, 16),
    ("rows", 1, 16),
)
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, technical specifications


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The block of work of one program, and the kernel that does it.

    Attributes:
        block_m: output positions; block_n: output channels; block_k: input channels a step.
        num_warps: warps a program.
        num_stages: loads in flight ahead of the matrix units, Triton's pipeline depth.
        family: a name of `FAMILIES`.
        span: neighbouring inputs of a row that a position takes together (grouping.py).
        rows: neighbouring rows of outputs that a program computes together (rows.py).
        relayout: the input is copied first, in channels_last (relayout.py).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    family: str = "gather"
    span: int = 1
    rows: int = 1
    relayout: bool = False

    def __post_init__(self) -> None:
        """Check that it is a tile at all; whether it serves a layer and fits a GPU, planning does.

        Raises:
            SpecError: a field is of another type or out of range; it names the field.
        """
        for name, low, high in TILE_RANGES:
            value = check_integer(f"{name} of a tile", getattr(self, name), low, high)
            if name not in ("num_stages", "rows") and value & (value - 1):
                raise SpecError(f"{name} of a tile must be a power of two, got {value}", name)
            object.__setattr__(self, name, value)
        family = text_of(self.family)
        if family is None or not re.fullmatch("[a-z][a-z0-9_]{0,39}", family):
            raise SpecError(
                f"family of a tile must be the name of a family, got {shown(self.family)}", "family"
            )
        object.__setattr__(self, "family", family)
        if type(self.relayout) is not bool:
            raise SpecError(
                f"relayout of a tile must be true or false, got {shown(self.relayout)}", "relayout"
            )

    @property
    def depthwise(self) -> bool:
        """Whether its programs have channels that are groups of their own."""
        return self.family in DEPTHWISE

    @property
    def boxed(self) -> bool:
        """Whether its programs load boxes of tensors, from descriptors."""
        return self.family == "window"

    def __str__(self) -> str:
        inputs = f" x {self.span} inputs" if self.span > 1 else ""
        rows = f" x {self.rows} rows" if self.rows > 1 else ""
        shape = f"{self.block_m} positions{rows} x {self.block_n} channels"
        depth = f"{self.block_k}{inputs} deep"
        copy = ", of a copy of the input" if self.relayout else ""
        return f"{shape}, {depth}, {self.num_warps} warps, {self.num_stages} stages{copy}"


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
        phases: one entry a spatial axis.
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
    phases: tuple[AxisPhases, ...]
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
    def family(self) -> str:
        """The name of the family that runs it."""
        return self.tile.family

    @property
    def input_layout(self) -> str:
        """The layout that the kernel reads: the spec's, or that of the copy made before."""
        return "channels_last" if self.tile.relayout else self.spec.layout

    @property
    def reads_raw_weight(self) -> bool:
        """Whether its kernel reads the weight as torch lays it, so that nothing is packed.

        Programs of depthwise layers read a few weights, whatever their order.
        """
        return self.tile.depthwise

    @property
    def grid_text(self) -> str:
        """The grid's axes as text."""
        axes = [" * ".join(coordinate.name for coordinate in axis) for axis in self.grid]
        return f"({', '.join(axes)})"

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Every tile the file may run with."""
        return self.tuned or (self.tile,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The sizes a cost is computed for: the spec's, with nominal ones in the gaps."""

    batch: int
    in_channels: int
    out_channels: int
    extents: tuple[int, ...]
    output_extents: tuple[int, ...]
    phase_extents: tuple[int, ...]
    nominal: bool

    @property
    def inputs(self) -> int:
        """Inputs of one channel of one image."""
        return math.prod(self.extents)

    @property
    def outputs(self) -> int:
        """Outputs of one channel of one image."""
        return math.prod(self.output_extents)


def problem_of(spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...]) -> Problem:
    """Return the sizes of `spec`; unknown ones are nominal, channels a multiple of the groups."""
    nominal_channels = -(-NOMINAL_CHANNELS // spec.groups) * spec.groups
    extents, positions, outputs = [], [], []
    for size, axis in zip(spec.spatial, phases, strict=True):
        smallest = max(1, -axis.extent_growth + 1)  # an output must be left
        extent = size or max(NOMINAL_SPATIAL[spec.rank], smallest)
        extents.append(extent)
        positions.append(extent + axis.extent_growth)
        outputs.append((extent - 1) * axis.stride + axis.growth)
    known = (spec.batch, spec.in_channels, spec.out_channels, *spec.spatial)
    return Problem(
        batch=spec.batch or NOMINAL_BATCH,
        in_channels=spec.in_channels or nominal_channels,
        out_channels=spec.out_channels or nominal_channels,
        extents=tuple(extents),
        output_extents=tuple(outputs),
        phase_extents=tuple(positions),
        nominal=None in known,
    )
