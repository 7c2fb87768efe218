"""The ladder of a file for open sizes: kernels for small and for large inputs beside that for any.

Stage 4, part of plan. Input: the plan of a kernel for any size; output: the tiles of the others,
with the numbers of elements up to and from which on they are faster. A large input gains from a
copy that the kernel reads: where extents are unknown, loads of the input itself need masks and are
not aligned. A small one gains from small tiles, of which there are enough for every SM, and whose
positions several images share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry.problem import SMALL_INPUTS, Problem, one_image, problem_of
from ..geometry.row_blocks import ROWS
from ..geometry.tile import Tile
from .candidates import WORTH_UNMEASURED, best_of
from .costs import cost_of, least_of
from .forms import form_of, forms
from .plan import GRID_LIMITS, KernelPlan

# Factor of predicted time that makes one more kernel worth its lines. The model of copies was
# fitted on Hopper alone: elsewhere WORTH_UNMEASURED is asked for.
WORTH_LARGE = 1.1
WORTH_SMALL = 1.25
# Milliseconds that the host takes for the copy's launch, and for an eager call with packing (H200,
# torch 2.11, Triton 3.6, 2026-11-30).
LAUNCH_MS = 0.007
CALL_MS = 0.03
# Small and other tiles are compared for 2**power inputs per channel.
POWERS = range(8, 15)
MOST_OFFSET = 2**31 - 2**16  # as checked for other kernels (host_sizes.py)


@dataclass(frozen=True, slots=True)
class Large:
    """A tile with an input copy, and the elements of an input from which on it is faster."""

    tile: Tile
    least: int


@dataclass(frozen=True, slots=True)
class Small:
    """A tile for few positions, and the elements of an input up to which it is faster."""

    tile: Tile
    most: int


def large_of(plan: KernelPlan) -> Large | None:
    """Return what computes large inputs faster than `plan` does; None if that computes all.

    Measured and tuned tiles are not competed with. The kernel for large inputs has to save the
    host's time of a launch on the GPU, in case the call waits for the host; predicted times grow
    with the elements. `least` is a power of two.
    """
    spec, target = plan.spec, plan.target
    if _is_alone(plan) or plan.tile.relayout:
        return None
    problem = plan.problem
    served = forms(spec, plan.phases, problem, plan.families)
    best = best_of(spec, problem, target, (form for form in served if form.relayout))
    if best is None:
        return None
    slow, fast = plan.cost.model_ms, best.cost.model_ms
    if slow < fast * (WORTH_LARGE if target.is_hopper else WORTH_UNMEASURED):
        return None
    elements = problem.batch * problem.in_channels * problem.inputs
    return Large(best.tile, 1 << math.ceil(math.log2(elements * LAUNCH_MS / (slow - fast))))


def small_of(plan: KernelPlan) -> Small | None:
    """Return what computes small inputs faster than `plan` does; None if that computes all.

    Measured and tuned tiles are not competed with, and every size but the channels has to be open.
    One image of each number of positions is compared, which suits tiles for large images most.
    Where `plan` is faster than the host, no call would gain.
    """
    spec = plan.spec
    open_sizes = spec.batch, *spec.spatial
    if _is_alone(plan) or any(size is not None for size in open_sizes):
        return None
    if spec.in_channels is None or spec.out_channels is None:
        return None
    problem = problem_of(spec, plan.phases, SMALL_INPUTS)
    served = forms(spec, plan.phases, problem, plan.families)
    best = best_of(spec, problem, plan.target, (form for form in served if not form.relayout))
    if best is None or best.tile == plan.tile:
        return None
    taken = dict(_faster(plan, best.tile))
    positions = max(taken, default=0)
    is_worth = positions >= problem.batch * problem.inputs and max(taken.values()) >= CALL_MS
    if not is_worth or not _fits(plan, positions):
        return None
    return Small(best.tile, spec.in_channels * positions)


def _is_alone(plan: KernelPlan) -> bool:
    """Whether no kernel should be beside that of `plan`."""
    return None not in plan.spec.spatial or bool(plan.tuned) or plan.measured is not None


def _faster(plan: KernelPlan, tile: Tile) -> Iterator[tuple[int, float]]:
    """Yield the numbers of inputs per channel at which `tile` is faster than that of `plan`.

    Each is beside the milliseconds that the plan takes. The least first; it ends at the first
    number at which the gain is not worth a kernel.
    """
    for power in POWERS:
        problem = problem_of(plan.spec, plan.phases, one_image(power))
        slow, fast = _ms(plan, problem, plan.tile), _ms(plan, problem, tile)
        if slow < WORTH_SMALL * fast:
            return
        yield 2**power, slow


def _ms(plan: KernelPlan, problem: Problem, tile: Tile) -> float:
    """Return the predicted time of a tile in milliseconds."""
    form = form_of(plan.spec, plan.phases, problem, tile, plan.families)
    least = least_of(plan.spec, problem, plan.target)
    return cost_of(plan.spec, problem, form, tile, plan.target, least).model_ms


def _fits(plan: KernelPlan, positions: int) -> bool:
    """Whether a kernel can index every input of so many positions, so that no call is checked.

    Extents of 1 grow most: each axis has at most `growth` times as many outputs as inputs; the
    factor covers what is padded: rows to those of a block and to even ones, lanes of phases.
    """
    spec = plan.spec
    assert spec.in_channels is not None
    assert spec.out_channels is not None
    growth = math.prod(axis.stride * (1 + max(0, axis.extent_growth)) for axis in plan.phases)
    reach = 4 * max(ROWS) * positions * growth * max(spec.in_channels, spec.out_channels)
    return reach < MOST_OFFSET and positions <= min(GRID_LIMITS)
