"""The copy of the input that can precede a kernel: in channels_last, and rounded to TF32.

Stage 4, beside the families. Input: a spec or a `KernelPlan`; output: whether a copy serves it, its
size, and the tile of the kernel that makes it. A copy pays for layers of many taps: in
channels_first most taps read a row of inputs unaligned, and matrix units want the channels of a
position contiguous; in either layout, inputs that are already rounded need not be staged through
registers. The copy is a workspace of the call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sympy import Symbol

from ..geometry.problem import Problem
from ..language.spec import ConvTransposeSpec
from ..symbolic.sizes import Sizes
from .plan import KernelPlan

VECTOR = 16  # bytes of a thread's widest load
MOST_INDEX = 2**31 - 1
CHANNELS = (64, 32, 16)  # channels of a copy's tile, the first that divides the layer's
ELEMENTS = 4096  # elements of a copy's tile, if an image has as many
LEAST_POSITIONS = 16


@dataclass(frozen=True, slots=True)
class CopyTile:
    """The tile of the copy's kernel: a number of positions by a number of channels."""

    positions: int
    channels: int


def relayout_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why no copy of the input serves `spec`, None if one can."""
    if spec.layout == "channels_last" and not _rounds(spec):
        return "a copy would gain nothing: the input is in channels_last and is not rounded"
    if spec.dtype == "float64":
        return "a copy would gain nothing: float64 is bound by its products"
    if spec.in_channels is None:
        return "the channels of the input are left to run time"
    group = spec.in_channels // spec.groups
    if group * spec.element.itemsize % VECTOR:
        return f"the {group} channels of a group are no multiple of {VECTOR} bytes"
    if spec.in_channels * math.prod(_known(spec)) > MOST_INDEX:
        return "an image has more than 2**31 - 1 elements"
    return None


def copy_tile(spec: ConvTransposeSpec) -> CopyTile:
    """Return the tile of the copy's kernel, for a spec that `relayout_refusal` accepts.

    It has the most of `CHANNELS` that divide the layer's channels, so that no lane is idle; if none
    do, channels are padded. Fewer channels leave room for more positions.
    """
    assert spec.in_channels is not None
    most = min(_power_of_two(spec.in_channels), CHANNELS[0])
    channels = next((each for each in CHANNELS if spec.in_channels % each == 0), most)
    positions = ELEMENTS // channels
    if None not in spec.spatial:
        positions = min(positions, _power_of_two(math.prod(_known(spec))))
    return CopyTile(max(positions, LEAST_POSITIONS), channels)


def _known(spec: ConvTransposeSpec) -> list[int]:
    """Return the extents of the input that the spec fixes."""
    return [extent for extent in spec.spatial if extent is not None]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def copy_rounds(plan: KernelPlan) -> bool:
    """Whether the plan's copy is rounded to TF32, so that its kernel need not round."""
    return plan.tile.relayout and _rounds(plan.spec)


def copy_name(spec: ConvTransposeSpec) -> str:
    """Return the name of the copy, by its purpose; kernels and arguments are named after it."""
    return "channels_last" if spec.layout == "channels_first" else "rounded"


def copy_text(spec: ConvTransposeSpec) -> str:
    """Return the words that describe the copy: its layout, and whether it is rounded."""
    layout = " in channels_last" if spec.layout == "channels_first" else ""
    return layout + ("," * bool(layout) + " rounded to TF32") * _rounds(spec)


def tile_text(plan: KernelPlan) -> str:
    """Return the plan's tile as text, with the words of `copy_text` if it has a copy."""
    return f"{plan.tile}{copy_text(plan.spec) if plan.tile.relayout else ''}"


def _rounds(spec: ConvTransposeSpec) -> bool:
    """Whether the products take the input rounded to TF32, with no stage in between."""
    return spec.product is not None and spec.product.rounds and not spec.before


def copied_sizes(sizes: Sizes) -> set[Symbol]:
    """Return the sizes that the copy's kernel uses: those of an image."""
    return {sizes.named("C_IN"), *(sizes.input(axis) for axis in range(sizes.rank))}


def copied_bytes(spec: ConvTransposeSpec, problem: Problem) -> int:
    """Return the bytes of the copy; making the copy moves twice as many."""
    return problem.batch * problem.in_channels * problem.inputs * spec.element.itemsize
