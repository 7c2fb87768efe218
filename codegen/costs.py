"""What a tile costs: the model that ranks candidates, for any target.

Stage 4, part of plan. Input: a spec, a `Form` of it, a `Tile` and a `GpuTarget`; output: a `Cost`.
A program's work is its products at the target's rate plus what issuing its loads and stores costs
an SM; an SM shares itself among its programs, which come in whole waves.

The costs are fitted to 1397 timings on an NVIDIA H100 80GB HBM3 (torch 2.11, Triton 3.6,
2026-11-23): 29 layers, channels_first, float32 and float16, both families, its own code; those of
float64 and of channels_last are scaled or older. On them its first choice takes 1.11 times the best
of up to 32 tiles tried for a layer (geometric mean; the worst 2.7). On other cards the rates are
the target's and the costs stay: a prediction that orders tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .boxes import tiles_of
from .forms import Form
from .plan import SINGLE, Cost, Problem, Tile
from .relayout import copied_bytes
from .resources import occupancy, use_of
from .sizes import needs_even_rows
from .spec import ConvTransposeSpec
from .targets import GpuTarget

# Nanoseconds of an SM for each element of a tile that is loaded or stored: by bytes of an element
# and inputs that are loaded as one (a tap's shift breaks the alignment of longer runs).
LOAD_POSITIONS = {
    8: {1: 0.11, 2: 0.094, 4: 0.078},
    4: {1: 0.055, 2: 0.047, 4: 0.039},
    2: {1: 0.035, 2: 0.040, 4: 0.021},
}
LOAD_CHANNELS = 0.031
LOAD_WEIGHT = 0.0059  # of a byte
# The same of a copy in channels_last (relayout.py). Fitted to 634 tiles of 54 layers (as above, but
# 2026-11-25), 265 of them of copies: the model's first choice takes 1.06 times the best of each
# (geometric mean; the worst 1.45).
LOAD_COPY = {4: 0.020, 2: 0.012}
# Boxes (window.py): nanoseconds of each that is loaded, for its barriers, and of elements; those of
# float32 inputs are rounded in registers. Nothing else is in the way of the products. Fitted to 700
# tiles of 67 layers on an NVIDIA H200 (torch 2.11, Triton 3.6, 2026-11-28), of which the model's
# first choice takes 1.09 times the best (geometric mean; the worst 1.79).
BOX = 26.0
LOAD_BOX = {4: 0.034, 2: 0.012}
LOAD_BOX_WEIGHT = 0.013
STORE_BOX = 0.056
STORE = 0.084
STORE_GROUPS = {8: 0.188, 4: 0.094, 2: 0.061}
# The direct family's loads, and its multiplications without matrix units: a guess, from 128 lanes
# an SM and clock, unfitted.
DIRECT_LOAD = 0.05
DIRECT_PRODUCT = 0.01
STENCIL_LOADS = 3  # of a group: a vector, and the inputs beside it; a guess as well
# Strided stores fill a line in several programs; more channels a tile, more lines in flight.
STORE_STRIDED = 0.90  # of STRIDED_N channels a tile
STRIDED_N = 16
STORE_STRIDED_GROWTH = 0.51  # exponent of BLOCK_N / STRIDED_N
# Nanoseconds that one program alone cannot overlap: from launch to last store, and a step.
LATENCY = 2900.0
STEP_LATENCY = 204.0
# Nanoseconds of an SM for a step whatever its size: barriers, addresses, the loop.
STEP = 40.0
# Eight warps split a tile that four would hold: each reuses its operands less.
SPLIT = 1.11
# Blocks of rows of single inputs take longer than the rest of the model has it where products read
# shared memory; those of groups do not. Fitted to 270 tiles of nine layers of KernelBench, of which
# the model's first choice then takes 1.03 times the best (geometric mean; the worst 1.13). Blocks
# of strides 2 and 4 do not either: 1.09 times the best (the worst 1.38), of 562 tiles of 35 layers.
UNROLLED = 1.3
# Part of the peak rate that the matrix units sustain when nothing else is in the way.
SUSTAINED = 0.75


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
    occupied = occupancy(tile, target, use_of(spec, form, tile, target))
    return cost_of_work(work_of(spec, problem, form, tile, target), occupied, target, least)


@dataclass(frozen=True, slots=True)
class Work:
    """What a tile has to do, however many of its programs an SM holds.

    Attributes:
        programs: programs launched.
        steps: steps of each, on average.
        ns: what one costs an SM, in nanoseconds.
        l2_bytes: what the programs, and a copy of the input, read and write.
        copied: of these, the copy's.
    """

    programs: int
    steps: float
    ns: float
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

    ns = steps * _step_ns(spec, form, tile, target) + _store_ns(spec, form, tile)
    ns *= SPLIT if tile.num_warps > 4 else 1.0
    single = form.rows > 1 and form.span == 1 and spec.stride[-2] == 1 and not tile.boxed
    if single and target.multiplies_from_shared:
        ns *= UNROLLED
    copied = 2 * copied_bytes(spec, problem) if form.relayout else 0
    return Work(programs, steps, ns, l2_bytes + copied, copied)


def cost_of_work(work: Work, occupied: int, target: GpuTarget, least: Least) -> Cost:
    """Return the cost of `work`, of which an SM holds `occupied` programs at once."""
    waves = work.programs / (target.sms * occupied)
    wave = max(work.ns * occupied, LATENCY + work.steps * STEP_LATENCY + work.ns)
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


def _with_memory(seconds: float, work: Work, target: GpuTarget, least: Least) -> float:
    """Return how long the programs take that compute for `seconds`, and a copy before them."""
    bandwidth = target.dram_gbps * 1e9
    seconds = max(seconds, least.dram_bytes / bandwidth)
    if work.copied:
        seconds += LATENCY * 1e-9 + work.copied / bandwidth
    return seconds


def _step_ns(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> float:
    """Return what a step of a program costs its SM, in nanoseconds."""
    if form.family == "direct":
        return STEP + tile.block_m * tile.block_n * (DIRECT_LOAD + form.lanes * DIRECT_PRODUCT)
    if form.family == "stencil":
        return STEP + tile.block_m * (STENCIL_LOADS * DIRECT_LOAD + form.lanes * DIRECT_PRODUCT)
    columns, depth = form.columns(tile), form.depth(tile)
    flops = 2 * form.products * tile.block_m * columns * depth
    compute = flops / (rate(spec, target) * 1e-9 / target.sms)
    if tile.boxed:
        lines = form.inputs * tile.block_m * LOAD_BOX[spec.element.itemsize]
        lines += form.weights * columns * LOAD_BOX_WEIGHT
        return STEP + BOX * (form.inputs + form.weights) + compute + depth * lines
    if form.relayout:
        load = LOAD_COPY[spec.element.itemsize]
    elif spec.layout == "channels_last":
        load = LOAD_CHANNELS
    else:
        load = LOAD_POSITIONS[spec.element.itemsize][form.span]
    weight = LOAD_WEIGHT * spec.element.itemsize
    lines = form.inputs * tile.block_m * load + form.weights * columns * weight
    return STEP + compute / SUSTAINED + depth * lines


def _store_ns(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float:
    """Return what the store of a program costs its SM, in nanoseconds."""
    store = STORE
    if tile.boxed and spec.layout == "channels_last":
        store = STORE_BOX
    elif form.family not in SINGLE:
        store = STORE_GROUPS[spec.element.itemsize]
    elif spec.stride[-1] > 1 and spec.layout == "channels_first":
        store = STORE_STRIDED * (tile.block_n / STRIDED_N) ** STORE_STRIDED_GROWTH
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
