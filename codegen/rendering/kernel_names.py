"""The names of a kernel's template, as text.

Stage 5, part of render. Input: a `KernelPlan`; output: a `KernelText`, in which every expression is
already printed. A file has one, and another for the gradient of the input where it has that kernel.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sympy import Symbol

from ..families.window import described_sizes
from ..kernels.gemm import is_overtaken, settled
from ..kernels.packing import packed_grouping
from ..language.spec import ConvTransposeSpec
from ..planning.input_copy import copied_sizes, copy_rounds
from ..planning.plan import KernelPlan
from ..symbolic.lines import WIDTH
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, BLOCKS, Sizes
from ..tables.pointwise import Stage
from .size_lines import list_text, size_lines

TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelText:
    """The names of `kernels/*.jinja` and the parts of them; text, flags and tuples of text only.

    Attributes:
        name, template: the kernel's name, and what prints it.
        summary, formula: what it computes, lines of its docstring.
        triton_dtype, accumulator: the element type in comments, and of the sum.
        has_bias: it adds a bias.
        bias_value: the bias in the accumulator's precision.
        precision: `tl.dot`'s input_precision, a quoted name or the constant that holds it.
        precision_constant: the precision behind the constant, None where a name serves.
        rounds: operands are rounded to TF32.
        settles: some of its products are waited for.
        unpipelined: it is for no Hopper, where its loop must not be pipelined.
        swaps: groups of neighbours become channels, and the other way round.
        preface: lines before its constants.
        constants, arguments, locals: sizes known, given at the launch, and derived from those.
        block_arguments: blocks that are tuned.
        tuned: the file has configs for it.
        argument_names: the names of `arguments`, as a list.
        body: the family's own context.
        x_shape, w_shape, y_shape: the tensors' axes.
        x_box, w_box: the boxes that operands are loaded in; empty where they have pointers.
        after: the stages behind the product, of `acc`.
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
    body: Any
    x_shape: str
    w_shape: str
    y_shape: str
    x_box: str
    w_box: str
    after: tuple[str, ...]


def kernel_text(
    plan: KernelPlan,
    sizes: Sizes,
    name: str,
    summary: str,
    preface: tuple[str, ...] = (),
    used: Iterable[Symbol] = (),
) -> KernelText:
    """Return the names of the template of `plan`'s family; some are given, as of `KernelText`.

    Sizes that are `used` elsewhere in the file are among its constants.
    """
    spec = plan.spec
    family = plan.family
    scribe = Scribe(sizes.space)
    body = family.context(plan, sizes, scribe)
    overtaken = family.products and is_overtaken(plan, sizes, body)
    settles = overtaken and plan.target.is_hopper
    if settles:
        body = settled(body)
    body = _with_stages(plan, body, products=family.products)
    after = tuple(_stage_line("acc", stage) for stage in spec.after)
    body = _with_values(spec, body, staged=bool(after))
    if plan.tile.relayout:
        scribe.used |= copied_sizes(sizes)
    if plan.family.boxed:
        scribe.used |= described_sizes(sizes)
    if not plan.prefix:  # even where no line reads them: they are what the file is for
        scribe.used |= {sizes.named(f"K{sizes.letter(axis)}") for axis in range(spec.rank)}
    constants, arguments, local_lines = size_lines(sizes, scribe, set(used))
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
        bias_value=_bias_value(spec),
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
        **_tensor_shapes(plan, sizes),
        after=after,
    )


def _stage_line(variable: str, stage: Stage) -> str:
    return f"{variable} = {stage.text(stage.row.triton, variable)}"


def cast(spec: ConvTransposeSpec, value: str) -> str:
    """Text of `value` in the spec's dtype, from the accumulator's."""
    if spec.dtype == "bfloat16":
        return f"to_bfloat16({value})"
    same = spec.element.triton == spec.element.accumulator
    return value if same else f"{value}.to(tl.{spec.element.triton})"


def _with_values(spec: ConvTransposeSpec, kernel: Any, *, staged: bool) -> Any:
    """Return a family's context with what each tile stores: `acc`, if stages work on it before.

    A tile without an accumulator is of outputs that no input reaches: bias and stages only.
    """
    tiles = []
    for tile in kernel.outputs:
        if not (tile.acc or staged or spec.bias):
            tiles.append(dataclasses.replace(tile, value="0.0"))
            continue
        name = "acc" if staged or not tile.acc else tile.acc
        source = tile.acc or _unreached(spec, kernel.acc_shape)
        starts, pointers = (f"{name} = {source}",) * (name != source), tile.pointer_lines
        value = cast(spec, kernel.result.replace("acc", name))
        store = f"    tl.store({kernel.y_pointers}{tile.offset}, {value}, mask=y_mask)"
        if len(store) > WIDTH:
            pointers += (f"acc = {kernel.result.replace('acc', name)}",)
            value = cast(spec, "acc")
        tiles.append(
            dataclasses.replace(
                tile,
                start_lines=(*tile.start_lines, *starts),
                pointer_lines=pointers,
                value=value,
            )
        )
    return dataclasses.replace(kernel, outputs=tuple(tiles))


def _unreached(spec: ConvTransposeSpec, shape: str) -> str:
    """Return the sum of outputs that no input reaches, of a `shape` with channels as columns."""
    if spec.bias:
        return f"tl.broadcast_to({_bias_value(spec)}[None, :], ({shape}))"
    return f"tl.zeros(({shape}), dtype=tl.{spec.element.accumulator})"


def _bias_value(spec: ConvTransposeSpec) -> str:
    """Return the bias in the accumulator's precision."""
    wide = spec.element.accumulator
    return "bias" if spec.element.triton == wide else f"bias.to(tl.{wide})"


def _with_stages(plan: KernelPlan, kernel: Any, *, products: bool) -> Any:
    """Return a family's context, stages and rounding put before what it does to its inputs."""
    tiles = []
    for tile in kernel.inputs:
        weights = [weight.name for weight in tile.weights] if products else []
        lines = (*_stages_before(plan, tile.masked, weights, products=products), *tile.lines)
        tiles.append(dataclasses.replace(tile, lines=lines))
    return dataclasses.replace(kernel, inputs=tuple(tiles))


def _stages_before(
    plan: KernelPlan, masked: bool, weights: list[str], *, products: bool
) -> tuple[str, ...]:
    """Lines between a load and its products, in matrix units or not."""
    spec = plan.spec
    narrow = spec.element.triton != spec.element.accumulator
    lines: list[str] = []
    if spec.before:
        lines += [f"x = x.to(tl.{spec.element.accumulator})"] * narrow
        lines += [_stage_line("x", stage) for stage in spec.before]
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


def _tensor_shapes(plan: KernelPlan, sizes: Sizes) -> dict[str, str]:
    spec, p = plan.spec, plan.prefix
    letters = [letter.upper() for letter in AXES[spec.rank]]
    shapes = {}
    for name, end in (("x_shape", "IN"), ("y_shape", "OUT")):
        spatial = [f"{p}{letter}_{end}" for letter in letters]
        axes = [f"{p}C_{end}", *spatial]
        layout = plan.input_layout if end == "IN" else spec.layout
        if layout == "channels_last":
            axes = [*spatial, f"{p}C_{end}"]
        shapes[name] = f"[{p}BATCH, {', '.join(axes)}]"
    if plan.tile.relayout:
        shapes["x_shape"] += f", a copy{' rounded to TF32' if copy_rounds(plan) else ''}"
    packed = f"{packed_shape(plan)}, packed"
    shapes["w_shape"] = _raw_shape(plan) if plan.reads_raw_weight else packed
    shapes |= {"x_box": "", "w_box": ""}
    if plan.family.boxed:
        taps, rows, columns = packed_axes(plan)
        shapes["w_shape"] = f"[{taps} * {rows}, {columns}], packed"
        names = zip(("N", *letters), sizes.box, strict=True)
        axes = [f"BOX_{letter}" if extent > 1 else "1" for letter, extent in names]
        shapes["x_box"] = f"[{', '.join(axes)}, BLOCK_K]"
        shapes["w_box"] = "[BLOCK_N, BLOCK_K]"
    return shapes


def packed_shape(plan: KernelPlan) -> str:
    """Return the axes of the packed weight."""
    return f"[{', '.join(packed_axes(plan))}]"


def packed_axes(plan: KernelPlan) -> tuple[str, str, str]:
    """Return the axes of the packed weight: taps, rows and columns of its matrices."""
    grouping, p = packed_grouping(plan), plan.prefix
    letters = [letter.upper() for letter in AXES[plan.spec.rank]]
    taps = [f"{p}K{letter}" for letter in letters]
    rows, columns = f"{p}C_OUT", f"{p}C_IN" if plan.spec.groups == 1 else f"{p}GROUP_C_IN"
    if grouping is not None:
        taps[-1:] = [f"{p}TAPS_{letters[-1]}"] * (grouping.taps > 1)
        lanes = "PHASES" if grouping.lanes == grouping.width else "PHASE_LANES"
        rows += f" * {p}{lanes}" * (grouping.lanes > 1)
        columns += f" * {p}SPAN" * (grouping.span > 1)
    # With a prefix the names of all taps would not fit the line.
    return "taps" if p else " * ".join(taps) or "1", rows, columns


def _raw_shape(plan: KernelPlan) -> str:
    """Return the axes of a depthwise layer's weight as torch lays it."""
    letters = [letter.upper() for letter in AXES[plan.spec.rank]]
    return f"[{plan.prefix}C_IN, 1, {', '.join(f'{plan.prefix}K{each}' for each in letters)}]"


def _formula(plan: KernelPlan) -> tuple[str, ...]:
    """Say what the kernel computes, axis by axis; of a weight as it lies or as it is packed."""
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
    if plan.reads_raw_weight and plan.prefix:
        weight += ", taps reversed"
    group = "" if spec.groups == 1 else f", ci and co of the same of {spec.groups} groups"
    return (
        f"y[n, co, {outputs}] = sum over ci, {taps} of x[n, ci, {inputs}] * {weight}",
        *_relations(relations, group),
        *_around(spec),
    )


def _around(spec: ConvTransposeSpec) -> list[str]:
    """Say what happens to the inputs before the sum, and to the sum."""
    before, after = (" | ".join(map(str, stages)) for stages in (spec.before, spec.after))
    lines = [f"where x has passed {before}"] if before else []
    steps = ["bias[co] is added"] * spec.bias + [f"it passes {after}"] * bool(after)
    if steps:
        lines.append(f"then {', and '.join(steps)}")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH - 4)]


def _relations(relations: list[str], group: str) -> list[str]:
    """Say what the indices have to do with each other, in one line if it is short."""
    line = f"with {', '.join(relations)}{group}"
    return [line] if len(line) + 4 <= WIDTH else ["with", *relations, *[group[2:]] * bool(group)]
