"""Choosing a tile: the candidates of a layer, and their order.

Stage 4, part of plan. Input: a spec, its phases and a `GpuTarget`; output: the tiles that fit it,
with their cost (costs.py), best first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem, problem_of
from ..geometry.tile import DEPTHWISE, Tile
from ..language.spec import ConvTransposeSpec
from ..tables.targets import GpuTarget
from .costs import Least, Work, cost_of_work, least_ms_of_work, least_of, work_of
from .forms import Form, forms
from .plan import Candidate
from .registers import NUM_WARPS, WARP, most_registers
from .resources import Use, demand_of, occupancy

# `tl.dot` wants 16 of each dimension at least; more than 256 rows leave no registers.
BLOCK_M = (32, 64, 128, 256)
BLOCK_N = (16, 32, 64, 128, 256)
BLOCK_K = (16, 32, 64)
NUM_STAGES = (2, 3, 4)
DIRECT_M = {"channels_first": (64, 128, 256, 512), "channels_last": (4, 8, 16, 32, 64)}
DIRECT_N = {"channels_first": (1, 2, 4, 8, 16), "channels_last": (32, 64, 128, 256)}
# Copies take memory: they have to gain by the model. It knows them, and boxes, of Hopper.
WORTH_COPY = 1.05
WORTH_UNMEASURED = 2.0


@dataclass(frozen=True, slots=True)
class Siblings:
    """Tiles of a form that differ in stages alone.

    Attributes:
        form: their form.
        blocks: BLOCK_M, BLOCK_N, BLOCK_K and warps.
        uses: what each of those that fit takes of an SM, by its stages.
        work: what each has to do.
        least_grain: below it is none of them, in the order of tiles.
    """

    form: Form
    blocks: tuple[int, int, int, int]
    uses: dict[int, Use]
    work: Work
    least_grain: int


@functools.lru_cache(maxsize=16)
def rank_tiles(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
) -> tuple[Candidate, ...]:
    """Return every tile that fits `target`, with its cost, best first.

    It takes longer than to print a file, and who tries tiles asks for each of them.
    """
    least = least_of(spec, problem_of(spec, phases), target)
    candidates = [
        candidate
        for siblings in _siblings(spec, phases, target, least)
        for candidate in _candidates(siblings, target, least)
    ]
    return tuple(sorted(candidates, key=lambda candidate: _order(candidate, target)))


def best_tile(spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], target: GpuTarget) -> Tile:
    """Return the first tile of `rank_tiles`, in a third of its time."""
    least = least_of(spec, problem_of(spec, phases), target)
    found: list[tuple[tuple[Any, ...], Tile]] = []
    every = sorted(_siblings(spec, phases, target, least), key=lambda each: each.least_grain)
    for siblings in every:
        if found and siblings.least_grain > found[0][0][0]:
            break
        candidates = _candidates(siblings, target, least)
        here = [(_order(each, target), each.tile) for each in candidates]
        found = [min(found + here)]
    return found[0][1]


def _siblings(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], target: GpuTarget, least: Least
) -> Iterator[Siblings]:
    """Yield the tiles that fit `target`."""
    problem = problem_of(spec, phases)
    for form in forms(spec, phases, problem):
        for blocks in _blocks_of(spec, problem, form):
            tile = _tile(form, *blocks)
            most = most_registers(spec, form, tile, target)
            if most == 0 or _share_a_layout(spec, form, tile):
                continue
            demand = demand_of(spec, form, tile, target)
            uses = {number: demand.use(number) for number in _stages(form)}
            fitting = {
                number: use
                for number, use in uses.items()
                if use.registers <= most and use.shared <= target.shared_per_block
            }
            if fitting:
                work = work_of(spec, problem, form, tile, target)
                least_ms = least_ms_of_work(work, target, least)
                yield Siblings(form, blocks, fitting, work, _grain(tile, target, least_ms))


def _candidates(siblings: Siblings, target: GpuTarget, least: Least) -> Iterator[Candidate]:
    """Yield siblings, each with its cost."""
    for num_stages, use in siblings.uses.items():
        tile = _tile(siblings.form, *siblings.blocks, num_stages)
        cost = cost_of_work(siblings.work, num_stages, occupancy(tile, target, use), target, least)
        yield Candidate(tile, cost)


def _worth(tile: Tile, target: GpuTarget) -> float:
    """Return how much faster than others a tile has to be by the model, to be taken."""
    if (tile.boxed or tile.relayout) and target.arch != "sm_90":
        return WORTH_UNMEASURED
    return WORTH_COPY if tile.relayout else 1.0


def _order(candidate: Candidate, target: GpuTarget) -> tuple[Any, ...]:
    tile = candidate.tile
    # The model's figures are no better than a percent: within that, wider vectors win over single
    # elements, fewer bytes asked for, the smaller tile, and the deeper pipeline.
    grain = _grain(tile, target, candidate.cost.model_ms)
    size = tile.block_m * tile.block_n
    wide = tile.span if tile.family == "stencil" else 0
    name = (tile.family, tile.span, tile.rows, tile.relayout)
    l2_bytes = candidate.cost.l2_bytes
    return (
        grain,
        -wide,
        l2_bytes,
        *name,
        size,
        tile.num_warps,
        -tile.num_stages,
        tile.block_k,
        tile.block_m,
    )


def _grain(tile: Tile, target: GpuTarget, model_ms: float) -> int:
    """Return the model's time in steps of a percent, as far as it is worth."""
    return round(math.log(model_ms * _worth(tile, target)) / math.log(1.01))


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
