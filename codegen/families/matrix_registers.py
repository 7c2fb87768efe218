"""Register estimates for tensor-core tiles: registers per thread, and which tiles would spill.

Stage 4, plan. Input: a spec, a `Form` of it, a `Tile` and a `GpuTarget`; output: registers per
thread. These are estimates; execution/cubin.py reads the real numbers from compiled kernels.
"""

from __future__ import annotations

from ..geometry.boxes import is_run
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.resources import WARP, accumulators_of
from ..tables.targets import GpuTarget

NUM_WARPS = (4, 8)
FRAGMENT = (16, 8)  # rows and columns of an `mma.sync` instruction
# Bounds for row-blocked tiles on targets with wgmma. 313 such tiles were compiled (Triton 3.6,
# sm_89 and sm_90; kernels 3 x 3, 3 x 7 and 5 x 5; float32 and float16) and 388 of strides 2 to 4
# (Triton 3.7); the tiles within these bounds spilled 8 bytes at most.
OTHER_ROWS = 96  # registers per thread besides the accumulators
MOST_ROW_ACCUMULATORS = 128  # per thread
MOST_ROW_BYTES = 64  # bytes of a step's depth (input channels times span)
MOST_ROW_BYTES_OF_ONE = 128  # the same if the block reads a single input row
FEW_ROW_ACCUMULATORS = 64  # accumulators per thread in float64 or with run-time extents
FEW_ROW_DOUBLES = (
    32  # float64 without wgmma: above it 32 of 40 such tiles spilled (Triton 3.7, sm_80, sm_89)
)
MOST_STAGED = 16  # staged inputs per thread (`is_staged`); above it 5 of 7 tiles spilled (sm_90)
# ptxas unrolls loops of up to this many products (steps times products per step). With 128
# accumulators per thread at 64 positions and both operands in shared memory, the unrolled loop
# spills 24 to 728 bytes (7 of 7 tiles; none of 13 with more products; Triton 3.7, sm_90). At 128
# positions one of four tiles spilled, in float32.
UNROLLED_PRODUCTS = 72
# The same if operands pass through registers (`mma.sync`). The unrolled loop spills 24 to 912 bytes
# if accumulators and operands take at least CROWDED registers and a step loads more than
# UNROLLED_INPUTS inputs, both by bytes of an element. In 16 bits only loops of more than SHORT
# steps and up to UNROLLED_SHORT_PRODUCTS products do so (6 of 6 tiles, Triton 3.6, sm_80 and
# sm_89); in wider elements 3 of 9 tiles did, and a fourth took 255 registers.
CROWDED = {2: 88, 4: 88, 8: 64}
UNROLLED_INPUTS = {2: 3, 4: 5, 8: 3}
SHORT = 8
UNROLLED_SHORT_PRODUCTS = 240
# Most input rows of a row block with spans in float64: with 8, 4 of 5 tiles spilled 600 bytes.
MOST_DOUBLE_GROUPS = 5
# Tensor memory of an SM of sm_100, in columns of accumulators of 64 rows. Triton allocates two
# buffers for each accumulator, four if a step adds to one more than LONG_CHAIN times. None of 85
# row-blocked tiles takes more. In 25 of 271 kernels that exceeded TENSOR_COLUMNS (Triton 3.6 and
# 3.7): such kernels compile but cannot be launched.
TENSOR_COLUMNS = 512
LONG_CHAIN = 3
WGMMA_ROWS = 64  # rows of a wgmma instruction; smaller tiles use `mma.sync`
# Row-blocked tiles whose operands pass through registers (`mma.sync`): registers per thread for
# each accumulator, each register of the operands' fragments, and each input row. Fitted to 263
# tiles of ten layers, float32 and float16, both layouts (Triton 3.7, sm_89): none of the 176 below
# the bound spills.
ROW_SUM = 1.22
ROW_OPERAND = 1.46
ROW_OPERAND_GROUPED = 1.04
ROW_INPUT = 7.0
ROW_STAGED = 0.25  # for each staged input element (`is_staged`)
OTHER_ROW_FRAGMENTS = 10
MARGIN_ROW_FRAGMENTS = 52
# Mean registers per thread besides accumulators and inputs: of 614 window tiles (standard deviation
# 7) and 2342 others (26) of 78 layers on sm_90 (Triton 3.6), and of 250 tiles on sm_89 (21).
EXPECTED_BOX = 26
EXPECTED = 42
EXPECTED_FRAGMENTS = 30
# Registers per thread besides its share of the tiles: addresses, masks, loop state.
OTHER_REGISTERS = 48
OTHER_GROUPED = 32
STAGE_GROUPED = 12  # for each pipeline stage beyond two
MASKED = 1.5  # for each input of a span above 1 if the last step's channels are masked
# Registers for each input that is loaded by itself; fitted to 14 tiles of `ieee` (Triton 3.6).
ELEMENT = 3
LATE_ELEMENT = 7
OPEN_ELEMENT = 13  # of run-time channels and extents: 8 inputs took 100 registers (Triton 3.9)
MOST_OPEN_STAGED = 32  # inputs of run-time extents that a thread stages; 64 spilled
# The estimate is off by about 30 registers, and a spill costs more than a smaller tile.
MARGIN = 56
MARGIN_GROUPED = 16
MARGIN_FRAGMENTS = 40  # if both operands pass through registers
# Registers per thread of the input tile: tiles with more spill around conversions.
MOST_OPERANDS = 32
# Depth of a step (channels times span): deeper ones spill around pointers of run-time strides.
DEEPEST_OPEN = 32
# Loads of a thread for an input tile of a row block, with extents left to run time: of 800 plans on
# eight GPUs those that spilled had more, or an open number of channels (Triton 3.9).
MOST_OPEN_LOADS = 8


def registers_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Return an upper estimate of registers per thread, with two pipeline stages."""
    threads = WARP * tile.num_warps
    columns, depth = form.columns(tile), form.depth(tile)
    wide = 2 if spec.dtype == "float64" else 1
    accumulators = accumulators_of(spec, form, tile)
    if form.boxed:
        shared = input_from_shared(spec, form, tile, target)
        return OTHER_REGISTERS + accumulators + (0 if shared else tile.block_m * depth // threads)
    if form.rows > 1:
        if target.multiplies_from_shared:
            return OTHER_ROWS + accumulators
        return _row_registers(spec, form, tile)
    # A product emulated by several (such as tf32x3) holds each operand in two or three parts.
    parts = 1 if spec.product is None else min(spec.product.products, 3)
    lines = tile.block_m + columns
    if form.family.grouped and form.span == 1 and from_shared(spec, tile, target):
        # Only float32 inputs pass through registers, to be rounded. Of 49 such tiles with 128
        # accumulators a thread, 41 pass this estimate and do not spill; one of all 49 did (Triton
        # 3.6).
        lines = tile.block_m if spec.dtype == "float32" else 0
    operands = lines * depth * wide * parts // threads
    # A strided output is stored element by element: every accumulator has its own address.
    strided = max(spec.stride) > 1 and not form.family.grouped
    addresses = accumulators // 2 if strided else 0
    if form.family.grouped and None in spec.spatial:  # pointers of run-time strides
        addresses += 3 * accumulators // 4
    if form.family.grouped and form.lanes > spec.stride[-1] * form.span:
        addresses += accumulators // 4  # lanes without an output are masked
    if form.span > 1:  # vector loads need fewer addresses and pack two 16-bit values a register
        narrow = 2 if spec.element.itemsize == 2 else 1
        if not _fills_steps(spec, tile):  # masked channels are zeroed by a select after the load
            operands += round(MASKED * tile.block_m * depth / threads)
        return OTHER_GROUPED + accumulators + operands // narrow
    # Channels that are not a multiple of 16 bytes are loaded one by one, each with its own address.
    if spec.layout == "channels_last" and not comes_in_vectors(spec):
        addresses += _element_registers(spec) * tile.block_m * tile.block_k // threads
    return OTHER_REGISTERS + accumulators + operands + addresses


def _element_registers(spec: ConvTransposeSpec) -> int:
    """Return the registers of an input that is loaded by itself, besides its value.

    With a run-time number of channels each input has an address and a mask. Products on CUDA cores
    take many instructions, so these registers are live for longer.
    """
    on_cores = spec.product is not None and spec.product.rate == "fp32"
    if not on_cores or spec.in_channels is not None:
        return ELEMENT
    return OPEN_ELEMENT if None in spec.spatial else LATE_ELEMENT


def _row_registers(spec: ConvTransposeSpec, form: Form, tile: Tile) -> int:
    """Estimate registers per thread of a row-blocked tile that multiplies with `mma.sync`.

    Both operands of a product are in registers; staged inputs (`is_staged`) take additional ones.
    """
    staged = form.inputs * tile.block_m * form.depth(tile) / (WARP * tile.num_warps)
    return round(
        OTHER_ROW_FRAGMENTS
        + ROW_SUM * accumulators_of(spec, form, tile)
        + (ROW_OPERAND_GROUPED if form.family.grouped else ROW_OPERAND)
        * fragments_of(spec, form, tile)
        + ROW_INPUT * form.inputs
        + (ROW_STAGED * staged if is_staged(spec, form) else 0)
    )


def expected_registers(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Return the mean estimate of registers per thread, for the occupancy.

    `registers_of` is the upper estimate that predicts spills; this returns it where no mean was
    fitted.
    """
    bound = registers_of(spec, form, tile, target)
    in_parts = spec.product is not None and spec.product.products > 1
    if in_parts or spec.dtype == "float64":
        return bound
    sums, size = accumulators_of(spec, form, tile), spec.element.itemsize
    depth = form.depth(tile)
    elements = tile.block_m * depth / (WARP * tile.num_warps)
    operands = 0.0 if input_from_shared(spec, form, tile, target) else elements * size / 4
    if form.boxed:
        return round(EXPECTED_BOX + sums + operands)
    if target.multiplies_from_shared:
        run = 16 // size if spec.layout == "channels_last" or form.relayout else form.span
        return round(EXPECTED + 0.9 * sums + 1.1 * operands + 0.7 * elements / run)
    if form.rows > 1:
        return bound
    return round(EXPECTED_FRAGMENTS + 1.1 * sums + 0.6 * fragments_of(spec, form, tile))


def fragments_of(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float:
    """Return the registers per thread that hold both operands of an `mma.sync` product."""
    columns = form.columns(tile)
    down, across = warps_of(tile.block_m, columns, tile.num_warps)
    lines = max(FRAGMENT[0], tile.block_m // down) + max(FRAGMENT[1], columns // across)
    return lines * form.depth(tile) * spec.element.itemsize / 4 / WARP


def is_staged(spec: ConvTransposeSpec, form: Form) -> bool:
    """Whether inputs are staged: loaded one by one into registers, then stored to shared memory.

    An asynchronous copy moves at least 32 bits. 16-bit inputs are loaded one by one in
    channels_first, where a tap's shift breaks the alignment of pairs, and in channels_last if the
    number of channels is odd or unknown.
    """
    if spec.element.itemsize != 2 or form.span > 1 or form.boxed:
        return False
    if spec.layout == "channels_last" or form.relayout:
        return spec.in_channels is None or spec.in_channels // spec.groups % 2 == 1
    return True


def comes_in_vectors(spec: ConvTransposeSpec) -> bool:
    """Whether a group's input channels are known to be a multiple of 16 bytes."""
    channels, vector = spec.in_channels, 16 // spec.element.itemsize
    return channels is not None and channels // spec.groups % vector == 0


def warps_of(rows: int, columns: int, num_warps: int) -> tuple[int, int]:
    """Return the numbers of warps along the rows and the columns of an `mma.sync` product.

    This mirrors Triton's `warpsPerTileV2`, which aims at an equal part of rows and columns a warp.
    """
    down, across = 1, 1
    while down * across < num_warps:
        if rows * across >= columns * down and down < rows // FRAGMENT[0]:
            down *= 2
        else:
            across *= 2
    return down, across


def from_shared(spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> bool:
    """Whether products read weights from shared memory, without a copy in registers.

    This takes wgmma (or later), a tile of at least 64 positions, and one instruction per product.
    """
    single = spec.dtype != "float64" if spec.product is None else spec.product.rounds
    return target.multiplies_from_shared and single and tile.block_m >= WGMMA_ROWS


def input_from_shared(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether products read the input from shared memory too: it is not changed after its load."""
    if form.boxed and not is_run(form.box(tile)):
        return False
    plain = spec.element.itemsize == 2 or (form.relayout and not spec.before)
    return plain and form.span == 1 and from_shared(spec, tile, target)


def most_registers(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Return the bound on `registers_of` below which `tile` is tried, whatever its stages.

    It is 0 for a tile that is known to spill, or not to work, regardless of the estimate.
    """
    parts = 1 if spec.product is None else min(spec.product.products, 3)
    depth = form.depth(tile)
    if form.family.grouped and None in spec.spatial and depth > DEEPEST_OPEN:
        return 0
    if form.family.grouped and form.span > 1 and not _lays_out(spec, target):
        return 0
    if form.boxed and not boxes_fit(spec, tile, target):
        return 0
    if target.has_tensor_memory and not _sums_fit(spec, form, tile, target):
        return 0
    if form.rows > 1 and not form.boxed:
        if not _rows_fit(spec, form, tile, target):
            return 0
        from_shared = target.multiplies_from_shared
        return target.registers_per_thread - (0 if from_shared else MARGIN_ROW_FRAGMENTS)
    elements = _inputs_each(form, tile)
    if elements * spec.element.itemsize // 4 * parts > MOST_OPERANDS:
        return 0
    if None in spec.spatial and is_staged(spec, form) and elements > MOST_OPEN_STAGED:
        return 0
    return target.registers_per_thread - _margin(form, target)


def boxes_fit(spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> bool:
    """Whether `target` multiplies boxes from shared memory, and each box is within one group.

    Tiles with fewer than 16 positions a warp would multiply with `mma.sync`, which reads registers,
    and take up to twice as many (84 tiles of seven layers, Triton 3.6, sm_90).
    """
    assert spec.in_channels is not None
    whole = spec.groups == 1 or spec.in_channels // spec.groups % tile.block_k == 0
    return whole and target.multiplies_from_shared and tile.block_m >= 16 * tile.num_warps


def _sums_fit(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether tensor memory holds the accumulators of all rows, with their buffers."""
    if form.rows == 1 or not from_shared(spec, tile, target):
        return True
    buffers = 4 if form.products > LONG_CHAIN * form.rows else 2
    columns = form.rows * form.columns(tile) * tile.block_m // WGMMA_ROWS
    return columns * buffers <= TENSOR_COLUMNS


def _lays_out(spec: ConvTransposeSpec, target: GpuTarget) -> bool:
    """Whether Triton can compile the reshape of a span above 1.

    On sm_100 it fails with 16-bit inputs: "Illegal shared layout" (Triton 3.7).
    """
    return target.arch != "sm_100" or spec.element.itemsize != 2


def _rows_fit(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether a row-blocked tile meets the bounds above, within which tiles did not spill.

    The estimate of its registers is compared with `most_registers` in addition.
    """
    if spec.product is not None and spec.product.products > 1:  # operands are split into parts
        return False
    # Eight warps at 64 positions took twice as many registers.
    if tile.num_warps > NUM_WARPS[0] and tile.block_m < FRAGMENT[0] * tile.num_warps:
        return False
    if None in spec.spatial and not _open_loads_fit(spec, form, tile, target):
        return False
    held = accumulators_of(spec, form, tile)
    # Run-time strides take registers: for every element of a tile that is not in shared memory, and
    # for those of a grouped store.
    beside = target.multiplies_from_shared and not form.family.grouped
    roomy = beside or None not in spec.spatial
    if not target.multiplies_from_shared:
        if _unrolls_fragments(spec, form, tile):
            return False
        if spec.dtype == "float64":
            grouped = form.span > 1 and form.inputs > MOST_DOUBLE_GROUPS
            return held <= FEW_ROW_DOUBLES and not grouped
        return held <= (MOST_ROW_ACCUMULATORS if roomy else FEW_ROW_ACCUMULATORS)
    one = form.inputs == 1
    if one and is_staged(spec, form) and _inputs_each(form, tile) > MOST_STAGED:
        return False
    most = MOST_ROW_BYTES_OF_ONE if one else MOST_ROW_BYTES
    if form.depth(tile) * spec.element.itemsize > most:
        return False
    if tile.block_m < WGMMA_ROWS:  # slower in 18 of 18 measurements
        return False
    crowded = held >= MOST_ROW_ACCUMULATORS and not one and target.is_hopper
    crowded = crowded and (tile.block_m == WGMMA_ROWS or spec.dtype == "float32")
    if crowded and input_from_shared(spec, form, tile, target):
        steps = _steps(spec, form, tile)
        if steps is not None and steps * form.products <= UNROLLED_PRODUCTS:
            return False
    # Each output of a strided layer has its own address.
    apart = spec.stride[-1] > 1 and not (form.family.grouped or form.boxed)
    roomy = roomy and spec.dtype != "float64" and not apart
    return held <= (MOST_ROW_ACCUMULATORS if roomy else FEW_ROW_ACCUMULATORS)


def _inputs_each(form: Form, tile: Tile) -> int:
    """Return the number of inputs of a step that each thread has."""
    return tile.block_m * form.depth(tile) // (WARP * tile.num_warps)


def _open_loads_fit(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether a row-blocked tile has registers for the addresses of its loads in open extents."""
    if spec.in_channels is None and not target.multiplies_from_shared:
        return False
    together = spec.layout == "channels_last" or form.relayout
    wide = 16 // spec.element.itemsize if together and comes_in_vectors(spec) else 1
    return _inputs_each(form, tile) <= MOST_OPEN_LOADS * wide


def _unrolls_fragments(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether ptxas would unroll the loop over the steps and then run out of registers."""
    steps = _steps(spec, form, tile)
    if steps is None or is_staged(spec, form) or form.span > 1:
        return False
    size = spec.element.itemsize
    held = accumulators_of(spec, form, tile) + fragments_of(spec, form, tile)
    if held < CROWDED[size] or form.inputs <= UNROLLED_INPUTS[size]:
        return False
    if size == 2:
        return steps > SHORT and steps * form.products <= UNROLLED_SHORT_PRODUCTS
    return steps * form.products <= UNROLLED_PRODUCTS


def _steps(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float | None:
    """Return the steps of the loop, averaged over phases; None if channels are run-time sizes."""
    if spec.in_channels is None:
        return None
    return form.taps * -(-spec.in_channels // spec.groups // tile.block_k)


def _fills_steps(spec: ConvTransposeSpec, tile: Tile) -> bool:
    """Whether BLOCK_K divides the input channels of a group (or they are unknown).

    If so, no step has masked channels.
    """
    return spec.in_channels is None or spec.in_channels // spec.groups % tile.block_k == 0


def _margin(form: Form, target: GpuTarget) -> int:
    if form.span == 1:
        return MARGIN
    return MARGIN_GROUPED if target.multiplies_from_shared else MARGIN_FRAGMENTS
