"""Blocks of rows: neighbouring outputs of the last axis but one, computed by one program.

Stage 2, after decompose. Input: the `AxisPhases` of that axis, and a number of rows; output: a
`RowBlock`.

Output row o gets input row i through kernel index k where `o + p = s*i + d*k` (phases.py). Rows in
blocks of R, a multiple of the stride s, `o = R*m + r`, read the inputs

    i = (R/s)*m + floor(p/s) + (r + p mod s - d*k)/s        where that is whole

The offsets of the last term are fewer than the pairs (r, k) that have one: a program that holds all
rows of a block, and so all phases of the axis, loads an input once for all of them, and a weight
once for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..language.spec import ConvTransposeSpec
from .phases import AxisPhases, decompose

# Each input of a block has its own lines in the kernel, which should stay readable.
MOST_INPUTS = 10
ROWS = (2, 3, 4)  # of a block, tried


@dataclass(frozen=True, slots=True)
class RowBlock:
    """An axis in blocks of `rows` outputs.

    Attributes:
        axis: its phases.
        rows: outputs of a block, a multiple of the stride.
    """

    axis: AxisPhases
    rows: int

    @property
    def advance(self) -> int:
        """Inputs from one block to the next."""
        return self.rows // self.axis.stride

    @property
    def inputs(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """Offset of each input of a block, ascending: the pairs (row, kernel index) it serves."""
        axis = self.axis
        found: dict[int, list[tuple[int, int]]] = {}
        for row in range(self.rows):
            for index in range(axis.kernel):
                reach = row + axis.padding % axis.stride - axis.dilation * index
                offset, rest = divmod(reach, axis.stride)
                if rest == 0:
                    found.setdefault(offset, []).append((row, index))
        return {offset: tuple(found[offset]) for offset in sorted(found)}

    @property
    def products(self) -> int:
        """Pairs of all inputs: `advance` for each kernel index."""
        return self.advance * self.axis.kernel

    @property
    def taps(self) -> AxisPhases:
        """The axis as a loop over taps sees it: with one, as the block has all of its own at once.

        It reads the input of offset 0.
        """
        axis = self.axis
        padding = axis.padding // axis.stride
        return AxisPhases(kernel=1, stride=1, padding=padding, dilation=1, growth=axis.growth)


def rows_refusal(spec: ConvTransposeSpec, rows: int) -> str | None:
    """Return why blocks of `rows` rows cannot serve `spec`, None if they can."""
    if spec.rank == 1:
        return "rank 1 has no rows"
    stride, extent = spec.stride[-2], spec.output_spatial[-2]
    if rows % stride or rows // stride & (rows // stride - 1):
        return f"{rows} are no power of two times the stride of the last axis but one, {stride}"
    if extent is None:
        return "the last extent but one is left to run time"
    if extent < rows:
        return f"it has {extent} rows of outputs"
    block = RowBlock(decompose(spec)[-2], rows)
    inputs = len(block.inputs)
    if inputs == block.products:
        return "its rows share no input"
    return f"a block would read {inputs} rows" if inputs > MOST_INPUTS else None
