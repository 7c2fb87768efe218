"""The glue of an emitted file: `templates/runtime.py` with what the file states put in.

Stage 5, part of render. Input: a spec and the plans of its kernels; output: a `GlueText`, the
sections that `module.py.jinja` places, and the records of a file's several kernels.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..kernels.packing import packed_grouping, packed_taps
from ..language.spec import ANY, MEMORY_FORMATS, ConvTransposeSpec
from ..planning.input_copy import copy_text
from ..planning.plan import KernelPlan
from ..symbolic.lines import count_text
from ..symbolic.sizes import AXES, Sizes
from ..tables.dtypes import DTYPES
from .fold import RECORD, Value, fold, read_source


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueText:
    """Sections of an emitted file, each without an empty line before or after it.

    Attributes:
        record: the class of what a file states of a kernel, where it has several.
        devices: constants of what a call may bring.
        functions: those that users call.
        stages: how many stages a launch has, where that is the device's matter; else empty.
        launch: from arguments to the launch of the kernels, and what repeats that.
        plans: which kernel computes a call, where there are several.
        checks, modes: whether the kernel may compute a call, and who asks for it.
        gradients: shapes of the input's gradient, where a kernel computes that.
        backward: the gradients as torch asks for them.
        operator: what is registered as an operator of torch's.
        registration: that operator, and how gradients are recorded without it.
        layer: `ModelNew`.
    """

    record: str
    devices: str
    functions: str
    stages: str
    launch: str
    plans: str
    checks: str
    modes: str
    gradients: str
    backward: str
    operator: str
    registration: str
    layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFacts:
    """What a plan does not say of its kernel.

    Attributes:
        plan: the plan.
        lanes: outputs of a group of the packed weight, as Python; 1 if they are no factor.
        places: inputs of a group, likewise.
        rounds: the packed weight is rounded to TF32.
        checks, checks_gradient: sizes of a call are checked, and those of a gradient.
        boxes: the kernel loads by tensor descriptors.
        packer: the kernel whose packed weight this one reads too; None if it has its own.
    """

    plan: KernelPlan
    lanes: str
    places: str
    rounds: bool
    checks: bool
    checks_gradient: bool
    boxes: bool
    packer: KernelFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueFacts:
    """What is put into the glue beside the spec.

    Attributes:
        kernels: of each kernel of the layer.
        packs: a kernel packs the weight, for the layer or for the input's gradient.
        repeats, unpipelined, precompiled: as in `FileContext`.
    """

    kernels: tuple[KernelFacts, ...]
    packs: bool
    repeats: bool
    unpipelined: bool
    precompiled: bool


@dataclass(frozen=True, slots=True)
class GlueValues:
    """What is put into the source, by its name there.

    Attributes:
        file: what all kernels of the file share.
        kernels: what is read from `plan`, of each kernel.
    """

    file: Mapping[str, Value]
    kernels: tuple[Mapping[str, Value], ...]

    @property
    def alike(self) -> dict[str, Value]:
        """What is the same for all kernels of the file, by names as `plan.start`."""
        first, *others = self.kernels
        same = (n for n in first if all(other[n] == first[n] for other in others))
        return {f"{RECORD}.{name}": first[name] for name in same}

    @property
    def all(self) -> dict[str, Value]:
        """What is put into a standalone file."""
        return {**self.file, **self.alike, **({} if self.file["SEVERAL"] else {RECORD: None})}


@dataclass(frozen=True, slots=True)
class RecordText:
    """What a file of several kernels states of one.

    Attributes:
        name: of the variable that has it.
        lines: lines `NAME=value`.
        rungs: the variables of its layout's rungs, each by its spatial sizes.
        ladder: lines `NAME=value` of its layout's kernels for small and for large inputs, and the
            elements up to and from which on these compute; empty where the file has none.
    """

    name: str
    lines: tuple[str, ...]
    rungs: tuple[str, ...]
    ladder: tuple[str, ...]


@functools.cache
def runtime_text() -> str:
    """Return the source of the glue."""
    return (importlib.resources.files("convgen.templates") / "runtime.py").read_text("utf-8")


def glue_values(spec: ConvTransposeSpec, facts: GlueFacts) -> GlueValues:
    """Return what is put into the source for a file of `spec`."""
    kernels = tuple(map(_of_kernel, facts.kernels))
    first = facts.kernels[0]
    values = _of_spec(spec) | {
        "SEVERAL": len(kernels) > 1,
        "ANY_LAYOUT": spec.layout == ANY,
        "HAS_RUNGS": bool(spec.rungs),
        "HAS_SMALL": any(each.plan.most for each in facts.kernels),
        "HAS_LARGE": any(each.plan.least for each in facts.kernels),
        "HAS_LADDER": len(facts.kernels) > len(spec.each_layout),
        "HAS_LAST": spec.layout != "channels_first",
        "RAW_WEIGHT": all(each["RAW_WEIGHT"] for each in kernels),
        "PACKED_DTYPES": _packed_dtypes(spec),
        "PACKED_WEIGHT": _packed_weight(first),
        "PACKS_BOTH_LAYOUTS": spec.rank in MEMORY_FORMATS and math.prod(spec.kernel_size) > 1,
        "HAS_LANES": any(each.lanes != "1" for each in facts.kernels),
        "HAS_PLACES": any(each.places != "1" for each in facts.kernels),
        "HAS_PACKING": facts.packs,
        "COPIED": "" if len(kernels) > 1 else copy_text(first.plan.spec),
        "IS_TUNED": bool(first.plan.tuned),
        "REPEATS": facts.repeats,
        "UNPIPELINED": facts.unpipelined,
        "PRECOMPILED": facts.precompiled,
    }
    values["CHECKS_PLANS"] = len(kernels) > 1 and any(each["CHECKS_SIZES"] for each in kernels)
    for name in ("HAS_COPY", "HAS_BOXES", "HAS_GRADIENT"):
        values[name] = any(each[name] for each in kernels)
    return GlueValues(values, kernels)


def _of_kernel(facts: KernelFacts) -> dict[str, Value]:
    """Return what functions read from `plan`, of one kernel."""
    plan = facts.plan
    back = plan.gradient
    packs_back = back is not None and not back.reads_raw_weight
    values: dict[str, Value] = {
        "CHANNELS_LAST": plan.spec.layout == "channels_last",
        "RAW_WEIGHT": plan.reads_raw_weight,
        "PACKED_TAPS": packed_taps(plan),
        "LANES": facts.lanes,
        "PLACES": facts.places,
        "HAS_COPY": plan.tile.relayout,
        "HAS_BOXES": facts.boxes,
        "HAS_GRADIENT": back is not None,
        "RAW_GRADIENT": not packs_back,
        "CHECKS_SIZES": facts.checks,
        "CHECKS_GRADIENT": facts.checks_gradient,
    }
    functions = {
        "start": True,
        "start_pack": not plan.reads_raw_weight,
        "start_copy": plan.tile.relayout,
        "descriptors": facts.boxes,
        "start_gradient": back is not None,
        "start_pack_for_gradient": packs_back,
        "mismatch_of_sizes": facts.checks,
        "serves_gradient": facts.checks_gradient,
    }
    values |= {name: f"_{name}{plan.suffix}" if it else "None" for name, it in functions.items()}
    if facts.packer is None:
        return values
    packer = _of_kernel(facts.packer)
    return values | {name: packer[name] for name in ("LANES", "PLACES", "start_pack")}


def glue_text(rank: int, glue: GlueValues) -> GlueText:
    """Return the glue of a file for a layer of `rank` axes; `glue` is that of `glue_values`."""
    words = {f"{name}2d": f"{name}{rank}d" for name in ("conv_transpose", "ConvTranspose")}
    values = glue.all
    text = fold(read_source(runtime_text(), frozenset(values)), values, words)
    return GlueText(**{field.name: text[field.name] for field in fields(GlueText)})


def _of_spec(spec: ConvTransposeSpec) -> dict[str, Value]:
    last, axes = spec.layout == "channels_last", [letter.upper() for letter in AXES[spec.rank]]
    spatial = tuple(range(spec.rank + 1, 1, -1))
    orders = [str((*spatial, 1, 0)), str((1, *spatial, 0))]
    layouts = ['"channels_first"', '"channels_last"']
    format = MEMORY_FORMATS.get(spec.rank)
    inputs = ", ".join(["BATCH", "C_IN", *(f"{axis}_IN" for axis in axes)])
    return {
        "RANK": spec.rank,
        "BATCHED": spec.rank + 2,
        "UNBATCHED": spec.rank + 1,
        "OP": f'"conv_transpose{spec.rank}d"',
        "LAYER": f'"ConvTranspose{spec.rank}d"',
        "DTYPE": f"torch.{spec.dtype}",
        "LAYOUT": layouts[last],
        "OTHER_LAYOUT": layouts[not last],
        "CHANNELS_LAST": last,
        "FORMAT": format and f"torch.{format}",
        "OWN_AXES": orders[last],
        "OTHER_AXES": orders[not last],
        "LAST_AXES": orders[True],
        "INPUT_AXES": f"[{inputs}]" + (" in channels_last" if last else ""),
        "KERNEL_AXES": ", ".join(f"K{axis}" for axis in axes),
        "HAS_BIAS": spec.bias,
        "BIAS_AXES": "[C_out]" if spec.bias else "None: this file was generated for bias=False",
        "HAS_STAGES": bool(spec.before or spec.after),
        "STAGES": _stages(spec),
        "GEOMETRY_ITSELF": str(
            (spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation)
        ),
        **_defaults(spec),
    }


def _stages(spec: ConvTransposeSpec) -> str | None:
    """Return the layer between its pointwise stages, None if it has none."""
    stages = [*map(str, spec.before), "layer", *map(str, spec.after)]
    return " | ".join(stages) if len(stages) > 1 else None


def _defaults(spec: ConvTransposeSpec) -> dict[str, Value]:
    """Return the defaults of the layer's parameters; open channels have none."""

    def axes(values: tuple[int, ...]) -> str:
        return str(values[0]) if len(set(values)) == 1 else str(values)

    # A default cannot stand before a required argument.
    channels = None if spec.out_channels is None else spec.in_channels
    return {
        "IN_CHANNELS": channels,
        "OUT_CHANNELS": spec.out_channels,
        "DEFAULT_KERNEL": axes(spec.kernel_size),
        "DEFAULT_STRIDE": axes(spec.stride),
        "DEFAULT_PADDING": axes(spec.padding),
        "DEFAULT_OUTPUT_PADDING": axes(spec.output_padding),
        "DEFAULT_GROUPS": spec.groups,
        "DEFAULT_DILATION": axes(spec.dilation),
        "OPEN_BATCH": spec.batch is None,
        "OPEN_CHANNELS": False,  # parameters without a default: Python checks that they are given
    }


def _packed_dtypes(spec: ConvTransposeSpec) -> str:
    """Return the dtypes of weights that the kernel packs, as a set in Python."""
    half = spec.element.itemsize == 2  # under autocast one becomes another
    dtypes = [row.name for row in DTYPES if row.itemsize <= 4] if half else [spec.dtype]
    return f"{{{', '.join(f'torch.{name}' for name in dtypes)}}}"


def packed_text(facts: KernelFacts) -> str:
    """Return taps of a packed weight, outputs and inputs of a group, as a tuple in Python.

    Empty if the kernel reads the weight as torch lays it.
    """
    plan = facts.plan
    taps = f"{packed_taps(plan)}, {facts.lanes}, {facts.places}"
    return "" if plan.reads_raw_weight else taps


def records_of(
    plan: KernelPlan, values: GlueValues, glue: GlueText | None
) -> tuple[RecordText, ...]:
    """Return what a file of several kernels states of each: what its glue reads.

    Without `glue` a shared runtime reads it, which may need all.
    """
    names = [*values.kernels[0]]
    if glue is not None:
        sections = "".join(getattr(glue, field.name) for field in fields(glue))
        names = [name for name in names if re.search(rf"\b{RECORD}\.{name}\b", sections)]
    layouts = sum(each.is_for_any for each in plan.kernels)
    made = []
    for each, kernel in zip(plan.kernels, values.kernels, strict=True):
        lines = tuple(f"{name}={kernel[name]}" for name in names)
        layout = each.spec.layout
        rungs, ladder = _rungs(plan, layout), _ladder(plan, layout)
        others = (rungs, ladder) if each.is_for_any else ((), ())
        made.append(RecordText(_record_name(each), lines, *others))
    # What a record names stands before it.
    return (*made[layouts:], *made[:layouts])


def _record_name(plan: KernelPlan) -> str:
    """Return the variable of a kernel's record."""
    return f"PLAN{plan.suffix.upper()}"


def plans_text(plan: KernelPlan) -> str:
    """Return the records of the kernels for any size, by layout."""
    names = [_record_name(each) for each in plan.kernels if each.is_for_any]
    return ", ".join(names) + "," * (len(names) == 1)


def _rungs(plan: KernelPlan, layout: str) -> tuple[str, ...]:
    """Return the records of a layout's rungs, as entries of a dictionary by spatial sizes."""
    found = (each for each in plan.kernels if each.rung and each.spec.layout == layout)
    return tuple(f"{each.spec.spatial}: {_record_name(each)}" for each in found)


def _ladder(plan: KernelPlan, layout: str) -> tuple[str, ...]:
    """Return what a layout's record states of its kernels for small and for large inputs."""
    lines: list[str] = []
    for name, bound in (("small", "most"), ("large", "least")):
        bounds = {each.spec.layout: each for each in plan.kernels if getattr(each, bound)}
        if bounds:
            found = bounds.get(layout)
            elements = None if found is None else getattr(found, bound)
            lines += f"{name}={found and _record_name(found)}", f"{bound}={count_text(elements)}"
    return tuple(lines)


def kernel_facts(
    plan: KernelPlan,
    sizes: Sizes,
    *,
    checks: bool,
    checks_gradient: bool,
    boxes: bool,
    packer: KernelFacts | None,
) -> KernelFacts:
    """Return what a plan does not say of its kernel; what is given, as in `KernelFacts`."""
    grouping = None if plan.reads_raw_weight else packed_grouping(plan)
    lanes = sizes.lanes
    return KernelFacts(
        plan=plan,
        lanes="1" if grouping is None or lanes == 1 else f"{lanes}.value",
        places="1" if grouping is None or grouping.span == 1 else f"{sizes.named('SPAN')}.value",
        rounds=plan.rounds,
        checks=checks,
        checks_gradient=checks_gradient,
        boxes=boxes,
        packer=packer,
    )


def _packed_weight(facts: KernelFacts) -> str:
    """Return what `pack_weight` says that it returns."""
    rounded = ", rounded to TF32, to nearest" if facts.rounds else ""
    if facts.plan.reads_raw_weight:
        return "Returns a copy, contiguous: the kernel reads a weight as torch lays it."
    if facts.lanes == "1":
        return "Returns a new tensor [taps, C_out, C_in / groups], C_in contiguous" + rounded + "."
    span = "" if facts.places == "1" else " * span"
    return (
        f"Returns a new tensor [taps, C_out * phases, C_in / groups{span}]: what leads from\n"
        f"neighbouring inputs to neighbouring outputs{rounded}."
    )
