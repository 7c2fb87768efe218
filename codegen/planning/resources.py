"""What a tile takes of an SM: registers (registers.py), shared memory, and so its occupancy.

Stage 4, part of plan. Input: a spec, a `Form` of it and a `Tile`; output: numbers that fit or do
not fit a `GpuTarget`. They are estimates; the compiler has the last word (cubin.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import SpecError
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..tables.targets import GpuTarget
from .forms import Form
from .registers import (
    STAGE_GROUPED,
    WARP,
    accumulators_of,
    boxes_fit,
    expected_registers,
    from_shared,
    input_from_shared,
    is_staged,
    registers_of,
)


@dataclass(frozen=True, slots=True)
class Use:
    """What a tile takes of an SM.

    Attributes:
        registers: of a thread, at most but for a few tiles.
        expected: of a thread, on average.
        shared: bytes of shared memory a program.
    """

    registers: int
    expected: int
    shared: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What tiles take of an SM that differ in their stages alone.

    Attributes:
        registers: of a thread at most, with two stages.
        expected: of a thread on average.
        stage_registers: of each stage more.
        step: bytes of a step's loads in flight, of which there are one fewer than stages.
        read: bytes beside them: of the step that products read, of inputs without a second buffer.
        barriers: bytes of the barriers of a stage.
        store: bytes of the output's way to its layout, for which the rest has made room.
    """

    registers: int
    expected: int
    stage_registers: int = 0
    step: int = 0
    read: int = 0
    barriers: int = 0
    store: int = 0

    def use(self, num_stages: int) -> Use:
        """Return what the tile of that many stages takes."""
        loads = (num_stages - 1) * self.step + self.read + num_stages * self.barriers
        registers = self.registers + (num_stages - 2) * self.stage_registers
        return Use(registers, self.expected, max(loads, self.store))


def demand_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
    """Estimate what `tile` and those that differ from it in their stages take of an SM."""
    size, columns = spec.element.itemsize, form.columns(tile)
    if tile.depthwise:  # one step; the way from the loads' layout to the store's
        moved = spec.layout != "channels_last"  # else it stores as it loads
        store = tile.block_m * columns * size if moved else 0
        registers = registers_of(spec, form, tile, target)
        return Demand(registers, registers, store=store)
    step, read = _loads(spec, form, tile, target)
    staged = form.span > 1 and form.rows == 1 and not tile.boxed
    return Demand(
        registers=registers_of(spec, form, tile, target),
        expected=expected_registers(spec, form, tile, target),
        stage_registers=STAGE_GROUPED if staged else 0,
        step=step,
        read=read,
        # One of 8 bytes tells that a box has come.
        barriers=8 * (form.inputs + form.weights) if tile.boxed else 0,
        store=tile.block_m * columns * size,
    )


def _loads(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> tuple[int, int]:
    """Return the bytes of a step that each stage but one has in flight, and those beside them."""
    size, depth = spec.element.itemsize, form.depth(tile)
    weights = form.weights * form.columns(tile) * depth * size
    inputs = tile.block_m * depth * size  # of one input, of which a step has `form.inputs`
    if is_staged(spec, form):
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
    return known and form.taps <= 1 and not tile.boxed


def use_of(spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Use:
    """Estimate what `tile` takes of an SM.

    Registers are those of its accumulators, of its part of a step's tiles, and others. Shared
    memory is that of the pipeline's buffers, or of the output's way to its layout: Triton keeps
    num_stages - 1 steps in flight; what products read from there has one buffer more. Of 2956 tiles
    that were compiled for sm_90 (Triton 3.6) nine in ten take what this says.
    """
    return demand_of(spec, form, tile, target).use(tile.num_stages)


def check_limits(form: Form, spec: ConvTransposeSpec, tile: Tile, target: GpuTarget) -> None:
    """Raise SpecError for a tile that no estimate can save: of a file of choices."""
    if tile.boxed and not boxes_fit(spec, tile, target):
        raise SpecError(
            f"{tile} of family {tile.family} cannot run on {target.name}: boxes want a GPU since "
            "Hopper, channels of one group alone, and 16 positions a warp",
            "choices",
        )
    shared = use_of(spec, form, tile, target).shared
    held = accumulators_of(spec, form, tile)
    if shared > target.shared_per_block or held > target.registers_per_thread:
        raise SpecError(
            f"{tile} cannot run on {target.name}: {shared} bytes of shared memory of "
            f"{target.shared_per_block}, {held} accumulators a thread",
            "choices",
        )


def occupancy(tile: Tile, target: GpuTarget, use: Use) -> int:
    """Return programs resident on an SM: what threads, registers and shared memory allow."""
    return max(1, resident(target, tile.num_warps, use.expected, use.shared))


def resident(target: GpuTarget, num_warps: int, registers: int, shared: int) -> int:
    """Return programs that an SM holds at once: what threads, registers and shared memory allow.

    Args:
        target: the GPU.
        num_warps: warps a program.
        registers: of a thread; allocated in eights.
        shared: bytes a program; CUDA keeps 1 KB more.
    """
    threads = WARP * num_warps
    return min(
        target.threads_per_sm // threads,
        target.blocks_per_sm,
        target.registers_per_sm // (math.ceil(registers / 8) * 8 * threads),
        target.shared_per_sm // (shared + 1024),
    )
