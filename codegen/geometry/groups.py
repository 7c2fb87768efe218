"""Grouping of the last axis: neighbouring inputs and outputs taken together as channels.

Stage 2, after decompose. Input: the `AxisPhases` of the last axis and a span; output: a `Grouping`.

Take the inputs of a row in groups of `span`, `i = span*g + v`, and its outputs in groups of
`width = stride*span`, `o = width*m + r - offset`. Then `o + p = s*i + d*k` (phases.py) says that
output r of group m gets input v of group `g = m + shift` through kernel index

    k = (r - offset + p - s*v - width*shift) / d           if that is whole and in [0, kernel)

which m does not enter: along the groups the layer has stride 1, `width` times its output channels
and `span` times its input channels, some of whose weights are zero. A program that holds all
outputs of a group stores them side by side, and loads its inputs `span` at a time. Groups that
start with the padding, before the row, may meet fewer input groups: kernel 4, stride 2, padding 1
has two taps so, and three with groups that start with the row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from .phases import AxisPhases

# A larger table of weights would be mostly zeros, or long to print.
MOST_LANES = 32
MOST_SLOTS = 96


@dataclass(frozen=True, slots=True)
class Grouping:
    """The last axis of a layer, grouped.

    Attributes:
        axis: its phases.
        span: inputs of a group.
        unrolled: a program meets all inputs of an output group at once, by `sums`; there are no
            taps along the groups, which start with the row.
    """

    axis: AxisPhases
    span: int
    unrolled: bool = False

    @property
    def offset(self) -> int:
        """Outputs of the first group that lie before the row: none, or what saves a tap."""
        if self.unrolled:
            return 0
        before = self.axis.padding % self.width
        low, high = _shifts(self.axis, self.width, self.span, 0)
        low_before, high_before = _shifts(self.axis, self.width, self.span, before)
        return before if high_before - low_before < high - low else 0

    @property
    def growth(self) -> int:
        """Groups of outputs, less the last axis' input extent; of a span of 1."""
        return -(-(self.axis.growth + self.offset) // self.axis.stride) - 1

    @property
    def width(self) -> int:
        """Outputs of a group."""
        return self.axis.stride * self.span

    @property
    def lanes(self) -> int:
        """`width`, up to a power of two: Triton's tensors have no other extents."""
        return 1 << (self.width - 1).bit_length()

    @property
    def shifts(self) -> tuple[int, int]:
        """Smallest and largest `g - m`: where input and output groups meet."""
        return _shifts(self.axis, self.width, self.span, self.offset)

    @property
    def groups(self) -> AxisPhases:
        """The axis group by group: stride 1, `taps` taps, tap 0 at the largest shift."""
        return AxisPhases(
            kernel=1 if self.unrolled else self.taps,
            stride=1,
            padding=0 if self.unrolled else self.shifts[1],
            dilation=1,
            growth=self.growth + 1,
        )

    @property
    def taps(self) -> int:
        """Input groups that an output group reads."""
        low, high = self.shifts
        return high - low + 1

    @property
    def slack(self) -> int:
        """What makes `taps` ceil((dilation * (kernel - 1) + 1 + slack) / width).

        The outputs of a group meet inputs from floor((padding - offset - dilation * (kernel - 1) +
        stride - 1) / width) to ceil((padding - offset) / width), in groups of `span` inputs, which
        are `width` outputs apart.
        """
        before = (self.offset - self.axis.padding) % self.width
        return before + self.width - self.axis.stride

    def kernel_index(self, tap: int, output: int, place: int) -> int | None:
        """Return k from input `place` of the tap's group to `output` of the group, if there is one.

        Tap 0 is the largest shift.
        """
        axis = self.axis
        low = self.offset + axis.stride * place + self.width * (self.shifts[1] - tap)
        k, rest = divmod(output + axis.padding - low, axis.dilation)
        return k if rest == 0 and 0 <= k < axis.kernel and output < self.width else None

    @property
    def sums(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each output of a group the inputs it meets, as (place, k) with rising k.

        Places count from the first input of the group of that number, and may lie beside it.
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
        """Whether an input and an output of a tap's groups have no kernel index between them."""
        return any(None in inputs for outputs in self.table for inputs in outputs)

    @property
    def spreads(self) -> bool:
        """Whether inputs are multiplied by zero for outputs that they have no weight for."""
        places = (inputs for outputs in self.table for inputs in outputs[: self.width])
        return not self.unrolled and any(None in inputs for inputs in places)

    @property
    def table(self) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
        """Kernel indices as [tap][output lane][input place], None where there is none."""
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
    # Taps are `width` outputs apart at most; counted exactly only where that is few.
    grouping = Grouping(axis, span)
    slots = grouping.lanes * span * (axis.dilation * (axis.kernel - 1) // grouping.width + 1)
    if slots <= MOST_SLOTS:
        slots = grouping.lanes * span * grouping.taps
    if slots > MOST_SLOTS:
        return f"{slots} weights or more for each pair of channels, at most {MOST_SLOTS}"
    return None
