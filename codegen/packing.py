"""The packed weight: its layout, and the kernel index of each of its elements.

Stages 3 and 5, common to the families. Input: a `KernelPlan` or a `Kernel`; output: what the
weight, which torch lays as `[C_in, C_out / groups, K…]`, is packed into, a matrix for each tap:

    packed[tap, C_out * lanes, C_in / groups * span]     the input channels contiguous

Where the last axis is grouped (grouping.py), lanes are the outputs of a group, span its inputs, and
a tap leads from a group of inputs to a group of outputs.
"""

from __future__ import annotations

import dataclasses
import math

from sympy import Expr, Integer

from .grouping import Grouping
from .index import Coordinate, FloorDiv, Modulo
from .kernel import ONE, Kernel
from .plan import KernelPlan


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


def grouped_tap(kernel: Kernel, tap: Expr, output: Expr, place: Expr) -> list[Coordinate]:
    """Return coordinates along the last axis of the kernel, where it is grouped.

    They are of the kernel index that leads from input `place` of a group to `output` of another,
    `tap` groups before the last one that it reaches: k of grouping.py. Where there is none, one of
    the coordinates is out of bounds.
    """
    sizes, grouping = kernel.sizes, kernel.plan.grouping
    assert grouping is not None
    axis = grouping.axis
    width = sizes.named("PHASES") if grouping.width > 1 else ONE
    first = axis.padding - grouping.offset - grouping.width * grouping.shifts[1]
    reach = width * tap + output - axis.stride * place + first  # dilation * k
    extent = kernel_extents(kernel)[-1]
    found = []
    if grouping.lanes > grouping.width:
        found.append(Coordinate(output, width, Integer(0)))
    if axis.dilation == 1:
        return [Coordinate(reach, extent, ONE), *found]
    # `//` and `%` take no negative numbers.
    low = kernel.scribe.space.number(kernel.scribe.space.bounds(reach).low)
    assert low is not None
    lift = max(0, -(low // axis.dilation))
    lifted, dilation = reach + lift * axis.dilation, Integer(axis.dilation)
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
