"""A copy of the input, made before the kernel: in channels_last, and rounded to TF32.

Stages 3 and 4, beside the families. Input: a spec or a `KernelPlan`; output: whether such a copy
serves it, what it takes, and the tile of the kernel that makes it. In channels_first a tap shifts a
row of inputs off its alignment, and products in matrix units want the channels of a position side
by side; in either layout, inputs that are rounded already need not pass through registers. All of
this costs more than the copy where a layer has many taps. The copy is its workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sympy import Symbol

from ..geometry.problem import Problem
from ..language.spec import ConvTransposeSpec
from ..symbolic.sizes import Sizes
from .plan import KernelPlan

VECTOR = 16  # bytes that a thread loads at once
MOST_INDEX = 2**31 - 1
CHANNELS = (64, 32, 16)  # of a tile of the copy, where they divide those of the layer
ELEMENTS = 4096  # of a tile, where an image has as many
LEAST_POSITIONS = 16


@dataclass(frozen=True, slots=True)
class CopyTile:
    """What a program copies: positions, each with some of its channels."""

    positions: int
    channels: int


def relayout_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why no copy of the input serves `spec`, None if one can."""
    if spec.layout == "channels_last" and not _rounds(spec):
        return "the input is in channels_last, and nothing rounds it"
    if spec.dtype == "float64":
        return "float64 is bound by its products"
    if spec.in_channels is None or None in spec.spatial:
        return "the extents or the channels of the input are left to run time"
    group = spec.in_channels // spec.groups
    if group * spec.element.itemsize % VECTOR:
        return f"the {group} channels of a group come in no vectors of {VECTOR} bytes"
    if spec.in_channels * math.prod(e for e in spec.spatial if e) > MOST_INDEX:
        return "an image has more elements than 32 bits count"
    return None


def copy_tile(spec: ConvTransposeSpec) -> CopyTile:
    """Return the tile of the copy of an input that `relayout_refusal` does not refuse.

    Its channels are the most that divide the layer's, so that no lane is idle; a few channels, or
    an odd number of them, are padded. Fewer channels leave room for more positions.
    """
    assert spec.in_channels is not None
    most = min(_power_of_two(spec.in_channels), CHANNELS[0])
    channels = next((each for each in CHANNELS if spec.in_channels % each == 0), most)
    inputs = _power_of_two(math.prod(extent for extent in spec.spatial if extent))
    return CopyTile(max(min(ELEMENTS // channels, inputs), LEAST_POSITIONS), channels)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def copy_rounds(plan: KernelPlan) -> bool:
    """Whether the copy is rounded to TF32, so that the kernel has nothing to round."""
    return plan.tile.relayout and _rounds(plan.spec)


def copy_name(spec: ConvTransposeSpec) -> str:
    """Return what a copy of the input is called by what it is for."""
    return "channels_last" if spec.layout == "channels_first" else "rounded"


def copy_text(spec: ConvTransposeSpec) -> str:
    """Return what a copy of the input is, beside one: its layout and whether it is rounded."""
    layout = " in channels_last" if spec.layout == "channels_first" else ""
    return layout + ("," * bool(layout) + " rounded to TF32") * _rounds(spec)


def tile_text(plan: KernelPlan) -> str:
    """Return the plan's tile and what its copy is, if it has one."""
    return f"{plan.tile}{copy_text(plan.spec) if plan.tile.relayout else ''}"


def _rounds(spec: ConvTransposeSpec) -> bool:
    """Whether the products take the input itself, rounded to TF32."""
    return spec.product is not None and spec.product.rounds and not spec.before


def copied_sizes(sizes: Sizes) -> set[Symbol]:
    """Return the sizes that the copy's kernel names: those of an image."""
    return {sizes.named("C_IN"), *(sizes.input(axis) for axis in range(sizes.rank))}


def copied_bytes(spec: ConvTransposeSpec, problem: Problem) -> int:
    """Return the bytes of the copy; making it moves twice as many."""
    return problem.batch * problem.in_channels * problem.inputs * spec.element.itemsize
