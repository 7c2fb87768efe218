"""A family: one way of computing a transposed convolution, as planning sees it.

Stage 4, part of plan. Input: a spec and a `Tile`; output: the `Form` that the family gives the
layer, what its tiles take of an SM and what they cost. `families/` has one subclass for each, and
nothing else asks which one it has at hand: what differs is a method or an attribute here.
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
# Images share a tile where one each would leave more than this of it empty: an eighth.
MOST_PADDED = 1.125


@dataclass(frozen=True, slots=True)
class Use:
    """What a tile takes of an SM.

    Attributes:
        registers: of a thread, at most but for a few tiles.
        expected: of a thread, on average.
        shared: bytes of shared memory a program.
    """

    registers: int
    expected: int
    shared: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What tiles take of an SM that differ in their stages alone.

    Attributes:
        registers: of a thread at most, with two stages.
        expected: of a thread on average.
        stage_registers: of each stage more.
        step: bytes of a step's loads in flight, of which there are one fewer than stages.
        read: bytes beside them: of the step that products read, of inputs without a second buffer.
        barriers: bytes of the barriers of a stage.
        store: bytes of the output's way to its layout, for which the rest has made room.
    """

    registers: int
    expected: int
    stage_registers: int = 0
    step: int = 0
    read: int = 0
    barriers: int = 0
    store: int = 0

    def use(self, num_stages: int) -> Use:
        """Return what the tile of that many stages takes."""
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
    """What a family and a span make of a layer: the products that its programs share.

    Attributes:
        family: what computes it.
        span: inputs that a position takes together.
        rows: rows of outputs that a program has of each position.
        relayout: the input is copied first (input_copy.py).
        extents: of the images and of the positions along each axis, where tiles are boxes of them.
        lanes: columns of the product for each output channel.
        positions: positions of a phase of one image.
        phases: phases that have programs of their own.
        taps: taps of a phase that have steps of their own, on average.
        inputs, weights: input tiles and weights that a step loads.
        products: products of a step.
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
        """Return the box of images and positions that a tile is, empty where it is none."""
        if not self.boxed:
            return ()
        return box_of(self.extents, tile.block_m, self.rows > 1)

    def columns(self, tile: Tile) -> int:
        """Return columns of the product of a tile: its channels, `lanes` of each."""
        return tile.block_n * self.lanes

    def depth(self, tile: Tile) -> int:
        """Return the depth of a step of a tile: its channels, `span` inputs of each."""
        return tile.block_k * self.span


class Family(abc.ABC):
    """One way of computing a transposed convolution; two of a class are equal.

    Attributes:
        name: what choices, headers and the command line call it.
        method: what it does, in a line.
        serves: which specs, in a line.
        template: prints its kernel; the names it uses are the fields of `context_type`.
        context_type: the dataclass that `context` returns, with the fields of `KernelBody`.
        loader: finds `template`, None where convgen's own templates have it.
        products: it multiplies in matrix units, in the spec's precision; else all is done in the
            accumulator's.
        packs: its kernel reads a packed weight, else the weight as torch lays it.
        grouped: its positions are groups of a row in channels_first, not single outputs.
        unrolled: a program meets all inputs of such a group at once.
        prefers_wide: of tiles that take equally long, those of a wider span come first.
        takes_rows: a program may have a block of rows.
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
        """Return why it cannot serve `spec` at all, None if it can."""

    @abc.abstractmethod
    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield its forms of one row that serve `spec`; none where it is refused."""

    @abc.abstractmethod
    def blocks(
        self, spec: ConvTransposeSpec, problem: Problem, form: Form
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield BLOCK_M, BLOCK_N, BLOCK_K and warps of the tiles of a form that are tried."""

    @abc.abstractmethod
    def most_registers(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> int:
        """Return how many registers a thread may be estimated to take, in whatever stages.

        It is 0 for a tile that spills, or does not work, whatever the estimate.
        """

    @abc.abstractmethod
    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        """Estimate what `tile` and those that differ from it in stages alone take of an SM."""

    @abc.abstractmethod
    def program_ns(
        self,
        spec: ConvTransposeSpec,
        form: Form,
        tile: Tile,
        target: GpuTarget,
        steps: float,
    ) -> float:
        """Return what a program of so many steps costs its SM, in nanoseconds."""

    @abc.abstractmethod
    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> KernelBody:
        """Return the names of `template` for a plan; `scribe.used` then has the sizes it reads."""

    def grouping(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], span: int
    ) -> Grouping | None:
        """Return the grouping of the last axis; a group of one input and one output is none."""
        if not self.grouped or spec.layout == "channels_last":
            return None
        grouping = Grouping(phases[-1], span, self.unrolled)
        return None if grouping.width == 1 else grouping

    def stages(self, form: Form) -> tuple[int, ...]:
        """Return the stages that tiles of a form are tried with."""
        return NUM_STAGES if form.rows == 1 else NUM_STAGES[:2]  # a step of rows is large

    def worth(self, target: GpuTarget) -> float:
        """Return how much faster than others a tile has to be by the model, to be taken."""
        return 1.0

    def limits(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> str | None:
        """Return why `tile` cannot run on `target` whatever it takes of an SM, None if it can."""
        return None

    def is_staged(self, spec: ConvTransposeSpec, form: Form) -> bool:
        """Whether inputs pass through registers on their way to shared memory, each by itself."""
        return False

    def folds_batch(self, problem: Problem, form: Form, tile: Tile) -> bool:
        """Whether images share a tile: flattening pays where a tile an image wastes an eighth."""
        padded = math.ceil(form.positions / tile.block_m) * tile.block_m
        return problem.batch > 1 and padded > MOST_PADDED * form.positions

    def tiles(self, spec: ConvTransposeSpec, problem: Problem, form: Form, tile: Tile) -> int:
        """Return the tiles of positions of all images, in one phase."""
        if not self.folds_batch(problem, form, tile):
            return math.ceil(form.positions / tile.block_m) * problem.batch
        odd = form.positions % 2 and needs_even_rows(spec, form.span, fold=True)
        return math.ceil((form.positions + bool(odd)) * problem.batch / tile.block_m)

    def channel_tiles(self, spec: ConvTransposeSpec, problem: Problem, tile: Tile) -> int:
        """Return the tiles of output channels, of all groups."""
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
        """Return elements that a step of a tile loads."""
        lines = form.inputs * tile.block_m + form.weights * form.columns(tile)
        return lines * form.depth(tile)
