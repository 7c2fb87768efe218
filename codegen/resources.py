"""What a tile takes of an SM: registers, shared memory, and so its occupancy.

Stage 4, part of plan. Input: a spec, a `Form` of it and a `Tile`; output: numbers that fit or do
not fit a `GpuTarget`. They are estimates; the compiler has the last word (cubin.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .boxes import is_run
from .forms import Form
from .plan import Tile
from .rows import ROWS
from .spec import ConvTransposeSpec, SpecError
from .targets import GpuTarget

WARP = 32
# Of 313 tiles with rows that were compiled (Triton 3.6, sm_89 and sm_90; kernels 3 x 3, 3 x 7 and
# 5 x 5, float32 and float16), those within these bounds spilled 8 bytes at most; so did those
# within them of 388 of strides 2 to 4 (Triton 3.7).
OTHER_ROWS = 96
MOST_ROW_ACCUMULATORS = 128
MOST_ROW_BYTES = 64  # of a step's depth
LEAST_DEPTH = 16  # of `tl.dot`
MOST_ROW_BYTES_OF_ONE = 128  # where a block has a single input, of wgmma
FEW_ROW_ACCUMULATORS = 64  # in float64, of open sizes, or where operands crowd the registers
WGMMA_ROWS = 64  # of an instruction; smaller tiles take the older ones
MOST_FRAGMENT_COLUMNS = 64  # where both operands pass through registers
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


@dataclass(frozen=True, slots=True)
class Use:
    """What a tile takes of an SM: registers a thread, bytes of shared memory a program."""

    registers: int
    shared: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What tiles take of an SM that differ in their stages alone.

    Attributes:
        registers: of a thread, with two stages.
        stage_registers: of each stage more.
        step: bytes of a step's loads in flight, of which there are one fewer than stages.
        read: bytes of the step that products read.
        barriers: bytes of the barriers of a stage.
        store: bytes of the output's way to its layout, for which the rest has made room.
    """

    registers: int
    stage_registers: int = 0
    step: int = 0
    read: int = 0
    barriers: int = 0
    store: int = 0

    def use(self, num_stages: int) -> Use:
        """Return what the tile of that many stages takes."""
        loads = (num_stages - 1) * self.step + self.read + num_stages * self.barriers
        registers = self.registers + (num_stages - 2) * self.stage_registers
        return Use(registers, max(loads, self.store))


def demand_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
    """Estimate what `tile` and those that differ from it in their stages take of an SM."""
    size, columns = spec.element.itemsize, form.columns(tile)
    if tile.depthwise:  # one step; the way from the loads' layout to the store's
        moved = spec.layout != "channels_last"  # else it stores as it loads
        store = tile.block_m * columns * size if moved else 0
        return Demand(_registers(spec, form, tile, target), store=store)
    step = form.step_elements(tile) * size
    read = 0  # where products read registers
    if _input_from_shared(spec, form, tile, target):
        read = step
    elif _from_shared(spec, target):
        read = form.weights * columns * form.depth(tile) * size
    staged = form.span > 1 and form.rows == 1 and not tile.boxed
    return Demand(
        registers=_registers(spec, form, tile, target),
        stage_registers=STAGE_GROUPED if staged else 0,
        step=step,
        read=read,
        # One of 8 bytes tells that a box has come.
        barriers=8 * (form.inputs + form.weights) if tile.boxed else 0,
        store=tile.block_m * columns * (8 if spec.dtype == "float64" else 4),
    )


def use_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Use:
    """Estimate what `tile` takes of an SM.

    Registers are those of its accumulators, of its part of a step's tiles, and others. Shared
    memory is that of the pipeline's buffers, or of the output's way to its layout: Triton keeps
    num_stages - 1 steps in flight; what products read from there has one buffer more.
    """
    return demand_of(spec, form, tile, target).use(tile.num_stages)


def _registers(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Estimate registers a thread, with two stages."""
    threads = WARP * tile.num_warps
    if tile.depthwise:  # the products of a tap beside their sums
        return OTHER_REGISTERS + 2 * tile.block_m * form.columns(tile) // threads
    columns, depth = form.columns(tile), form.depth(tile)
    wide = 2 if spec.dtype == "float64" else 1
    accumulators = _held(spec, form, tile)
    if tile.boxed:
        shared = _input_from_shared(spec, form, tile, target)
        return OTHER_REGISTERS + accumulators + (0 if shared else tile.block_m * depth // threads)
    if form.rows > 1:
        return OTHER_ROWS + accumulators
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
        return OTHER_GROUPED + accumulators + operands // narrow
    # Channels that do not come in 16 bytes are loaded element by element, each with its address.
    vector = 16 // spec.element.itemsize
    if spec.layout == "channels_last" and (spec.in_channels or 1) // spec.groups % vector:
        addresses += 3 * tile.block_m * tile.block_k // threads
    return OTHER_REGISTERS + accumulators + operands + addresses


def _from_shared(spec: ConvTransposeSpec, target: GpuTarget) -> bool:
    """Whether products read their operands from shared memory: those of a single matrix product."""
    single = spec.dtype != "float64" if spec.product is None else spec.product.rounds
    return target.multiplies_from_shared and single


def _input_from_shared(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether products read the input from shared memory too: nothing happens to it on the way."""
    if tile.boxed and not is_run(form.box(tile)):
        return False
    plain = spec.element.itemsize == 2 or (form.relayout and not spec.before)
    return plain and form.span == 1 and _from_shared(spec, target)


def most_registers(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Return how many registers a thread may be estimated to take, of `tile` in whatever stages.

    It is 0 for a tile that spills, or does not work, whatever the estimate.
    """
    parts = 1 if spec.product is None else min(spec.product.products, 3)
    depth = form.depth(tile)
    if form.family == "polyphase" and None in spec.spatial and depth > DEEPEST_OPEN:
        return 0
    if form.family == "polyphase" and form.span > 1 and not _lays_out(spec, target):
        return 0
    if tile.boxed and not _boxes_fit(spec, tile, target):
        return 0
    if form.rows > 1 and not tile.boxed:
        return target.registers_per_thread if _rows_fit(spec, form, tile, target) else 0
    held = tile.block_m * depth * spec.element.itemsize // (4 * WARP * tile.num_warps)
    if held * parts > MOST_OPERANDS:
        return 0
    return target.registers_per_thread - _margin(form, target)


def _boxes_fit(spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> bool:
    """Whether a target multiplies boxes as they lie, and those of a tile have one group's channels.

    Smaller tiles take the older instructions, which read registers; those with fewer than 16
    positions a warp take up to twice the registers (84 tiles of seven layers, Triton 3.6, sm_90).
    """
    assert spec.in_channels is not None
    whole = spec.groups == 1 or spec.in_channels // spec.groups % tile.block_k == 0
    return whole and target.multiplies_from_shared and tile.block_m >= 16 * tile.num_warps


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
        if spec.layout == "channels_last":  # 9 of 9 such tiles spill (58 tiles, Triton 3.7, sm_89)
            roomy = False
            if tile.block_m > form.columns(tile) and form.depth(tile) > LEAST_DEPTH:  # 2 of 2
                return False
    return _held(spec, form, tile) <= (MOST_ROW_ACCUMULATORS if roomy else FEW_ROW_ACCUMULATORS)


def check_limits(form: Form, spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> None:
    """Raise SpecError for a tile that no estimate can save: of a file of choices."""
    if tile.boxed and not _boxes_fit(spec, tile, target):
        raise SpecError(
            f"{tile} of family {tile.family} cannot run on {target.name}: boxes want a GPU since "
            "Hopper, channels of one group alone, and 16 positions a warp",
            "choices",
        )
    shared = use_of(spec, form, tile, target).shared
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
