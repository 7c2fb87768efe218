"""What a tile takes of an SM: registers, shared memory, and so its occupancy.

Stage 4, part of plan. Input: a spec, a `Form` of it and a `Tile`; output: numbers that fit or do
not fit a `GpuTarget`. They are estimates; the compiler has the last word (cubin.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from .direct import direct_refusal
from .grouping import Grouping
from .phases import AxisPhases
from .plan import DEPTHWISE, Problem, Tile
from .polyphase import SPANS, span_refusal
from .relayout import relayout_refusal
from .rows import RowBlock, rows_refusal
from .sizes import needs_even_rows
from .spec import ConvTransposeSpec, SpecError
from .stencil import STENCIL_SPANS, stencil_refusal, stencil_span_refusal
from .targets import GpuTarget

WARP = 32
# Of 313 tiles with rows that were compiled (Triton 3.6, sm_89 and sm_90; kernels 3 x 3, 3 x 7 and
# 5 x 5, float32 and float16), those within these bounds spilled 8 bytes at most; so did those
# within them of 388 of strides 2 to 4 (Triton 3.7).
OTHER_ROWS = 96
MOST_ROW_ACCUMULATORS = 128
MOST_ROW_BYTES = 64  # of a step's depth
MOST_ROW_BYTES_OF_ONE = 128  # where a block has a single input, of wgmma
FEW_ROW_ACCUMULATORS = 64  # in float64, of open sizes, or where operands crowd the registers
WGMMA_ROWS = 64  # of an instruction; smaller tiles take the older ones
MOST_FRAGMENT_COLUMNS = 64  # where both operands pass through registers
ROWS = (2, 3, 4)  # of a block
# Registers a thread needs beside its share of the tiles: addresses, masks, loop state.
OTHER_REGISTERS = 48
OTHER_GROUPED = 32
STAGE_GROUPED = 12  # each stage beyond two
# The estimate is off by 30 registers or so, and a spill costs more than a smaller tile.
MARGIN = 56
MARGIN_GROUPED = 16
MARGIN_FRAGMENTS = 36  # where both operands pass through registers
# Registers of a thread's part of the input tile: more than this spills around conversions.
MOST_OPERANDS = 32
# Deeper steps spill around pointers of run-time strides.
DEEPEST_OPEN = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a family and a span make of a layer: the products that its programs share.

    Attributes:
        family: a name of `FAMILIES`.
        span: inputs that a position takes together.
        rows: rows of outputs that a program has of each position.
        relayout: the input is copied to channels_last first.
        lanes: columns of the product for each output channel.
        positions: positions of a phase of one image.
        phases: phases that have programs of their own.
        taps: taps of a phase that have steps of their own, on average.
        inputs, weights: input tiles and weights that a step loads.
        products: products of a step.
    """

    family: str
    span: int
    lanes: int
    positions: int
    phases: int
    taps: float
    rows: int = 1
    relayout: bool = False
    inputs: int = 1
    weights: int = 1
    products: int = 1

    def step_elements(self, tile: Tile) -> int:
        """Return elements that a step of a tile loads."""
        lines = self.inputs * tile.block_m + self.weights * self.columns(tile)
        return lines * self.depth(tile)

    def columns(self, tile: Tile) -> int:
        """Return columns of the product of a tile: its channels, `lanes` of each."""
        return tile.block_n * self.lanes

    def depth(self, tile: Tile) -> int:
        """Return the depth of a step of a tile: its channels, `span` inputs of each."""
        return tile.block_k * self.span


def forms(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
) -> Iterator[Form]:
    """Yield every form that serves `spec`: those of one row, then those of several."""
    of_one_row = list(_forms_of_one_row(spec, phases, problem))
    if relayout_refusal(spec) is None:
        of_one_row += [
            dataclasses.replace(form, relayout=True)
            for form in of_one_row
            if form.family == ("gather" if spec.stride[-1] == 1 else "polyphase") and form.span == 1
        ]
    yield from of_one_row
    for form, rows in itertools.product(of_one_row, ROWS):
        if form.family not in DEPTHWISE and rows_refusal(spec, rows) is None:
            yield _in_blocks(form, problem, RowBlock(phases[-2], rows))


def _in_blocks(form: Form, problem: Problem, block: RowBlock) -> Form:
    """Return a form whose programs have blocks of rows, and with them all phases of that axis."""
    stride, kernel = block.axis.stride, block.axis.kernel
    blocks = -(-problem.output_extents[-2] // block.rows)
    return dataclasses.replace(
        form,
        positions=form.positions // problem.phase_extents[-2] * blocks,
        phases=form.phases // stride,
        taps=form.taps * stride / kernel,
        rows=block.rows,
        inputs=len(block.inputs),
        weights=kernel,
        products=block.products,
    )


def _forms_of_one_row(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
) -> Iterator[Form]:
    count = math.prod(axis.stride for axis in phases)
    # Taps of all phases together are the layer's taps: a phase has its share.
    kernel = math.prod(axis.kernel for axis in phases)
    gather = Form(
        family="gather",
        span=1,
        lanes=1,
        positions=math.prod(problem.phase_extents[:-1])
        * _row(spec, problem.phase_extents[-1], span=1),
        phases=count,
        taps=kernel / count,
    )
    yield gather
    last, depthwise = phases[-1], direct_refusal(spec) is None
    if spec.layout == "channels_last":
        if depthwise:
            yield dataclasses.replace(gather, family="direct")
        return
    if depthwise:
        yield _grouped(spec, "direct", Grouping(last, 1), phases, problem)
    for span in STENCIL_SPANS if stencil_refusal(spec) is None else ():
        if stencil_span_refusal(spec, span) is None:
            yield _grouped(spec, "stencil", Grouping(last, span, unrolled=True), phases, problem)
    for span in SPANS:
        if span_refusal(spec, span) is None:
            yield _grouped(spec, "polyphase", Grouping(last, span), phases, problem)


def _row(spec: ConvTransposeSpec, count: int, span: int) -> int:
    """Return the positions of a row of `count` outputs or groups, as sizes.py has them."""
    return count + count % 2 if needs_even_rows(spec, span, fold=False) else count


def _grouped(
    spec: ConvTransposeSpec,
    family: str,
    grouping: Grouping,
    phases: tuple[AxisPhases, ...],
    problem: Problem,
) -> Form:
    groups = -(-(problem.output_extents[-1] + grouping.offset) // grouping.width)
    count = math.prod(axis.stride for axis in phases[:-1])
    return Form(
        family=family,
        span=grouping.span,
        lanes=grouping.lanes,
        positions=math.prod(problem.phase_extents[:-1]) * _row(spec, groups, grouping.span),
        phases=count,
        taps=math.prod(axis.kernel for axis in phases[:-1]) / count * grouping.groups.kernel,
    )


def form_of(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem, tile: Tile
) -> Form:
    """Return the form that `tile` belongs to; raises SpecError if the spec has no such form."""
    for form in forms(spec, phases, problem):
        if _kind(form) == _kind(tile):
            return form
    copy = " of a copy" if tile.relayout else ""
    kind = f"family {tile.family}, span {tile.span} and rows {tile.rows}{copy}"
    raise SpecError(f"no kernel of {kind} serves {spec}")


def _kind(of: Form | Tile) -> tuple[str, int, int, bool]:
    return of.family, of.span, of.rows, of.relayout


def registers(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Estimate registers a thread: its accumulators, its part of a step's tiles, the rest."""
    threads = WARP * tile.num_warps
    if tile.depthwise:  # the products of a tap beside their sums
        return OTHER_REGISTERS + 2 * tile.block_m * form.columns(tile) // threads
    columns, depth = form.columns(tile), form.depth(tile)
    wide = 2 if spec.dtype == "float64" else 1
    if form.rows > 1:
        return OTHER_ROWS + _held(spec, form, tile)
    accumulators = _held(spec, form, tile)
    # Products of several terms hold each operand in two or three parts.
    parts = 1 if spec.product is None else min(spec.product.products, 3)
    lines = tile.block_m + columns
    if form.family == "polyphase" and form.span == 1 and _from_shared(spec, target):
        # Only float32 inputs pass through registers, to be rounded. Of 49 such tiles of 128
        # accumulators one spilled, none of the 41 that this lets fit (Triton 3.6).
        lines = tile.block_m if spec.dtype == "float32" else 0
    operands = lines * depth * wide * parts // threads
    # A strided output is stored element by element: every accumulator has its own address.
    strided = max(spec.stride) > 1 and form.family == "gather"
    addresses = accumulators // 2 if strided else 0
    if form.family != "gather" and None in spec.spatial:  # pointers of run-time strides
        addresses += 3 * accumulators // 4
    if form.span > 1:  # loads of whole groups: fewer addresses, two halves in a register
        narrow = 2 if spec.element.itemsize == 2 else 1
        stages = STAGE_GROUPED * (tile.num_stages - 2)
        return OTHER_GROUPED + stages + accumulators + operands // narrow
    # Channels that do not come in 16 bytes are loaded element by element, each with its address.
    vector = 16 // spec.element.itemsize
    if spec.layout == "channels_last" and (spec.in_channels or 1) // spec.groups % vector:
        addresses += 3 * tile.block_m * tile.block_k // threads
    return OTHER_REGISTERS + accumulators + operands + addresses


def _from_shared(spec: ConvTransposeSpec, target: GpuTarget) -> bool:
    """Whether products read their operands from shared memory: those of a single matrix product."""
    single = spec.dtype != "float64" if spec.product is None else spec.product.rounds
    return target.multiplies_from_shared and single


def _input_from_shared(spec: ConvTransposeSpec, form: Form, target: GpuTarget) -> bool:
    """Whether products read the input from shared memory too: nothing happens to it on the way."""
    plain = spec.element.itemsize == 2 or (form.relayout and not spec.before)
    return plain and form.span == 1 and _from_shared(spec, target)


def shared_memory(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Return bytes of shared memory: the pipeline's buffers, or the output's way to its layout.

    Triton keeps num_stages - 1 steps in flight; what products read from there has one buffer more.
    """
    size = spec.element.itemsize
    if tile.depthwise and spec.layout == "channels_last":  # it stores as it loads
        return 0
    if tile.depthwise:  # the way from the loads' layout to the store's
        return tile.block_m * form.columns(tile) * size
    columns = form.columns(tile)
    step = form.step_elements(tile) * size
    read = 0  # where products read registers
    if _input_from_shared(spec, form, target):
        read = step
    elif _from_shared(spec, target):
        read = form.weights * columns * form.depth(tile) * size
    store = tile.block_m * columns * (8 if spec.dtype == "float64" else 4)
    return max((tile.num_stages - 1) * step + read, store)


@dataclass(frozen=True, slots=True)
class Use:
    """What a tile takes of an SM: registers a thread, bytes of shared memory a program."""

    registers: int
    shared: int


def use_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Use:
    """Estimate what `tile` takes of an SM."""
    return Use(registers(spec, form, tile, target), shared_memory(spec, form, tile, target))


def fits(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, use: Use) -> bool:
    """Whether `tile`, which takes `use`, stays within the target's registers and shared memory."""
    if use.shared > target.shared_per_block:
        return False
    parts = 1 if spec.product is None else min(spec.product.products, 3)
    depth = form.depth(tile)
    held = tile.block_m * depth * spec.element.itemsize // (4 * WARP * tile.num_warps)
    if form.family == "polyphase" and None in spec.spatial and depth > DEEPEST_OPEN:
        return False
    if form.family == "polyphase" and form.span > 1 and not _lays_out(spec, target):
        return False
    if form.rows > 1:
        return _rows_fit(spec, form, tile, target)
    most = target.registers_per_thread - _margin(form, target)
    return held * parts <= MOST_OPERANDS and use.registers <= most


def _lays_out(spec: ConvTransposeSpec, target: GpuTarget) -> bool:
    """Whether Triton can lay out groups of inputs for a product.

    For sm_100 it fails on those of 16 bits: "Illegal shared layout" (3.7).
    """
    return target.arch != "sm_100" or spec.element.itemsize != 2


def _held(spec: ConvTransposeSpec, form: Form, tile: Tile) -> int:
    """Return registers of a thread's accumulators."""
    wide = 2 if spec.dtype == "float64" else 1
    return form.rows * tile.block_m * form.columns(tile) * wide // (WARP * tile.num_warps)


def _rows_fit(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether a tile of several rows is one of those that were found not to spill."""
    one = form.inputs == 1 and target.multiplies_from_shared
    most = MOST_ROW_BYTES_OF_ONE if one else MOST_ROW_BYTES
    if form.depth(tile) * spec.element.itemsize > most:
        return False
    if target.multiplies_from_shared and tile.block_m < WGMMA_ROWS:  # slower, 18 times of 18
        return False
    if spec.product is not None and spec.product.products > 1:  # operands in parts
        return False
    roomy = spec.dtype != "float64" and None not in spec.spatial
    if spec.stride[-1] > 1 and form.family == "gather":  # each output has its own address
        roomy = False
    if not target.multiplies_from_shared:
        fragments = spec.stride[-2] == 1 and form.columns(tile) <= MOST_FRAGMENT_COLUMNS
        roomy = roomy and fragments and (form.rows == ROWS[0] or form.span > 1)
    return _held(spec, form, tile) <= (MOST_ROW_ACCUMULATORS if roomy else FEW_ROW_ACCUMULATORS)


def check_limits(form: Form, spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> None:
    """Raise SpecError for a tile that no estimate can save: of a file of choices."""
    shared = shared_memory(spec, form, tile, target)
    held = _held(spec, form, tile)
    if shared > target.shared_per_block or held > target.registers_per_thread:
        raise SpecError(
            f"{tile} cannot run on {target.name}: {shared} bytes of shared memory of "
            f"{target.shared_per_block}, {held} accumulators a thread",
            "choices",
        )


def _margin(form: Form, target: GpuTarget) -> int:
    if form.span == 1:
        return MARGIN
    return MARGIN_GROUPED if target.multiplies_from_shared else MARGIN_FRAGMENTS


def occupancy(tile: Tile, target: GpuTarget, use: Use) -> int:
    """Return programs resident on an SM: what threads, registers and shared memory allow."""
    return max(1, resident(target, tile.num_warps, use.registers, use.shared))


def resident(target: GpuTarget, num_warps: int, registers: int, shared: int) -> int:
    """Return programs that an SM holds at once: what threads, registers and shared memory allow.

    Args:
        target: the GPU.
        num_warps: warps a program.
        registers: of a thread; allocated in eights.
        shared: bytes a program; CUDA keeps 1 KB more.
    """
    threads = WARP * num_warps
    return min(
        target.threads_per_sm // threads,
        target.blocks_per_sm,
        target.registers_per_sm // (math.ceil(registers / 8) * 8 * threads),
        target.shared_per_sm // (shared + 1024),
    )
