"""Row blocks: neighbouring rows of outputs that one program computes together.

Stage 2, after decompose. Input: the `AxisPhases` of the last axis but one, and a number of rows;
output: a `RowBlock`.

Output row o reads input row i through kernel index k if `o + p = s*i + d*k` (phases.py). Take rows
in blocks of R, a multiple of the stride s: `o = R*m + r`. They read the inputs

    i = (R/s)*m + floor(p/s) + (r + p mod s - d*k)/s        if that is whole

Several pairs (r, k) share a value of the last term, that is, an input. A program computes all rows
of a block, and so all phases of the axis: it loads each input once for all pairs, and each weight
once for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..language.spec import ConvTransposeSpec
from .phases import AxisPhases, decompose

# Each input of a block has its own lines in the kernel: a limit keeps the kernel readable.
MOST_INPUTS = 10
ROWS = (2, 3, 4)  # sizes of blocks that are tried


@dataclass(frozen=True, slots=True)
class RowBlock:
    """An axis in blocks of `rows` outputs.

    Attributes:
        axis: phases of the axis.
        rows: rows of outputs in a block, a multiple of the stride.
    """

    axis: AxisPhases
    rows: int

    @property
    def advance(self) -> int:
        """Step between the inputs of successive blocks."""
        return self.rows // self.axis.stride

    @property
    def inputs(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """For each input of a block, by ascending offset: its pairs (output row, kernel index)."""
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
        """Number of pairs in `inputs`: `advance` per kernel index."""
        return self.advance * self.axis.kernel

    @property
    def taps(self) -> AxisPhases:
        """The axis as the tap loop sees it: a single tap, because the block unrolls its own.

        That tap reads the input with offset 0.
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
        return f"{rows} is no power of two times the stride of the last axis but one, {stride}"
    if extent is not None and extent < rows:
        return f"it has {extent} rows of outputs"
    block = RowBlock(decompose(spec)[-2], rows)
    inputs = len(block.inputs)
    if inputs == block.products:
        return "its rows share no input"
    return f"a block would read {inputs} rows" if inputs > MOST_INPUTS else None
