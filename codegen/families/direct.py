"""The direct family: depthwise layers without matrix units, bound by memory.

Stages 3 and 5 of the family. Input: a `KernelPlan`, in channels_first with a `Grouping` of span 1;
output: the `DirectContext` of the template. A program has BLOCK_N channels at BLOCK_M positions: in
channels_last outputs of one phase, side by side along the channels; in channels_first PHASES
neighbouring outputs of a row each (groups.py has the algebra). Each tap multiplies the inputs
there by the weights that lead to these outputs, all in the accumulator's precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy import Expr, Integer

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
from ..kernels.gemm import channel_lanes
from ..kernels.group_coordinates import group_inputs, group_outputs
from ..kernels.packing import grouped_reach, grouped_tap, kernel_extents, raw_weight
from ..kernels.taps import define_flat_tap, define_phase, define_steps, define_taps
from ..kernels.texts import AccessText, LoadText, Loop, OperandText, StoreText
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import grouped_outputs, single_outputs
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, Sizes
from .depthwise import DepthwiseFamily, depthwise_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectContext:
    """The names of `kernels/direct.py.jinja`: text and tuples of text only.

    Attributes:
        program_lines, phase_lines, position_lines, step_lines, loop: as of `GemmContext`.
        x, w, y, bias: the accesses.
        lane_lines: the lanes over channels, and over outputs of a position.
        acc_shape, flat_shape: extents of the sum; with a position's outputs as positions, None
            if they are that already.
        phases: outputs of a position; None if it is one.
        over_positions: the index that spreads what a channel has over the positions.
        x_value, w_value: the tiles in the accumulator's precision.
        inputs, w_tile, outputs: the tiles at x, w and y: one of each.
        y_pointers: where the elements go.
        result: the accumulator as it is stored.
    """

    program_lines: tuple[str, ...]
    phase_lines: tuple[str, ...]
    position_lines: tuple[str, ...]
    step_lines: tuple[str, ...]
    loop: Loop | None
    x: AccessText
    w: AccessText
    y: AccessText
    bias: AccessText
    lane_lines: tuple[str, ...]
    acc_shape: str
    flat_shape: str | None
    phases: str | None
    over_positions: str
    x_value: str
    w_value: str
    inputs: tuple[OperandText, ...]
    w_tile: LoadText
    outputs: tuple[StoreText, ...]
    y_pointers: str
    result: str


def direct_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why the family cannot serve `spec`, None if it can."""
    if (reason := depthwise_refusal(spec)) is not None:
        return reason
    grouped = spec.layout == "channels_first" and spec.stride[-1] > 1
    return refusal(decompose(spec)[-1], 1) if grouped else None


def direct_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> DirectContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    kernel = Kernel(plan, sizes, scribe)
    lanes = sizes.lanes
    parts = ("program", "phase", "position", "step", "out")
    lines: dict[str, list[str]] = {part: [] for part in parts}
    define_program(kernel, lines["program"])
    channel = output_start(kernel, lines["program"]) + define_lane(kernel, "co", "BLOCK_N")
    phase = define_phase(kernel, lines["phase"])
    start = define_start(kernel, lines["position"])
    at = define_positions(kernel, lines["position"], start, Integer(1))
    steps = define_steps(kernel, lines["step"], phase, depthwise=True)
    shifts, tap = define_taps(kernel, lines["step"], phase, steps)
    x = tensor(kernel, at.image, channel, "IN", group_inputs(kernel, at, shifts, 0))
    column = scribe.name("phase", 0, lanes - 1, "phase") if lanes != 1 else Integer(0)
    last = plan.spec.layout == "channels_last"
    x_text = kernel.access("x", x, ("position", "co") if last else ("co", "position"))
    w_text = _weight(kernel, lines, channel, (tap, steps.taps[-1]), column)
    out = define_positions(kernel, lines["out"], start, lanes, "_out") if lanes != 1 else at
    outputs = group_outputs(kernel, out, phase.residues, 0)
    y = tensor(kernel, out.image, channel, "OUT", outputs)
    position = "position_out" if lanes != 1 else "position"
    order = (position, "co") if last else ("co", position)
    y_text, output_texts = stores(kernel, lambda row: y, order, lines["out"], added=True)
    grouped, element = bool(lanes != 1), plan.spec.element
    block_m, block_n = sizes.named("BLOCK_M"), sizes.named("BLOCK_N")
    per_position = f", {lanes}" if grouped else ""
    same, wide = element.triton == element.accumulator, f"tl.{element.accumulator}"
    return DirectContext(
        program_lines=tuple(lines["program"]),
        phase_lines=tuple(lines["phase"]),
        position_lines=tuple(lines["position"]),
        step_lines=tuple(lines["step"]),
        loop=steps.loop,
        x=x_text,
        w=w_text,
        y=y_text,
        bias=kernel.access("bias", bias_coordinates(kernel, channel), ("co",)),
        lane_lines=(*channel_lanes(kernel, "co"), *[f"phase = tl.arange(0, {lanes})"] * grouped),
        acc_shape=f"{block_m}, {block_n}" if last else f"{block_n}, {block_m}" + per_position,
        flat_shape=f"{block_n}, {block_m} * {lanes}" if grouped else None,
        phases=str(lanes) if grouped else None,
        over_positions="[None, :]" if last else "[:, None]",
        x_value="x" if same or plan.spec.before else f"x.to({wide})",
        w_value="w" if same else f"w.to({wide})",
        inputs=(OperandText("", x_text.masked, x_text.mask_lines, ()),),
        w_tile=LoadText("", w_text.masked, w_text.mask_lines),
        outputs=output_texts,
        y_pointers="y_pointers",
        result="acc",
    )


def _weight(
    kernel: Kernel,
    lines: dict[str, list[str]],
    channel: Expr,
    taps: tuple[Expr, Expr],
    column: Expr,
) -> AccessText:
    """Return the access of the weights of a step, one a channel or one for each of its phases.

    Of the `taps`, one is flat, the other its part along the last axis.
    """
    tap, last = taps
    grouping, unit = kernel.plan.grouping, Integer(1)
    if grouping is None:
        tap = define_flat_tap(kernel, lines, tap)
        return kernel.access(
            "w", raw_weight(kernel, channel, [Coordinate(tap, unit, unit, looped=True)]), ("co",)
        )
    rank = kernel.plan.spec.rank
    outer = sympy.expand((tap - last) / kernel.sizes.kernel(rank - 1))
    outer = define_flat_tap(kernel, lines, outer)
    first = Coordinate(outer, unit, kernel_extents(kernel)[-1], looped=True)
    reach = grouped_reach(kernel, last, column, Integer(0))
    name = f"k{AXES[rank][-1]}"
    reach = _reach(kernel, lines["step"], name, reach, column)
    index, *others = grouped_tap(kernel, reach, column)
    found = kernel.scribe.define(lines["step"], name, index.index, None)
    unmoved = dataclasses.replace(index, index=found, stride=Integer(0))
    weight = raw_weight(kernel, channel, [first, unmoved, *others])
    w = kernel.access("w", weight, ("co", "phase"))
    if found == 0:
        return w
    sign = "-" if kernel.plan.prefix else "+"
    return dataclasses.replace(w, added=f"{w.added} {sign} {found}[None, :]")


def _reach(kernel: Kernel, lines: list[str], name: str, reach: Expr, column: Expr) -> Expr:
    """Define the lanes of the step's `reach`, as `name` where there is no dilation.

    The lane comes first: Triton's interpreter makes a constant of a constant plus a tensor.
    """
    grouping = kernel.plan.grouping
    assert grouping is not None
    moved = kernel.scribe.space.reduce(reach - column)
    if moved == 0:
        return reach
    if grouping.axis.dilation > 1:
        name = f"reach_{name[1:]}"
    lines.append(f"{name} = {column}{kernel.offset(moved)}")
    bounds = kernel.scribe.space.bounds(reach)
    return kernel.scribe.name(name, bounds.low, bounds.high, "phase")


class Direct(DepthwiseFamily):
    """Serves depthwise layers."""

    name = "direct"
    method = (
        "one multiplication a tap and output, without matrix units, in full precision; in "
        "channels_first all phases of the last axis in one contiguous store"
    )
    serves = "depthwise layers"
    template = "kernels/direct.py.jinja"
    context_type = DirectContext
    columns: ClassVar = {"channels_first": (1, 2, 4, 8, 16), "channels_last": (32, 64, 128, 256)}
    loads = 1

    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        """Return why it cannot serve `spec`, None if it can."""
        return direct_refusal(spec)

    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield its form: single outputs, or all phases of the last axis in channels_first."""
        if spec.layout == "channels_last" or phases[-1].stride == 1:  # a group has one output
            yield single_outputs(self, spec, phases, problem)
        else:
            yield grouped_outputs(self, spec, Grouping(phases[-1], 1), phases, problem)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> DirectContext:
        """Return the names of its template; `scribe.used` then holds the sizes the kernel reads."""
        return direct_context(plan, sizes, scribe)


DIRECT = Direct()
