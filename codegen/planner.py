"""Planning: family, tile and launch grid for a spec on a target.

Stage 4, plan. Input: a spec, its phases and a `GpuTarget`; output: a `KernelPlan`.
"""

from __future__ import annotations

import functools
import math

from sympy import Integer

from .choices import MODEL_ALONE, Choices, shipped
from .costs import cost_of, folds_batch, least_of
from .errors import SpecError
from .forms import form_of
from .geometry.gradient import PREFIX, gradient_refusal, input_gradient
from .geometry.groups import Grouping
from .geometry.phases import AxisPhases, decompose
from .geometry.problem import problem_of
from .geometry.row_blocks import RowBlock
from .geometry.tile import SINGLE, Tile
from .language.spec import ConvTransposeSpec
from .plan import GRID_LIMITS, Candidate, GridCoordinate, KernelPlan, Measured
from .resources import check_limits
from .symbolic.sizes import AXES, Sizes, make_sizes
from .symbolic.space import Space
from .tables.targets import GpuTarget
from .tiling import best_tile, rank_tiles
from .window import axis_coordinate, image_coordinate

Grid = tuple[tuple[GridCoordinate, ...], ...]
TUNED = 6  # configs that an autotuned file tries


def plan_kernel(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    target: GpuTarget,
    tile: Tile | None = None,
    choices: Choices | None = None,
    prefix: str = "",
) -> KernelPlan:
    """Return the plan of `spec` on `target`.

    Args:
        spec: the layer.
        phases: its phases.
        target: the GPU.
        tile: a tile to use in place of a choice.
        choices: measured ones, which come before the package's own; `MODEL_ALONE` for neither.
        prefix: what the names of sizes begin with.

    Raises:
        SpecError: the launch grid asked for cannot hold the programs.
    """
    rank = functools.partial(rank_tiles, spec, phases, target)
    measured: Measured | None = None
    digest: str | None = None
    if tile is None and spec.autotune == "none":
        measured, digest = _measured(spec, target, choices)
    chosen = tile or (best_tile(spec, phases, target) if measured is None else measured.tile)
    tuned = _tuned(spec, chosen, rank()) if spec.autotune != "none" else ()
    problem = problem_of(spec, phases)
    form = form_of(spec, phases, problem, chosen)
    if measured is not None:
        check_limits(form, spec, chosen, target)
    fold = folds_batch(problem, form, chosen)
    grouping = _grouping(spec, phases, chosen)
    block = RowBlock(phases[-2], chosen.rows) if chosen.rows > 1 else None
    sizes = make_sizes(spec, phases, tuned or (chosen,), grouping, block, fold, prefix)
    grid, reason = _grid(spec, phases, sizes, fold)
    return KernelPlan(
        spec=spec,
        target=target,
        phases=phases,
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
        unmeasured=tile is None and choices == MODEL_ALONE and _is_shipped(spec, target),
        grid_reason=reason,
        prefix=prefix,
        gradient=_gradient(spec, target, measured),
    )


def _grouping(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], tile: Tile
) -> Grouping | None:
    """Return the grouping of the last axis; a group of one input and one output is none."""
    if tile.family in SINGLE or spec.layout == "channels_last":
        return None
    grouping = Grouping(phases[-1], tile.span, unrolled=tile.family == "stencil")
    return None if grouping.width == 1 else grouping


def _gradient(
    spec: ConvTransposeSpec, target: GpuTarget, measured: Measured | None
) -> KernelPlan | None:
    """Return the plan of the input's gradient, where its kernel was measured to beat torch's."""
    found = None if measured is None else measured.gradient
    if found is None or found.ms >= found.torch_ms or gradient_refusal(spec) is not None:
        return None
    back = input_gradient(spec)
    phases = decompose(back)
    check_limits(
        form_of(back, phases, problem_of(back, phases), found.tile), back, found.tile, target
    )
    return plan_kernel(back, phases, target, found.tile, prefix=PREFIX)


def _measured(
    spec: ConvTransposeSpec, target: GpuTarget, given: Choices | None
) -> tuple[Measured | None, str | None]:
    """Return what was measured for `spec`, and the hash of the file that says so.

    That is the file given, if it is of the target and has the spec; else the package's, unhashed.
    """
    if given == MODEL_ALONE:
        return None, None
    for choices in (given, shipped(target.name)):
        if choices is not None and choices.target == target.name:
            found = choices.of(spec)
            if found is not None:
                return found, choices.digest
    return None, None


def _is_shipped(spec: ConvTransposeSpec, target: GpuTarget) -> bool:
    """Whether a plan without choices would take a tile of the package's."""
    return spec.autotune == "none" and shipped(target.name).of(spec) is not None


def _tuned(spec: ConvTransposeSpec, best: Tile, ranking: tuple[Candidate, ...]) -> tuple[Tile, ...]:
    """The tiles an autotuned file tries: other blocks, or other warps and stages, never both."""
    same = _launch if spec.autotune == "blocks" else _blocks
    others = [c.tile for c in ranking if same(c.tile) == same(best) and c.tile != best]
    return (best, *others)[:TUNED]


def _launch(tile: Tile) -> tuple[int | str, ...]:
    return tile.num_warps, tile.num_stages, tile.family, tile.span, tile.rows, tile.relayout


def _blocks(tile: Tile) -> tuple[int | str, ...]:
    blocks = tile.block_m, tile.block_n, tile.block_k
    return *blocks, tile.family, tile.span, tile.rows, tile.relayout


def _grid(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], sizes: Sizes, fold: bool
) -> tuple[Grid, str]:
    """Place the coordinates on the grid's axes: the longest extent on axis 0."""
    space = sizes.space
    steps = []
    numbered = list(zip(range(spec.rank), AXES[spec.rank], phases, strict=True))
    for number, letter, axis in reversed(numbered):
        if sizes.is_grouped(number) or sizes.is_blocked(number):
            continue  # a program has all its phases
        if axis.tap_step > 1:
            steps.append(GridCoordinate(f"phase_{letter}", Integer(axis.tap_step)))
        if axis.gaps > 1:
            steps.append(GridCoordinate(f"gap_{letter}", Integer(axis.gaps)))
    co_tile = GridCoordinate("co_tile", sizes.named("co_tiles"))
    group = GridCoordinate("group", Integer(sizes.groups))
    tiles = _tiles(sizes, fold)
    image = () if fold else (image_coordinate(sizes),)
    positions, channels = (*steps, *tiles), (co_tile, group)
    # Programs that run together should read the same inputs: phases and channels vary fastest.
    flat = (*steps, co_tile, *tiles, group, *image)
    extents = [_extent(space, part) for part in (positions, channels, image)]
    rank = spec.grid or _natural_rank(extents)
    if rank == 1:
        grid: Grid = (flat,)
    elif rank == 2:
        grid = (
            ((*positions, *image), channels) if extents[1] != 1 else (positions, image or channels)
        )
    else:
        grid = (positions, channels, image) if image else (positions, (co_tile,), (group,))
    grid = tuple(_live(space, part) for part in grid)
    grid = tuple(sorted(grid, key=lambda part: -(_extent(space, part) or math.inf)))
    _check_limits(spec, space, grid)
    shared = fold or (bool(sizes.box) and sizes.box[0] > 1)
    return grid, _reason(spec, rank, shared, extents)


def _live(space: Space, part: tuple[GridCoordinate, ...]) -> tuple[GridCoordinate, ...]:
    """Leave out coordinates that take one value, but for the last of an axis."""
    return tuple(c for c in part if space.number(c.extent) != 1) or part[:1]


def _tiles(sizes: Sizes, fold: bool) -> tuple[GridCoordinate, ...]:
    """Return what numbers the tiles of positions: one number, or one an axis for boxes."""
    if not sizes.box:
        return (GridCoordinate("tile", sizes.named("folded_tiles" if fold else "tiles")),)
    return tuple(axis_coordinate(sizes, axis) for axis in reversed(range(sizes.rank)))


def _extent(space: Space, coordinates: tuple[GridCoordinate, ...]) -> int | None:
    """Programs along an axis, None if only run time knows; the positions stay first then."""
    return space.number(math.prod((c.extent for c in coordinates), start=Integer(1)))


def _natural_rank(extents: list[int | None]) -> int:
    """One axis if channel tiles exist, to keep them side by side; else positions x images."""
    _, channels, images = extents
    if channels != 1 or images == 1:
        return 1
    return 2 if images is None or images <= GRID_LIMITS[1] else 1


def _check_limits(spec: ConvTransposeSpec, space: Space, grid: Grid) -> None:
    for number, part in enumerate(grid):
        extent = _extent(space, part)
        if extent is not None and extent > GRID_LIMITS[number]:
            names = " x ".join(c.name for c in part if space.number(c.extent) != 1)
            advice = "leave grid out" if spec.grid else f"no launch can hold input={spec.input}"
            raise SpecError(
                f"grid axis {number} ({names}) would need {extent} programs, "
                f"CUDA allows {GRID_LIMITS[number]}; {advice}",
                "grid" if spec.grid else "input",
            )


def _reason(spec: ConvTransposeSpec, rank: int, shared: bool, extents: list[int | None]) -> str:
    parts = [
        "images share tiles, so that small ones fill them" if shared else "one image a program"
    ]
    if spec.grid is not None:
        parts.append(f"grid={rank} was asked for")
    elif rank == 1 and extents[1] != 1:
        parts.append(
            "phases and channel tiles side by side on one axis, so that they share inputs in L2"
        )
    elif rank == 2:
        parts.append("images on an axis of their own: parallelism over the batch needs no division")
    return "; ".join(parts)
