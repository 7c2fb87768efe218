"""The common part of the depthwise families: direct and stencil.

Stage 4, plan. Input: a spec, a `Form` of it and a `Tile`; output: the candidate tiles, their
resources and their time. Each channel is a group of its own, so that tensor cores are of no use.
The figures of loads and products are guesses; those of stores are fitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import ClassVar

from ..geometry.problem import Problem
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.costs import STEP
from ..planning.family import NUM_STAGES, Demand, Family, Form
from ..planning.resources import WARP
from ..tables.targets import GpuTarget

NUM_WARPS = (4, 8)
POSITIONS = {"channels_first": (64, 128, 256, 512), "channels_last": (4, 8, 16, 32, 64)}
# Nanoseconds of an SM: per loaded input and per multiplication, for 128 lanes per SM and clock
# (not fitted); per stored output, by bytes of an element.
LOAD = 0.05
PRODUCT = 0.01
STORE = {8: 0.188, 4: 0.094, 2: 0.061}
# Registers per thread besides its sums, and the margin for the error of the estimate.
OTHER_REGISTERS = 48
MARGIN = 56
MOST_HELD = 32  # registers per thread for the inputs of a step
MARGIN_GROUPED = {True: 16, False: 40}  # by `GpuTarget.multiplies_from_shared`


def depthwise_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why `spec` is not depthwise, None if it is."""
    if 1 < spec.groups == spec.in_channels == spec.out_channels:
        return None
    return "not depthwise: a group of one input and one output channel each"


class DepthwiseFamily(Family):
    """A family whose programs multiply the inputs of each channel by its few weights.

    Attributes:
        columns: candidate numbers of channels of a tile, by layout.
        loads: inputs that a step loads for a position, in units of the cost `LOAD`.
    """

    products = False
    packs = False
    grouped = True
    takes_rows = False
    columns: ClassVar[dict[str, tuple[int, ...]]]
    loads: ClassVar[int]

    def blocks(
        self, spec: ConvTransposeSpec, problem: Problem, form: Form
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield BLOCK_M, BLOCK_N, BLOCK_K and number of warps of a form's candidate tiles."""
        columns = self.columns[spec.layout]
        columns = tuple(n for n in columns if n < 2 * problem.out_channels) or columns[:1]
        sizes = itertools.product(POSITIONS[spec.layout], columns, NUM_WARPS)
        for block_m, block_n, num_warps in sizes:
            if block_m * block_n >= WARP * num_warps:
                yield block_m, block_n, 1, num_warps

    def stages(self, form: Form) -> tuple[int, ...]:
        """Return the candidate numbers of stages: only one, as Triton pipelines no such loop."""
        return NUM_STAGES[:1]

    def most_registers(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> int:
        """Return the bound on the estimate of registers per thread; 0 to reject the tile."""
        held = tile.block_m * form.span * spec.element.itemsize
        if held > MOST_HELD * 4 * WARP * tile.num_warps:
            return 0
        grouped = MARGIN_GROUPED[target.multiplies_from_shared]
        return target.registers_per_thread - (MARGIN if form.span == 1 else grouped)

    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        """Estimate the resources of an SM that `tile` takes.

        Registers hold the sums and the products of one tap. In channels_first, shared memory
        converts the sums from the layout of the loads to that of the store.
        """
        outputs = tile.block_m * form.columns(tile)
        registers = OTHER_REGISTERS + 2 * outputs // (WARP * tile.num_warps)
        moved = spec.layout == "channels_first"
        store = outputs * spec.element.itemsize if moved else 0
        return Demand(registers, registers, store=store)

    def groups(self, spec: ConvTransposeSpec) -> int:
        """Return 1: a program computes channels of several groups, so it does not count groups."""
        return 1

    def input_channels(self, tile: Tile) -> int:
        """Return the input channels of a step: as many as the tile's output channels."""
        return tile.block_n

    def step_elements(self, form: Form, tile: Tile) -> int:
        """Return the number of elements that a step of `tile` loads."""
        return (tile.block_m * form.span + form.lanes) * tile.block_n

    def program_ns(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
    ) -> float:
        """Return the time that a program of `steps` steps takes of its SM, in nanoseconds."""
        each = self.loads * LOAD + form.lanes * PRODUCT
        step = STEP + tile.block_m * tile.block_n * each
        store = form.rows * tile.block_m * form.columns(tile) * STORE[spec.element.itemsize]
        return steps * step + store
