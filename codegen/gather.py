"""The gather family: implicit GEMM, output-stationary, for every transposed convolution.

Stages 3 and 5 of the family. Input: a `KernelPlan` and its `Sizes`; output: the `GemmContext` of
the template. The positions of a program are outputs of one phase (phases.py has the algebra):

    y[n, co, s*m + residue] = sum over taps j and channels ci of
                              x[n, ci, m + shift - j*step] * w[first_tap + j*tap_step, co, ci]
"""

from __future__ import annotations

from sympy import Integer

from .gemm import GemmContext, channel_lanes, triton_sees_rows, weight_coordinates
from .index import Coordinate
from .kernel import (
    Kernel,
    bias_coordinates,
    define_lane,
    define_positions,
    define_program,
    define_start,
    output_start,
    tensor,
)
from .plan import KernelPlan
from .printer import Scribe
from .sizes import Sizes
from .taps import define_phase, define_steps, define_taps


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
    transposed = not last and not triton_sees_rows(kernel)
    inputs, outputs = [], []
    for (number, _, axis), position, shift, residue in zip(
        kernel.axes, at.axes, shifts, phase.residues, strict=True
    ):
        output = axis.stride * position + residue
        inputs.append([Coordinate(position + shift, sizes.input(number), Integer(1))])
        outputs.append([Coordinate(output, sizes.output(number), Integer(1))])
    x = tensor(kernel, at.image, ci, "IN", inputs)
    y = tensor(kernel, at.image, co, "OUT", outputs)
    w = weight_coordinates(kernel, kernel_index, (co, sizes.group_out), (ci, sizes.group_in))
    y_text = kernel.access("y", y, ("position", "co") if last else ("co", "position"))
    return GemmContext(
        program_lines=tuple(lines["program"]),
        phase_lines=tuple(lines["phase"]),
        position_lines=tuple(lines["position"]),
        step_lines=tuple(lines["step"]),
        loop=steps.loop,
        lane_lines=channel_lanes("ci", "co"),
        x=kernel.access("x", x, ("ci", "position") if transposed else ("position", "ci")),
        w=kernel.access("w", w, ("ci", "co")),
        y=y_text,
        bias=kernel.access("bias", bias_coordinates(kernel, co), ("co",)),
        operand_lines=(),
        x_operand="tl.trans(x)" if transposed else "x",
        acc_shape="BLOCK_M, BLOCK_N",
        bias_lanes="co",
        pointer_lines=(),
        y_pointers=f"{y_text.pointer} + y_lanes",
        output_lines=(),
        result="acc" if last else "tl.trans(acc)",
    )
