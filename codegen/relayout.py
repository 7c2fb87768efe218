"""A copy of the input in channels_last, made before a kernel that reads that layout.

Stages 3 to 5, beside the families. Input: a spec or a `KernelPlan`; output: whether such a copy
serves it, and the names of the template of the kernel that makes it. In channels_first a tap shifts
a row of inputs off its alignment, and products in matrix units want the channels of a position side
by side: both cost more than the copy where a layer has many taps. The copy is its workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sympy import Symbol

from .plan import KernelPlan, problem_of
from .sizes import AXES, Sizes
from .spec import ConvTransposeSpec

VECTOR = 16  # bytes that a thread loads at once
MOST_INDEX = 2**31 - 1
POSITIONS, CHANNELS = 64, 64  # of a tile of the copy
FORMATS = {2: "channels_last", 3: "channels_last_3d"}  # of torch, by the rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayoutText:
    """The names of `kernels/relayout.py.jinja`, as text.

    Attributes:
        triton_dtype: the element type in comments.
        x_shape, copy_shape: the tensors' axes.
        inputs, factor: the inputs of a channel of an image; as a factor of a product.
        image: the image's number, in 64 bits where the elements of all need them.
        positions, channels: extents of a tile.
        rounds: the copy is rounded to TF32.
        format: torch's name of its memory format, empty where torch has none.
    """

    triton_dtype: str
    x_shape: str
    copy_shape: str
    inputs: str
    factor: str
    image: str
    positions: str
    channels: str
    rounds: bool
    format: str


def relayout_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why no copy of the input serves `spec`, None if one can."""
    if spec.layout == "channels_last":
        return "the input is in channels_last"
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


def copy_rounds(plan: KernelPlan) -> bool:
    """Whether the copy is rounded to TF32, so that the kernel has nothing to round."""
    product = plan.spec.product
    return plan.tile.relayout and product is not None and product.rounds and not plan.spec.before


def copied_sizes(sizes: Sizes) -> set[Symbol]:
    """Return the sizes that the copy's kernel reads."""
    return {sizes.named("C_IN"), *(sizes.input(axis) for axis in range(sizes.rank))}


def copied_bytes(plan: KernelPlan) -> int:
    """Return the bytes of the copy, of nominal sizes where the spec leaves them to run time."""
    problem = problem_of(plan.spec, plan.phases)
    elements = problem.batch * problem.in_channels * problem.inputs
    return elements * plan.spec.element.itemsize if plan.tile.relayout else 0


def relayout_text(plan: KernelPlan, triton_dtype: str) -> RelayoutText | None:
    """Return the names of the template of the copy's kernel, None for a plan without one."""
    if not plan.tile.relayout:
        return None
    letters = [letter.upper() for letter in AXES[plan.spec.rank]]
    spatial = [f"{letter}_IN" for letter in letters]
    inputs = " * ".join(spatial)
    channels, batch = plan.spec.in_channels, plan.spec.batch
    assert channels is not None
    each = channels * math.prod(extent for extent in plan.spec.spatial if extent)
    wide = batch is None or batch * each > MOST_INDEX
    return RelayoutText(
        triton_dtype=triton_dtype,
        x_shape=f"[BATCH, C_IN, {', '.join(spatial)}]",
        copy_shape=f"[BATCH, {', '.join(spatial)}, C_IN]",
        inputs=inputs,
        factor=f"({inputs})" if len(spatial) > 1 else inputs,
        image="tl.cast(image, tl.int64)" if wide else "image",
        positions=str(POSITIONS),
        channels=str(min(CHANNELS, 1 << (channels - 1).bit_length())),
        rounds=copy_rounds(plan),
        format=FORMATS.get(plan.spec.rank, ""),
    )
