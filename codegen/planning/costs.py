"""What a tile costs: the model that ranks candidates, for any target.

Stage 4, part of plan. Input: a spec, a `Form` of it, a `Tile` and a `GpuTarget`; output: a `Cost`.
A program's work is its products at the target's rate plus what issuing its loads and stores costs
an SM; an SM shares itself among its programs, which come in whole waves. Beside that runs what
moves through L2 and from and to memory: the longest of the three is what a call takes.

The costs are fitted to 3026 timings on an NVIDIA H200 (torch 2.11, Triton 3.6, 2026-11-29): layers
of KernelBench and of real networks, 78 with their dtypes (float32, float16, bfloat16) and layouts,
15 to 50 tiles of each, in every form. On them its first choice takes 1.06 times the best tile that
was tried for a layer (geometric mean; the worst 1.39); on layers that a fit had not seen, 1.10
times. On other cards the rates are the target's and the costs stay: a prediction that orders tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..geometry.boxes import is_run, tiles_of
from ..geometry.problem import Problem
from ..geometry.tile import SINGLE, Tile
from ..language.spec import ConvTransposeSpec
from ..symbolic.sizes import needs_even_rows
from ..tables.targets import GpuTarget
from .forms import Form
from .input_copy import copied_bytes
from .plan import Cost
from .registers import WGMMA_ROWS, comes_in_vectors, is_staged
from .resources import occupancy, use_of

# Nanoseconds of an SM for each element of the inputs that a step loads: by bytes of an element; in
# channels_first by inputs loaded as one, too (a tap's shift breaks the alignment of longer runs).
LOAD_POSITIONS = {
    8: {1: 0.16, 2: 0.14, 4: 0.05},
    4: {1: 0.088, 2: 0.068, 4: 0.022},
    2: {1: 0.051, 2: 0.04, 4: 0.034},
}
# Times that, of pairs in rows of odd extent: every other row begins within one. From two layers in
# float32 and float16, 136 tiles, on the same card; fours are no slower there.
ODD_PAIRS = {8: 1.0, 4: 2.2, 2: 1.6}
LOAD_CHANNELS = {8: 0.08, 4: 0.045, 2: 0.014}
LOAD_COPY = {4: 0.025, 2: 0.0071}  # of a copy in channels_last (relayout.py)
LOAD_BOX = {4: 0.021, 2: 0.0032}  # boxes (window.py); those of float32 are rounded in registers
APART = 4.0  # times that, where channels do not come in 16 bytes
TURNED = 1.9  # times that, where a box is no run: Triton lays it out in registers
# Of a byte of the weights that a step loads; the same of boxes. Of each box, for its barriers.
LOAD_WEIGHT = 0.0025
LOAD_BOX_WEIGHT = 0.0047
BOX = 26.0
# Of an element of the outputs: each by itself along a row, along the channels (by bytes of an
# element), from boxes, of groups of a row.
STORE = 0.027
STORE_CHANNELS = {8: 0.3, 4: 0.15, 2: 0.058}
STORE_BOX = 0.016
STORE_GROUPS = {8: 0.16, 4: 0.066, 2: 0.051}
# Strided stores fill a line in several programs; more channels a tile, more lines in flight.
STORE_STRIDED = 0.3  # of STRIDED_N channels a tile
STRIDED_N = 16
STORE_STRIDED_GROWTH = 0.41  # exponent of BLOCK_N / STRIDED_N
# The depthwise families' loads, and their multiplications without matrix units: a guess, from 128
# lanes an SM and clock, unfitted.
DIRECT_LOAD = 0.05
DIRECT_PRODUCT = 0.01
DIRECT_STORE = {8: 0.188, 4: 0.094, 2: 0.061}
STENCIL_LOADS = 3  # of a group: a vector, and the inputs beside it; a guess as well
# Nanoseconds that one program alone cannot overlap: from launch to last store, and a step.
LATENCY = 3000.0
STEP_LATENCY = 290.0
LAUNCH = 860.0  # of a kernel, whatever it does
LAUNCH_COPY = 1800.0  # of the copy before it
# Nanoseconds of an SM for a step whatever its size: barriers, addresses, the loop.
STEP = 81.0
# Eight warps split a tile that four would hold: each reuses its operands less.
SPLIT = 1.2
# Blocks of rows of single inputs take longer than the rest of the model has it where products read
# shared memory; those of groups do not.
UNROLLED = 1.1
# Parts of the peak rate of the matrix units. On Hopper the rest of a step is added to the products;
# tiles of few positions take the older instructions there, which A100 has alone (a guess).
SUSTAINED = 1.0
SUSTAINED_OLD = {9: 0.34, 10: 0.34, 8: 0.75}
# GeForce and L40S (sm_86, sm_89, sm_120): their matrix units take twice the cycles an instruction,
# in which a warp issues the next loads; a saturated RTX 4060 reaches 0.957 of its peak (triton
# issue 10851). Of products and loads that overlap the longer time is felt, and part of the other.
SUSTAINED_SLOW = 0.95
OVERLAP = 4  # exponent of the sum of both
# Nanoseconds of an SM that a step leaves open where loads have no buffer ahead: with a single
# buffer, whoever multiplies from registers; and where inputs pass through registers. Fitted on
# Hopper. For the others from the brief's layer on an RTX 4090, two programs an SM, simulated: with
# a single buffer the matrix units are busy for 75 to 90 % of the time, with two for 95 to 100 %.
OPEN_HOPPER = 190.0
STAGED_HOPPER = 41.0
OPEN = 600.0
# Memory: the part of its bandwidth that a copy reaches; of the bytes that programs ask for, what
# L2 is asked for, the rest being found in L1; the exponent of the sum of what runs at once.
DRAM_REACHED = 0.9
L2_PART = 0.5
BESIDE = 8


def rate(spec: ConvTransposeSpec, target: GpuTarget) -> float:
    """Return FLOP/s of the units the spec's products run on, per product asked for."""
    if spec.product is not None:
        return float(getattr(target, f"tflops_{spec.product.rate}")) * 1e12 / spec.product.products
    return float(getattr(target, f"tflops_{spec.element.rate}")) * 1e12


def folds_batch(problem: Problem, form: Form, tile: Tile) -> bool:
    """Whether images share a tile: flattening pays where a tile an image wastes an eighth."""
    padded = math.ceil(form.positions / tile.block_m) * tile.block_m
    return not tile.boxed and problem.batch > 1 and padded > 1.125 * form.positions


@dataclass(frozen=True, slots=True)
class Least:
    """What a layer takes at least, whatever the tile; as in `Cost`."""

    flops: int
    dram_bytes: int
    roofline_ms: float
    bound: str


def least_of(spec: ConvTransposeSpec, problem: Problem, target: GpuTarget) -> Least:
    """Return what `spec` takes at least on `target`."""
    flops, dram_bytes = layer_flops(spec, problem), layer_bytes(spec, problem)
    compute = 1e3 * flops / rate(spec, target)
    memory = 1e3 * dram_bytes / (target.dram_gbps * 1e9)
    return Least(flops, dram_bytes, *max((compute, "compute"), (memory, "memory")))


def cost_of(
    spec: ConvTransposeSpec,
    problem: Problem,
    form: Form,
    tile: Tile,
    target: GpuTarget,
    least: Least,
) -> Cost:
    """Return the cost of `tile` on `target`."""
    work = work_of(spec, problem, form, tile, target)
    occupied = occupancy(tile, target, use_of(spec, form, tile, target))
    return cost_of_work(work, tile.num_stages, occupied, target, least)


@dataclass(frozen=True, slots=True)
class Work:
    """What a tile has to do, in whatever stages, however many of its programs an SM holds.

    Attributes:
        programs: programs launched.
        steps: steps of each, on average.
        ns: what one costs an SM, in nanoseconds.
        staged: its inputs pass through registers, and no load of one is in flight over a step.
        l2_bytes: what the programs, and a copy of the input, read and write.
        copied: of these, the copy's.
    """

    programs: int
    steps: float
    ns: float
    staged: bool
    l2_bytes: int
    copied: int


def work_of(
    spec: ConvTransposeSpec, problem: Problem, form: Form, tile: Tile, target: GpuTarget
) -> Work:
    """Return what `tile` has to do on `target`."""
    size = spec.element.itemsize
    group_in, group_out = problem.in_channels // spec.groups, problem.out_channels // spec.groups
    if tile.boxed:
        tiles = tiles_of(form.extents, form.box(tile))
    elif folds_batch(problem, form, tile):
        odd = form.positions % 2 and needs_even_rows(spec, form.span, fold=True)
        tiles = math.ceil((form.positions + bool(odd)) * problem.batch / tile.block_m)
    else:
        tiles = math.ceil(form.positions / tile.block_m) * problem.batch
    if tile.depthwise:
        channel_tiles = math.ceil(problem.out_channels / tile.block_n)
    else:
        channel_tiles = math.ceil(group_out / tile.block_n) * spec.groups
    programs = tiles * channel_tiles * form.phases
    steps = form.taps * math.ceil(group_in / tile.block_k)
    step_bytes = form.step_elements(tile) * size
    if tile.depthwise:
        step_bytes = (tile.block_m * form.span + form.lanes) * tile.block_n * size
    store_bytes = form.rows * tile.block_m * form.columns(tile) * size
    l2_bytes = int(programs * (steps * step_bytes + store_bytes))

    ns = _program_ns(spec, form, tile, target, steps)
    ns *= SPLIT if tile.num_warps > 4 else 1.0
    single = form.rows > 1 and form.span == 1 and spec.stride[-2] == 1 and not tile.boxed
    if single and target.multiplies_from_shared:
        ns *= UNROLLED
    copied = 2 * copied_bytes(spec, problem) if form.relayout else 0
    staged = not tile.depthwise and is_staged(spec, form)
    return Work(programs, steps, ns, staged, l2_bytes + copied, copied)


def cost_of_work(
    work: Work, num_stages: int, occupied: int, target: GpuTarget, least: Least
) -> Cost:
    """Return the cost of `work`, of which an SM holds `occupied` programs at once."""
    waves = work.programs / (target.sms * occupied)
    open_ns = work.steps * _open_ns(work, num_stages, target)
    wave = max(work.ns * occupied + open_ns, LATENCY + work.steps * STEP_LATENCY + work.ns)
    # Up to a few waves a partial one takes as long as a full one; later they drift apart.
    whole_waves = math.ceil(waves) if waves < 8 else waves
    model = _with_memory(whole_waves * wave * 1e-9, work, target, least)
    return Cost(
        programs=work.programs,
        occupancy=occupied,
        waves=waves,
        tail=math.ceil(waves) - waves,
        flops=least.flops,
        dram_bytes=least.dram_bytes,
        l2_bytes=work.l2_bytes,
        roofline_ms=least.roofline_ms,
        bound=least.bound,
        model_ms=model * 1e3,
    )


def least_ms_of_work(work: Work, target: GpuTarget, least: Least) -> float:
    """Return the model's time of `work` on an SM that holds whatever it takes: nobody waits."""
    return 1e3 * _with_memory(work.programs * work.ns / target.sms * 1e-9, work, target, least)


def _open_ns(work: Work, num_stages: int, target: GpuTarget) -> float:
    """Return what a step leaves open, in nanoseconds; programs of an SM fill it for each other."""
    single = num_stages == 2
    if target.multiplies_from_shared:
        return OPEN_HOPPER * single + STAGED_HOPPER * work.staged
    return OPEN if single or work.staged else 0.0


def l2_ms(asked: int, target: GpuTarget) -> float:
    """Return the milliseconds that L2 takes for what programs ask for, in bytes."""
    return 1e3 * asked * L2_PART / (target.l2_gbps * 1e9)


def _with_memory(seconds: float, work: Work, target: GpuTarget, least: Least) -> float:
    """Return how long the programs take that compute for `seconds`, and a copy before them."""
    bandwidth = target.dram_gbps * 1e9 * DRAM_REACHED
    memory = least.dram_bytes / bandwidth
    l2 = 1e-3 * l2_ms(work.l2_bytes, target)
    seconds = (seconds**BESIDE + memory**BESIDE + l2**BESIDE) ** (1 / BESIDE) + LAUNCH * 1e-9
    if work.copied:
        seconds += LAUNCH_COPY * 1e-9 + work.copied / bandwidth
    return seconds


def _program_ns(
    spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
) -> float:
    """Return what a program of so many steps costs its SM, in nanoseconds."""
    loads, store = steps * _load_ns(spec, form, tile), _store_ns(spec, form, tile)
    if tile.depthwise:
        return loads + store
    flops = 2 * form.products * tile.block_m * form.columns(tile) * form.depth(tile)
    products = steps * flops / (rate(spec, target) * 1e-9 / target.sms)
    if target.overlaps_loads:
        both = (products / SUSTAINED_SLOW) ** OVERLAP + (loads + store) ** OVERLAP
        return float(both ** (1 / OVERLAP))
    new = target.multiplies_from_shared and tile.block_m >= WGMMA_ROWS
    sustained = SUSTAINED if new else SUSTAINED_OLD[target.compute_capability[0]]
    return products / sustained + loads + store


def _load_ns(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float:
    """Return what a step costs an SM beside its products, in nanoseconds."""
    if form.family == "direct":
        return STEP + tile.block_m * tile.block_n * (DIRECT_LOAD + form.lanes * DIRECT_PRODUCT)
    if form.family == "stencil":
        return STEP + tile.block_m * (STENCIL_LOADS * DIRECT_LOAD + form.lanes * DIRECT_PRODUCT)
    depth, size = form.depth(tile), spec.element.itemsize
    inputs = form.inputs * tile.block_m * depth
    weights = form.weights * form.columns(tile) * depth * size
    if tile.boxed:
        turned = 1.0 if is_run(form.box(tile)) else TURNED
        boxes = BOX * (form.inputs + form.weights)
        return STEP + boxes + inputs * LOAD_BOX[size] * turned + weights * LOAD_BOX_WEIGHT
    if form.relayout:
        load = LOAD_COPY[size]
    elif spec.layout == "channels_last":
        load = LOAD_CHANNELS[size] * (1.0 if comes_in_vectors(spec) else APART)
    else:
        load = LOAD_POSITIONS[size][form.span]
        if form.span == 2 and _is_odd(spec.input):
            load *= ODD_PAIRS[size]
    return STEP + inputs * load + weights * LOAD_WEIGHT


def _is_odd(extents: tuple[int | None, ...] | None) -> bool:
    """Whether rows of an input have an odd extent; one of 1 leaves a pair nothing to load."""
    last = extents[-1] if extents else None
    return last is not None and last > 1 and last % 2 == 1


def _store_ns(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float:
    """Return what the store of a program costs its SM, in nanoseconds."""
    size, last = spec.element.itemsize, spec.layout == "channels_last"
    if tile.depthwise:
        store = DIRECT_STORE[size]
    elif last:
        store = STORE_BOX if tile.boxed else STORE_CHANNELS[size]
    elif form.family not in SINGLE:
        store = STORE_GROUPS[size]
    elif spec.stride[-1] > 1:
        store = STORE_STRIDED * (tile.block_n / STRIDED_N) ** STORE_STRIDED_GROWTH
    else:
        store = STORE
    return form.rows * tile.block_m * form.columns(tile) * store


def multiplied(
    spec: ConvTransposeSpec, problem: Problem, form: Form, tile: Tile, cost: Cost
) -> int:
    """Return operations that the matrix units do for `cost.flops` of the layer's, two a product."""
    steps = form.taps * math.ceil(problem.in_channels // spec.groups / tile.block_k)
    each = 2 * form.products * tile.block_m * form.columns(tile) * form.depth(tile)
    return round(cost.programs * steps * each)


def layer_flops(spec: ConvTransposeSpec, problem: Problem) -> int:
    """Return operations of the layer, two a product; each input meets every tap of its group."""
    taps = math.prod(spec.kernel_size)
    products = problem.batch * problem.inputs * taps * problem.in_channels
    return 2 * products * (problem.out_channels // spec.groups)


def layer_bytes(spec: ConvTransposeSpec, problem: Problem) -> int:
    """Return the bytes of input, weight and output, each moved once."""
    weight = math.prod(spec.kernel_size) * problem.in_channels
    elements = (
        problem.batch * problem.in_channels * problem.inputs
        + weight * (problem.out_channels // spec.groups)
        + problem.batch * problem.out_channels * problem.outputs
    )
    return elements * spec.element.itemsize
