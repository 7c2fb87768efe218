"""Choosing a tile: a cost model over the candidates, for any target.

Stage 4, part of plan. Input: a spec, its phases and a `GpuTarget`; output: the candidates with
their cost, best first. A program's work is its products at the target's rate plus what issuing its
loads and stores costs an SM; an SM shares itself among its programs, which come in whole waves.

The costs are fitted to 1397 timings on an NVIDIA H100 80GB HBM3 (torch 2.11, Triton 3.6,
2026-11-23): 29 layers, channels_first, float32 and float16, both families, its own code; those of
float64 and of channels_last are scaled or older. On them its first choice takes 1.11 times the best
of up to 32 tiles tried for a layer (geometric mean; the worst 2.7). On other cards the rates are
the target's and the costs stay: a prediction that orders tiles.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .boxes import tiles_of
from .forms import Form, forms
from .phases import AxisPhases
from .plan import DEPTHWISE, SINGLE, Candidate, Cost, Problem, Tile, problem_of
from .relayout import copied_bytes
from .resources import WARP, demand_of, most_registers, occupancy, use_of
from .sizes import needs_even_rows
from .spec import ConvTransposeSpec
from .targets import GpuTarget

# `tl.dot` wants 16 of each dimension at least; more than 256 rows leave no registers.
BLOCK_M = (32, 64, 128, 256)
BLOCK_N = (16, 32, 64, 128, 256)
BLOCK_K = (16, 32, 64)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4)
DIRECT_M = {"channels_first": (64, 128, 256, 512), "channels_last": (4, 8, 16, 32, 64)}
DIRECT_N = {"channels_first": (1, 2, 4, 8, 16), "channels_last": (32, 64, 128, 256)}
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
# Copies take memory, boxes another unit: they have to gain by the model, which knows them of
# Hopper, where they were measured. Copies that only round it takes for better than they are: of 18
# layers three gained a tenth by the best of up to 14 tiles, nine lost as much (NVIDIA H100, torch
# 2.11, Triton 3.6, 2026-11-28).
WORTH = 1.05
WORTH_ROUNDED = WORTH_BOX = 1.25
WORTH_UNMEASURED = 2.0
STORE = 0.084
STORE_GROUPS = {8: 0.188, 4: 0.094, 2: 0.061}
# The direct family's loads, and its multiplications without matrix units: a guess, from 128 lanes
# an SM and clock, unfitted.
DIRECT_LOAD = 0.05
DIRECT_PRODUCT = 0.01
STENCIL_LOADS = 3  # of a group: a vector, and the inputs beside it; a guess as well
# Strided stores fill a line in several programs; more channels a tile, more lines in flight.
STORE_STRIDED = 0.90
STORE_STRIDED_GROWTH = 0.51  # exponent of BLOCK_N / 16
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


@functools.lru_cache(maxsize=16)
def rank_tiles(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
) -> tuple[Candidate, ...]:
    """Return every tile that fits `target`, with its cost, best first.

    It takes longer than to print a file, and who tries tiles asks for each of them.
    """
    problem = problem_of(spec, phases)
    least = least_of(spec, problem, target)
    candidates = [
        candidate
        for form in forms(spec, phases, problem)
        for candidate in _candidates(spec, problem, form, target, least)
    ]
    return tuple(sorted(candidates, key=lambda candidate: _order(spec, candidate, target)))


def _candidates(
    spec: ConvTransposeSpec, problem: Problem, form: Form, target: GpuTarget, least: Least
) -> Iterator[Candidate]:
    """Yield the tiles of a form that fit; those that differ in stages alone share their work."""
    for blocks in _blocks_of(spec, problem, form):
        first = _tile(form, *blocks)
        most = most_registers(spec, form, first, target)
        if most == 0 or _share_a_layout(spec, form, first):
            continue
        demand, work = demand_of(spec, form, first, target), None
        for num_stages in _stages(form):
            use = demand.use(num_stages)
            if use.registers > most or use.shared > target.shared_per_block:
                continue
            work = work or _work_of(spec, problem, form, first, target)
            tile = _tile(form, *blocks, num_stages)
            yield Candidate(tile, _cost(work, occupancy(tile, target, use), target, least))


def _worth(spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> float:
    """Return how much faster than others a tile has to be by the model, to be taken."""
    if not (tile.boxed or tile.relayout):
        return 1.0
    if target.arch != "sm_90":
        return WORTH_UNMEASURED
    if tile.boxed:
        return WORTH_BOX
    return WORTH if spec.layout == "channels_first" else WORTH_ROUNDED


def _order(spec: ConvTransposeSpec, candidate: Candidate, target: GpuTarget) -> tuple[Any, ...]:
    tile = candidate.tile
    model = candidate.cost.model_ms * _worth(spec, tile, target)
    # The model's figures are no better than a percent: within that, wider vectors win over single
    # elements, the smaller tile, and the deeper pipeline.
    grain = round(math.log(model) / math.log(1.01))
    size = tile.block_m * tile.block_n
    wide = tile.span if tile.family == "stencil" else 0
    name = (-wide, tile.family, tile.span, tile.rows, tile.relayout)
    return (grain, *name, size, tile.num_warps, -tile.num_stages, tile.block_k, tile.block_m)


def _blocks_of(
    spec: ConvTransposeSpec, problem: Problem, form: Form
) -> Iterator[tuple[int, int, int, int]]:
    """Yield BLOCK_M, BLOCK_N, BLOCK_K and warps of the tiles of a form."""
    if form.family in DEPTHWISE:
        yield from _depthwise_blocks(spec, problem, form)
        return
    group_in, group_out = problem.in_channels // spec.groups, problem.out_channels // spec.groups
    most = 2 * form.positions * problem.batch
    rows = [m for m in BLOCK_M if m <= max(BLOCK_M[0], most)]
    columns = _channels(BLOCK_N, form.lanes, group_out)
    depths = _channels(BLOCK_K, form.span, group_in)
    yield from itertools.product(rows, columns, depths, NUM_WARPS)


def _depthwise_blocks(
    spec: ConvTransposeSpec, problem: Problem, form: Form
) -> Iterator[tuple[int, int, int, int]]:
    columns = DIRECT_N[spec.layout] if form.family == "direct" else (1,)
    columns = tuple(n for n in columns if n < 2 * problem.out_channels) or columns[:1]
    for block_m, block_n, num_warps in itertools.product(DIRECT_M[spec.layout], columns, NUM_WARPS):
        if block_m * block_n >= WARP * num_warps:
            yield block_m, block_n, 1, num_warps


def _channels(extents: tuple[int, ...], width: int, channels: int) -> list[int]:
    """Return the channels of blocks that have one of `extents` columns, `width` a channel."""
    blocks = [max(1, extent // width) for extent in extents if extent >= width]
    least = blocks[0]
    return [block for block in blocks if block < 2 * max(channels, least)] or [least]


def _stages(form: Form) -> tuple[int, ...]:
    """Return the stages that tiles of a form are tried with."""
    if form.family in DEPTHWISE:  # they have one step
        return NUM_STAGES[:1]
    return NUM_STAGES if form.rows == 1 else NUM_STAGES[:2]  # a step of rows is large


def _tile(
    form: Form, block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int = 2
) -> Tile:
    return Tile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        family=form.family,
        span=form.span,
        rows=form.rows,
        relayout=form.relayout,
    )


def _share_a_layout(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether the tiles of input and weight have one shape, and so one layout: the weight's.

    Its vectors run along the input channels; neighbouring threads then read far from each other
    along a row. None of them is the fastest measured of its layer.
    """
    apart = spec.layout == "channels_last" or form.relayout or form.span > 1
    return not apart and tile.block_m == tile.block_k == form.columns(tile)


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
    return _cost(_work_of(spec, problem, form, tile, target), occupied, target, least)


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


def _work_of(
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


def _cost(work: Work, occupied: int, target: GpuTarget, least: Least) -> Cost:
    """Return the cost of `work`, of which an SM holds `occupied` programs at once."""
    waves = work.programs / (target.sms * occupied)
    wave = max(work.ns * occupied, LATENCY + work.steps * STEP_LATENCY + work.ns)
    # Up to a few waves a partial one takes as long as a full one; later they drift apart.
    whole_waves = math.ceil(waves) if waves < 8 else waves
    bandwidth = target.dram_gbps * 1e9
    model = max(whole_waves * wave * 1e-9, least.dram_bytes / bandwidth)
    if work.copied:
        model += LATENCY * 1e-9 + work.copied / bandwidth
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
        store = STORE_STRIDED * (tile.block_n / BLOCK_N[0]) ** STORE_STRIDED_GROWTH
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
