"""The gather family: implicit GEMM, output-stationary, for every transposed convolution.

Stages 3 and 5. Input: a `KernelPlan` and its `Sizes`; output: the `GemmContext` of the template.
The positions of a program are outputs of one phase (geometry/phases.py derives the formula):

    y[n, co, s*m + residue] = sum over taps j and channels ci of
                              x[n, ci, m + shift - j*step] * w[first_tap + j*tap_step, co, ci]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem
from ..kernels.builder import Kernel, define_lane
from ..kernels.coordinates import bias_coordinates, input_at, output_at
from ..kernels.gemm import GemmContext, channel_lanes, loads, weight_coordinates
from ..kernels.outline import define_outline
from ..kernels.stores import single_result, stores
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import single_outputs
from ..planning.input_copy import relayout_refusal
from ..planning.plan import KernelPlan
from ..symbolic.access import TensorIndex
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import Sizes
from .matrix import MatrixFamily


def gather_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    kernel = Kernel(plan, sizes, scribe)
    outline = define_outline(kernel)
    at = outline.positions(outline.start())
    co = outline.co_start + define_lane(kernel, "co", "BLOCK_N")
    ci = outline.steps.channel + define_lane(kernel, "ci", "BLOCK_K")

    def inputs(row: int) -> TensorIndex:
        return input_at(kernel, at, ci, outline.shifts, row)

    def outputs(row: int) -> TensorIndex:
        return output_at(kernel, at, co, outline.phase.residues, row)

    weight = weight_coordinates(kernel, outline.tap, (co, sizes.group_out), (ci, sizes.group_in))
    weights = (weight, ("ci", "co"))
    x, w, input_texts = loads(outline, inputs, ("position", "ci"), weights)
    result = single_result(kernel, flat=plan.spec.stride[-1] > 1)
    y_text, output_texts = stores(kernel, outputs, result)
    return GemmContext(
        outline=outline.text(),
        lane_lines=channel_lanes(kernel, "ci", "co"),
        x=x,
        w=w,
        y=y_text,
        bias=kernel.access("bias", bias_coordinates(kernel, co), ("co",)),
        inputs=input_texts,
        outputs=output_texts,
        acc_shape=result.shape,
        bias_lanes="co",
    )


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
        """Yield the form of single outputs, and one with an input copy where this may be faster.

        That is the case with stride 1 along the last axis, or in channels_last.
        """
        form = single_outputs(self, spec, phases, problem)
        yield form
        whole = spec.stride[-1] == 1 or spec.layout == "channels_last"
        if whole and relayout_refusal(spec) is None:
            yield dataclasses.replace(form, relayout=True)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
        """Return the names in its template; `scribe.used` then holds the sizes the kernel reads."""
        return gather_context(plan, sizes, scribe)


GATHER = Gather()
