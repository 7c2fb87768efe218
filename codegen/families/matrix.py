"""The common part of the tensor-core families: gather, window and polyphase.

Stage 4, plan. Input: a spec, a `Form` of it and a `Tile`; output: the candidate tiles, their
resources (matrix_registers.py) and their time (matrix_costs.py).
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

LEAST = 16  # smallest dimension of a `tl.dot`
# Not 512: the accumulators then leave enough registers for at most 64 columns, and the cost model
# ranks none of these narrow tiles first (all of tests/support/layers.convgen, float32 and float16,
# both layouts; RTX 4090, H100 and B200).
BLOCK_M = (32, 64, 128, 256)
BLOCK_N = (16, 32, 64, 128, 256)
BLOCK_K = (16, 32, 64)


class MatrixFamily(Family):
    """A family whose programs multiply [positions, channels] by [channels, columns]."""

    def blocks(
        self, spec: ConvTransposeSpec, problem: Problem, form: Form
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield BLOCK_M, BLOCK_N, BLOCK_K and number of warps of a form's candidate tiles."""
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
        """Return the bound on the estimate of registers per thread; 0 to reject the tile."""
        if _share_a_layout(spec, form, tile):
            return 0
        return matrix_registers.most_registers(spec, form, tile, target)

    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        """Estimate the resources of an SM that `tile` takes, for any number of stages."""
        step, read = _loads(spec, form, tile, target)
        staged = form.span > 1 and form.rows == 1
        return Demand(
            registers=matrix_registers.registers_of(spec, form, tile, target),
            expected=matrix_registers.expected_registers(spec, form, tile, target),
            stage_registers=STAGE_GROUPED if staged else 0,
            step=step,
            read=read,
            # A barrier of 8 bytes signals the arrival of each box.
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
        """Whether inputs are loaded one by one through registers (matrix_registers.py)."""
        return matrix_registers.is_staged(spec, form)

    def program_ns(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
    ) -> float:
        """Return the time that a program of `steps` steps takes of its SM, in nanoseconds."""
        return matrix_costs.program_ns(spec, form, tile, target, steps)


def _channels(extents: tuple[int, ...], width: int, channels: int) -> list[int]:
    """Return the candidate blocks of channels: `extents` divided by the `width` of a channel.

    Blocks of twice the layer's `channels` or more are left out, but for the smallest.
    """
    blocks = [max(1, extent // width) for extent in extents if extent >= width]
    least = blocks[0]
    return [block for block in blocks if block < 2 * max(channels, least)] or [least]


def _share_a_layout(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether input and weight tiles have the same shape, so that Triton gives both one layout.

    That is the weight's layout, whose vectors run along the input channels, so that neighbouring
    threads read inputs that are far apart. No such tile was measured to be its layer's fastest.
    """
    apart = spec.layout == "channels_last" or form.relayout or form.span > 1
    return not apart and tile.block_m == tile.block_k == form.columns(tile)


def _loads(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> tuple[int, int]:
    """Return the shared memory of a step's loads, in bytes.

    Returns:
        The bytes that each stage but one holds in flight, and the bytes besides these.
    """
    size, depth = spec.element.itemsize, form.depth(tile)
    weights = form.weights * form.columns(tile) * depth * size
    inputs = tile.block_m * depth * size  # one input tile; a step loads `form.inputs` of them
    if matrix_registers.is_staged(spec, form):
        held, kept = weights, inputs
    else:
        held, kept = weights + form.inputs * inputs, 0
    if _is_one_step(spec, form, tile):  # without a loop there is no pipeline
        return 0, held + kept
    if input_from_shared(spec, form, tile, target) and not kept:
        # If accumulators are in tensor memory, an input is kept once for each of its products: none
        # of 110 row-blocked kernels has more, barriers of 320 bytes aside (Triton 3.6, sm_100).
        copies = form.products - form.inputs if target.has_tensor_memory else 0
        return held, held + copies * inputs
    return held, kept + (weights if from_shared(spec, tile, target) else 0)


def _is_one_step(spec: ConvTransposeSpec, form: Form, tile: Tile) -> bool:
    """Whether a program has one step: a single tap and one block of input channels."""
    channels = spec.in_channels
    known = channels is not None and channels // spec.groups <= tile.block_k
    return known and form.taps <= 1 and not form.boxed
