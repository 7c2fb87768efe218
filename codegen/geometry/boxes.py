"""Boxes of positions: which neighbours of a phase one program computes, in the window family.

Stage 4, part of plan. Input: extents of images and axes, and a number of positions, a power of two;
output: how many of them lie along each. A box of outputs reads a box of inputs for each tap, as
inputs of a phase are neighbours (phases.py). It is a run of a row where rows are long; of shorter
ones it takes several, and of small images as well, so that few of its positions lie outside.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

# A box of one row needs no numbers of rows, and its inputs go to the matrix units as they lie.
WORTH = 1.07
RUN = 8  # positions of a row in a box at least, where the row has them
SMALL = 4  # images of at most so many boxes share them


@functools.cache
def box_of(extents: tuple[int, ...], count: int, rows_blocked: bool) -> tuple[int, ...]:
    """Return the extents of boxes of `count` positions.

    Args:
        extents: of the images, and of the positions along each axis.
        count: positions of a box, a power of two.
        rows_blocked: the last axis but one is in blocks of rows, of which a box has one.
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
    """Whether a box lies along one axis at most, so that its inputs are a matrix as they lie.

    Triton (3.6 to 3.9) reshapes others in registers.
    """
    return sum(extent > 1 for extent in box) <= 1


def tiles_of(extents: tuple[int, ...], box: tuple[int, ...]) -> int:
    """Return how many boxes cover all images."""
    return math.prod(-(-extent // each) for extent, each in zip(extents, box, strict=True))


def _covered(extents: tuple[int, ...], box: tuple[int, ...]) -> int:
    return tiles_of(extents, box) * math.prod(box)


def _factors(axes: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield `count` as products of a power of two for each axis."""
    powers = count.bit_length() - 1
    for parts in itertools.product(range(powers + 1), repeat=axes - 1):
        if sum(parts) <= powers:
            yield (*(1 << part for part in parts), 1 << (powers - sum(parts)))
