"""What the families of depthwise layers have in common: direct and stencil.

Stage 4, part of the families. Input: a spec, a `Form` of it and a `Tile`; output: the tiles that
are tried, what they take of an SM and what they cost. Each channel is a group of its own, so that
nothing is multiplied in matrix units; all costs are guesses but those of the store.
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
# Nanoseconds of an SM: of an input and a multiplication, from 128 lanes an SM and clock, unfitted;
# of an output, by its bytes.
LOAD = 0.05
PRODUCT = 0.01
STORE = {8: 0.188, 4: 0.094, 2: 0.061}
# Registers of a thread beside its sums, and how far the estimate may be off.
OTHER_REGISTERS = 48
MARGIN = 56
MOST_HELD = 32  # of a thread's part of the inputs of a step
MARGIN_GROUPED = {True: 16, False: 40}  # by whether the target multiplies from shared memory


def depthwise_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why `spec` is not depthwise, None if it is."""
    if 1 < spec.groups == spec.in_channels == spec.out_channels:
        return None
    return "not depthwise: a group of one input and one output channel each"


class DepthwiseFamily(Family):
    """A family whose programs multiply inputs of a channel by its few weights.

    Attributes:
        columns: channels of a tile, by layout.
        loads: inputs that a position of a step loads, by what each costs.
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
        """Yield BLOCK_M, BLOCK_N, BLOCK_K and warps of the tiles of a form that are tried."""
        columns = self.columns[spec.layout]
        columns = tuple(n for n in columns if n < 2 * problem.out_channels) or columns[:1]
        sizes = itertools.product(POSITIONS[spec.layout], columns, NUM_WARPS)
        for block_m, block_n, num_warps in sizes:
            if block_m * block_n >= WARP * num_warps:
                yield block_m, block_n, 1, num_warps

    def stages(self, form: Form) -> tuple[int, ...]:
        """Return the stages that tiles of a form are tried with: their loop has no pipeline."""
        return NUM_STAGES[:1]

    def most_registers(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> int:
        """Return how many registers a thread may be estimated to take; 0 for none of any use."""
        held = tile.block_m * form.span * spec.element.itemsize
        if held > MOST_HELD * 4 * WARP * tile.num_warps:
            return 0
        grouped = MARGIN_GROUPED[target.multiplies_from_shared]
        return target.registers_per_thread - (MARGIN if form.span == 1 else grouped)

    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        """Estimate what `tile` takes of an SM: the products of a tap beside their sums.

        In channels_first a way from the loads' layout to the store's; else it stores as it loads.
        """
        outputs = tile.block_m * form.columns(tile)
        registers = OTHER_REGISTERS + 2 * outputs // (WARP * tile.num_warps)
        moved = spec.layout == "channels_first"
        store = outputs * spec.element.itemsize if moved else 0
        return Demand(registers, registers, store=store)

    def groups(self, spec: ConvTransposeSpec) -> int:
        """Return 1: a program has the channels of several groups."""
        return 1

    def input_channels(self, tile: Tile) -> int:
        """Return the input channels of a step of a tile: those of its outputs."""
        return tile.block_n

    def step_elements(self, form: Form, tile: Tile) -> int:
        """Return elements that a step of a tile loads."""
        return (tile.block_m * form.span + form.lanes) * tile.block_n

    def program_ns(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
    ) -> float:
        """Return what a program of so many steps costs its SM, in nanoseconds."""
        each = self.loads * LOAD + form.lanes * PRODUCT
        step = STEP + tile.block_m * tile.block_n * each
        store = form.rows * tile.block_m * form.columns(tile) * STORE[spec.element.itemsize]
        return steps * step + store
