"""Ranking of the candidate tiles of a layer.

Stage 4, part of plan. Input: a spec, its phases and a `GpuTarget`; output: the tiles that fit the
target, with their cost (costs.py), best first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..geometry.phases import AxisPhases
from ..geometry.problem import NOMINAL, Nominal, Problem, problem_of
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..tables.targets import GpuTarget
from .costs import Least, Work, cost_of_work, least_ms_of_work, least_of, work_of
from .family import Family, Form
from .forms import forms
from .plan import Candidate
from .resources import occupancy

# An input copy costs memory, and the model of copies was only fitted on Hopper: a tile with a copy
# must beat the others by these factors in predicted time, on Hopper and elsewhere. If the extents
# are left to run time, an input may be small, and one launch more costs the host time: the copy
# is left to a kernel for large inputs (ladder.py) unless it gains this much.
WORTH_COPY = 1.05
WORTH_COPY_OPEN = 2.0
WORTH_UNMEASURED = 2.0


@dataclass(frozen=True, slots=True)
class Siblings:
    """Tiles of a form that differ only in their number of stages.

    Attributes:
        form: the form of all.
        blocks: BLOCK_M, BLOCK_N, BLOCK_K and warps.
        work: the work of each.
        least_grain: lower bound of these tiles' first sort key; lets `best_tile` stop early.
    """

    form: Form
    blocks: tuple[int, int, int, int]
    work: Work
    least_grain: int


@functools.lru_cache(maxsize=16)
def rank_tiles(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    families: tuple[Family, ...],
    nominal: Nominal = NOMINAL,
) -> tuple[Candidate, ...]:
    """Return every tile of `families` that fits `target`, with its cost, best first.

    `nominal` stands for sizes left to run time. Cached: ranking takes longer than rendering, and
    the tuner asks once per tile.
    """
    problem = problem_of(spec, phases, nominal)
    least = least_of(spec, problem, target)
    served = forms(spec, phases, problem, families)
    is_open = None in spec.spatial
    ordered = [
        (_order(candidate, siblings.form.family, target, is_open=is_open), candidate)
        for siblings in _siblings(spec, problem, target, least, served)
        for candidate in _candidates(siblings, spec, target, least)
    ]
    return tuple(candidate for _, candidate in sorted(ordered, key=lambda pair: pair[0]))


def best_tile(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    families: tuple[Family, ...],
) -> Tile:
    """Return the first tile of `rank_tiles`, in a third of the time."""
    problem = problem_of(spec, phases)
    best = best_of(spec, problem, target, forms(spec, phases, problem, families))
    assert best is not None  # a family serves every spec with a small tile
    return best.tile


def best_of(
    spec: ConvTransposeSpec, problem: Problem, target: GpuTarget, served: Iterable[Form]
) -> Candidate | None:
    """Return the first tile of the given forms in the order of `rank_tiles`, None without any."""
    least = least_of(spec, problem, target)
    is_open = None in spec.spatial
    found: list[tuple[tuple[Any, ...], Candidate]] = []
    every = list(_siblings(spec, problem, target, least, served))
    every.sort(key=lambda each: each.least_grain)
    for siblings in every:
        if found and siblings.least_grain > found[0][0][0]:
            break
        candidates = _candidates(siblings, spec, target, least)
        family = siblings.form.family
        here = [(_order(c, family, target, is_open=is_open), c) for c in candidates]
        found = sorted(found + here, key=lambda pair: pair[0])[:1]
    return found[0][1] if found else None


def _siblings(
    spec: ConvTransposeSpec,
    problem: Problem,
    target: GpuTarget,
    least: Least,
    served: Iterable[Form],
) -> Iterator[Siblings]:
    """Yield the tiles of these forms, in groups that differ only in stages."""
    for form in served:
        for blocks in form.family.blocks(spec, problem, form):
            tile = _tile(form, *blocks)
            work = work_of(spec, problem, form, tile, target)
            least_ms = least_ms_of_work(work, target, least)
            worth = _worth(tile, form.family, target, is_open=None in spec.spatial)
            yield Siblings(form, blocks, work, _grain(least_ms * worth))


def _candidates(
    siblings: Siblings, spec: ConvTransposeSpec, target: GpuTarget, least: Least
) -> Iterator[Candidate]:
    """Yield the tiles of `siblings` that fit `target`, each with its cost."""
    form, family = siblings.form, siblings.form.family
    tile = _tile(form, *siblings.blocks)
    most = family.most_registers(spec, form, tile, target)
    if most == 0:
        return
    demand = family.demand(spec, form, tile, target)
    for num_stages in family.stages(form):
        use = demand.use(num_stages)
        if use.registers <= most and use.shared <= target.shared_per_block:
            tile = _tile(form, *siblings.blocks, num_stages)
            occupied = occupancy(tile, target, use)
            cost = cost_of_work(siblings.work, num_stages, occupied, target, least)
            yield Candidate(tile, cost)


def _worth(tile: Tile, family: Family, target: GpuTarget, *, is_open: bool) -> float:
    """Return the factor by which a tile must beat others in predicted time to be chosen."""
    if not tile.relayout:
        return family.worth(target)
    if is_open:
        return WORTH_COPY_OPEN
    return WORTH_COPY if target.is_hopper else WORTH_UNMEASURED


def _order(
    candidate: Candidate, family: Family, target: GpuTarget, *, is_open: bool
) -> tuple[Any, ...]:
    tile = candidate.tile
    # The model is no more accurate than 1 %. Among tiles within 1 %, a wider span wins (if the
    # family prefers it), then fewer bytes requested, a smaller tile, and a deeper pipeline.
    worth = _worth(tile, family, target, is_open=is_open)
    grain = _grain(candidate.cost.model_ms * worth)
    size = tile.block_m * tile.block_n
    wide = tile.span if family.prefers_wide else 0
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


def _grain(ms: float) -> int:
    """Return a time as the number of its 1 % bucket."""
    return round(math.log(ms) / math.log(1.01))


def _tile(
    form: Form, block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int = 2
) -> Tile:
    variant = form.family.name, form.span, form.rows, form.relayout
    return _made(block_m, block_n, block_k, num_warps, num_stages, *variant)


@functools.lru_cache(maxsize=2**16)
def _made(
    block_m: int,
    block_n: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
    family: str,
    span: int,
    rows: int,
    relayout: bool,
) -> Tile:
    """Return the tile; layers of one process share it, as its checks take longer than its costs."""
    return Tile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        family=family,
        span=span,
        rows=rows,
        relayout=relayout,
    )
