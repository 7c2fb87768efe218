"""The packed weight: its layout, and the kernel index of each of its elements.

Stages 3 and 5, common to the families. Input: a `KernelPlan` or a `Kernel`; output: what the
weight, which torch lays as `[C_in, C_out / groups, K…]`, is packed into, a matrix for each tap:

    packed[tap, C_out * lanes, C_in / groups * span]     the input channels contiguous

Where the last axis is grouped (groups.py), lanes are the outputs of a group, span its inputs, and
a tap leads from a group of inputs to a group of outputs.
"""

from __future__ import annotations

import dataclasses
import math

from sympy import Expr, Integer

from ..geometry.groups import Grouping
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate
from ..symbolic.space import FloorDiv, Modulo
from .builder import ONE, Kernel


def packed_grouping(plan: KernelPlan) -> Grouping | None:
    """Return the grouping that the packed weight has, None where it has the kernel's own taps."""
    grouping = plan.grouping
    return None if grouping is None or grouping.unrolled else grouping


def packed_taps(plan: KernelPlan) -> int:
    """Return the number of matrices of the packed weight."""
    grouping, kernel = packed_grouping(plan), plan.spec.kernel_size
    return math.prod(kernel) if grouping is None else math.prod(kernel[:-1]) * grouping.taps


def kernel_extents(kernel: Kernel) -> list[Expr]:
    """Return the kernel's extents along the axes, by name."""
    return [kernel.sizes.named(f"K{kernel.sizes.letter(axis)}") for axis, _, _ in kernel.axes]


def grouped_reach(kernel: Kernel, tap: Expr, output: Expr, place: Expr) -> Expr:
    """Return dilation * k of the kernel index k along the last axis, where that is grouped.

    It leads from input `place` of a group to `output` of another, `tap` groups before the last one
    that it reaches (groups.py).
    """
    grouping = kernel.plan.grouping
    assert grouping is not None
    axis = grouping.axis
    width = kernel.sizes.named("PHASES") if grouping.width > 1 else ONE
    first = axis.padding - grouping.offset - grouping.width * grouping.shifts[1]
    return width * tap + output - axis.stride * place + first


def grouped_tap(kernel: Kernel, reach: Expr, output: Expr) -> list[Coordinate]:
    """Return coordinates of the kernel index k where dilation * k is `reach`, k itself first.

    Where there is none that leads to `output`, one of the coordinates is out of bounds.
    """
    sizes, grouping = kernel.sizes, kernel.plan.grouping
    assert grouping is not None
    axis, extent = grouping.axis, kernel_extents(kernel)[-1]
    found = []
    if grouping.lanes > grouping.width:
        width = sizes.named("PHASES") if grouping.width > 1 else ONE
        found.append(Coordinate(output, width, Integer(0)))
    if axis.dilation == 1:
        return [Coordinate(reach, extent, ONE), *found]
    # `//` and `%` take no negative numbers.
    dilation = sizes.named(f"DILATION_{sizes.letter(sizes.rank - 1)}")
    low = kernel.scribe.space.number(kernel.scribe.space.bounds(reach).low)
    assert low is not None
    lift = max(0, -(low // axis.dilation))
    lifted = reach + lift * axis.dilation
    return [
        Coordinate(FloorDiv(lifted, dilation) - lift, extent, ONE),
        Coordinate(Modulo(lifted, dilation), ONE, Integer(0)),
        *found,
    ]


def raw_weight(kernel: Kernel, channel: Expr, taps: list[Coordinate]) -> list[Coordinate]:
    """Return coordinates in a depthwise layer's weight as torch lays it, [C, 1, K…].

    The `taps` are coordinates of the flat kernel index, in its unit. The input's gradient takes
    them in reverse order (gradient.py).
    """
    count = math.prod(kernel_extents(kernel))
    if kernel.plan.prefix:
        last = Coordinate(count - 1, count, ONE)
        taps = [last, *(dataclasses.replace(tap, stride=-tap.stride) for tap in taps)]
    return [Coordinate(channel, kernel.sizes.group_out, count), *taps]
