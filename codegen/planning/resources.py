"""Resources of a tile on an SM: registers, shared memory and occupancy.

Stage 4, part of plan. Input: a spec, one of its `Form`s, a `Tile` and a `GpuTarget`; output:
estimates. Compiling gives the true figures (execution/cubin.py).
"""

from __future__ import annotations

import math

from ..errors import SpecError
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..tables.targets import GpuTarget
from .family import Form, Use

WARP = 32


def use_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Use:
    """Estimate the registers and shared memory of `tile`.

    Registers hold accumulators, the thread's part of a step's operands, and addresses. Shared
    memory holds the pipeline's buffers or, if larger, the output while its layout is converted.
    Triton keeps num_stages - 1 steps in flight; operands that products read from shared memory have
    one buffer more. The estimate is right for nine in ten of 2956 tiles compiled for sm_90 (Triton
    3.6).
    """
    return form.family.demand(spec, form, tile, target).use(tile.num_stages)


def check_limits(form: Form, spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> None:
    """Raise SpecError if a tile from a choices file cannot run on `target` at all."""
    if (reason := form.family.limits(spec, form, tile, target)) is not None:
        raise SpecError(
            f"{tile} of family {tile.family} cannot run on {target.name}: {reason}", "choices"
        )
    shared = use_of(spec, form, tile, target).shared
    held = accumulators_of(spec, form, tile)
    if shared > target.shared_per_block or held > target.registers_per_thread:
        raise SpecError(
            f"{tile} cannot run on {target.name}: {shared} bytes of shared memory of "
            f"{target.shared_per_block}, {held} accumulators per thread",
            "choices",
        )


def occupancy(tile: Tile, target: GpuTarget, use: Use) -> int:
    """Return the estimated occupancy of a tile, in programs per SM; at least 1."""
    return max(1, resident(target, tile.num_warps, use.expected, use.shared))


def resident(target: GpuTarget, num_warps: int, registers: int, shared: int) -> int:
    """Return the occupancy, in programs per SM, that threads, registers and shared memory allow.

    Args:
        target: the GPU.
        num_warps: warps per program.
        registers: registers per thread; allocated in multiples of 8.
        shared: bytes of shared memory per program; CUDA reserves 1 KB more.
    """
    threads = WARP * num_warps
    return min(
        target.threads_per_sm // threads,
        target.blocks_per_sm,
        target.registers_per_sm // (math.ceil(registers / 8) * 8 * threads),
        target.shared_per_sm // (shared + 1024),
    )


def accumulators_of(spec: ConvTransposeSpec, form: Form, tile: Tile) -> int:
    """Return the number of accumulator registers per thread."""
    wide = 2 if spec.dtype == "float64" else 1
    return form.rows * tile.block_m * form.columns(tile) * wide // (WARP * tile.num_warps)
