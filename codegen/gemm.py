"""What the families share that are an implicit GEMM, output-stationary.

Stages 3 and 5. Input: a `Kernel`; output: the names of the template, the packed weight's layout. A
program computes BLOCK_M positions of one phase times BLOCK_N channels; one flat loop over (channel
block, tap) gathers the inputs that reach them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Integer

from .index import Coordinate
from .kernel import AccessText, Kernel, Loop


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmContext:
    """The names of `kernels/gemm.py.jinja`: text, flags and tuples of text only.

    Attributes:
        program_lines: the program's coordinates, from its ids.
        phase_lines: what the phase fixes: taps, shifts and residues.
        position_lines: the outputs of the tile, along the image.
        step_lines: tap and channel block of a step; empty if there is but one step.
        loop: the loop over the steps, None for one step, which needs no loop.
        lane_lines: the lanes over channels.
        x, w, y, bias: the accesses.
        operand_lines: lines that bring the x tile into the product's shape.
        x_operand: the x tile as left operand of the product, [positions, channels].
        acc_shape: extents of the product.
        bias_lanes: the bias of each of its columns.
        pointer_lines, y_pointers: where the elements go.
        output_lines: lines that bring the product into the output's shape, and its lanes there.
        result: the product as it is stored.
    """

    program_lines: tuple[str, ...]
    phase_lines: tuple[str, ...]
    position_lines: tuple[str, ...]
    step_lines: tuple[str, ...]
    loop: Loop | None
    lane_lines: tuple[str, ...]
    x: AccessText
    w: AccessText
    y: AccessText
    bias: AccessText
    operand_lines: tuple[str, ...]
    x_operand: str
    acc_shape: str
    bias_lanes: str
    pointer_lines: tuple[str, ...]
    y_pointers: str
    output_lines: tuple[str, ...]
    result: str


def triton_sees_rows(kernel: Kernel) -> bool:
    """Whether Triton can tell that neighbouring positions are neighbours in memory.

    Its axis analysis loses a run through `//` and `%` by an odd or unknown extent. It then takes
    the last dimension of a tile to be the contiguous one, so that positions must be that one. A
    [positions, channels] tile is the faster one where it is seen through: it is the left operand
    of the product as it is (H100, Triton 3.6, 2026-11: case 57 of KernelBench 4.4 against 5.8 ms).
    """
    spec, sizes = kernel.plan.spec, kernel.sizes
    if spec.rank == 1 and not kernel.plan.fold_batch:
        return True
    extent = kernel.scribe.space.number(sizes.phase(spec.rank - 1))
    return extent is not None and extent % 2 == 0


def weight_coordinates(
    kernel: Kernel, tap: Expr, row: tuple[Expr, Expr], column: tuple[Expr, Expr]
) -> list[Coordinate]:
    """Return coordinates in the packed weight: tap, group, row and column of its matrix.

    Rows and columns come with the extent they have in a group.
    """
    sizes = kernel.sizes
    groups = Integer(sizes.groups)
    taps = sizes.product(sizes.kernel(axis) for axis, _, _ in kernel.axes)
    (row_index, rows), (column_index, columns) = row, column
    # C_OUT has a name of its own: groups * GROUP_C_OUT would be the longer text.
    all_rows = rows * sizes.named("C_OUT") / sizes.group_out
    return [
        Coordinate(tap, taps, all_rows * columns),
        Coordinate(kernel.coordinate("group"), groups, rows * columns),
        Coordinate(row_index, rows, columns),
        Coordinate(column_index, columns, Integer(1)),
    ]


def channel_lanes(*names: str) -> tuple[str, ...]:
    """Return the lines of lanes over the blocks of input and output channels."""
    blocks = {"ci": "BLOCK_K", "co": "BLOCK_N"}
    return tuple(f"{name} = tl.arange(0, {blocks[name]})" for name in names)
