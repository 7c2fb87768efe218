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

from ..geometry.problem import Problem
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..tables.targets import GpuTarget
from .family import Form
from .input_copy import copied_bytes
from .plan import Cost
from .resources import occupancy, use_of

# Nanoseconds that one program alone cannot overlap: from launch to last store, and a step.
LATENCY = 3000.0
STEP_LATENCY = 290.0
LAUNCH = 860.0  # of a kernel, whatever it does
LAUNCH_COPY = 1800.0  # of the copy before it
# Nanoseconds of an SM for a step whatever its size: barriers, addresses, the loop.
STEP = 81.0
# Eight warps split a tile that four would hold: each reuses its operands less.
SPLIT = 1.2
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
    family, size = form.family, spec.element.itemsize
    tiles, channel_tiles = (
        family.tiles(spec, problem, form, tile),
        family.channel_tiles(spec, problem, tile),
    )
    programs = tiles * channel_tiles * form.phases
    steps = form.taps * math.ceil(problem.in_channels // spec.groups / tile.block_k)
    step_bytes = family.step_elements(form, tile) * size
    store_bytes = form.rows * tile.block_m * form.columns(tile) * size
    l2_bytes = int(programs * (steps * step_bytes + store_bytes))

    ns = family.program_ns(spec, form, tile, target, steps)
    ns *= SPLIT if tile.num_warps > 4 else 1.0
    copied = 2 * copied_bytes(spec, problem) if form.relayout else 0
    staged = family.is_staged(spec, form)
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
