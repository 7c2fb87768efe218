"""The names of the emitted file's templates, as text.

Stage 5, part of render. Input: a `KernelPlan`; output: a `FileContext`, in which every expression
is already printed.
"""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from dataclasses import dataclass

from sympy import Symbol

from ..geometry.tile import Tile
from ..kernels.packing import packed_form
from ..language.spec import ConvTransposeSpec
from ..planning.caveats import caveats_of
from ..planning.input_copy import tile_text
from ..planning.plan import KernelPlan
from ..symbolic.lines import WIDTH, count_text
from ..symbolic.sizes import Sizes
from ..version import __version__
from .copy_names import RelayoutText, relayout_text
from .glue import (
    GlueFacts,
    GlueText,
    GlueValues,
    KernelFacts,
    RecordText,
    glue_text,
    glue_values,
    kernel_facts,
    packed_text,
    plans_text,
    records_of,
)
from .kernel_names import KernelText, kernel_text
from .pack_names import PackText, pack_text
from .wrapper_names import LaunchText, WrapperContext, launch_text, wrapper_context

_BACKWARD = "Compute one tile of the input's gradient, y, from the output's, x."
_PREFACE = (
    "",
    "# The input's gradient is a transposed convolution of the output's, of these sizes; its",
    "# weight is the layer's, channels swapped and taps reversed.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderText:
    """Lines of the header about a kernel.

    Attributes:
        serves: the inputs that it is for, where a file has several kernels.
        family: its name.
        tile, grid: as text.
        gradient_tile: family and tile of the kernel of the input's gradient, None without one.
    """

    serves: str
    family: str
    tile: str
    grid: str
    gradient_tile: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContext:
    """The names of `module.py.jinja` and its parts; text, flags and tuples of text only.

    Attributes:
        version, spec, target, choices, command: the header's lines.
        first, others: what the header says of the kernels.
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
            the kernel reads the weight as it lies, or if there are records.
        layout: the spec's.
        interpreted: the kernels have branches for Triton's interpreter.
        configs: of an autotuned kernel.
        kernels: the layer's own, each followed by that of the input's gradient, if it has one.
        precompiled: machine code may lie beside the file.
        wrapper: what the file was generated for.
        launches: what the launches of the layer's kernels need, and the checks of sizes.
        boxes: a kernel loads by tensor descriptors.
        records: what is stated of each of several kernels; empty if there is one.
        plans: the variables of the records by layout, as a tuple in text.
        glue: what files have in common, with what this one states put in.
        gradients: what the functions for the input's gradient need; none where torch gives it.
        relayouts: what the kernels that copy the input need.
    """

    version: str
    spec: str
    target: str
    choices: str | None
    command: str
    first: HeaderText
    others: tuple[HeaderText, ...]
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
    launches: tuple[LaunchText, ...]
    boxes: bool
    records: tuple[RecordText, ...]
    plans: str
    glue: GlueText
    gradients: tuple[LaunchText, ...]
    relayouts: tuple[RelayoutText, ...]


@dataclass(frozen=True, slots=True)
class _PlanText:
    """The texts of one kernel of the layer, and of what goes with it.

    Attributes:
        facts: what the glue has to know.
        kernels: its own, and that of the input's gradient.
        packs: what packs the weight for them.
        launch, gradient: what launches them.
        relayout: what copies the input.
    """

    facts: KernelFacts
    kernels: tuple[KernelText, ...]
    packs: tuple[PackText, ...]
    launch: LaunchText
    gradient: LaunchText | None
    relayout: RelayoutText | None


def file_context(
    plan: KernelPlan, *, precompiled: bool = False, shared: bool = False
) -> tuple[FileContext, GlueValues]:
    """Return every name the templates of `plan`'s family use, and what was put into the glue.

    `precompiled`: machine code ships; `shared`: the runtime is a file of its own.
    """
    spec = plan.file_spec
    texts = _plan_texts(plan)
    kernels = tuple(kernel for text in texts for kernel in text.kernels)
    packs = tuple(pack for text in texts for pack in text.packs)
    gradients = tuple(text.gradient for text in texts if text.gradient is not None)
    repeats = bool(packs or gradients or not plan.tuned)
    unpipelined = any(each.unpipelined for each in kernels)
    helpers = _helpers(spec, kernels)
    glue = GlueFacts(
        kernels=tuple(text.facts for text in texts),
        packs=bool(packs),
        repeats=repeats,
        unpipelined=unpipelined,
        precompiled=precompiled,
    )
    values = glue_values(spec, glue)
    text = glue_text(spec.rank, values)
    layouts = len(spec.each_layout)
    first, *others = (_header_text(each, layouts) for each in plan.kernels)
    context = FileContext(
        version=__version__,
        spec=str(spec),
        target=_target_text(plan),
        choices=next((each.choices_digest for each in plan.kernels if each.choices_digest), None),
        command="convgen build" if precompiled or shared else _command(plan),
        first=first,
        others=tuple(others),
        caveats=tuple(line for text in caveats_of(plan) for line in textwrap.wrap(text, WIDTH)),
        layer=f"ConvTranspose{spec.rank}d",
        op=f"conv_transpose{spec.rank}d",
        dtype=f"torch.{spec.dtype}",
        has_bias=spec.bias,
        precision_constant=next(
            (k.precision_constant for k in kernels if k.precision_constant), None
        ),
        packs=packs,
        repeats=repeats,
        unpipelined=unpipelined,
        helpers=helpers,
        shared_names=_shared_names(helpers, unpipelined=unpipelined, several=bool(others)),
        packed="" if others else packed_text(texts[0].facts),
        layout=spec.layout,
        interpreted=spec.dtype == "bfloat16",
        configs=tuple(_config(tile, kernels[0].block_arguments) for tile in plan.tuned),
        kernels=kernels,
        precompiled=precompiled,
        wrapper=wrapper_context(spec),
        launches=tuple(text.launch for text in texts),
        boxes=any(text.launch.descriptors for text in texts),
        records=records_of(plan, values, None if shared else text) if others else (),
        plans=plans_text(plan),
        glue=text,
        gradients=gradients,
        relayouts=tuple(text.relayout for text in texts if text.relayout is not None),
    )
    return context, values


def _plan_texts(plan: KernelPlan) -> tuple[_PlanText, ...]:
    """Return the texts of a file's kernels.

    A constant stands with the first kernel that has it. Kernels that read one packed form of the
    weight share what packs it, the first one's.
    """
    texts: list[_PlanText] = []
    packers: dict[object, _PlanText] = {}
    for each in plan.kernels:
        form = packed_form(each)
        packer = None if form is None else packers.get(form)
        texts.append(_plan_text(each, packer))
        packers.setdefault(form, texts[-1])
    lines: set[str] = set()
    result = []
    for text in texts:
        kernels = []
        for kernel in text.kernels:
            own = tuple(line for line in kernel.constants if line not in lines)
            lines.update(own)
            kernels.append(dataclasses.replace(kernel, constants=own))
        result.append(dataclasses.replace(text, kernels=tuple(kernels)))
    return tuple(result)


def _plan_text(plan: KernelPlan, packer: _PlanText | None) -> _PlanText:
    """Return the texts of a kernel; `packer` has what packs the weight, None if there is none."""
    op, sizes = f"conv_transpose{plan.spec.rank}d", plan.sizes
    packs, used = _packs(plan, sizes) if packer is None else ((), set())
    name = f"{op}{plan.suffix}_kernel"
    kernel = kernel_text(plan, sizes, name, "Compute one tile of the output.", used=used)
    launch = launch_text(plan, sizes, kernel)
    kernels: tuple[KernelText, ...] = (kernel,)
    gradient = None
    if plan.gradient is not None:
        back, back_sizes = plan.gradient, plan.gradient.sizes
        more, used = _packs(back, back_sizes)
        name = f"{op}_input_gradient{plan.suffix}_kernel"
        second = kernel_text(back, back_sizes, name, _BACKWARD, _PREFACE, used)
        kernels, gradient = (kernel, second), launch_text(back, back_sizes, second)
        packs += more
    facts = kernel_facts(
        plan,
        sizes,
        checks=bool(launch.checks),
        checks_gradient=gradient is not None and bool(gradient.checks),
        boxes=bool(launch.descriptors),
        packer=None if packer is None else packer.facts,
    )
    copy = relayout_text(plan, sizes, kernel.triton_dtype)
    return _PlanText(facts, kernels, packs, launch, gradient, copy)


def _serves(plan: KernelPlan, layouts: int) -> str:
    """Return the inputs that a kernel beside the first is for, in words; a file has `layouts`."""
    layout = f"in {plan.spec.layout}"
    if plan.is_for_any:
        return layout
    if plan.least is not None:
        sizes = f"for inputs of {count_text(plan.least)} elements or more"
    elif plan.most is not None:
        sizes = f"for inputs of at most {count_text(plan.most)} elements"
    else:
        sizes = f"for {plan.rung} and other batches"
    return f"{sizes}, {layout}" if layouts > 1 else sizes


def _header_text(plan: KernelPlan, layouts: int) -> HeaderText:
    back = plan.gradient
    tuned = f"one of {len(plan.tuned)}, tuned at run time"
    return HeaderText(
        serves=_serves(plan, layouts),
        family=plan.family.name,
        tile=tuned if plan.tuned else tile_text(plan),
        grid=_grid_text(plan),
        gradient_tile=None if back is None else f"{back.family}, tile {back.tile}",
    )


def _packs(plan: KernelPlan, sizes: Sizes) -> tuple[tuple[PackText, ...], set[Symbol]]:
    """Return what packs the weight for the kernel of `plan`, and the sizes that it reads."""
    if plan.reads_raw_weight:
        return (), set()
    text, used = pack_text(plan, sizes)
    return (text,), used


def _command(plan: KernelPlan) -> str:
    command = f"convgen emit {shlex.quote(str(plan.file_spec))} --target {plan.target.name}"
    if any(each.unmeasured for each in plan.kernels):
        return f"{command} --choices none"
    given = any(each.choices_digest for each in plan.kernels)
    return command + (" --choices FILE" if given else "")


def _helpers(spec: ConvTransposeSpec, kernels: tuple[KernelText, ...]) -> tuple[str, ...]:
    """Return the names of the functions in `parts/helpers.jinja` that the kernels call."""
    found = {stage.row.helper for stage in (*spec.before, *spec.after)}
    found |= {"to_bfloat16"} if spec.dtype == "bfloat16" else set()
    found |= {"round_to_tf32"} if any(each.rounds for each in kernels) else set()
    found |= {"settle"} if any(each.settles for each in kernels) else set()
    found |= {"swap_groups"} if any(each.swaps for each in kernels) else set()
    return tuple(sorted(name for name in found if name is not None))


def _shared_names(helpers: tuple[str, ...], *, unpipelined: bool, several: bool) -> str:
    names = sorted([*["Plan"] * several, "bind", *helpers, *["_num_stages"] * unpipelined])
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
