"""The polyphase family: implicit GEMM whose positions are groups of neighbours in a row.

Stages 3 and 5. Input: a `KernelPlan` with a `Grouping`; output: the `GemmContext` of the template.
A position is a group of PHASES outputs of a row, which reads groups of SPAN inputs
(geometry/groups.py derives the formulas). The product has a column for each pair (output channel,
output of a group) and a depth of pairs (input channel, input of a group); the store interleaves the
columns along the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..geometry.groups import Grouping, refusal
from ..geometry.phases import AxisPhases, decompose
from ..geometry.problem import Problem
from ..kernels.builder import Kernel, define_lane
from ..kernels.coordinates import bias_coordinates, input_at, output_at
from ..kernels.gemm import (
    UNCHANGED,
    GemmContext,
    Reshape,
    channel_lanes,
    loads,
    weight_coordinates,
)
from ..kernels.outline import define_outline
from ..kernels.stores import Result, stores
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import grouped_outputs
from ..planning.input_copy import relayout_refusal
from ..planning.plan import KernelPlan
from ..symbolic.access import TensorIndex
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import BLOCKS, Sizes
from ..symbolic.space import FloorDiv
from .matrix import MatrixFamily

SPANS = (1, 2, 4)


def polyphase_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why the family cannot serve `spec` with any span, None if it can."""
    if spec.layout != "channels_first":
        return "channels_last: gather stores whole lines there"
    reasons = [span_refusal(spec, span) for span in SPANS]
    return reasons[0] if all(reasons) else None


def span_refusal(spec: ConvTransposeSpec, span: int) -> str | None:
    """Return why groups of `span` inputs cannot serve `spec`, None if they can."""
    if span == spec.stride[-1] == 1:
        return "stride 1 along the last axis: a group of one input has one output"
    if span > 1 and spec.spatial[-1] is None:
        # Groups may be partial then, so that inputs are loaded one by one: three layers took 1.13
        # to 1.15 times what they take with row blocks and a span of 1 (H200, Triton 3.6).
        return "the last extent is left to run time"
    return refusal(decompose(spec)[-1], span)


def polyphase_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    assert plan.grouping is not None
    kernel = Kernel(plan, sizes, scribe)
    span, lanes = sizes.span, sizes.lanes
    outline = define_outline(kernel)
    co_start, ci_start = outline.co_start, outline.steps.channel
    tap, start = outline.named_tap(outline.tap), outline.start()
    at = outline.positions(start, span)
    ci = define_lane(kernel, "ci", "BLOCK_K")
    co = define_lane(kernel, "co", "BLOCK_N")
    column = define_lane(kernel, "column", "BLOCK_N", lanes)
    row = ci if span == 1 else define_lane(kernel, "row", "BLOCK_K", span)
    block_m, block_n, block_k = map(sizes.named, BLOCKS)
    lane_lines = [*channel_lanes(kernel, "ci"), f"column = tl.arange(0, {block_n} * {lanes})"]
    if span != 1:
        lane_lines.insert(1, f"row = tl.arange(0, {block_k} * {span})")

    def inputs(row: int) -> TensorIndex:
        return input_at(kernel, at, ci_start + ci, outline.shifts, row)

    def outputs(row: int) -> TensorIndex:
        return output_at(kernel, out, co_start + co, outline.phase.residues, row)

    w = weight_coordinates(
        kernel,
        tap,
        (co_start * lanes + column, sizes.group_out * lanes),
        (ci_start * span + row, sizes.group_in * span),
    )
    # With span 1 the input tile is the left operand of the product, else `_reshape` makes it so.
    order = ("position", "ci") if span == 1 else ("ci", "position")
    w_order = ("row" if span != 1 else "ci", "column")
    x_text, w_text, input_texts = loads(outline, inputs, order, (w, w_order), _reshape(sizes))
    out = outline.outputs(start, lanes)
    result = Result(
        shape=f"{block_m}, {block_n} * {lanes}",
        order=("co", "position_out"),
        laid=lambda acc: f"swap_groups({acc}, {lanes})",
        lane_lines=(*outline.lines.out, *channel_lanes(kernel, "co")),
        added=True,
    )
    bias = bias_coordinates(kernel, co_start + FloorDiv(column, lanes))
    y_text, output_texts = stores(kernel, outputs, result)
    return GemmContext(
        outline=outline.text(),
        lane_lines=tuple(lane_lines),
        x=x_text,
        w=w_text,
        y=y_text,
        bias=kernel.access("bias", bias, ("column",)),
        inputs=input_texts,
        outputs=output_texts,
        acc_shape=result.shape,
        bias_lanes=f"column // {lanes}",
    )


def _reshape(sizes: Sizes) -> Reshape:
    """Return the reshape that merges channel and place in the group into the product's depth."""
    if sizes.span == 1:
        return UNCHANGED
    # Taps overlap, so that each input is loaded, rounded and reordered once per tap: an aligned
    # load is cheaper than keeping the tile in registers.
    comment = "# Channel and place in the group become one axis, as in the packed weight"
    return Reshape((f"x = swap_groups(x, {sizes.span})",), (comment,))


class Polyphase(MatrixFamily):
    """Serves layers in channels_first."""

    name = "polyphase"
    method = (
        "implicit GEMM over groups of neighbours in a row, which become channels: aligned "
        "loads, and all phases of the last axis in one contiguous store"
    )
    serves = "channels_first, where a group of the last axis is small"
    template = "kernels/gemm.py.jinja"
    context_type = GemmContext
    grouped = True

    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        """Return why it cannot serve `spec` with any span, None if it can."""
        return polyphase_refusal(spec)

    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield a form for each span that serves `spec`, and one of span 1 with an input copy."""
        for span in SPANS:
            if span_refusal(spec, span) is not None:
                continue
            form = grouped_outputs(self, spec, Grouping(phases[-1], span), phases, problem)
            yield form
            if span == 1 and relayout_refusal(spec) is None:
                yield dataclasses.replace(form, relayout=True)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
        """Return the names in its template; `scribe.used` then holds the sizes the kernel reads."""
        return polyphase_context(plan, sizes, scribe)


POLYPHASE = Polyphase()
