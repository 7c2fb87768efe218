"""The direct family: depthwise layers without tensor cores, bound by memory.

Stages 3 and 5. Input: a `KernelPlan`, in channels_first with a `Grouping` of span 1 if the last
axis is strided; output: the `DirectContext` of the template. A program computes BLOCK_N channels at
BLOCK_M positions. In channels_last a position is an output of one phase; in channels_first it is
PHASES neighbouring outputs of a row (geometry/groups.py derives the formulas). Each tap multiplies
the inputs at the positions by its weights, in the accumulator's precision.
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
from ..kernels.builder import Kernel, define_lane
from ..kernels.coordinates import bias_coordinates, input_at, output_at
from ..kernels.gemm import channel_lanes
from ..kernels.outline import Outline, define_outline
from ..kernels.packing import grouped_reach, grouped_tap, kernel_extents, raw_weight
from ..kernels.stages import operand_lines
from ..kernels.stores import Result, stores
from ..kernels.texts import AccessText, KernelBody, LoadText, OperandText
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import grouped_outputs, single_outputs
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, Sizes
from .depthwise import DepthwiseFamily, depthwise_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectContext(KernelBody):
    """The names of `kernels/direct.py.jinja`: text and tuples of text only.

    Attributes:
        lane_lines: lines that define the lanes over channels and over the outputs of a position.
        acc_shape: extents of the accumulator.
        flat_shape: extents of the accumulator with positions and their outputs merged into one
            dimension; None if a position has one output.
        phases: outputs of a position; None if it has one.
        over_positions: index that broadcasts a vector over channels along the positions.
        x_value, w_value: text of the input and weight tiles in the accumulator's dtype.
        w_tile: the weight tile that a step loads.
    """

    lane_lines: tuple[str, ...]
    acc_shape: str
    flat_shape: str | None
    phases: str | None
    over_positions: str
    x_value: str
    w_value: str
    w_tile: LoadText


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
    outline = define_outline(kernel, depthwise=True)
    start = outline.start()
    at = outline.positions(start)
    channel = outline.co_start + define_lane(kernel, "co", "BLOCK_N")
    x = input_at(kernel, at, channel, outline.shifts, row=0)
    column = scribe.name("phase", 0, lanes - 1, "phase") if lanes != 1 else Integer(0)
    last = plan.spec.layout == "channels_last"
    x_text = kernel.access("x", x.coordinates(), ("position", "co") if last else ("co", "position"))
    w_text = _weight(outline, channel, column)
    out = outline.outputs(start, lanes) if lanes != 1 else at
    y = output_at(kernel, out, channel, outline.phase.residues, row=0)
    position = "position_out" if lanes != 1 else "position"
    grouped, element = bool(lanes != 1), plan.spec.element
    block_m, block_n = sizes.named("BLOCK_M"), sizes.named("BLOCK_N")
    per_position = f", {lanes}" if grouped else ""
    acc_shape = f"{block_m}, {block_n}" if last else f"{block_n}, {block_m}" + per_position
    result = Result(
        shape=acc_shape,
        order=(position, "co") if last else ("co", position),
        lane_lines=tuple(outline.lines.out),
        added=True,
    )
    same, wide = element.triton == element.accumulator, f"tl.{element.accumulator}"
    y_text, output_texts = stores(kernel, lambda row: y, result)
    return DirectContext(
        outline=outline.text(),
        x=x_text,
        w=w_text,
        y=y_text,
        bias=kernel.access("bias", bias_coordinates(kernel, channel), ("co",)),
        lane_lines=(*channel_lanes(kernel, "co"), *[f"phase = tl.arange(0, {lanes})"] * grouped),
        acc_shape=acc_shape,
        flat_shape=f"{block_n}, {block_m} * {lanes}" if grouped else None,
        phases=str(lanes) if grouped else None,
        over_positions="[None, :]" if last else "[:, None]",
        x_value="x" if same or plan.spec.before else f"x.to({wide})",
        w_value="w" if same else f"w.to({wide})",
        inputs=(
            OperandText("", x_text.masked, x_text.mask_lines, operand_lines(plan, x_text.masked)),
        ),
        w_tile=LoadText("", w_text.masked, w_text.mask_lines),
        outputs=output_texts,
    )


def _weight(outline: Outline, channel: Expr, column: Expr) -> AccessText:
    """Return the access of a step's weights: one per channel, or one per channel and phase."""
    kernel, step, last = outline.kernel, outline.lines.step, outline.steps.taps[-1]
    grouping, unit = kernel.plan.grouping, Integer(1)
    if grouping is None:
        tap = outline.named_tap(outline.tap)
        return kernel.access(
            "w", raw_weight(kernel, channel, [Coordinate(tap, unit, unit, looped=True)]), ("co",)
        )
    rank = kernel.plan.spec.rank
    outer = sympy.expand((outline.tap - last) / kernel.sizes.kernel(rank - 1))
    outer = outline.named_tap(outer)
    first = Coordinate(outer, unit, kernel_extents(kernel)[-1], looped=True)
    reach = grouped_reach(kernel, last, column, Integer(0))
    letter = AXES[rank][-1]
    reach = _reach(kernel, step, letter, reach, column)
    index, *others = grouped_tap(kernel, reach, column)
    found = kernel.scribe.define(step, f"k{letter}", index.index, None)
    unmoved = dataclasses.replace(index, index=found, stride=Integer(0))
    weight = raw_weight(kernel, channel, [first, unmoved, *others])
    w = kernel.access("w", weight, ("co", "phase"))
    if found == 0:
        return w
    sign = "-" if kernel.plan.is_backward else "+"
    return dataclasses.replace(w, added=f"{w.added} {sign} {found}[None, :]")


def _reach(kernel: Kernel, lines: list[str], letter: str, reach: Expr, column: Expr) -> Expr:
    """Define the lanes of the step's `reach` (dilation * kernel index) and return their symbol.

    The lane is printed first: Triton's interpreter turns constexpr + tensor into a constexpr.
    """
    grouping = kernel.plan.grouping
    assert grouping is not None
    moved = kernel.scribe.space.reduce(reach - column)
    if moved == 0:
        return reach
    name = f"k{letter}" if grouping.axis.dilation == 1 else f"reach_{letter}"
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
        """Yield its form: single outputs, or groups of PHASES outputs if that saves stores."""
        if spec.layout == "channels_last" or phases[-1].stride == 1:  # a group has one output
            yield single_outputs(self, spec, phases, problem)
        else:
            yield grouped_outputs(self, spec, Grouping(phases[-1], 1), phases, problem)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> DirectContext:
        """Return the names in its template; `scribe.used` then holds the sizes the kernel reads."""
        return direct_context(plan, sizes, scribe)


DIRECT = Direct()
