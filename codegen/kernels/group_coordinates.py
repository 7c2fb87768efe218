"""Coordinates where the last axis may be grouped: of the inputs of a group, and of its outputs.

Stages 3 and 5, common to the families that group it (groups.py has the algebra). Input: a
`Kernel` and the positions of a tile; output: coordinates of the tensors.
"""

from __future__ import annotations

from sympy import Expr, Integer

from ..geometry.groups import Grouping
from ..symbolic.access import Coordinate
from ..symbolic.sizes import AXES
from .builder import Kernel, Positions, input_index, output_index


def group_inputs(
    kernel: Kernel, at: Positions, shifts: list[Expr], row: int
) -> list[list[Coordinate]]:
    """Return the input's spatial coordinates; of a group its place, and its number in the row."""
    sizes, last = kernel.sizes, kernel.plan.spec.rank - 1
    axes = []
    for (number, _, _), position, shift in zip(kernel.axes, at.axes, shifts, strict=True):
        extent, index = sizes.input(number), input_index(kernel, number, position, row) + shift
        if number < last or sizes.span == 1:
            axes.append([Coordinate(index, extent, Integer(1))])
        elif (sizes.space.number(extent) or 1) % _grouping(kernel).span == 0:
            # Whole groups: a mask that is the same for all of a group leaves its load in one piece.
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


def group_outputs(
    kernel: Kernel, out: Positions, residues: list[Expr], row: int
) -> list[list[Coordinate]]:
    """Return the output's spatial coordinates: a phase of each axis, all of a grouped one."""
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
