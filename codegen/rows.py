"""Blocks of rows: neighbouring outputs of the last axis but one, computed by one program.

Stage 2, after decompose. Input: the `AxisPhases` of that axis, of stride 1, and a number of rows;
output: a `RowBlock`.

At stride 1 output row o gets input row i through kernel index k where `o + p = i + d*k`
(phases.py). Rows in blocks of R, `o = R*m + r`, read the inputs `i = R*m + p + (r - d*k)`. The
offsets r - d*k are fewer than the pairs (r, k): a program that holds all rows of a block loads an
input once for all of them, and a weight once for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .phases import AxisPhases, decompose
from .spec import ConvTransposeSpec

# Each input of a block has its own lines in the kernel, which should stay readable.
MOST_INPUTS = 10


@dataclass(frozen=True, slots=True)
class RowBlock:
    """An axis of stride 1, in blocks of `rows` outputs.

    Attributes:
        axis: its phases.
        rows: outputs of a block.
    """

    axis: AxisPhases
    rows: int

    @property
    def inputs(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """Offset of each input of a block, ascending: the pairs (row, kernel index) it serves."""
        found: dict[int, list[tuple[int, int]]] = {}
        for row in range(self.rows):
            for index in range(self.axis.kernel):
                found.setdefault(row - self.axis.dilation * index, []).append((row, index))
        return {offset: tuple(found[offset]) for offset in sorted(found)}

    @property
    def taps(self) -> AxisPhases:
        """The axis as a loop over taps sees it: with one, as the block has all of its own at once.

        It reads the input of offset 0.
        """
        axis = self.axis
        return AxisPhases(kernel=1, stride=1, padding=axis.padding, dilation=1, growth=axis.growth)


def rows_refusal(spec: ConvTransposeSpec, rows: int) -> str | None:
    """Return why blocks of `rows` rows cannot serve `spec`, None if they can."""
    if spec.rank == 1:
        return "rank 1 has no rows"
    kernel, stride, dilation = (axes[-2] for axes in (spec.kernel_size, spec.stride, spec.dilation))
    if stride > 1:
        return "the stride of the last axis but one is not 1"
    if kernel == 1 or dilation >= rows:
        return "its rows share no input"
    extent = spec.output_spatial[-2]
    if extent is None:
        return "the last extent but one is left to run time"
    if extent < rows:
        return f"it has {extent} rows of outputs"
    inputs = len(RowBlock(decompose(spec)[-2], rows).inputs)
    return f"a block would read {inputs} rows" if inputs > MOST_INPUTS else None
