"""The result of planning: kernel family, tile, launch grid and their cost on a target.

Stage 4, plan. Input: a spec, its phases and a `GpuTarget`; output: the type `KernelPlan`. Every
figure is computed from the spec and the target's row; no device is queried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from sympy import Expr

from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.problem import NOMINAL, Nominal, Problem, problem_of
from ..geometry.row_blocks import RowBlock
from ..geometry.tile import Tile
from ..language.spec import ANY, ConvTransposeSpec
from ..symbolic.sizes import GRADIENT, OF_LAYOUT, Sizes
from ..tables.targets import GpuTarget
from .family import Family

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, technical specifications


@dataclass(frozen=True, slots=True)
class MeasuredGradient:
    """The fastest tile for the input's gradient, its time, and the time of torch's operator."""

    tile: Tile
    ms: float
    torch_ms: float


@dataclass(frozen=True, slots=True)
class MeasuredTorch:
    """The times of torch's operator, in milliseconds.

    Attributes:
        ms: as a layer calls it, with the input in the spec's layout.
        best_ms: the least that a compiler can make of it: the same or, if that is faster, a change
            of the input to the other layout and the operator there.
    """

    ms: float
    best_ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest tile of those timed for a spec.

    Attributes:
        tile: the winner.
        ms: time of the winner, in milliseconds.
        tried: number of candidates timed.
        device: name of the GPU they were timed on.
        gradient: the measurement for the gradient of the input, None without one.
        torch: the times of torch's operator on the same data, None without them.
    """

    tile: Tile
    ms: float
    tried: int
    device: str
    gradient: MeasuredGradient | None = None
    torch: MeasuredTorch | None = None


@dataclass(frozen=True, slots=True)
class GridCoordinate:
    """A coordinate of a program on the launch grid: its name and its number of values."""

    name: str
    extent: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The predicted cost of one call.

    Attributes:
        programs: programs launched.
        occupancy: programs per SM.
        waves: programs / (SMs x occupancy).
        tail: fraction of the last wave's slots that are empty, 0 to 1.
        flops: floating-point operations of the layer, 2 per product, without wasted taps.
        dram_bytes: bytes of input, packed weight and output, each moved once.
        l2_bytes: bytes that programs request and write, with every tap and re-read.
        roofline_ms: max(flops / rate, dram_bytes / bandwidth), in milliseconds.
        bound: the larger of the two, "compute" or "memory".
        model_ms: the model's time for this tile in milliseconds; meant to rank tiles.
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
    """A tile and its predicted cost."""

    tile: Tile
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """Everything a family needs to print a kernel.

    Attributes:
        spec: the layer; sizes may be left to run time.
        target: the GPU to plan for.
        family: the kernel family.
        families: the families whose tiles were ranked.
        phases: phases of each spatial axis.
        sizes: symbols of the kernel's sizes.
        grouping: grouping of the last axis, None if the family does not group it.
        block: row block of the last axis but one, None if programs have single rows.
        tile: the tile of the launch; with autotune, the first of `tuned`.
        tuned: tiles that the emitted file tries on its first call, empty without autotune.
        fold_batch: whether images are flattened into the positions, so that they share tiles.
        grid: coordinates on each launch axis, fastest first.
        cost: predicted cost, with nominal values for sizes left to run time.
        nominal: whether `cost` has nominal values.
        rank: function that returns `ranking`; called late, as it takes longer than the plan.
        measured: measurement of the spec, None without one or if the caller gave a tile.
        choices_digest: hash of the choices file that the caller gave, None without one.
        unmeasured: whether the package has a measured tile that the caller excluded (`none`).
        grid_reason: reason for the grid, as text.
        prefix: prefix of the names of this kernel's own sizes; empty for a file's first kernel.
        rung: the input that the kernel was planned for as a rung; None if it is for any.
        least: elements of an input from which on it computes, if it is for large inputs alone.
        most: elements of an input up to which it computes, if it is for small inputs alone.
        assumed: what stands for sizes left to run time in `cost` and `ranking`.
        is_backward: whether it computes the gradient of a layer's input, from that of the output.
        gradient: plan of the kernel for the input's gradient, None if torch computes it.
        others: plans of the file's other kernels: of the other layout, of its rungs, for large
            and for small inputs.
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
    rung: tuple[int | None, ...] | None = None
    least: int | None = None
    most: int | None = None
    assumed: Nominal = NOMINAL
    is_backward: bool = False
    gradient: KernelPlan | None = None
    others: tuple[KernelPlan, ...] = ()

    @property
    def ranking(self) -> tuple[Candidate, ...]:
        """All candidate tiles with their cost, best first."""
        return self.rank()

    @property
    def kernels(self) -> tuple[KernelPlan, ...]:
        """The plans of a file's kernels of the layer: this one's and the others'."""
        return self, *self.others

    @property
    def problem(self) -> Problem:
        """The sizes that its cost is computed for."""
        return problem_of(self.spec, self.phases, self.assumed)

    @property
    def is_for_any(self) -> bool:
        """Whether it computes every input in its layout that no other kernel of the file does."""
        return self.rung is None and self.least is None and self.most is None

    @property
    def file_spec(self) -> ConvTransposeSpec:
        """The spec of the file, of which `spec` is the part that this kernel computes."""
        layouts = {kernel.spec.layout for kernel in self.kernels}
        rungs = dict.fromkeys(kernel.rung for kernel in self.kernels if kernel.rung)
        layout = ANY if len(layouts) > 1 else self.spec.layout
        return dataclasses.replace(self.spec, layout=layout, rungs=tuple(rungs))

    @property
    def suffix(self) -> str:
        """What the names of its functions and kernels end in; empty for a file's first kernel."""
        own = self.prefix.removesuffix(GRADIENT)
        return f"_{own.removesuffix('_').lower()}" if own else ""

    @property
    def inputs_text(self) -> str:
        """Words for the inputs that it computes beside a file's first kernel; empty for that."""
        last = "channels_last" * (OF_LAYOUT[1] in self.prefix)
        if self.rung is not None:
            which = f"inputs of {' x '.join(map(str, self.rung[2:]))}"
        else:
            which = "large inputs" * bool(self.least) + "small inputs" * bool(self.most)
        return " in ".join(filter(None, (which, last)))

    @property
    def input_layout(self) -> str:
        """The layout that the kernel reads: the spec's, or that of the input copy."""
        return "channels_last" if self.tile.relayout else self.spec.layout

    @property
    def rounds(self) -> bool:
        """Whether operands are rounded to TF32 before they are multiplied."""
        product = self.spec.product if self.family.products else None
        return product is not None and product.rounds

    @property
    def reads_raw_weight(self) -> bool:
        """Whether the kernel reads the weight in torch's layout, so that nothing is packed.

        A program of a depthwise layer reads so few weights that their order does not matter.
        """
        return not self.family.packs

    @property
    def grid_text(self) -> str:
        """The grid's axes as text."""
        axes = [" * ".join(coordinate.name for coordinate in axis) for axis in self.grid]
        return f"({', '.join(axes)})"

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Every tile that the file may launch."""
        return self.tuned or (self.tile,)
