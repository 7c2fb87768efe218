"""The polyphase family: an implicit GEMM over groups of neighbours of the last axis.

Stages 3 and 5 of the family. Input: a `KernelPlan` with a `Grouping`; output: the `GemmContext` of
the template. A position is a group of PHASES outputs of a row, which read groups of SPAN inputs
(groups.py has the algebra); outputs of a group are columns of the product beside the channels,
its inputs rows of the weight beside theirs, and the store lays the columns side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..geometry.groups import Grouping, refusal
from ..geometry.phases import AxisPhases, decompose
from ..geometry.problem import Problem
from ..kernels.builder import (
    Kernel,
    bias_coordinates,
    define_lane,
    define_positions,
    define_program,
    define_start,
    output_start,
    stores,
    tensor,
)
from ..kernels.gemm import GemmContext, channel_lanes, loads, weight_coordinates
from ..kernels.group_coordinates import group_inputs, group_outputs
from ..kernels.taps import define_flat_tap, define_phase, define_steps, define_taps
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import grouped_outputs
from ..planning.input_copy import relayout_refusal
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate
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
        return "the last extent is left to run time"
    return refusal(decompose(spec)[-1], span)


def polyphase_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    assert plan.grouping is not None
    kernel = Kernel(plan, sizes, scribe)
    span, lanes = sizes.span, sizes.lanes
    parts = ("program", "phase", "position", "step", "out")
    lines: dict[str, list[str]] = {part: [] for part in parts}
    define_program(kernel, lines["program"])
    co_start = output_start(kernel, lines["program"])
    phase = define_phase(kernel, lines["phase"])
    start = define_start(kernel, lines["position"])
    at = define_positions(kernel, lines["position"], start, span)
    steps = define_steps(kernel, lines["step"], phase)
    shifts, tap = define_taps(kernel, lines["step"], phase, steps)
    tap = define_flat_tap(kernel, lines, tap)
    ci = define_lane(kernel, "ci", "BLOCK_K")
    co = define_lane(kernel, "co", "BLOCK_N")
    column = define_lane(kernel, "column", "BLOCK_N", lanes)
    row = ci if span == 1 else define_lane(kernel, "row", "BLOCK_K", span)
    block_m, block_n, block_k = map(sizes.named, BLOCKS)
    lane_lines = [*channel_lanes(kernel, "ci"), f"column = tl.arange(0, {block_n} * {lanes})"]
    if span != 1:
        lane_lines.insert(1, f"row = tl.arange(0, {block_k} * {span})")

    def inputs(row: int) -> list[Coordinate]:
        axes = group_inputs(kernel, at, shifts, row)
        return tensor(kernel, at.image, steps.channel + ci, "IN", axes)

    def outputs(row: int) -> list[Coordinate]:
        axes = group_outputs(kernel, out, phase.residues, row)
        return tensor(kernel, out.image, co_start + co, "OUT", axes)

    w = weight_coordinates(
        kernel,
        tap,
        (co_start * lanes + column, sizes.group_out * lanes),
        (steps.channel * span + row, sizes.group_in * span),
    )
    # The left operand of the product as it is, or what `_operand_lines` makes of groups.
    order = ("position", "ci") if span == 1 else ("ci", "position")
    w_order = ("row" if span != 1 else "ci", "column")
    x_text, w_text, input_texts = loads(kernel, inputs, order, (w, w_order), *_operand_lines(sizes))
    out = define_positions(kernel, lines["out"], start, lanes, "_out")
    lines["out"] += channel_lanes(kernel, "co")
    y_text, output_texts = stores(kernel, outputs, ("co", "position_out"), lines["out"], added=True)
    bias = bias_coordinates(kernel, co_start + FloorDiv(column, lanes))
    return GemmContext(
        program_lines=tuple(lines["program"]),
        phase_lines=tuple(lines["phase"]),
        position_lines=tuple(lines["position"]),
        step_lines=tuple(lines["step"]),
        loop=steps.loop,
        lane_lines=tuple(lane_lines),
        x=x_text,
        w=w_text,
        y=y_text,
        bias=kernel.access("bias", bias, ("column",)),
        inputs=input_texts,
        outputs=output_texts,
        acc_shape=f"{block_m}, {block_n} * {lanes}",
        bias_lanes=f"column // {lanes}",
        y_pointers="y_pointers",
        result=f"swap_groups(acc, {lanes})",
    )


def _operand_lines(sizes: Sizes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a comment, and the lines it is of."""
    if sizes.span == 1:
        return (), ()
    # One step of the loop loads, rounds and reorders a tile; its taps overlap, so that an input
    # passes once a tap: an aligned load is cheaper than keeping it.
    comment = "# Channel and place in the group become one axis, as in the packed weight"
    return (comment,), (f"x = swap_groups(x, {sizes.span})",)


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
        """Yield a form for each span that serves `spec`, and one of a copy of single inputs."""
        for span in SPANS:
            if span_refusal(spec, span) is not None:
                continue
            form = grouped_outputs(self, spec, Grouping(phases[-1], span), phases, problem)
            yield form
            if span == 1 and relayout_refusal(spec) is None:
                yield dataclasses.replace(form, relayout=True)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
        """Return the names of its template; `scribe.used` then holds the sizes the kernel reads."""
        return polyphase_context(plan, sizes, scribe)


POLYPHASE = Polyphase()
