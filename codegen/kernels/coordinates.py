"""Coordinates of the input, output and bias elements that belong to a tile's positions.

Stages 3 and 5, common to the families. Input: a `Kernel` and the positions of a tile; output:
coordinates in the tensors. `geometry/groups.py` derives the formulas for a grouped last axis,
`geometry/row_blocks.py` those for row blocks.
"""

from __future__ import annotations

from sympy import Expr, Integer

from ..geometry.groups import Grouping
from ..symbolic.access import Coordinate, TensorIndex
from ..symbolic.sizes import AXES
from .builder import ONE, Kernel, Positions


def input_at(
    kernel: Kernel, at: Positions, channel: Expr, shifts: list[Expr], row: int
) -> TensorIndex:
    """Return the index of the inputs of `channel` at the positions plus `shifts`.

    `row` is the offset of an input row in a row block, 0 without row blocks.
    """
    return tensor(kernel, at.image, channel, "IN", _input_axes(kernel, at, shifts, row))


def output_at(
    kernel: Kernel, out: Positions, channel: Expr, residues: list[Expr], row: int
) -> TensorIndex:
    """Return the index of the outputs of `channel` at the positions of the phase `residues`.

    `row` is the output row in a row block, 0 without row blocks.
    """
    return tensor(kernel, out.image, channel, "OUT", _output_axes(kernel, out, residues, row))


def tensor(
    kernel: Kernel, image: Expr, channel: Expr, end: str, axes: list[list[Coordinate]]
) -> TensorIndex:
    """Return the index in the input (`end` "IN") or output ("OUT"), in the program's group.

    Strides in `axes` are multiples of the axis' stride in the tensor.
    """
    sizes = kernel.sizes
    spatial = [
        sizes.input(axis) if end == "IN" else sizes.output(axis) for axis, _, _ in kernel.axes
    ]
    channels = sizes.named(f"C_{end}")
    per_group = sizes.group_in if end == "IN" else sizes.group_out
    layout = kernel.plan.input_layout if end == "IN" else kernel.plan.spec.layout
    strides = sizes.strides(spatial, channels, layout)
    groups = Integer(sizes.groups)
    return TensorIndex(
        image=Coordinate(image, sizes.named("BATCH"), strides[0]),
        group=Coordinate(kernel.coordinate("group"), groups, per_group * strides[1]),
        channel=Coordinate(channel, per_group, strides[1]),
        axes=tuple(
            tuple(Coordinate(part.index, part.extent, part.stride * stride) for part in parts)
            for parts, stride in zip(axes, strides[2:], strict=True)
        ),
    )


def bias_coordinates(kernel: Kernel, channel: Expr) -> list[Coordinate]:
    """Return the coordinates of `channel`, counted in the program's group, in the bias."""
    sizes = kernel.sizes
    return [
        Coordinate(kernel.coordinate("group"), Integer(sizes.groups), sizes.group_out),
        Coordinate(channel, sizes.group_out, Integer(1)),
    ]


def input_index(kernel: Kernel, number: int, position: Expr, row: int) -> Expr:
    """Return the input index of a position before its shift; in a row block, of input `row`."""
    block = kernel.plan.block
    if block is None or not kernel.sizes.is_blocked(number):
        return position
    name = "ROWS" if block.advance == block.rows else "ROWS_IN"
    return (kernel.sizes.named(name) if block.advance > 1 else ONE) * position + row


def output_index(kernel: Kernel, number: int, position: Expr, row: int) -> Expr:
    """Return the index of a position among its phase's outputs; in a row block, of row `row`."""
    if not kernel.sizes.is_blocked(number):
        return position
    return kernel.sizes.named("ROWS") * position + row


def _input_axes(
    kernel: Kernel, at: Positions, shifts: list[Expr], row: int
) -> list[list[Coordinate]]:
    """Return the input's spatial coordinates; group and place in the group for a grouped axis."""
    sizes, last = kernel.sizes, kernel.plan.spec.rank - 1
    axes = []
    for (number, _, _), position, shift in zip(kernel.axes, at.axes, shifts, strict=True):
        extent, index = sizes.input(number), input_index(kernel, number, position, row) + shift
        if number < last or sizes.span == 1:
            axes.append([Coordinate(index, extent, Integer(1))])
        elif (sizes.space.number(extent) or 1) % _grouping(kernel).span == 0:
            # No partial groups: masking whole groups keeps the load of a group vectorized.
            letter = AXES[kernel.plan.spec.rank][number].upper()
            groups = sizes.named(f"{letter}_IN_GROUPS")
            axes.append(
                [
                    Coordinate(index, groups, sizes.span),
                    Coordinate(at.place, sizes.span, Integer(1)),
                ]
            )
        else:
            axes.append([Coordinate(sizes.span * index + at.place, extent, Integer(1))])
    return axes


def _output_axes(
    kernel: Kernel, out: Positions, residues: list[Expr], row: int
) -> list[list[Coordinate]]:
    """Return the output's spatial coordinates: outputs of one phase, of all if grouped."""
    sizes, last = kernel.sizes, kernel.plan.spec.rank - 1
    axes = []
    for (number, _, axis), position, residue in zip(kernel.axes, out.axes, residues, strict=True):
        extent = sizes.output(number)
        if number < last or kernel.plan.grouping is None:
            index = output_index(kernel, number, position, row)
            axes.append([Coordinate(axis.stride * index + residue, extent, Integer(1))])
            continue
        phases = sizes.named("PHASES") if _grouping(kernel).width > 1 else Integer(1)
        before = sizes.named("OFFSET") if _grouping(kernel).offset else Integer(0)
        axes.append([Coordinate(phases * position + out.place - before, extent, Integer(1))])
        if _grouping(kernel).lanes > _grouping(kernel).width:
            axes[-1].append(Coordinate(out.place, phases, Integer(0)))
    return axes


def _grouping(kernel: Kernel) -> Grouping:
    assert kernel.plan.grouping is not None
    return kernel.plan.grouping
