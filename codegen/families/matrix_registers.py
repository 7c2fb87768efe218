"""What a tile of products in matrix units takes of a thread's registers, and which would spill.

Stage 4, part of the families that multiply in matrix units (matrix.py). Input: a spec, a `Form` of
it and a `Tile`; output: numbers. They are estimates; the compiler has the last word (cubin.py).
"""

from __future__ import annotations

from ..geometry.boxes import is_run
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.resources import WARP, accumulators_of
from ..tables.targets import GpuTarget

NUM_WARPS = (4, 8)
FRAGMENT = (16, 8)  # rows and columns of an instruction of `mma.sync`
# Where products read shared memory: of 313 tiles with rows that were compiled (Triton 3.6, sm_89
# and sm_90; kernels 3 x 3, 3 x 7 and 5 x 5, float32 and float16), those within these bounds spilled
# 8 bytes at most; so did those within them of 388 of strides 2 to 4 (Triton 3.7).
OTHER_ROWS = 96
MOST_ROW_ACCUMULATORS = 128
MOST_ROW_BYTES = 64  # of a step's depth
MOST_ROW_BYTES_OF_ONE = 128  # where a block has a single input, of wgmma
FEW_ROW_ACCUMULATORS = 64  # in float64, or of open sizes
FEW_ROW_DOUBLES = (
    32  # without wgmma: above it 32 of 40 such tiles spilled (Triton 3.7, sm_80, sm_89)
)
MOST_STAGED = 16  # of a single input's elements; above it five of seven tiles spilled (sm_90)
# Products of a loop, steps times those of each, that ptxas unrolls: with 128 sums at 64 positions,
# whose operands both lie in shared memory, it then spills 24 to 728 bytes (7 of 7 tiles, Triton
# 3.7, sm_90; none of 13 with more). At 128 positions one of four tiles did, in float32.
UNROLLED_PRODUCTS = 72
# Where operands pass through registers, a loop that ptxas unrolls spills 24 to 912 bytes if its
# sums and operands are as many registers as these, and its inputs more: in 16 bits one of more than
# SHORT steps (6 of 6 tiles, Triton 3.6, sm_80 and sm_89), whose products may be more; in wider
# elements 3 of 9, another having 255 registers.
CROWDED = {2: 88, 4: 88, 8: 64}  # by bytes of an element
UNROLLED_INPUTS = {2: 3, 4: 5, 8: 3}
SHORT = 8
UNROLLED_SHORT_PRODUCTS = 240  # of 16 bits
# The most inputs of a block of groups in float64: 4 of 5 tiles of eight spilled 600 bytes.
MOST_DOUBLE_GROUPS = 5
# Tensor memory of an SM of sm_100: columns of sums of 64 rows, two for each, four where a step adds
# to one more often than LONG_CHAIN. None of 85 tiles with rows takes more, in 25 kernels of 271 it
# was more than there is (Triton 3.6 and 3.7): those compile, and cannot be launched.
TENSOR_COLUMNS = 512
LONG_CHAIN = 3
WGMMA_ROWS = 64  # of an instruction; smaller tiles take the older ones
# Where operands pass through registers: registers of a thread for each of what it holds of its
# sums, of the operands of a product, and for each input of a block. Fitted to 263 tiles of ten
# layers, float32 and float16, both layouts (Triton 3.7, sm_89): none of 176 below the bound spills.
ROW_SUM = 1.22
ROW_OPERAND = 1.46
ROW_OPERAND_GROUPED = 1.04
ROW_INPUT = 7.0
ROW_STAGED = 0.25  # each element that is no asynchronous copy and passes through a register
OTHER_ROW_FRAGMENTS = 10
MARGIN_ROW_FRAGMENTS = 52
# Registers of a thread on average, beside its sums and what it holds of the inputs: of 614 tiles of
# boxes (deviation 7) and 2342 others (26) of 78 layers on sm_90 (Triton 3.6), of 250 on sm_89 (21).
EXPECTED_BOX = 26
EXPECTED = 42
EXPECTED_FRAGMENTS = 30
# Registers a thread needs beside its share of the tiles: addresses, masks, loop state.
OTHER_REGISTERS = 48
OTHER_GROUPED = 32
STAGE_GROUPED = 12  # each stage beyond two
MASKED = 1.5  # of an element of a group, where a step may have more channels than are left
# Registers of an input that is loaded by itself; fitted to 14 tiles of `ieee` (Triton 3.6).
ELEMENT = 3
LATE_ELEMENT = 7
# The estimate is off by 30 registers or so, and a spill costs more than a smaller tile.
MARGIN = 56
MARGIN_GROUPED = 16
MARGIN_FRAGMENTS = 40  # where both operands pass through registers
# Registers of a thread's part of the input tile: more than this spills around conversions.
MOST_OPERANDS = 32
# Deeper steps spill around pointers of run-time strides.
DEEPEST_OPEN = 32


def registers_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Estimate registers a thread, with two stages."""
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
    # Products of several terms hold each operand in two or three parts.
    parts = 1 if spec.product is None else min(spec.product.products, 3)
    lines = tile.block_m + columns
    if form.family.grouped and form.span == 1 and from_shared(spec, tile, target):
        # Only float32 inputs pass through registers, to be rounded. Of 49 such tiles of 128
        # accumulators one spilled, none of the 41 that this lets fit (Triton 3.6).
        lines = tile.block_m if spec.dtype == "float32" else 0
    operands = lines * depth * wide * parts // threads
    # A strided output is stored element by element: every accumulator has its own address.
    strided = max(spec.stride) > 1 and not form.family.grouped
    addresses = accumulators // 2 if strided else 0
    if form.family.grouped and None in spec.spatial:  # pointers of run-time strides
        addresses += 3 * accumulators // 4
    if form.family.grouped and form.lanes > spec.stride[-1] * form.span:
        addresses += accumulators // 4  # lanes without an output are masked
    if form.span > 1:  # loads of whole groups: fewer addresses, two halves in a register
        narrow = 2 if spec.element.itemsize == 2 else 1
        if not _fills_steps(spec, tile):  # what a mask leaves out is chosen once it is loaded
            operands += round(MASKED * tile.block_m * depth / threads)
        return OTHER_GROUPED + accumulators + operands // narrow
    # Channels that do not come in 16 bytes are loaded element by element, each with its address.
    if spec.layout == "channels_last" and not comes_in_vectors(spec):
        addresses += _element_registers(spec) * tile.block_m * tile.block_k // threads
    return OTHER_REGISTERS + accumulators + operands + addresses


def _element_registers(spec: ConvTransposeSpec) -> int:
    """Return registers of an input that is loaded by itself, beside its value.

    With channels of run time those are an address and a mask of each, which the products of
    CUDA cores, many instructions each, keep for longer.
    """
    on_cores = spec.product is not None and spec.product.rate == "fp32"
    return LATE_ELEMENT if on_cores and spec.in_channels is None else ELEMENT


def _row_registers(spec: ConvTransposeSpec, form: Form, tile: Tile) -> int:
    """Estimate registers a thread of a tile of several rows whose operands pass through them.

    Those of `mma.sync` hold both operands of a product; inputs that are staged (`is_staged`) have
    registers of their own.
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
    """Return the registers a thread that a tile takes on average, where that was fitted.

    It tells how many programs an SM holds; `registers_of`, which is more, what may spill.
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
    """Return registers of a thread's part of both operands of a product of `mma.sync`."""
    columns = form.columns(tile)
    down, across = warps_of(tile.block_m, columns, tile.num_warps)
    lines = max(FRAGMENT[0], tile.block_m // down) + max(FRAGMENT[1], columns // across)
    return lines * form.depth(tile) * spec.element.itemsize / 4 / WARP


def is_staged(spec: ConvTransposeSpec, form: Form) -> bool:
    """Whether inputs pass through registers on their way to shared memory, each by itself.

    An asynchronous copy has 32 bits at least; an element of 16 that a tap shifts is by itself, and
    so are channels in odd numbers.
    """
    if spec.element.itemsize != 2 or form.span > 1 or form.boxed:
        return False
    if spec.layout == "channels_last" or form.relayout:
        return spec.in_channels is None or spec.in_channels // spec.groups % 2 == 1
    return True


def comes_in_vectors(spec: ConvTransposeSpec) -> bool:
    """Whether the input channels of a group come in 16 bytes, for all that is known."""
    channels, vector = spec.in_channels, 16 // spec.element.itemsize
    return channels is not None and channels // spec.groups % vector == 0


def warps_of(rows: int, columns: int, num_warps: int) -> tuple[int, int]:
    """Return how many warps share the rows and the columns of a product of `mma.sync`.

    As Triton has it (`warpsPerTileV2`): towards squares of instructions of 16 x 16.
    """
    down, across = 1, 1
    while down * across < num_warps:
        if rows * across >= columns * down and down < rows // FRAGMENT[0]:
            down *= 2
        else:
            across *= 2
    return down, across


def from_shared(spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> bool:
    """Whether products read weights from shared memory: single ones, of 64 positions at least."""
    single = spec.dtype != "float64" if spec.product is None else spec.product.rounds
    return target.multiplies_from_shared and single and tile.block_m >= WGMMA_ROWS


def input_from_shared(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether products read the input from shared memory too: nothing happens to it on the way."""
    if form.boxed and not is_run(form.box(tile)):
        return False
    plain = spec.element.itemsize == 2 or (form.relayout and not spec.before)
    return plain and form.span == 1 and from_shared(spec, tile, target)


def most_registers(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> int:
    """Return how many registers a thread may be estimated to take, of `tile` in whatever stages.

    It is 0 for a tile that spills, or does not work, whatever the estimate.
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
    held = tile.block_m * depth * spec.element.itemsize // (4 * WARP * tile.num_warps)
    if held * parts > MOST_OPERANDS:
        return 0
    return target.registers_per_thread - _margin(form, target)


def boxes_fit(spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> bool:
    """Whether a target multiplies boxes as they lie, and those of a tile have one group's channels.

    Smaller tiles take the older instructions, which read registers; those with fewer than 16
    positions a warp take up to twice the registers (84 tiles of seven layers, Triton 3.6, sm_90).
    """
    assert spec.in_channels is not None
    whole = spec.groups == 1 or spec.in_channels // spec.groups % tile.block_k == 0
    return whole and target.multiplies_from_shared and tile.block_m >= 16 * tile.num_warps


def _sums_fit(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether tensor memory holds the sums of several rows, which lie there with their buffers."""
    if form.rows == 1 or not from_shared(spec, tile, target):
        return True
    buffers = 4 if form.products > LONG_CHAIN * form.rows else 2
    columns = form.rows * form.columns(tile) * tile.block_m // WGMMA_ROWS
    return columns * buffers <= TENSOR_COLUMNS


def _lays_out(spec: ConvTransposeSpec, target: GpuTarget) -> bool:
    """Whether Triton can lay out groups of inputs for a product.

    For sm_100 it fails on those of 16 bits: "Illegal shared layout" (3.7).
    """
    return target.arch != "sm_100" or spec.element.itemsize != 2


def _rows_fit(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> bool:
    """Whether a tile of several rows is of those that do not spill, but for their registers."""
    if spec.product is not None and spec.product.products > 1:  # operands in parts
        return False
    # Eight warps at 64 positions took twice the registers.
    if tile.num_warps > NUM_WARPS[0] and tile.block_m < FRAGMENT[0] * tile.num_warps:
        return False
    held, roomy = accumulators_of(spec, form, tile), None not in spec.spatial
    if not target.multiplies_from_shared:
        if _unrolls_fragments(spec, form, tile):
            return False
        if spec.dtype == "float64":
            grouped = form.span > 1 and form.inputs > MOST_DOUBLE_GROUPS
            return held <= FEW_ROW_DOUBLES and not grouped
        return held <= (MOST_ROW_ACCUMULATORS if roomy else FEW_ROW_ACCUMULATORS)
    one = form.inputs == 1
    staged = tile.block_m * form.depth(tile) // (WARP * tile.num_warps)
    if one and is_staged(spec, form) and staged > MOST_STAGED:
        return False
    most = MOST_ROW_BYTES_OF_ONE if one else MOST_ROW_BYTES
    if form.depth(tile) * spec.element.itemsize > most:
        return False
    if tile.block_m < WGMMA_ROWS:  # slower, 18 times of 18
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


def _unrolls_fragments(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether ptxas unrolls the loop over the steps, and their loads leave it no registers."""
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
    """Return steps of the loop, on average over the phases; None if run time knows."""
    if spec.in_channels is None:
        return None
    return form.taps * -(-spec.in_channels // spec.groups // tile.block_k)


def _fills_steps(spec: ConvTransposeSpec, tile: Tile) -> bool:
    """Whether the input channels of a group come in whole steps, so that none is masked."""
    return spec.in_channels is None or spec.in_channels // spec.groups % tile.block_k == 0


def _margin(form: Form, target: GpuTarget) -> int:
    if form.span == 1:
        return MARGIN
    return MARGIN_GROUPED if target.multiplies_from_shared else MARGIN_FRAGMENTS
