"""The names of the emitted file's templates, as text.

Stage 5, part of render. Input: a `KernelPlan`; output: a `FileContext`, in which every expression
is already printed.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any

from . import __version__
from .families import find_family
from .plan import KernelPlan, Tile
from .pointwise import Stage
from .printer import WIDTH, Scribe
from .sizes import AXES, BLOCKS, Size, Sizes, make_sizes
from .spec import ConvTransposeSpec
from .wrappertext import WrapperContext, wrapper_context

_TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_COMMENTS = {
    "BLOCK_M": "output positions of a tile",
    "BLOCK_N": "output channels of a tile",
    "BLOCK_K": "input channels of a step",
    "PHASE": "outputs of a phase: ceil(output / stride)",
    "TAPS": "taps of a phase",
    "SPAN": "neighbouring inputs of a row, taken together as channels",
    "PHASES": "neighbouring outputs of a row, computed together",
    "PHASE_LANES": "PHASES, up to a power of two",
    "ROWS": "neighbouring rows of outputs, computed together",
    "BLOCKS": "blocks of ROWS rows",
    "OFFSET": "outputs of a row's first group that lie before the row",
    "IN_GROUPS": "groups of SPAN inputs in a row",
    "GROUPS": "groups of PHASES outputs in a row",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContext:
    """The names of `module.py.jinja` and its parts; text, flags and tuples of text only.

    Attributes:
        version, spec, target, tile, grid, choices, command: the header's lines.
        family, template: the family, and what prints its kernel.
        layer, op, rank: `ConvTranspose2d`, `conv_transpose2d`, 2.
        unbatched, batched: dimensions of an input without its batch axis, and with it.
        dtype, triton_dtype, accumulator: the element type in torch, in comments, of the sum.
        precision: `tl.dot`'s input_precision, a quoted name or the constant that holds it.
        precision_constant: the precision behind the constant, None where a name serves.
        rounds: operands are rounded to TF32.
        functions: helper functions that the kernel calls.
        interpreted: the kernel has branches for Triton's interpreter.
        constants, arguments, locals: sizes known, given at the launch, and derived from those.
        block_arguments, configs: of an autotuned kernel.
        argument_names: the names of `arguments`, as a list.
        kernel: the family's own context.
        formula: what the kernel computes, lines of its docstring.
        x_shape, w_shape, y_shape: the tensors' axes.
        after, store: stages and casts behind the product, and what is stored.
        precompiled: machine code may lie beside the file.
        wrapper: what the wrapper functions and the module need.
    """

    version: str
    spec: str
    target: str
    tile: str
    grid: str
    choices: str | None
    command: str
    family: str
    template: str
    layer: str
    op: str
    rank: int
    unbatched: int
    batched: int
    dtype: str
    triton_dtype: str
    accumulator: str
    has_bias: bool
    precision: str
    precision_constant: str | None
    rounds: bool
    functions: tuple[str, ...]
    interpreted: bool
    constants: tuple[str, ...]
    arguments: tuple[str, ...]
    locals: tuple[str, ...]
    block_arguments: tuple[str, ...]
    configs: tuple[str, ...]
    argument_names: str
    kernel: Any
    formula: tuple[str, ...]
    x_shape: str
    w_shape: str
    y_shape: str
    after: tuple[str, ...]
    store: str
    precompiled: bool
    wrapper: WrapperContext


def file_context(plan: KernelPlan, *, precompiled: bool = False) -> FileContext:
    """Return every name the templates of `plan`'s family use; `precompiled`: machine code ships."""
    spec = plan.spec
    family = find_family(plan.family)
    sizes = make_sizes(spec, plan.phases, plan.tiles, plan.grouping, plan.block)
    scribe = Scribe(sizes.space)
    kernel = _with_stages(spec, family.context(plan, sizes, scribe), products=family.products)
    constants, arguments, local_lines = _size_lines(sizes, scribe)
    tuned_blocks = tuple(name for name in BLOCKS if sizes.values[sizes.named(name)] is None)
    functions = _functions(spec)
    product = spec.product if family.products else None
    fallback = product is not None and not product.interpreted
    precision = product.name if product else "ieee"
    return FileContext(
        version=__version__,
        spec=str(spec),
        target=_target_text(plan),
        tile=str(plan.tile) if not plan.tuned else f"one of {len(plan.tuned)}, tuned at run time",
        grid=_grid_text(plan),
        choices=plan.choices_digest,
        command="convgen build" if precompiled else _command(plan),
        family=plan.family,
        template=family.template,
        layer=f"ConvTranspose{spec.rank}d",
        op=f"conv_transpose{spec.rank}d",
        rank=spec.rank,
        unbatched=spec.rank + 1,
        batched=spec.rank + 2,
        dtype=f"torch.{spec.dtype}",
        triton_dtype=_TRITON_DTYPES[spec.dtype],
        accumulator=spec.element.accumulator,
        has_bias=spec.bias,
        precision="PRECISION" if fallback else f'"{precision}"',
        precision_constant=precision if fallback else None,
        rounds=product is not None and product.rounds,
        functions=functions,
        interpreted=spec.dtype == "bfloat16" or fallback,
        constants=constants,
        arguments=arguments,
        locals=local_lines,
        block_arguments=tuned_blocks,
        configs=tuple(_config(tile, tuned_blocks) for tile in plan.tuned),
        argument_names="[" + ", ".join(f'"{name}"' for name in arguments) + "]",
        kernel=kernel,
        formula=_formula(spec),
        **_tensor_shapes(plan),
        after=tuple(_stage_line("acc", stage) for stage in spec.after),
        store=_cast(spec, kernel.result),
        precompiled=precompiled,
        wrapper=wrapper_context(plan, sizes, arguments),
    )


def _command(plan: KernelPlan) -> str:
    command = f"convgen emit {shlex.quote(str(plan.spec))} --target {plan.target.name}"
    return command + (" --choices FILE" if plan.choices_digest else "")


def _size_lines(
    sizes: Sizes, scribe: Scribe
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the constants, arguments and locals for the sizes the kernel reads."""
    constants: list[str] = []
    arguments: list[str] = []
    local_lines: list[str] = []
    for size in reversed(sizes.table):
        if size.symbol not in scribe.used:
            continue
        if size.block is not None:
            scribe.used.add(sizes.named(size.block))
            local_lines.insert(
                0, f"{size.name} = tl.cdiv({scribe.text(size.definition)}, {size.block})"
            )
        elif size.value is not None:
            constants.insert(0, _constant(size, sizes))
        elif size.definition is not None:
            local_lines.insert(0, f"{size.name} = {scribe.text(size.definition)}")
        elif size.name not in BLOCKS:
            arguments.insert(0, size.name)
    return tuple(constants), tuple(arguments), tuple(local_lines)


def _constant(size: Size, sizes: Sizes) -> str:
    comment = None
    if sizes.block is not None and size.name == "BLOCK_M":
        what = "groups of outputs" if sizes.grouping is not None else "outputs"
        comment = f"positions of a tile: {what}, in each of ROWS rows"
    elif sizes.grouping is not None:
        comment = {
            "BLOCK_M": "positions of a tile: groups of outputs",
            f"TAPS_{sizes.letter(sizes.rank - 1)}": "groups of inputs that a group reads",
        }.get(size.name)
    comment = comment or _COMMENTS.get(size.name) or _COMMENTS.get(size.name.partition("_")[2])
    comment = comment or _COMMENTS.get(size.name.partition("_")[0])
    return f"{size.name} = tl.constexpr({size.value})" + (f"  # {comment}" if comment else "")


def _functions(spec: ConvTransposeSpec) -> tuple[str, ...]:
    helpers = {stage.row.helper for stage in (*spec.before, *spec.after)}
    names = {helper for helper in helpers if helper is not None}
    return tuple(sorted(names | ({"to_bfloat16"} if spec.dtype == "bfloat16" else set())))


def _config(tile: Tile, tuned_blocks: tuple[str, ...]) -> str:
    blocks = ", ".join(f'"{name}": {getattr(tile, name.lower())}' for name in tuned_blocks)
    return f"{{{blocks}}}, num_warps={tile.num_warps}, num_stages={tile.num_stages}"


def _stage_line(variable: str, stage: Stage) -> str:
    return f"{variable} = {stage.text(stage.row.triton, variable)}"


def _cast(spec: ConvTransposeSpec, value: str) -> str:
    """Text of `value` in the spec's dtype, from the accumulator's."""
    if spec.dtype == "bfloat16":
        return f"to_bfloat16({value})"
    same = spec.element.triton == spec.element.accumulator
    return value if same else f"{value}.to(tl.{spec.element.triton})"


def _with_stages(spec: ConvTransposeSpec, kernel: Any, *, products: bool) -> Any:
    """Return a family's context, stages and rounding put before what it does to its inputs."""
    tiles = []
    for tile in kernel.inputs:
        weights = [weight.name for weight in tile.weights] if products else []
        lines = (*_stages_before(spec, tile.masked, weights, products=products), *tile.lines)
        tiles.append(dataclasses.replace(tile, lines=lines))
    return dataclasses.replace(kernel, inputs=tuple(tiles))


def _stages_before(
    spec: ConvTransposeSpec, masked: bool, weights: list[str], *, products: bool
) -> tuple[str, ...]:
    """Lines between a load and its products, in matrix units or not."""
    narrow = spec.element.triton != spec.element.accumulator
    lines: list[str] = []
    if spec.before:
        lines += [f"x = x.to(tl.{spec.element.accumulator})"] * narrow
        lines += [_stage_line("x", stage) for stage in spec.before]
        if masked and not all(stage.row.keeps_zero for stage in spec.before):
            lines.append("x = tl.where(x_mask, x, 0.0)  # padding stays zero")
        lines += [f"x = {_cast(spec, 'x')}"] * (narrow and products)
    if not products:
        return tuple(lines)
    if spec.product is not None and spec.product.rounds:
        lines.append("x = round_to_tf32(x)")
    if spec.dtype == "bfloat16":
        lines += [
            "if INTERPRETED:  # its tl.dot does not know bfloat16",
            *(f"    {name} = {name}.to(tl.float32)" for name in ("x", *weights)),
        ]
    return tuple(lines)


def _tensor_shapes(plan: KernelPlan) -> dict[str, str]:
    spec, grouping = plan.spec, plan.grouping
    letters = [letter.upper() for letter in AXES[spec.rank]]
    shapes = {}
    for name, end in (("x_shape", "IN"), ("y_shape", "OUT")):
        spatial = [f"{letter}_{end}" for letter in letters]
        axes = [f"C_{end}", *spatial]
        if spec.layout == "channels_last":
            axes = [*spatial, f"C_{end}"]
        shapes[name] = f"[BATCH, {', '.join(axes)}]"
    taps = [f"K{letter}" for letter in letters]
    rows, columns = "C_OUT", "C_IN" if spec.groups == 1 else "GROUP_C_IN"
    if grouping is not None:
        taps[-1:] = [f"TAPS_{letters[-1]}"] * (grouping.taps > 1)
        lanes = " * PHASES" if grouping.lanes == grouping.width else " * PHASE_LANES"
        rows += lanes * (grouping.lanes > 1)
        columns += " * SPAN" * (grouping.span > 1)
    if not find_family(plan.family).products:
        columns = "1"  # a channel of its own is all that an output reads
    shapes["w_shape"] = f"[{' * '.join(taps) or 1}, {rows}, {columns}]"
    return shapes


def _formula(spec: ConvTransposeSpec) -> tuple[str, ...]:
    """Say what the kernel computes, axis by axis."""
    letters = AXES[spec.rank]
    outputs, inputs, taps = (
        ", ".join(f"{prefix}{letter}" for letter in letters) for prefix in ("o", "i", "k")
    )
    relations = []
    for letter, s, p, d in zip(letters, spec.stride, spec.padding, spec.dilation, strict=True):
        left = f"o{letter}" + (f" + {p}" if p else "")
        strided = f"{s} * i{letter}" if s > 1 else f"i{letter}"
        dilated = f"{d} * k{letter}" if d > 1 else f"k{letter}"
        relations.append(f"{left} = {strided} + {dilated}")
    group = "" if spec.groups == 1 else f", ci and co of the same of {spec.groups} groups"
    return (
        f"y[n, co, {outputs}] = sum over ci, {taps} of x[n, ci, {inputs}] * w[{taps}, co, ci]",
        *_relations(relations, group),
    )


def _relations(relations: list[str], group: str) -> list[str]:
    """Say what the indices have to do with each other, in one line if it is short."""
    line = f"with {', '.join(relations)}{group}"
    return [line] if len(line) + 4 <= WIDTH else ["with", *relations, *[group[2:]] * bool(group)]


def _target_text(plan: KernelPlan) -> str:
    target = plan.target
    return f"{target.name} ({target.product}, {target.arch}, {target.sms} SMs)"


def _grid_text(plan: KernelPlan) -> str:
    if plan.nominal:
        return plan.grid_text
    cost = plan.cost
    return (
        f"{plan.grid_text}, {cost.programs} programs = {cost.waves:.2f} waves "
        f"over {plan.target.sms} SMs x {cost.occupancy}"
    )
