"""The packed weight: its layout, and the kernel index of each of its elements.

Stages 3 and 5, common to the families. Input: a `KernelPlan` or a `Kernel`; output: coordinates of
packed elements in torch's weight `[C_in, C_out / groups, K…]`. The packed weight has a matrix for
each tap:

    packed[tap, C_out * lanes, C_in / groups * span]     the input channels contiguous

If the last axis is grouped (geometry/groups.py), `lanes` counts the outputs of a group (rounded up
to a power of two), `span` its inputs, and a tap connects an input group to an output group.
Otherwise both are 1.
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
    """Return the grouping of the packed weight's last axis; None if its taps are kernel indices."""
    grouping = plan.grouping
    return None if grouping is None or grouping.unrolled else grouping


def packed_taps(plan: KernelPlan) -> int:
    """Return the number of taps of the packed weight."""
    grouping, kernel = packed_grouping(plan), plan.spec.kernel_size
    return math.prod(kernel) if grouping is None else math.prod(kernel[:-1]) * grouping.taps


def packed_form(plan: KernelPlan) -> tuple[int, int, int] | None:
    """Return taps of the packed weight, outputs and inputs of a group; None if nothing is packed.

    Kernels of one layer that agree in these read the same packed weight.
    """
    if plan.reads_raw_weight:
        return None
    grouping = packed_grouping(plan)
    lanes, span = (1, 1) if grouping is None else (grouping.lanes, grouping.span)
    return packed_taps(plan), lanes, span


def kernel_extents(kernel: Kernel) -> list[Expr]:
    """Return the symbols of the convolution kernel's extents, one for each spatial axis."""
    return [kernel.sizes.named(f"K{kernel.sizes.letter(axis)}") for axis, _, _ in kernel.axes]


def grouped_reach(kernel: Kernel, tap: Expr, output: Expr, place: Expr) -> Expr:
    """Return dilation * k for the kernel index k along the grouped last axis.

    That k connects input `place` of an input group to output `output` of an output group; `tap`
    counts from the largest shift between the two groups (geometry/groups.py).
    """
    grouping = kernel.plan.grouping
    assert grouping is not None
    axis = grouping.axis
    width = kernel.sizes.named("PHASES") if grouping.width > 1 else ONE
    first = axis.padding - grouping.offset - grouping.width * grouping.shifts[1]
    return width * tap + output - axis.stride * place + first


def grouped_tap(kernel: Kernel, reach: Expr, output: Expr) -> list[Coordinate]:
    """Return coordinates of the kernel index k = `reach` / dilation; k itself comes first.

    Further coordinates have stride 0: one is out of bounds if k is not whole, or if `output` is a
    lane beyond the outputs of the group.
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
    # Printed `//` and `%` need a non-negative dividend (printer.py): add a multiple of dilation.
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
    """Return coordinates in a depthwise layer's weight in torch's layout, [C, 1, K…].

    The `taps` are coordinates of the flat kernel index; a stride of 1 is one kernel index. The
    kernel of the input's gradient reverses them (geometry/gradient.py).
    """
    count = math.prod(kernel_extents(kernel))
    if kernel.plan.is_backward:
        last = Coordinate(count - 1, count, ONE)
        taps = [last, *(dataclasses.replace(tap, stride=-tap.stride) for tap in taps)]
    return [Coordinate(channel, kernel.sizes.group_out, count), *taps]
