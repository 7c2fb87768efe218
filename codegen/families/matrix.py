"""What the families have in common that multiply in matrix units: gather, window and polyphase.

Stage 4, part of the families. Input: a spec, a `Form` of it and a `Tile`; output: the tiles that
are tried, what they take of an SM (matrix_registers.py) and what they cost (matrix_costs.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..geometry.problem import Problem
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.family import Demand, Family, Form
from ..tables.targets import GpuTarget
from . import matrix_costs, matrix_registers
from .matrix_registers import NUM_WARPS, STAGE_GROUPED, from_shared, input_from_shared

LEAST = 16  # of each dimension of `tl.dot`
# More than 256 rows leave no registers.
BLOCK_M = (32, 64, 128, 256)
BLOCK_N = (16, 32, 64, 128, 256)
BLOCK_K = (16, 32, 64)


class MatrixFamily(Family):
    """A family whose programs multiply [positions, channels] by [channels, columns]."""

    def blocks(
        self, spec: ConvTransposeSpec, problem: Problem, form: Form
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield BLOCK_M, BLOCK_N, BLOCK_K and warps of the tiles of a form that are tried."""
        group_in = problem.in_channels // spec.groups
        group_out = problem.out_channels // spec.groups
        most = 2 * form.positions * problem.batch
        rows = [m for m in BLOCK_M if m <= max(BLOCK_M[0], most)]
        columns = _channels(BLOCK_N, form.lanes, group_out)
        depths = _channels(BLOCK_K, form.span, group_in)
        yield from itertools.product(rows, columns, depths, NUM_WARPS)

    def most_registers(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> int:
        """Return how many registers a thread may be estimated to take; 0 for none of any use."""
        if _share_a_layout(spec, form, tile):
            return 0
        return matrix_registers.most_registers(spec, form, tile, target)

    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        """Estimate what `tile` and those that differ from it in stages alone take of an SM."""
        step, read = _loads(spec, form, tile, target)
        staged = form.span > 1 and form.rows == 1
        return Demand(
            registers=matrix_registers.registers_of(spec, form, tile, target),
            expected=matrix_registers.expected_registers(spec, form, tile, target),
            stage_registers=STAGE_GROUPED if staged else 0,
            step=step,
            read=read,
            # One of 8 bytes tells that a box has come.
            barriers=8 * (form.inputs + form.weights) if form.boxed else 0,
            store=tile.block_m * form.columns(tile) * spec.element.itemsize,
        )

    def limits(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> str | None:
        """Return why `tile` cannot run on `target`, None if it can."""
        if min(tile.block_m, form.columns(tile), form.depth(tile)) >= LEAST:
            return None
        return f"a product has {LEAST} positions, columns and input channels at least"

    def is_staged(self, spec: ConvTransposeSpec, form: Form) -> bool:
        """Whether inputs pass through registers on their way to shared memory, each by itself."""
        return matrix_registers.is_staged(spec, form)

    def program_ns(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
    ) -> float:
        """Return what a program of so many steps costs its SM, in nanoseconds."""
        return matrix_costs.program_ns(spec, form, tile, target, steps)


def _channels(extents: tuple[int, ...], width: int, channels: int) -> list[int]:
    """Return the channels of blocks that have one of `extents` columns, `width` a channel."""
    blocks = [max(1, extent // width) for extent in extents if extent >= width]
    least = blocks[0]
    return [block for block in blocks if block < 2 * max(channels, least)] or [least]


def _share_a_layout(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether the tiles of input and weight have one shape, and so one layout: the weight's.

    Its vectors run along the input channels; neighbouring threads then read far from each other
    along a row. None of them is the fastest measured of its layer.
    """
    apart = spec.layout == "channels_last" or form.relayout or form.span > 1
    return not apart and tile.block_m == tile.block_k == form.columns(tile)


def _loads(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> tuple[int, int]:
    """Return the bytes of a step that each stage but one has in flight, and those beside them."""
    size, depth = spec.element.itemsize, form.depth(tile)
    weights = form.weights * form.columns(tile) * depth * size
    inputs = tile.block_m * depth * size  # of one input, of which a step has `form.inputs`
    if matrix_registers.is_staged(spec, form):
        held, kept = weights, inputs
    else:
        held, kept = weights + form.inputs * inputs, 0
    if _is_one_step(spec, form, tile):  # without a loop there is no pipeline
        return 0, held + kept
    if input_from_shared(spec, form, tile, target) and not kept:
        # Where sums lie in tensor memory, an input is there once for each product of it: of 110
        # kernels with rows (Triton 3.6, sm_100) none has more, but for 320 bytes of barriers.
        copies = form.products - form.inputs if target.has_tensor_memory else 0
        return held, held + copies * inputs
    return held, kept + (weights if from_shared(spec, tile, target) else 0)


def _is_one_step(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether a program has a single tap and all channels at once."""
    channels = spec.in_channels
    known = channels is not None and channels // spec.groups <= tile.block_k
    return known and form.taps <= 1 and not form.boxed
