"""The base class of kernel families: a family is one way to compute a transposed convolution.

Stage 4, part of plan. Input: a spec and a `Tile`; output: the family's `Form`s of the layer, and
the resources and cost of its tiles. `families/` has one subclass per family. No other code asks
which family it has: every difference is a method or an attribute of this class.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sympy import Expr

from ..geometry.boxes import box_of
from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..symbolic.size_table import needs_even_rows
from ..symbolic.sizes import Sizes
from ..tables.targets import GpuTarget

if TYPE_CHECKING:
    import jinja2

    from ..kernels.texts import KernelBody
    from ..symbolic.scribe import Scribe
    from ..symbolic.sizes import Sizes
    from .plan import KernelPlan

NUM_STAGES = (2, 3, 4)
# Images share a tile if separate tiles would have more than an eighth more positions.
MOST_PADDED = 1.125


@dataclass(frozen=True, slots=True)
class Use:
    """Estimated resources of a tile.

    Attributes:
        registers: registers per thread, an upper bound for all but a few tiles.
        expected: registers per thread, on average.
        shared: bytes of shared memory per program.
    """

    registers: int
    expected: int
    shared: int


@dataclass(frozen=True, slots=True)
class Demand:
    """Estimated resources of tiles that differ only in their number of stages.

    Attributes:
        registers: registers per thread with two stages, an upper bound.
        expected: registers per thread, on average.
        stage_registers: registers per thread of each further stage.
        step: bytes of shared memory for a step in flight; num_stages - 1 steps are.
        read: bytes for the step that products read, and for inputs that have a single buffer.
        barriers: bytes of the barriers per stage.
        store: bytes to convert the accumulator to the store layout; reuses the other buffers.
    """

    registers: int
    expected: int
    stage_registers: int = 0
    step: int = 0
    read: int = 0
    barriers: int = 0
    store: int = 0

    def use(self, num_stages: int) -> Use:
        """Return the resources of the tile with `num_stages` stages."""
        loads = (num_stages - 1) * self.step + self.read + num_stages * self.barriers
        registers = self.registers + (num_stages - 2) * self.stage_registers
        return Use(registers, self.expected, max(loads, self.store))


@dataclass(frozen=True, slots=True)
class Boxes:
    """The extents of a box of the input, image first and channels last, and of the weight's rows.

    Both are of tensors in channels_last: the input, or its copy, and the packed weight as a matrix.
    """

    input: tuple[Expr, ...]
    weight: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A kernel variant for a layer: a family, a span, a row block, and whether it has a copy.

    Attributes:
        family: the kernel family.
        span: neighbouring inputs of a row per position.
        rows: rows of outputs per program.
        relayout: whether the kernel reads a copy of the input (input_copy.py).
        extents: number of images and of positions along each axis; empty if tiles are no boxes.
        lanes: columns of the product per output channel.
        positions: positions of one image in a phase.
        phases: number of phases computed by separate programs.
        taps: taps of a phase that take a step each, on average.
        inputs, weights: input tiles and weight tiles loaded per step.
        products: matrix products per step.
    """

    family: Family
    span: int
    lanes: int
    positions: int
    phases: int
    taps: float
    rows: int = 1
    relayout: bool = False
    extents: tuple[int, ...] = ()
    inputs: int = 1
    weights: int = 1
    products: int = 1

    @property
    def boxed(self) -> bool:
        """Whether tiles are boxes of positions, else they are runs of flattened ones."""
        return bool(self.extents)

    def box(self, tile: Tile) -> tuple[int, ...]:
        """Return the extents of a tile's box: images, then positions along each axis."""
        if not self.boxed:
            return ()
        return box_of(self.extents, tile.block_m, self.rows > 1)

    def columns(self, tile: Tile) -> int:
        """Return the columns of a tile's product: its channels times `lanes`."""
        return tile.block_n * self.lanes

    def depth(self, tile: Tile) -> int:
        """Return the depth of a step's product: its input channels times `span`."""
        return tile.block_k * self.span


class Family(abc.ABC):
    """One way to compute a transposed convolution; instances of a class are equal.

    Attributes:
        name: name in choices files, headers and the command line.
        method: one line on how it computes.
        serves: one line on which specs it serves.
        template: name of the template of its kernel, whose names are the fields of `context_type`.
        context_type: the dataclass that `context` returns, with the fields of `KernelBody`.
        loader: Jinja loader of `template`, None for convgen's own templates.
        products: whether it uses matrix units, in the spec's precision; if not, it computes in the
            dtype of the accumulator.
        packs: whether its kernel reads a packed weight; if not, the weight as torch lays it.
        grouped: whether positions are groups of a row in channels_first, not single outputs.
        unrolled: whether a program reads all inputs of such a group at once.
        prefers_wide: whether wider spans win among tiles of equal predicted time.
        takes_rows: whether a program may compute a row block.
    """

    name: ClassVar[str]
    method: ClassVar[str]
    serves: ClassVar[str]
    template: ClassVar[str]
    context_type: ClassVar[type[KernelBody]]
    loader: ClassVar[jinja2.BaseLoader | None] = None
    products: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    unrolled: ClassVar[bool] = False
    prefers_wide: ClassVar[bool] = False
    takes_rows: ClassVar[bool] = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __str__(self) -> str:
        return self.name

    @abc.abstractmethod
    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        """Return why the family cannot serve `spec` at all, None if it can."""

    @abc.abstractmethod
    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield the forms of one row that serve `spec`; none if `refusal` gives a reason."""

    @abc.abstractmethod
    def blocks(
        self, spec: ConvTransposeSpec, problem: Problem, form: Form
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield (BLOCK_M, BLOCK_N, BLOCK_K, warps) of each candidate tile of a form."""

    @abc.abstractmethod
    def most_registers(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> int:
        """Return the most registers per thread that `demand` may estimate, with any stages.

        0 means that the tile spills or does not work, whatever the estimate.
        """

    @abc.abstractmethod
    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        """Estimate the resources of `tile` for any number of stages."""

    @abc.abstractmethod
    def program_ns(
        self,
        spec: ConvTransposeSpec,
        form: Form,
        tile: Tile,
        target: GpuTarget,
        steps: float,
    ) -> float:
        """Return the SM time of a program of `steps` steps, in nanoseconds."""

    @abc.abstractmethod
    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> KernelBody:
        """Return the values of `template`'s names; adds the sizes it reads to `scribe.used`."""

    def grouping(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], span: int
    ) -> Grouping | None:
        """Return the grouping of the last axis, None if groups would be single outputs."""
        if not self.grouped or spec.layout == "channels_last":
            return None
        grouping = Grouping(phases[-1], span, self.unrolled)
        return None if grouping.width == 1 else grouping

    def stages(self, form: Form) -> tuple[int, ...]:
        """Return the numbers of stages to try for a form."""
        return NUM_STAGES if form.rows == 1 else NUM_STAGES[:2]  # steps with row blocks are large

    def worth(self, target: GpuTarget) -> float:
        """Return the factor by which a tile must beat others in predicted time to be chosen."""
        return 1.0

    def limits(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> str | None:
        """Return why `tile` cannot run on `target`, resources aside, None if it can."""
        return None

    def is_staged(self, spec: ConvTransposeSpec, form: Form) -> bool:
        """Whether inputs are staged through registers on their way to shared memory."""
        return False

    def folds_batch(self, problem: Problem, form: Form, tile: Tile) -> bool:
        """Whether images share tiles: it pays if separate tiles would waste more than an eighth."""
        padded = math.ceil(form.positions / tile.block_m) * tile.block_m
        return problem.batch > 1 and padded > MOST_PADDED * form.positions

    def tiles(self, spec: ConvTransposeSpec, problem: Problem, form: Form, tile: Tile) -> int:
        """Return the number of position tiles of all images in one phase."""
        if not self.folds_batch(problem, form, tile):
            return math.ceil(form.positions / tile.block_m) * problem.batch
        odd = form.positions % 2 and needs_even_rows(spec, form.span, fold=True)
        return math.ceil((form.positions + bool(odd)) * problem.batch / tile.block_m)

    def channel_tiles(self, spec: ConvTransposeSpec, problem: Problem, tile: Tile) -> int:
        """Return the number of output channel tiles of all groups."""
        groups = self.groups(spec)
        return math.ceil(problem.out_channels // groups / tile.block_n) * groups

    def groups(self, spec: ConvTransposeSpec) -> int:
        """Return how many groups number the programs: 1 where a program has channels of several."""
        return spec.groups

    def input_channels(self, tile: Tile) -> int:
        """Return the input channels of a step of a tile."""
        return tile.block_k

    def boxes(self, sizes: Sizes) -> Boxes | None:
        """Return the boxes that its programs load, from descriptors; None if it has addresses."""
        return None

    def gradient_refusal(self) -> str | None:
        """Return why its kernel cannot give the gradient of the input, None if it can."""
        return None

    def step_elements(self, form: Form, tile: Tile) -> int:
        """Return the number of elements loaded per step."""
        lines = form.inputs * tile.block_m + form.weights * form.columns(tile)
        return lines * form.depth(tile)
