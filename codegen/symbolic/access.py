"""Accesses: offsets into a tensor, and the masks that loads and stores there need.

Stage 3, index. Input: coordinates in a `Space`; output: an `Access` with its offset and masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr, Integer, Symbol

from .space import FloorDiv, Modulo, Space, expand


@dataclass(frozen=True, slots=True)
class Coordinate:
    """The index of an access along one axis of a tensor.

    Attributes:
        index: the coordinate; an access is in bounds where 0 <= index < extent.
        extent: the axis' size.
        stride: elements from one index to the next.
        looped: whether the kernel's loop only visits valid indices. Ranges cannot show this, so
            the flag suppresses the masks.
    """

    index: Expr
    extent: Expr
    stride: Expr
    looped: bool = False


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """The index of an access in the layer's input or output.

    Attributes:
        image: index along the batch.
        group: index of the channel group.
        channel: index of the channel within its group.
        axes: coordinates along each spatial axis; a grouped axis may have several.
    """

    image: Coordinate
    group: Coordinate
    channel: Coordinate
    axes: tuple[tuple[Coordinate, ...], ...]

    def coordinates(self) -> list[Coordinate]:
        """Return the coordinates of all axes."""
        return [self.image, self.group, self.channel, *itertools.chain(*self.axes)]

    def row_stride(self) -> Expr:
        """Return the stride of the last axis but one, in elements."""
        return self.axes[-2][0].stride

    def letters(self, letters: Iterable[str], masks: Iterable[Mask]) -> str:
        """Return the letters of the masked axes: `n` for the batch, `letters` for spatial axes."""
        indices = {mask.index for mask in masks}
        named = (("n", (self.image,)), *zip(letters, self.axes, strict=True))
        return "".join(x for x, parts in named if any(part.index in indices for part in parts))


@dataclass(frozen=True, slots=True)
class Mask:
    """A condition `index >= 0` (extent None) or `index < extent` that ranges cannot prove."""

    index: Expr
    extent: Expr | None


@dataclass(frozen=True, slots=True)
class Access:
    """The offsets of a tile's elements in a tensor.

    Attributes:
        scalar: offset of the tile, in elements.
        lanes: offsets inside the tile, in elements.
        masks: conditions under which an element is inside the tensor.
    """

    scalar: Expr
    lanes: Expr
    masks: tuple[Mask, ...]


def masks_of(space: Space, coordinates: Iterable[Coordinate]) -> tuple[Mask, ...]:
    """Return a mask for each bound of the `coordinates` that the ranges do not prove."""
    masks: list[Mask] = []
    for coordinate in coordinates:
        if coordinate.looped:
            continue
        bounds = space.bounds(coordinate.index)
        if not space.is_nonnegative(bounds.low):
            masks.append(Mask(coordinate.index, None))
        if not space.is_nonnegative(space.value(coordinate.extent) - 1 - bounds.high):
            masks.append(Mask(coordinate.index, coordinate.extent))
    return tuple(masks)


def access(space: Space, coordinates: Sequence[Coordinate], lanes: frozenset[Symbol]) -> Access:
    """Return the access at `coordinates`, with a mask for each bound the ranges do not prove.

    Terms that contain a symbol of `lanes` make up the offsets inside the tile.
    """
    scalar: list[Expr] = []
    vector: list[Expr] = []
    for coordinate in coordinates:
        for term in sympy.Add.make_args(expand(coordinate.index)):
            part = vector if term.free_symbols & lanes else scalar
            part.append(term * coordinate.stride)
    return Access(sympy.Add(*scalar), sympy.Add(*vector), masks_of(space, coordinates))


def unflatten(flat: Expr, extents: Iterable[Expr]) -> tuple[Expr, ...]:
    """Return the digits of `flat` in the mixed radix `extents`, fastest first.

    The last digit is not taken modulo its extent: it is `flat` divided by the other extents.
    """
    digits: list[Expr] = []
    radices = list(extents)
    below = Integer(1)
    for position, extent in enumerate(radices):
        digit = FloorDiv(flat, below)
        digits.append(digit if position == len(radices) - 1 else Modulo(digit, extent))
        below = below * extent
    return tuple(digits)
