"""Grouping of the last axis: neighbouring inputs and outputs treated as channels.

Stage 2, after decompose. Input: the `AxisPhases` of the last axis and a span; output: a `Grouping`.

Take the inputs of a row in groups of `span`, `i = span*g + v`, and its outputs in groups of
`width = stride*span`, `o = width*m + r - offset`. Then `o + p = s*i + d*k` (phases.py) says that
output r of group m gets input v of group `g = m + shift` through kernel index

    k = (r - offset + p - s*v - width*shift) / d           if that is whole and in [0, kernel)

which does not depend on m: along the groups the layer has stride 1, `width` times the output
channels and `span` times the input channels, with some weights zero. A program computes all outputs
of a group, stores them contiguously, and loads `span` inputs at a time. If groups start in the
padding before the row, an output group may read fewer input groups: for kernel 4, stride 2, padding
1 there are then two taps, and three if groups start with the row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from .phases import AxisPhases

# Limits of the weight table: a larger one would be mostly zeros, or too long to print.
MOST_LANES = 32
MOST_SLOTS = 96


@dataclass(frozen=True, slots=True)
class Grouping:
    """The last axis of a layer, grouped.

    Attributes:
        axis: phases of the axis.
        span: inputs of a group.
        unrolled: whether a program reads all inputs of an output group at once (`sums`). Then there
            are no taps along the groups, and groups start with the row.
    """

    axis: AxisPhases
    span: int
    unrolled: bool = False

    @property
    def offset(self) -> int:
        """Outputs of the first group that lie before the row: 0, unless more of them save a tap."""
        if self.unrolled:
            return 0
        before = self.axis.padding % self.width
        low, high = _shifts(self.axis, self.width, self.span, 0)
        low_before, high_before = _shifts(self.axis, self.width, self.span, before)
        return before if high_before - low_before < high - low else 0

    @property
    def growth(self) -> int:
        """Number of output groups minus the input extent, for a span of 1."""
        return -(-(self.axis.growth + self.offset) // self.axis.stride) - 1

    @property
    def width(self) -> int:
        """Number of outputs of a group."""
        return self.axis.stride * self.span

    @property
    def lanes(self) -> int:
        """`width` rounded up to a power of two, as the extents of Triton's tensors must be."""
        return 1 << (self.width - 1).bit_length()

    @property
    def shifts(self) -> tuple[int, int]:
        """Smallest and largest `g - m` of an input group g that output group m reads."""
        return _shifts(self.axis, self.width, self.span, self.offset)

    @property
    def groups(self) -> AxisPhases:
        """The axis with groups as elements: stride 1, `taps` taps, tap 0 at the largest shift."""
        return AxisPhases(
            kernel=1 if self.unrolled else self.taps,
            stride=1,
            padding=0 if self.unrolled else self.shifts[1],
            dilation=1,
            growth=self.growth + 1,
        )

    @property
    def taps(self) -> int:
        """Number of input groups that an output group reads."""
        low, high = self.shifts
        return high - low + 1

    @property
    def slack(self) -> int:
        """The term with which `taps` is ceil((dilation * (kernel - 1) + 1 + slack) / width).

        An output group reads the input groups with shifts from floor((padding - offset - dilation *
        (kernel - 1) + stride - 1) / width) to ceil((padding - offset) / width): groups of `span`
        inputs are `width` outputs apart.
        """
        before = (self.offset - self.axis.padding) % self.width
        return before + self.width - self.axis.stride

    def kernel_index(self, tap: int, output: int, place: int) -> int | None:
        """Return the kernel index from an input of a tap's group to an output, None without one.

        Args:
            tap: number of the tap; tap 0 has the largest shift.
            output: index of the output in its group.
            place: index of the input in its group.
        """
        axis = self.axis
        low = self.offset + axis.stride * place + self.width * (self.shifts[1] - tap)
        k, rest = divmod(output + axis.padding - low, axis.dilation)
        return k if rest == 0 and 0 <= k < axis.kernel and output < self.width else None

    @property
    def sums(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each output of a group its terms (place, kernel index), by ascending kernel index.

        A place is an offset from the group's first input; it may be negative or beyond the group.
        """
        return tuple(tuple(self._meets(output)) for output in range(self.width))

    def _meets(self, output: int) -> Iterator[tuple[int, int]]:
        for k in range(self.axis.kernel):
            reach = output + self.axis.padding - self.axis.dilation * k
            place, rest = divmod(reach, self.axis.stride)
            if rest == 0:
                yield place, k

    @property
    def has_zeros(self) -> bool:
        """Whether some entry of `table` is None: the packed weight has zeros."""
        return any(None in inputs for outputs in self.table for inputs in outputs)

    @property
    def spreads(self) -> bool:
        """Whether an input is multiplied by zero for an output that it has no weight for."""
        places = (inputs for outputs in self.table for inputs in outputs[: self.width])
        return not self.unrolled and any(None in inputs for inputs in places)

    @property
    def table(self) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
        """Kernel indices as [tap][output lane][input place], None for pairs without a weight."""
        return tuple(
            tuple(
                tuple(self.kernel_index(tap, output, place) for place in range(self.span))
                for output in range(self.lanes)
            )
            for tap in range(self.taps)
        )


@functools.lru_cache(maxsize=256)
def _shifts(axis: AxisPhases, width: int, span: int, offset: int) -> tuple[int, int]:
    meets = [
        output - offset + axis.padding - axis.dilation * k
        for output in range(width)
        for k in range(axis.kernel)
    ]
    inputs = [place // axis.stride for place in meets if place % axis.stride == 0]
    return min(inputs) // span, max(inputs) // span


def refusal(axis: AxisPhases, span: int) -> str | None:
    """Return why `axis` cannot be grouped with `span`, None if it can."""
    if axis.stride * span > MOST_LANES:
        return f"groups of {axis.stride * span} outputs, at most {MOST_LANES}"
    # A lower bound of the taps first: the exact count is slow for large kernels.
    grouping = Grouping(axis, span)
    slots = grouping.lanes * span * (axis.dilation * (axis.kernel - 1) // grouping.width + 1)
    if slots <= MOST_SLOTS:
        slots = grouping.lanes * span * grouping.taps
    if slots > MOST_SLOTS:
        return f"{slots} weights or more for each pair of channels, at most {MOST_SLOTS}"
    return None
