"""The cost model, which ranks tiles for any target.

Stage 4, part of plan. Input: a spec, one of its `Form`s, a `Tile` and a `GpuTarget`; output: a
`Cost`. The work of a program is its products at the target's rate, plus the issue cost of its loads
and stores. An SM is shared by its programs, which run in whole waves. Traffic through L2 and DRAM
overlaps with the work: a call takes about as long as the longest of the three.

The costs are fitted to 3026 timings on an NVIDIA H200 (torch 2.11, Triton 3.6, 2026-11-29): layers
of KernelBench and of real networks, 78 with their dtypes (float32, float16, bfloat16) and layouts,
15 to 50 tiles of each, in every form. On these layers the model's first choice takes 1.06 times as
long as the best tile tried (geometric mean; worst 1.39); on layers held out of the fit, 1.10 times.
For other GPUs the model uses their rates and the same costs: a prediction that ranks tiles.
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

# Nanoseconds that a lone program cannot overlap: per program, and per step.
LATENCY = 3000.0
STEP_LATENCY = 290.0
LAUNCH = 860.0  # ns per launch of a kernel
LAUNCH_COPY = 1800.0  # ns for the launch of the copy before it
# Nanoseconds of an SM per step, whatever its size: barriers, addresses, the loop.
STEP = 81.0
# Factor for eight warps on a tile: each warp reuses its operands less than with four warps.
SPLIT = 1.2
# Nanoseconds per step that an SM idles because no load is in flight: with a single buffer (two
# stages), and if inputs are staged through registers. Fitted on Hopper. The figure for other GPUs
# is from a simulation of the brief's layer on an RTX 4090, two programs per SM: with a single
# buffer the matrix units are busy for 75 to 90 % of the time, with two for 95 to 100 %.
OPEN_HOPPER = 190.0
STAGED_HOPPER = 41.0
OPEN = 600.0
# Memory: fraction of the DRAM bandwidth that a copy reaches; fraction of the requested bytes that
# L2 serves (L1 serves the rest); exponent of the p-norm that combines times that overlap.
DRAM_REACHED = 0.9
L2_PART = 0.5
BESIDE = 8


def rate(spec: ConvTransposeSpec, target: GpuTarget) -> float:
    """Return the rate of the spec's products in FLOP/s; tf32x3 has a third of tf32's."""
    if spec.product is not None:
        return float(getattr(target, f"tflops_{spec.product.rate}")) * 1e12 / spec.product.products
    return float(getattr(target, f"tflops_{spec.element.rate}")) * 1e12


@dataclass(frozen=True, slots=True)
class Least:
    """Lower bounds for a layer with any tile; fields as in `Cost`."""

    flops: int
    dram_bytes: int
    roofline_ms: float
    bound: str


def least_of(spec: ConvTransposeSpec, problem: Problem, target: GpuTarget) -> Least:
    """Return the lower bounds of `spec` on `target`."""
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
    """The work of a launch with a tile, for any number of stages and any occupancy.

    Attributes:
        programs: programs launched.
        steps: steps per program, on average.
        ns: SM time per program, in nanoseconds.
        staged: whether inputs are staged through registers, so that no load overlaps a step.
        l2_bytes: bytes that the programs, and a copy of the input, read and write.
        copied: bytes of these that the copy reads and writes.
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
    """Return the work of a launch with `tile` on `target`."""
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
    """Return the cost of `work` at an occupancy of `occupied` programs per SM."""
    waves = work.programs / (target.sms * occupied)
    open_ns = work.steps * _open_ns(work, num_stages, target)
    wave = max(work.ns * occupied + open_ns, LATENCY + work.steps * STEP_LATENCY + work.ns)
    # In the first few waves a partial one takes as long as a full one; later they drift apart.
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
    """Return the model's time in ms, assuming unlimited occupancy: a lower bound."""
    return 1e3 * _with_memory(work.programs * work.ns / target.sms * 1e-9, work, target, least)


def _open_ns(work: Work, num_stages: int, target: GpuTarget) -> float:
    """Return the idle time of a step in ns; other programs of the SM can fill it."""
    single = num_stages == 2
    if target.multiplies_from_shared:
        return OPEN_HOPPER * single + STAGED_HOPPER * work.staged
    return OPEN if single or work.staged else 0.0


def l2_ms(asked: int, target: GpuTarget) -> float:
    """Return the time in ms in which L2 serves `asked` bytes requested by programs."""
    return 1e3 * asked * L2_PART / (target.l2_gbps * 1e9)


def _with_memory(seconds: float, work: Work, target: GpuTarget, least: Least) -> float:
    """Return the time of a call in seconds, from that of its compute: memory and copy added."""
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
    """Return the FLOPs that the matrix units execute, padding and zero weights included."""
    steps = form.taps * math.ceil(problem.in_channels // spec.groups / tile.block_k)
    each = 2 * form.products * tile.block_m * form.columns(tile) * form.depth(tile)
    return round(cost.programs * steps * each)


def layer_flops(spec: ConvTransposeSpec, problem: Problem) -> int:
    """Return the FLOPs of the layer, two per product; every input meets every tap of its group."""
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
