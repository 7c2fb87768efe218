"""Decomposition of a strided transposed convolution into phases.

Stage 2, decompose. Input: a `ConvTransposeSpec`; output: one `AxisPhases` per spatial axis.

Output o reads input i through kernel index k if `o + p = s*i + d*k` (s stride, p padding, d
dilation). With g = gcd(s, d), write `k = a + j*(s/g)`: then `o = s*q + d*a - p` and
`i = q - j*(d/g)` for an integer q. So the taps of a phase are a first tap a in [0, s/g) and every
(s/g)-th kernel index after it, and each tap reads the input d/g before that of the previous tap: no
division by the stride is left. If g > 1, outputs `o + p = e (mod g)` with e in [1, g) have no tap
at all; these empty phases store the bias. The pair (a, e) numbers the s phases:

    o = s*q + v - p      with v = d*a + e                              (v: the phase's offset)
    q = first + m        with m = 0, 1, 2, … and first = ceil((p - v)/s)
    i = q - j*(d/g)      with j in [0, taps), taps = ceil((kernel - a)/(s/g)), 0 if e > 0
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..language.spec import ConvTransposeSpec


@dataclass(frozen=True, slots=True)
class Phase:
    """The outputs `o = stride*m + residue`, m = 0, 1, …, and what they read.

    Attributes:
        residue: output index modulo the stride.
        first_tap: a, the smallest kernel index of the phase.
        gap: e; if positive, no tap reaches these outputs.
        taps: number of taps.
        shift: tap 0 reads input `m + shift`; tap j reads `m + shift - j*input_step`.
    """

    residue: int
    first_tap: int
    gap: int
    taps: int
    shift: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisPhases:
    """The phases of one axis.

    Attributes:
        kernel, stride, padding, dilation: arguments of the layer along the axis.
        growth: `output - (input - 1)*stride`.
    """

    kernel: int
    stride: int
    padding: int
    dilation: int
    growth: int

    @property
    def gaps(self) -> int:
        """The number g = gcd(stride, dilation): one in g residues has taps."""
        return math.gcd(self.stride, self.dilation)

    @property
    def tap_step(self) -> int:
        """s/g: step between the kernel indices of a phase; also the number of first taps."""
        return self.stride // self.gaps

    @property
    def input_step(self) -> int:
        """d/g: step between the inputs of successive taps of a phase."""
        return self.dilation // self.gaps

    @property
    def most_taps(self) -> int:
        """Largest number of taps of a phase; other phases have one less, or none in a gap."""
        return -(-self.kernel // self.tap_step)

    @property
    def least_taps(self) -> int:
        """Smallest number of taps of a phase that is not in a gap."""
        return self.kernel // self.tap_step

    @property
    def full_phases(self) -> int:
        """Number of first taps whose phases have `most_taps` taps; later ones have one less."""
        return self.kernel - (self.most_taps - 1) * self.tap_step

    @property
    def extent_growth(self) -> int:
        """ceil(output/stride) - input: a phase has `input + extent_growth` values of m."""
        return -(-self.growth // self.stride) - 1

    @property
    def whole(self) -> bool:
        """Whether the stride divides the output extent, whatever the input is."""
        return self.growth % self.stride == 0

    @property
    def last_offset(self) -> int:
        """The largest offset v of a phase."""
        return self.dilation * (self.tap_step - 1) + self.gaps - 1

    def first(self, offset: int) -> int:
        """Return the smallest q with o >= 0 in the phase with offset v."""
        return -((offset - self.padding) // self.stride)

    @property
    def reads_padding(self) -> bool:
        """Whether some output has a tap that reads before the first input or after the last.

        The outputs of a phase are `input + (growth - 1 - residue) // stride`.
        """
        return any(
            phase.shift < (phase.taps - 1) * self.input_step
            or phase.shift + (self.growth - 1 - phase.residue) // self.stride > 0
            for phase in self
            if phase.taps
        )

    def phase(self, first_tap: int, gap: int) -> Phase:
        """Return the phase numbered (first_tap, gap)."""
        offset = self.dilation * first_tap + gap
        first = self.first(offset)
        taps = 0 if gap else -(-(self.kernel - first_tap) // self.tap_step)
        residue = self.stride * first + offset - self.padding
        return Phase(residue, first_tap, gap, max(taps, 0), first)

    def __iter__(self) -> Iterator[Phase]:
        for gap in range(self.gaps):
            for first_tap in range(self.tap_step):
                yield self.phase(first_tap, gap)

    @property
    def shifts(self) -> tuple[int, int]:
        """Smallest and largest `i - m` over all taps of all phases; some phase always has taps."""
        tapped = [phase for phase in self if phase.taps]
        low = min(phase.shift - (phase.taps - 1) * self.input_step for phase in tapped)
        return low, max(phase.shift for phase in tapped)


def decompose(spec: ConvTransposeSpec) -> tuple[AxisPhases, ...]:
    """Return the phases of each spatial axis of `spec`, outermost axis first."""
    axes = zip(
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.output_growth,
        strict=True,
    )
    return tuple(
        AxisPhases(kernel=k, stride=s, padding=p, dilation=d, growth=growth)
        for k, s, p, d, growth in axes
    )
