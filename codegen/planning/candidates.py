"""Choosing a tile: the candidates of a layer, and their order.

Stage 4, part of plan. Input: a spec, its phases and a `GpuTarget`; output: the tiles that fit it,
with their cost (costs.py), best first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..geometry.phases import AxisPhases
from ..geometry.problem import problem_of
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..tables.targets import GpuTarget
from .costs import Least, Work, cost_of_work, least_ms_of_work, least_of, work_of
from .family import Family, Form, Use
from .forms import forms
from .plan import Candidate
from .resources import occupancy

# Copies take memory: they have to gain by the model. It knows them of Hopper alone.
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
    families: tuple[Family, ...],
) -> tuple[Candidate, ...]:
    """Return every tile of `families` that fits `target`, with its cost, best first.

    Cached: ranking takes longer than printing a file, and who tries tiles asks for each of them.
    """
    least = least_of(spec, problem_of(spec, phases), target)
    ordered = [
        (_order(candidate, siblings.form.family, target), candidate)
        for siblings in _siblings(spec, phases, target, least, families)
        for candidate in _candidates(siblings, target, least)
    ]
    return tuple(candidate for _, candidate in sorted(ordered, key=lambda pair: pair[0]))


def best_tile(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    families: tuple[Family, ...],
) -> Tile:
    """Return the first tile of `rank_tiles`, in a third of its time."""
    least = least_of(spec, problem_of(spec, phases), target)
    found: list[tuple[tuple[Any, ...], Tile]] = []
    every = list(_siblings(spec, phases, target, least, families))
    every.sort(key=lambda each: each.least_grain)
    for siblings in every:
        if found and siblings.least_grain > found[0][0][0]:
            break
        candidates = _candidates(siblings, target, least)
        here = [(_order(each, siblings.form.family, target), each.tile) for each in candidates]
        found = [min(found + here)]
    return found[0][1]


def _siblings(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    least: Least,
    families: tuple[Family, ...],
) -> Iterator[Siblings]:
    """Yield the tiles that fit `target`."""
    problem = problem_of(spec, phases)
    for form in forms(spec, phases, problem, families):
        family = form.family
        for blocks in family.blocks(spec, problem, form):
            tile = _tile(form, *blocks)
            most = family.most_registers(spec, form, tile, target)
            if most == 0:
                continue
            demand = family.demand(spec, form, tile, target)
            uses = {number: demand.use(number) for number in family.stages(form)}
            fitting = {
                number: use
                for number, use in uses.items()
                if use.registers <= most and use.shared <= target.shared_per_block
            }
            if fitting:
                work = work_of(spec, problem, form, tile, target)
                least_ms = least_ms_of_work(work, target, least)
                yield Siblings(form, blocks, fitting, work, _grain(tile, family, target, least_ms))


def _candidates(siblings: Siblings, target: GpuTarget, least: Least) -> Iterator[Candidate]:
    """Yield siblings, each with its cost."""
    for num_stages, use in siblings.uses.items():
        tile = _tile(siblings.form, *siblings.blocks, num_stages)
        cost = cost_of_work(siblings.work, num_stages, occupancy(tile, target, use), target, least)
        yield Candidate(tile, cost)


def _worth(tile: Tile, family: Family, target: GpuTarget) -> float:
    """Return how much faster than others a tile has to be by the model, to be taken."""
    if not tile.relayout:
        return family.worth(target)
    return WORTH_COPY if target.is_hopper else WORTH_UNMEASURED


def _order(candidate: Candidate, family: Family, target: GpuTarget) -> tuple[Any, ...]:
    tile = candidate.tile
    # The model's figures are no better than a percent: within that, wider vectors win over single
    # elements, fewer bytes asked for, the smaller tile, and the deeper pipeline.
    grain = _grain(tile, family, target, candidate.cost.model_ms)
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


def _grain(tile: Tile, family: Family, target: GpuTarget, model_ms: float) -> int:
    """Return the model's time in steps of a percent, as far as it is worth."""
    return round(math.log(model_ms * _worth(tile, family, target)) / math.log(1.01))


def _tile(
    form: Form, block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int = 2
) -> Tile:
    return Tile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        family=form.family.name,
        span=form.span,
        rows=form.rows,
        relayout=form.relayout,
    )
