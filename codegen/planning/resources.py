"""What a tile takes of an SM: registers and shared memory, and so its occupancy.

Stage 4, part of plan. Input: a spec, a `Form` of it and a `Tile`; output: numbers that fit or do
not fit a `GpuTarget`. They are estimates; the compiler has the last word (cubin.py).
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
    """Estimate what `tile` takes of an SM.

    Registers are those of its accumulators, of its part of a step's tiles, and others. Shared
    memory is that of the pipeline's buffers, or of the output's way to its layout: Triton keeps
    num_stages - 1 steps in flight; what products read from there has one buffer more. Of 2956 tiles
    that were compiled for sm_90 (Triton 3.6) nine in ten take what this says.
    """
    return form.family.demand(spec, form, tile, target).use(tile.num_stages)


def check_limits(form: Form, spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> None:
    """Raise SpecError for a tile that no estimate can save: of a file of choices."""
    if (reason := form.family.limits(spec, form, tile, target)) is not None:
        raise SpecError(
            f"{tile} of family {tile.family} cannot run on {target.name}: {reason}", "choices"
        )
    shared = use_of(spec, form, tile, target).shared
    held = accumulators_of(spec, form, tile)
    if shared > target.shared_per_block or held > target.registers_per_thread:
        raise SpecError(
            f"{tile} cannot run on {target.name}: {shared} bytes of shared memory of "
            f"{target.shared_per_block}, {held} accumulators a thread",
            "choices",
        )


def occupancy(tile: Tile, target: GpuTarget, use: Use) -> int:
    """Return programs resident on an SM: what threads, registers and shared memory allow."""
    return max(1, resident(target, tile.num_warps, use.expected, use.shared))


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


def accumulators_of(spec: ConvTransposeSpec, form: Form, tile: Tile) -> int:
    """Return registers of a thread's accumulators."""
    wide = 2 if spec.dtype == "float64" else 1
    return form.rows * tile.block_m * form.columns(tile) * wide // (WARP * tile.num_warps)
