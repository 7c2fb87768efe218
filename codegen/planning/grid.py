"""The launch grid: which coordinates of a program are on which grid axis.

Stage 4, part of plan. Input: a spec, its form and tile; output: a `Grid` within CUDA's limits.
"""

from __future__ import annotations

import math

from sympy import Integer

from ..errors import SpecError
from ..geometry.phases import AxisPhases
from ..geometry.problem import NOMINAL
from ..language.spec import ConvTransposeSpec
from ..symbolic.sizes import AXES, Sizes
from ..symbolic.space import Space
from .plan import GRID_LIMITS, GridCoordinate

Grid = tuple[tuple[GridCoordinate, ...], ...]


def place_on_grid(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], sizes: Sizes, fold: bool
) -> tuple[Grid, str]:
    """Return the coordinates on each grid axis, the longest extent on axis 0, and the reason.

    Raises:
        SpecError: an axis would need more programs than CUDA allows.
    """
    space = sizes.space
    steps = []
    numbered = list(zip(range(spec.rank), AXES[spec.rank], phases, strict=True))
    for number, letter, axis in reversed(numbered):
        if sizes.is_grouped(number) or sizes.is_blocked(number):
            continue  # a program computes all phases of this axis
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
    """Return `part` without coordinates of extent 1; at least one coordinate stays."""
    return tuple(c for c in part if space.number(c.extent) != 1) or part[:1]


def _tiles(sizes: Sizes, fold: bool) -> tuple[GridCoordinate, ...]:
    """Return the coordinates of a position tile: one number, or one per axis for boxes."""
    if not sizes.box:
        return (GridCoordinate("tile", sizes.named("folded_tiles" if fold else "tiles")),)
    return tuple(axis_coordinate(sizes, axis) for axis in reversed(range(sizes.rank)))


def _extent(space: Space, coordinates: tuple[GridCoordinate, ...]) -> int | None:
    """Return the extent of a grid axis, None if known only at run time (it then sorts first)."""
    return space.number(math.prod((c.extent for c in coordinates), start=Integer(1)))


def _natural_rank(extents: list[int | None]) -> int:
    """Return 1 if there are channel tiles, to keep them adjacent; else 2, positions x images.

    An open batch would be the first of two axes, so that programs that run together read different
    images: unless an image has few programs, it is on one axis with them, which holds any batch.
    """
    positions, channels, images = extents
    if channels != 1 or images == 1:
        return 1
    if images is None:
        return 1 if positions is not None and positions > NOMINAL.batch else 2
    return 2 if images <= GRID_LIMITS[1] else 1


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
    elif rank == 1 and extents[2] is None:
        parts.append("programs of an image side by side, images of an open batch after them")
    elif rank == 2:
        parts.append("images on an axis of their own: parallelism over the batch needs no division")
    return "; ".join(parts)


def axis_coordinate(sizes: Sizes, axis: int) -> GridCoordinate:
    """Return the coordinate of a program along an axis: number of its box, or its position."""
    letter = AXES[sizes.rank][axis]
    if sizes.box[axis + 1] > 1:
        return GridCoordinate(f"{letter}_tile", sizes.named(f"{letter}_tiles"))
    kind = "block" if sizes.is_blocked(axis) else "q"
    return GridCoordinate(f"{kind}_{letter}", sizes.phase(axis))


def image_coordinate(sizes: Sizes) -> GridCoordinate:
    """Return the coordinate of a program among the images: number of its box, or its image."""
    if sizes.box and sizes.box[0] > 1:
        return GridCoordinate("n_tile", sizes.named("n_tiles"))
    return GridCoordinate("image", sizes.named("BATCH"))
