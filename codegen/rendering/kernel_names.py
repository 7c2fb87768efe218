"""The names in a kernel's template, as text.

Stage 5, render. Input: a `KernelPlan`; output: a `KernelText`, in which every expression is already
printed. A file has one for the layer, and one for the input's gradient if it has that kernel.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from sympy import Expr, Symbol

from ..kernels.gemm import is_overtaken
from ..kernels.packing import packed_grouping
from ..kernels.stages import bias_value
from ..kernels.texts import KernelBody
from ..language.spec import ConvTransposeSpec
from ..planning.input_copy import copied_sizes, copy_rounds
from ..planning.plan import KernelPlan
from ..symbolic.lines import WIDTH
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, BLOCKS, Sizes
from .size_lines import list_text, size_lines

TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelText:
    """The names in `kernels/*.jinja` and their parts; text, flags and tuples of text only.

    Attributes:
        name: the kernel's name.
        template: path of the template that prints it.
        summary: first line of its docstring.
        formula: further lines of its docstring, which define the result.
        triton_dtype: element type of the tensors, in Triton's short form.
        accumulator: dtype of the accumulator.
        has_bias: whether it adds a bias.
        bias_value: text of the bias in the accumulator's dtype.
        precision: `tl.dot`'s input_precision: a quoted name, or the constant that holds it.
        precision_constant: value of that constant; None if `precision` is a quoted name.
        rounds: whether operands are rounded to TF32.
        settles: whether it waits for products whose registers the next load may overwrite.
        unpipelined: whether its loop must not be pipelined if the file runs on Hopper, as it was
            generated for another GPU and does not settle its products.
        swaps: whether it merges neighbours in a row with the channels (`swap_groups`).
        preface: lines before its constants.
        constants: lines that define the known sizes.
        arguments: names of the sizes that the launch passes.
        locals: lines that compute sizes from the arguments.
        block_arguments: names of the tuned blocks.
        tuned: whether the file has autotuner configs for it.
        argument_names: the names in `arguments`, as a Python list.
        body: the names that the family adds.
        x_shape, w_shape, y_shape: axes of the tensors, in comments.
        x_box: extents of the boxes in which the input is loaded, as names; empty if operands have
            pointers.
        x_boxed, w_boxed: comments on the operands' descriptors, in lines; empty likewise.
    """

    name: str
    template: str
    summary: str
    formula: tuple[str, ...]
    triton_dtype: str
    accumulator: str
    has_bias: bool
    bias_value: str
    precision: str
    precision_constant: str | None
    rounds: bool
    settles: bool
    unpipelined: bool
    swaps: bool
    preface: tuple[str, ...]
    constants: tuple[str, ...]
    arguments: tuple[str, ...]
    locals: tuple[str, ...]
    block_arguments: tuple[str, ...]
    tuned: bool
    argument_names: str
    body: KernelBody
    x_shape: str
    w_shape: str
    y_shape: str
    x_box: tuple[str, ...]
    x_boxed: tuple[str, ...]
    w_boxed: tuple[str, ...]


def kernel_text(
    plan: KernelPlan,
    sizes: Sizes,
    name: str,
    summary: str,
    preface: tuple[str, ...] = (),
    used: Iterable[Symbol] = (),
) -> KernelText:
    """Return the names in the template of `plan`'s family.

    `name`, `summary` and `preface` are those of `KernelText`. Sizes that are `used` elsewhere in
    the file are defined as constants too.
    """
    spec = plan.spec
    family = plan.family
    boxes = family.boxes(sizes)
    scribe = Scribe(sizes.space)
    body = family.context(plan, sizes, scribe)
    overtaken = is_overtaken(plan, sizes, body.outline.loop)
    settles = overtaken and plan.target.is_hopper
    if plan.tile.relayout:
        scribe.used |= copied_sizes(sizes)
    if not plan.is_backward:  # always define the kernel size: it identifies the layer to readers
        scribe.used |= {sizes.named(f"K{sizes.letter(axis)}") for axis in range(spec.rank)}
    constants, arguments, local_lines = size_lines(sizes, scribe, set(used))
    shapes = _tensor_shapes(plan, boxed=boxes is not None)
    tuned_blocks = tuple(
        size.text for size in sizes.table if size.name in BLOCKS and size.value is None
    )
    product = spec.product if family.products else None
    fallback = product is not None and not product.interpreted
    precision = product.name if product else "ieee"
    return KernelText(
        name=name,
        template=family.template,
        summary=summary,
        formula=_formula(plan),
        triton_dtype=TRITON_DTYPES[spec.dtype],
        accumulator=spec.element.accumulator,
        has_bias=spec.bias,
        bias_value=bias_value(spec),
        precision="PRECISION" if fallback else f'"{precision}"',
        precision_constant=precision if fallback else None,
        rounds=plan.rounds,
        settles=settles,
        unpipelined=overtaken and not settles,
        swaps=family.products and plan.grouping is not None,
        preface=preface,
        constants=constants,
        arguments=arguments,
        locals=local_lines,
        block_arguments=tuned_blocks,
        tuned=bool(plan.tuned),
        argument_names=list_text(arguments),
        body=body,
        **shapes,
        x_box=() if boxes is None else tuple(map(str, boxes.input)),
        x_boxed=() if boxes is None else _boxed(spec, shapes["x_shape"], boxes.input),
        w_boxed=() if boxes is None else _boxed(spec, shapes["w_shape"], boxes.weight),
    )


def _boxed(spec: ConvTransposeSpec, shape: str, box: tuple[Expr, ...]) -> tuple[str, ...]:
    """Return the comment on a descriptor, in two lines if one would be too long."""
    tensor = f"{TRITON_DTYPES[spec.dtype]} {shape},"
    boxes = f"in boxes [{', '.join(map(str, box))}]"
    one = f"{tensor} {boxes}"
    return (one,) if len(f"    x_desc,  # {one}") <= WIDTH else (tensor, boxes)


def _tensor_shapes(plan: KernelPlan, *, boxed: bool) -> dict[str, str]:
    spec, sizes = plan.spec, plan.sizes
    shapes = {}
    for name, end in (("x_shape", "IN"), ("y_shape", "OUT")):
        spatial = [f"{sizes.named(f'{sizes.letter(axis)}_{end}')}" for axis in range(spec.rank)]
        axes = [f"{sizes.named(f'C_{end}')}", *spatial]
        layout = plan.input_layout if end == "IN" else spec.layout
        if layout == "channels_last":
            axes = [*axes[1:], axes[0]]
        shapes[name] = f"[{sizes.named('BATCH')}, {', '.join(axes)}]"
    if plan.tile.relayout:
        shapes["x_shape"] += f", a copy{' rounded to TF32' if copy_rounds(plan) else ''}"
    packed = f"{packed_shape(plan)}, packed"
    shapes["w_shape"] = _raw_shape(plan) if plan.reads_raw_weight else packed
    if boxed:
        taps, rows, columns = packed_axes(plan)
        shapes["w_shape"] = f"[{taps} * {rows}, {columns}], packed"
    return shapes


def packed_shape(plan: KernelPlan) -> str:
    """Return the axes of the packed weight, as a list in text."""
    return f"[{', '.join(packed_axes(plan))}]"


def packed_axes(plan: KernelPlan) -> tuple[str, str, str]:
    """Return the axes of the packed weight: taps, rows and columns of its matrices."""
    grouping, sizes = packed_grouping(plan), plan.sizes
    letters = [sizes.letter(axis) for axis in range(sizes.rank)]
    taps = [f"{sizes.named(f'K{letter}')}" for letter in letters]
    rows, columns = f"{sizes.named('C_OUT')}", f"{sizes.group_in}"
    if grouping is not None:
        taps[-1:] = [f"{sizes.named(f'TAPS_{letters[-1]}')}"] * (grouping.taps > 1)
        rows += f" * {sizes.lanes}" * (grouping.lanes > 1)
        columns += f" * {sizes.named('SPAN')}" * (grouping.span > 1)
    # With a prefix the names of all taps would not fit the line.
    return "taps" if plan.is_backward else " * ".join(taps) or "1", rows, columns


def _raw_shape(plan: KernelPlan) -> str:
    """Return the axes of a depthwise layer's weight in torch's layout, as a list in text."""
    sizes = plan.sizes
    taps = [f"{sizes.named(f'K{sizes.letter(axis)}')}" for axis in range(sizes.rank)]
    return f"[{sizes.named('C_IN')}, 1, {', '.join(taps)}]"


def _formula(plan: KernelPlan) -> tuple[str, ...]:
    """Return the docstring lines that define the result, with the weight as the kernel reads it."""
    spec, letters = plan.spec, AXES[plan.spec.rank]
    outputs, inputs, taps = (
        ", ".join(f"{prefix}{letter}" for letter in letters) for prefix in ("o", "i", "k")
    )
    relations = []
    for letter, s, p, d in zip(letters, spec.stride, spec.padding, spec.dilation, strict=True):
        left = f"o{letter}" + (f" + {p}" if p else "")
        strided = f"{s} * i{letter}" if s > 1 else f"i{letter}"
        dilated = f"{d} * k{letter}" if d > 1 else f"k{letter}"
        relations.append(f"{left} = {strided} + {dilated}")
    weight = f"w[ci, 0, {taps}]" if plan.reads_raw_weight else f"w[{taps}, co, ci]"
    if plan.reads_raw_weight and plan.is_backward:
        weight += ", taps reversed"
    group = "" if spec.groups == 1 else f", ci and co of the same of {spec.groups} groups"
    return (
        f"y[n, co, {outputs}] = sum over ci, {taps} of x[n, ci, {inputs}] * {weight}",
        *_relations(relations, group),
        *_around(spec),
    )


def _around(spec: ConvTransposeSpec) -> list[str]:
    """Return the docstring lines about pointwise stages and bias."""
    before, after = (" | ".join(map(str, stages)) for stages in (spec.before, spec.after))
    lines = [f"where x has passed {before}"] if before else []
    steps = ["bias[co] is added"] * spec.bias + [f"it passes {after}"] * bool(after)
    if steps:
        lines.append(f"then {', and '.join(steps)}")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH - 4)]


def _relations(relations: list[str], group: str) -> list[str]:
    """Return the docstring lines that relate the indices, one line if they fit."""
    line = f"with {', '.join(relations)}{group}"
    return [line] if len(line) + 4 <= WIDTH else ["with", *relations, *[group[2:]] * bool(group)]
