"""The gather family: implicit GEMM, output-stationary, for every transposed convolution.

Stages 3 and 5 of the family. Input: a `KernelPlan` and its `Sizes`; output: the `GemmContext` of
the template. The positions of a program are outputs of one phase (phases.py has the algebra):

    y[n, co, s*m + residue] = sum over taps j and channels ci of
                              x[n, ci, m + shift - j*step] * w[first_tap + j*tap_step, co, ci]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sympy import Integer

from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem
from ..kernels.builder import (
    ONE,
    Kernel,
    bias_coordinates,
    define_lane,
    define_positions,
    define_program,
    define_start,
    input_index,
    output_index,
    output_start,
    stores,
    tensor,
)
from ..kernels.gemm import GemmContext, channel_lanes, loads, weight_coordinates
from ..kernels.taps import define_phase, define_steps, define_taps
from ..kernels.texts import StoreText
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import single_outputs
from ..planning.input_copy import relayout_refusal
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import Sizes
from .matrix import MatrixFamily


def gather_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    kernel = Kernel(plan, sizes, scribe)
    lines: dict[str, list[str]] = {"program": [], "phase": [], "position": [], "step": []}
    define_program(kernel, lines["program"])
    co = output_start(kernel, lines["program"]) + define_lane(kernel, "co", "BLOCK_N")
    phase = define_phase(kernel, lines["phase"])
    start = define_start(kernel, lines["position"])
    at = define_positions(kernel, lines["position"], start, Integer(1))
    steps = define_steps(kernel, lines["step"], phase)
    ci = steps.channel + define_lane(kernel, "ci", "BLOCK_K")
    shifts, kernel_index = define_taps(kernel, lines["step"], phase, steps)

    last = plan.spec.layout == "channels_last"
    numbers = range(plan.spec.rank)

    def inputs(row: int) -> list[Coordinate]:
        indices = [input_index(kernel, number, at.axes[number], row) for number in numbers]
        sums = [index + shift for index, shift in zip(indices, shifts, strict=True)]
        axes = zip(sums, map(sizes.input, numbers), strict=True)
        return tensor(kernel, at.image, ci, "IN", [[Coordinate(*one, ONE)] for one in axes])

    def outputs(row: int) -> list[Coordinate]:
        axes = []
        for (number, _, axis), residue in zip(kernel.axes, phase.residues, strict=True):
            index = axis.stride * output_index(kernel, number, at.axes[number], row) + residue
            axes.append([Coordinate(index, sizes.output(number), ONE)])
        return tensor(kernel, at.image, co, "OUT", axes)

    weight = weight_coordinates(kernel, kernel_index, (co, sizes.group_out), (ci, sizes.group_in))
    x, w, input_texts = loads(kernel, inputs, ("position", "ci"), (weight, ("ci", "co")))
    order = ("position", "co") if last else ("co", "position")
    y, output_texts = stores(kernel, outputs, order, [], added=False)
    result = "acc" if last else "tl.trans(acc)"
    if plan.spec.stride[-1] > 1 and not last:
        block_m, block_n = sizes.named("BLOCK_M"), sizes.named("BLOCK_N")
        result = f"tl.trans(acc).reshape({block_n} * {block_m})"
        output_texts = tuple(
            _in_one_dimension(kernel, text, first=number == 0)
            for number, text in enumerate(output_texts)
        )
    return GemmContext(
        program_lines=tuple(lines["program"]),
        phase_lines=tuple(lines["phase"]),
        position_lines=tuple(lines["position"]),
        step_lines=tuple(lines["step"]),
        loop=steps.loop,
        lane_lines=channel_lanes(kernel, "ci", "co"),
        x=x,
        w=w,
        y=y,
        bias=kernel.access("bias", bias_coordinates(kernel, co), ("co",)),
        inputs=input_texts,
        outputs=output_texts,
        acc_shape=f"{sizes.named('BLOCK_M')}, {sizes.named('BLOCK_N')}",
        bias_lanes="co",
        y_pointers=f"{y.pointer} + y_lanes",
        result=result,
    )


def _in_one_dimension(kernel: Kernel, text: StoreText, *, first: bool) -> StoreText:
    """Return a store of outputs that are `stride` apart, flattened; the `first` flattens the lanes.

    Triton sees a run along neither dimension of such a tile, and lets neighbouring threads store
    along the first (3.6) or the last one (3.7 to 3.9): so there is but one.
    """
    shape = f"{kernel.sizes.named('BLOCK_N')}, {kernel.sizes.named('BLOCK_M')}"
    flat = shape.replace(", ", " * ")
    lines = [
        "# In one dimension, along which neighbouring threads store neighbours of a row",
        f"y_lanes = y_lanes.reshape({flat})",
    ] * first
    if text.mask_lines:
        lines.append(f"y_mask = tl.broadcast_to(y_mask, ({shape})).reshape({flat})")
    return dataclasses.replace(text, pointer_lines=tuple(lines))


class Gather(MatrixFamily):
    """Serves every layer."""

    name = "gather"
    method = "implicit GEMM, output-stationary: phase by phase, one loop over (channel block, tap)"
    serves = "any"
    template = "kernels/gemm.py.jinja"
    context_type = GemmContext

    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        """Return None: it can serve every spec."""
        return None

    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield the form of single outputs, and that of a copy where it loads whole rows."""
        form = single_outputs(self, spec, phases, problem)
        yield form
        whole = spec.stride[-1] == 1 or spec.layout == "channels_last"
        if whole and relayout_refusal(spec) is None:
            yield dataclasses.replace(form, relayout=True)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
        """Return the names of its template; `scribe.used` then holds the sizes the kernel reads."""
        return gather_context(plan, sizes, scribe)


GATHER = Gather()
