"""The planner: chooses family, tile and launch grid for a spec on a target.

Stage 4, plan. Input: a spec, its phases and a `GpuTarget`; output: a `KernelPlan`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator

from ..errors import SpecError
from ..geometry.gradient import gradient_refusal, input_gradient
from ..geometry.phases import AxisPhases, decompose
from ..geometry.problem import NOMINAL, SMALL_INPUTS, Nominal, problem_of
from ..geometry.row_blocks import RowBlock
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..symbolic.size_table import SizeTable
from ..symbolic.sizes import GRADIENT, LARGE, OF_LAYOUT, RUNG, SMALL
from ..tables.targets import GpuTarget
from .candidates import best_tile, rank_tiles
from .choices import MODEL_ALONE, Choices, found_for, shipped
from .costs import cost_of, least_of
from .family import Family
from .forms import form_of
from .grid import place_on_grid
from .ladder import large_of, small_of
from .plan import Candidate, KernelPlan, Measured
from .resources import check_limits

TUNED = 6  # number of configs that an autotuned file tries
ENOUGH = 3  # of them, for the best tile's form to be kept
NEAR = 1.1  # times the least predicted time


def plan_kernel(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    families: tuple[Family, ...],
    tile: Tile | tuple[Tile, ...] | None = None,
    choices: Choices | None = None,
) -> KernelPlan:
    """Return the plan of `spec` on `target`; for several kernels, the first one's, with `others`.

    Args:
        spec: the layer.
        phases: phases of each axis of `spec`.
        target: the GPU to plan for.
        families: the families whose tiles are ranked.
        tile: the tile to use, or one for each of the spec's parts; None lets the planner choose.
        choices: measured tiles, preferred to the package's own; `MODEL_ALONE` to use neither.

    Raises:
        SpecError: the launch grid cannot hold the programs, or a tile cannot serve the spec.
    """
    parts = spec.parts
    tiles = tile if isinstance(tile, tuple) else (tile,) * len(parts)
    layouts = len(spec.each_layout)
    kernels = []
    for number, (part, its) in enumerate(zip(parts, tiles, strict=True)):
        rung, layout = divmod(number, layouts)
        names = RUNG.format(rung) if rung else "", OF_LAYOUT[layout]
        found = _plan_one(part, phases, target, families, its, choices, names=names)
        kernels.append(_for_any_batch(found, spec, names) if rung else found)
    if tile is None:
        kernels += _ladder(kernels[:layouts], has_rungs=bool(spec.rungs))
    return dataclasses.replace(kernels[0], others=tuple(kernels[1:]))


def _ladder(plans: list[KernelPlan], *, has_rungs: bool) -> Iterator[KernelPlan]:
    """Yield plans of kernels for small and for large inputs, which beat those of `plans` there.

    The small inputs of a layer with rungs are theirs: a kernel for others would make a long file
    longer.
    """
    for plan, layout in zip(plans, OF_LAYOUT, strict=False):
        layer = plan.spec, plan.phases, plan.target, plan.families
        small, large = None if has_rungs else small_of(plan), large_of(plan)
        if small is not None:
            names = "", SMALL + layout
            found = _plan_one(*layer, small.tile, names=names, assumed=SMALL_INPUTS)
            yield dataclasses.replace(found, most=small.most)
        if large is not None:
            found = _plan_one(*layer, large.tile, names=("", LARGE + layout))
            yield dataclasses.replace(found, least=large.least)


def _for_any_batch(plan: KernelPlan, spec: ConvTransposeSpec, names: tuple[str, str]) -> KernelPlan:
    """Return the plan of a rung with its tile, but the batch that `spec` has, which may be open."""
    rung = plan.spec.input
    assert rung is not None
    other = dataclasses.replace(plan.spec, input=(spec.batch, *rung[1:]))
    found = _plan_one(
        other, plan.phases, plan.target, plan.families, plan.tile, names=names, known=plan
    )
    return dataclasses.replace(
        found, rung=rung, cost=plan.cost, nominal=False, choices_digest=plan.choices_digest
    )


def _plan_one(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    families: tuple[Family, ...],
    tile: Tile | None = None,
    choices: Choices | None = None,
    *,
    names: tuple[str, str] = ("", ""),
    is_backward: bool = False,
    known: KernelPlan | None = None,
    assumed: Nominal = NOMINAL,
) -> KernelPlan:
    """Return the plan of a kernel.

    `names` are the prefixes of its extents and of its layout; `known` is a plan of the same layer,
    with more sizes known, that has the given tile; `is_backward` and `assumed` are as in
    `KernelPlan`, the rest as above.
    """
    measured = None if known is None else known.measured
    rank = functools.partial(rank_tiles, spec, phases, target, families, assumed)
    digest: str | None = None
    if tile is None and spec.autotune == "none":
        measured, digest = _measured(spec, target, families, choices)
    chosen = tile or (None if measured is None else measured.tile)
    tuned = _tuned(spec, tile, rank()) if spec.autotune != "none" else ()
    chosen = tuned[0] if tuned else chosen or best_tile(spec, phases, target, families)
    problem = problem_of(spec, phases, assumed)
    form = form_of(spec, phases, problem, chosen, families)
    family = form.family
    if measured is not None:
        check_limits(form, spec, chosen, target)
    fold = family.folds_batch(problem, form, chosen) if known is None else known.fold_batch
    of_gradient = GRADIENT if is_backward else ""
    prefix = "".join(names) + of_gradient
    grouping = family.grouping(spec, phases, chosen.span)
    block = RowBlock(phases[-2], chosen.rows) if chosen.rows > 1 else None
    sizes = SizeTable(
        spec=spec,
        phases=phases,
        tiles=tuned or (chosen,),
        groups=family.groups(spec),
        grouping=grouping,
        block=block,
        box=form.box(chosen),
        fold=fold,
        prefix=prefix,
        layer_prefix=of_gradient,
        extent_prefix=names[0] + of_gradient,
    ).sizes()
    grid, reason = place_on_grid(spec, phases, sizes, fold)
    return KernelPlan(
        spec=spec,
        target=target,
        family=family,
        families=families,
        phases=phases,
        sizes=sizes,
        grouping=grouping,
        block=block,
        tile=chosen,
        tuned=tuned,
        fold_batch=fold,
        grid=grid,
        cost=cost_of(spec, problem, form, chosen, target, least_of(spec, problem, target)),
        nominal=problem.nominal,
        rank=rank,
        measured=measured,
        choices_digest=digest,
        unmeasured=tile is None and choices == MODEL_ALONE and _is_shipped(spec, target, families),
        grid_reason=reason,
        prefix=prefix,
        assumed=assumed,
        is_backward=is_backward,
        gradient=_gradient(spec, target, families, measured, names),
    )


def _gradient(
    spec: ConvTransposeSpec,
    target: GpuTarget,
    families: tuple[Family, ...],
    measured: Measured | None,
    names: tuple[str, str],
) -> KernelPlan | None:
    """Return the plan of the input's gradient, None unless its kernel is known to beat torch."""
    found = None if measured is None else measured.gradient
    if found is None or found.ms >= found.torch_ms or gradient_refusal(spec) is not None:
        return None
    back = input_gradient(spec)
    phases = decompose(back)
    form = form_of(back, phases, problem_of(back, phases), found.tile, families)
    refusal = form.family.gradient_refusal()
    if refusal is not None:
        raise SpecError(refusal, "choices")
    check_limits(form, back, found.tile, target)
    return _plan_one(back, phases, target, families, found.tile, names=names, is_backward=True)


def _measured(
    spec: ConvTransposeSpec,
    target: GpuTarget,
    families: tuple[Family, ...],
    given: Choices | None,
) -> tuple[Measured | None, str | None]:
    """Return the measurement of `spec`, and the hash of the choices file it comes from.

    The given file is used if it is for this target and has the spec; else the package's file, for
    which the hash is None.
    """
    found = found_for(spec, target.name, families, given)
    return (None, None) if found is None else (found[0], found[1].digest)


def _is_shipped(spec: ConvTransposeSpec, target: GpuTarget, families: tuple[Family, ...]) -> bool:
    """Whether the package has a measured tile that a plan of `spec` would use by default."""
    return spec.autotune == "none" and shipped(target.name, families).of(spec) is not None


def _tuned(
    spec: ConvTransposeSpec, given: Tile | None, ranking: tuple[Candidate, ...]
) -> tuple[Tile, ...]:
    """Return the tiles that an autotuned file tries: either blocks or warps and stages vary.

    All else is as in the given tile or, without one, as in the best tile or one predicted to be
    nearly as fast: the best one's form may leave too little to try.
    """
    same = _launch if spec.autotune == "blocks" else _blocks
    if given is None:
        near = [c.tile for c in ranking if c.cost.model_ms <= NEAR * ranking[0].cost.model_ms]
        counts = Counter(map(same, near))
        given = max(near, key=lambda tile: min(counts[same(tile)], ENOUGH))
    others = [c.tile for c in ranking if same(c.tile) == same(given) and c.tile != given]
    return (given, *others)[:TUNED]


def _launch(tile: Tile) -> tuple[int | str, ...]:
    return tile.num_warps, tile.num_stages, tile.family, tile.span, tile.rows, tile.relayout


def _blocks(tile: Tile) -> tuple[int | str, ...]:
    blocks = tile.block_m, tile.block_n, tile.block_k
    return *blocks, tile.family, tile.span, tile.rows, tile.relayout
