"""Conversions of values in an emitted kernel: pointwise stages, casts, rounding of operands.

Stages 3 and 5, common to the families. Input: a `KernelPlan`; output: lines of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..language.spec import ConvTransposeSpec
from ..planning.input_copy import copy_rounds
from ..planning.plan import KernelPlan
from ..tables.pointwise import Stage


def stage_lines(variable: str, stages: Iterable[Stage]) -> tuple[str, ...]:
    """Return the lines that apply the stages to `variable`, one line a stage."""
    return tuple(f"{variable} = {stage.text(stage.row.triton, variable)}" for stage in stages)


def cast(spec: ConvTransposeSpec, value: str) -> str:
    """Return the text that casts `value` from the accumulator's dtype to the spec's."""
    if spec.dtype == "bfloat16":
        return f"to_bfloat16({value})"
    same = spec.element.triton == spec.element.accumulator
    return value if same else f"{value}.to(tl.{spec.element.triton})"


def bias_value(spec: ConvTransposeSpec) -> str:
    """Return the text of the bias in the accumulator's dtype."""
    wide = spec.element.accumulator
    return "bias" if spec.element.triton == wide else f"bias.to(tl.{wide})"


def operand_lines(plan: KernelPlan, masked: bool, weights: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the lines between the load of `x` and its products: stages, casts and rounding.

    Args:
        plan: the kernel's plan.
        masked: whether `x` is loaded with `x_mask`; masked-off inputs are 0.
        weights: names of the weights that are loaded together with `x`.
    """
    spec, products = plan.spec, plan.family.products
    narrow = spec.element.triton != spec.element.accumulator
    lines: list[str] = []
    if spec.before:
        lines += [f"x = x.to(tl.{spec.element.accumulator})"] * narrow
        lines += stage_lines("x", spec.before)
        if masked and not all(stage.row.keeps_zero for stage in spec.before):
            lines.append("x = tl.where(x_mask, x, 0.0)  # padding stays zero")
        lines += [f"x = {cast(spec, 'x')}"] * (narrow and products)
    if not products:
        return tuple(lines)
    if spec.product is not None and spec.product.rounds and not copy_rounds(plan):
        lines.append("x = round_to_tf32(x)")
    if spec.dtype == "bfloat16":
        lines += [
            "if INTERPRETED:  # its tl.dot does not know bfloat16",
            *(f"    {name} = {name}.to(tl.float32)" for name in ("x", *weights)),
        ]
    return tuple(lines)
