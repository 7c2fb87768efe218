"""The names of the emitted file's templates, as text.

Stage 5, part of render. Input: a `KernelPlan`; output: a `FileContext`, in which every expression
is already printed.
"""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass

from sympy import Symbol

from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.caveats import caveats_of
from ..planning.input_copy import tile_text
from ..planning.plan import KernelPlan
from ..symbolic.lines import WIDTH
from ..symbolic.sizes import Sizes
from ..version import __version__
from .copy_names import RelayoutText, relayout_text
from .fold import Value
from .glue import GlueFacts, GlueText, glue_text, glue_values, lanes_text, packed_text
from .kernel_names import KernelText, kernel_text
from .pack_names import PackText, pack_text
from .wrapper_names import WrapperContext, wrapper_context

_BACKWARD = "Compute one tile of the input's gradient, y, from the output's, x."
_PREFACE = (
    "",
    "# The input's gradient is a transposed convolution of the output's, of these sizes; its",
    "# weight is the layer's, channels swapped and taps reversed.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContext:
    """The names of `module.py.jinja` and its parts; text, flags and tuples of text only.

    Attributes:
        version, spec, target, tile, grid, choices, command: the header's lines.
        family: its name.
        caveats: what its user should mind, lines of the docstring.
        layer, op: `ConvTranspose2d`, `conv_transpose2d`.
        dtype: the element type.
        has_bias: the layer has a bias.
        precision_constant: the precision behind the constant, None where a name serves.
        packs: what the kernels that pack the weight need: for the layer, for the input's gradient;
            none for one whose kernel reads the weight as it lies.
        repeats: launches are repeated without what Triton looks up for each.
        unpipelined: it is for no Hopper, where loops must not be pipelined.
        helpers: helper functions that the kernels call.
        shared_names: what a file imports from the runtime, where that is a file of its own.
        packed: taps of a packed weight, outputs of a group, inputs of a group: a tuple; empty if
            the kernel reads the weight as it lies.
        layout: the spec's.
        interpreted: the kernels have branches for Triton's interpreter.
        configs: of an autotuned kernel.
        kernels: the layer's own; then that of the input's gradient, where there is one.
        precompiled: machine code may lie beside the file.
        wrapper: what the launch needs, and the checks of sizes.
        glue: what files have in common, with what this one states put in.
        gradient: what the functions for the input's gradient need, None where torch gives it.
        gradient_tile: family and tile of its kernel.
        relayout: what the kernel that copies the input needs, None where there is no copy.
    """

    version: str
    spec: str
    target: str
    tile: str
    grid: str
    choices: str | None
    command: str
    family: str
    caveats: tuple[str, ...]
    layer: str
    op: str
    dtype: str
    has_bias: bool
    precision_constant: str | None
    packs: tuple[PackText, ...]
    repeats: bool
    unpipelined: bool
    helpers: tuple[str, ...]
    shared_names: str
    packed: str
    layout: str
    interpreted: bool
    configs: tuple[str, ...]
    kernels: tuple[KernelText, ...]
    precompiled: bool
    wrapper: WrapperContext
    glue: GlueText
    gradient: WrapperContext | None
    gradient_tile: str | None
    relayout: RelayoutText | None


def file_context(
    plan: KernelPlan, *, precompiled: bool = False, shared: bool = False
) -> tuple[FileContext, dict[str, Value]]:
    """Return every name the templates of `plan`'s family use, and what was put into the glue.

    `precompiled`: machine code ships; `shared`: the runtime is a file of its own.
    """
    spec, op = plan.spec, f"conv_transpose{plan.spec.rank}d"
    sizes = plan.sizes
    packs, used = _packs(plan, sizes)
    kernel = kernel_text(plan, sizes, f"{op}_kernel", "Compute one tile of the output.", used=used)
    kernels: tuple[KernelText, ...] = (kernel,)
    gradient, gradient_tile = None, None
    if plan.gradient is not None:
        back, back_sizes = plan.gradient, plan.gradient.sizes
        more, used = _packs(back, back_sizes)
        name = f"{op}_input_gradient_kernel"
        second = kernel_text(back, back_sizes, name, _BACKWARD, _PREFACE, used)
        kernels, gradient = (kernel, second), wrapper_context(back, back_sizes, second)
        packs += more
        gradient_tile = f"{back.family}, tile {back.tile}"
    wrapper = wrapper_context(plan, sizes, kernel)
    repeats = bool(packs or gradient or not plan.tuned)
    unpipelined = any(each.unpipelined for each in kernels)
    lanes = lanes_text(plan, sizes)
    facts = GlueFacts(
        lanes=lanes,
        rounds=kernel.rounds,
        checks=bool(wrapper.checks),
        checks_gradient=gradient is not None and bool(gradient.checks),
        packs=bool(packs),
        boxes=bool(wrapper.descriptors),
        repeats=repeats,
        unpipelined=unpipelined,
        precompiled=precompiled,
    )
    helpers = _helpers(spec, kernels)
    constant = next((k.precision_constant for k in kernels if k.precision_constant), None)
    values = glue_values(plan, facts)
    context = FileContext(
        version=__version__,
        spec=str(spec),
        target=_target_text(plan),
        tile=tile_text(plan) if not plan.tuned else f"one of {len(plan.tuned)}, tuned at run time",
        grid=_grid_text(plan),
        choices=plan.choices_digest,
        command="convgen build" if precompiled or shared else _command(plan),
        family=plan.family.name,
        caveats=tuple(line for text in caveats_of(plan) for line in textwrap.wrap(text, WIDTH)),
        layer=f"ConvTranspose{spec.rank}d",
        op=op,
        dtype=f"torch.{spec.dtype}",
        has_bias=spec.bias,
        precision_constant=constant,
        packs=packs,
        repeats=repeats,
        unpipelined=unpipelined,
        helpers=helpers,
        shared_names=_shared_names(helpers, unpipelined=unpipelined),
        packed=packed_text(plan, lanes),
        layout=spec.layout,
        interpreted=spec.dtype == "bfloat16",
        configs=tuple(_config(tile, kernel.block_arguments) for tile in plan.tuned),
        kernels=kernels,
        precompiled=precompiled,
        wrapper=wrapper,
        glue=glue_text(spec.rank, values),
        gradient=gradient,
        gradient_tile=gradient_tile,
        relayout=relayout_text(plan, sizes, kernel.triton_dtype),
    )
    return context, values


def _packs(plan: KernelPlan, sizes: Sizes) -> tuple[tuple[PackText, ...], set[Symbol]]:
    """Return what packs the weight for the kernel of `plan`, and the sizes that it reads."""
    if plan.reads_raw_weight:
        return (), set()
    text, used = pack_text(plan, sizes)
    return (text,), used


def _command(plan: KernelPlan) -> str:
    command = f"convgen emit {shlex.quote(str(plan.spec))} --target {plan.target.name}"
    if plan.unmeasured:
        return f"{command} --choices none"
    return command + (" --choices FILE" if plan.choices_digest else "")


def _helpers(spec: ConvTransposeSpec, kernels: tuple[KernelText, ...]) -> tuple[str, ...]:
    """Return the names of the functions in `parts/helpers.jinja` that the kernels call."""
    found = {stage.row.helper for stage in (*spec.before, *spec.after)}
    found |= {"to_bfloat16"} if spec.dtype == "bfloat16" else set()
    found |= {"round_to_tf32"} if any(each.rounds for each in kernels) else set()
    found |= {"settle"} if any(each.settles for each in kernels) else set()
    found |= {"swap_groups"} if any(each.swaps for each in kernels) else set()
    return tuple(sorted(name for name in found if name is not None))


def _shared_names(helpers: tuple[str, ...], *, unpipelined: bool) -> str:
    names = sorted(["bind", *helpers, *["_num_stages"] * unpipelined])
    line = ", ".join(names)
    if len(f"from ._runtime import {line}") <= WIDTH:
        return line
    return "(\n" + "".join(f"    {name},\n" for name in names) + ")"


def _config(tile: Tile, tuned_blocks: tuple[str, ...]) -> str:
    blocks = ", ".join(f'"{name}": {getattr(tile, name.lower())}' for name in tuned_blocks)
    return f"{{{blocks}}}, num_warps={tile.num_warps}, num_stages={tile.num_stages}"


def _target_text(plan: KernelPlan) -> str:
    target = plan.target
    return f"{target.name} ({target.product}, {target.arch}, {target.sms} SMs)"


def _grid_text(plan: KernelPlan) -> str:
    if plan.nominal:
        return plan.grid_text
    cost = plan.cost
    # An SM's programs are estimated: the compiler has the last word on registers.
    waves = f"{cost.waves:.2f}" if cost.waves < 10 else f"{cost.waves:.0f}"
    return (
        f"{plan.grid_text}, {cost.programs} programs in about {waves} waves "
        f"of {plan.target.sms} SMs x {cost.occupancy}"
    )
