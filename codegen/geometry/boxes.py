"""Boxes of positions: the block of neighbouring outputs of a phase that a program computes.

Used by the window family, in stage 4 (plan). Input: the number of images, the extents of the axes,
and a number of positions, a power of two; output: the extent of a box along each axis. For each tap
a box of outputs reads a box of inputs, since inputs of a phase are neighbours (phases.py). If rows
are long, a box is a run of a row; if rows or images are short, it covers several, so that few of
its positions lie outside.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

# One-row boxes need no row coordinates and no register reshape, so they may cover up to 7 % more
# positions than the best box and still win.
WORTH = 1.07
RUN = 8  # least number of positions of a row in a box, if the row has as many
SMALL = 4  # images of at most this many boxes share boxes


@functools.cache
def box_of(extents: tuple[int, ...], count: int, rows_blocked: bool) -> tuple[int, ...]:
    """Return the extents of a box of `count` positions, of images first, then along each axis.

    Args:
        extents: number of images, then number of positions along each axis.
        count: positions of a box, a power of two.
        rows_blocked: whether the last axis but one is in row blocks; a box then has one of them.
    """
    run = min(RUN, count, 1 << (extents[-1] - 1).bit_length())
    shared = math.prod(extents[1:]) <= SMALL * count
    boxes = [
        box
        for box in _factors(len(extents), count)
        if box[-1] >= run and (shared or box[0] == 1) and not (rows_blocked and box[-2] > 1)
    ]
    covered = {box: _covered(extents, box) for box in boxes}
    most = WORTH * min(covered.values())
    good = [box for box in boxes if covered[box] <= most]
    return min(good, key=lambda box: (sum(n > 1 for n in box), -box[-1], covered[box], box))


def is_run(box: tuple[int, ...]) -> bool:
    """Whether a box extends along one axis at most, so that its inputs already form a matrix.

    Triton 3.6 to 3.9 reshapes the inputs of other boxes in registers.
    """
    return sum(extent > 1 for extent in box) <= 1


def tiles_of(extents: tuple[int, ...], box: tuple[int, ...]) -> int:
    """Return the number of boxes that cover all images."""
    return math.prod(-(-extent // each) for extent, each in zip(extents, box, strict=True))


def _covered(extents: tuple[int, ...], box: tuple[int, ...]) -> int:
    return tiles_of(extents, box) * math.prod(box)


def _factors(axes: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield each way to write `count`, a power of two, as a product of one factor per axis."""
    powers = count.bit_length() - 1
    for parts in itertools.product(range(powers + 1), repeat=axes - 1):
        if sum(parts) <= powers:
            yield (*(1 << part for part in parts), 1 << (powers - sum(parts)))
