"""The kernel for large inputs, beside that for any, where sizes are left to run time.

Stage 4, part of plan. Input: the plan of a kernel for any size; output: the tile of one that reads
a copy of the input, and the number of elements from which on it is the faster one. A copy gains
most where extents are unknown, as their loads need masks and are not aligned; but it is one launch
more, which a small input does not pay for.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry.problem import problem_of
from ..geometry.tile import Tile
from .candidates import WORTH_UNMEASURED, best_copied
from .plan import KernelPlan

# Factor of predicted time that makes one more kernel worth its lines, on Hopper; elsewhere the
# model of copies was not fitted, and WORTH_UNMEASURED is asked for.
WORTH_LARGE = 1.1
# Milliseconds that the copy's launch takes the host (H200, torch 2.11, Triton 3.6, 2026-11-30).
LAUNCH_MS = 0.007


@dataclass(frozen=True, slots=True)
class Large:
    """A tile with an input copy, and the elements of an input from which on it is faster."""

    tile: Tile
    least: int


def large_of(plan: KernelPlan) -> Large | None:
    """Return what computes large inputs faster than `plan` does; None if that computes all.

    Measured and tuned tiles are not competed with. The kernel for large inputs has to save the
    host's time of a launch on the GPU, in case the call waits for the host; predicted times grow
    with the elements. `least` is a power of two.
    """
    spec, target = plan.spec, plan.target
    if None not in spec.spatial or plan.tile.relayout or plan.tuned or plan.measured is not None:
        return None
    best = best_copied(spec, plan.phases, target, plan.families)
    if best is None:
        return None
    slow, fast = plan.cost.model_ms, best.cost.model_ms
    if slow < fast * (WORTH_LARGE if target.is_hopper else WORTH_UNMEASURED):
        return None
    problem = problem_of(spec, plan.phases)
    elements = problem.batch * problem.in_channels * problem.inputs
    return Large(best.tile, _power_of_two(elements * LAUNCH_MS / (slow - fast)))


def _power_of_two(least: float) -> int:
    return 1 << max(0, int(least)).bit_length()
