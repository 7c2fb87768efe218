"""The glue of an emitted file: `templates/runtime.py` with what the file states put in.

Stage 5, part of render. Input: a `KernelPlan` and the names of its wrapper; output: a `GlueText`,
the sections that `module.py.jinja` places.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..kernels.packing import packed_grouping, packed_taps
from ..language.spec import MEMORY_FORMATS, ConvTransposeSpec
from ..planning.input_copy import copy_text
from ..planning.plan import KernelPlan
from ..symbolic.sizes import AXES, Sizes
from ..tables.dtypes import DTYPES
from .fold import Value, fold, read_source


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueText:
    """Sections of an emitted file, each without an empty line before or after it.

    Attributes:
        devices: constants of what a call may bring.
        functions: those that users call.
        stages: how many stages a launch has, where that is the device's matter; else empty.
        launch: from arguments to the launch of the kernels, and what repeats that.
        checks, modes: whether the kernel may compute a call, and who asks for it.
        gradients: shapes of the input's gradient, where a kernel computes that.
        backward: the gradients as torch asks for them.
        operator: what is registered as an operator of torch's.
        registration: that operator, and how gradients are recorded without it.
        layer: `ModelNew`.
    """

    devices: str
    functions: str
    stages: str
    launch: str
    checks: str
    modes: str
    gradients: str
    backward: str
    operator: str
    registration: str
    layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueFacts:
    """What a plan does not say of a file.

    Attributes:
        lanes: outputs of a group of the packed weight, as Python; 1 if they are no factor.
        rounds: the packed weight is rounded to TF32.
        checks, checks_gradient: sizes of a call are checked, and those of a gradient.
        packs: a kernel packs the weight, for the layer or for the input's gradient.
        boxes: the kernel loads by tensor descriptors.
        repeats, unpipelined, precompiled: as in `FileContext`.
    """

    lanes: str
    rounds: bool
    checks: bool
    checks_gradient: bool
    packs: bool
    boxes: bool
    repeats: bool
    unpipelined: bool
    precompiled: bool


@functools.cache
def runtime_text() -> str:
    """Return the source of the glue."""
    return (importlib.resources.files("convgen.templates") / "runtime.py").read_text("utf-8")


def glue_values(plan: KernelPlan, facts: GlueFacts) -> dict[str, Value]:
    """Return what is put into the source for a file of `plan`, by its name there."""
    values = _of_spec(plan.spec) | _of_weight(plan, facts)
    values |= {
        "HAS_GRADIENT": plan.gradient is not None,
        "RAW_GRADIENT": plan.gradient is None or plan.gradient.reads_raw_weight,
        "HAS_PACKING": facts.packs,
        "HAS_COPY": plan.tile.relayout,
        "COPIED": copy_text(plan.spec),
        "HAS_BOXES": facts.boxes,
        "IS_TUNED": bool(plan.tuned),
        "CHECKS_SIZES": facts.checks,
        "CHECKS_GRADIENT": facts.checks_gradient,
        "REPEATS": facts.repeats,
        "UNPIPELINED": facts.unpipelined,
        "PRECOMPILED": facts.precompiled,
    }
    return values


def glue_text(rank: int, values: Mapping[str, Value]) -> GlueText:
    """Return the glue of a file for a layer of `rank` axes; `values` are those of `glue_values`."""
    words = {f"{name}2d": f"{name}{rank}d" for name in ("conv_transpose", "ConvTranspose")}
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
        "OPEN_CHANNELS": False,  # parameters without a default: Python checks that they are given
    }


def _of_weight(plan: KernelPlan, facts: GlueFacts) -> dict[str, Value]:
    places = _places(plan)
    half = plan.spec.element.itemsize == 2  # under autocast one becomes another
    dtypes = [row.name for row in DTYPES if row.itemsize <= 4] if half else [plan.spec.dtype]
    return {
        "RAW_WEIGHT": plan.reads_raw_weight,
        "PACKS_BOTH_LAYOUTS": plan.spec.rank in MEMORY_FORMATS
        and math.prod(plan.spec.kernel_size) > 1,
        "PACKED_TAPS": packed_taps(plan),
        "PACKED_DTYPES": f"{{{', '.join(f'torch.{name}' for name in dtypes)}}}",
        "PACKED_WEIGHT": _packed_weight(plan, facts),
        "HAS_LANES": facts.lanes != "1",
        "LANES": facts.lanes,
        "HAS_PLACES": places > 1,
        "PLACES": "SPAN.value" if places > 1 else "1",
    }


def packed_text(plan: KernelPlan, lanes: str) -> str:
    """Return taps of a packed weight, outputs of a group (`lanes`) and inputs of a group.

    Empty if the kernel reads the weight as torch lays it.
    """
    if plan.reads_raw_weight:
        return ""
    return f"{packed_taps(plan)}, {lanes}, {'SPAN.value' if _places(plan) > 1 else '1'}"


def lanes_text(plan: KernelPlan, sizes: Sizes) -> str:
    """Return the outputs of a group of the packed weight, as Python; 1 if they are no factor."""
    lanes = sizes.lanes
    return "1" if packed_grouping(plan) is None or lanes == 1 else f"{lanes}.value"


def _places(plan: KernelPlan) -> int:
    """Return the inputs of a group of the packed weight."""
    grouping = packed_grouping(plan)
    return 1 if grouping is None else grouping.span


def _packed_weight(plan: KernelPlan, facts: GlueFacts) -> str:
    """Return what `pack_weight` says that it returns."""
    rounded = ", rounded to TF32, to nearest" if facts.rounds else ""
    if plan.reads_raw_weight:
        return "Returns a copy, contiguous: the kernel reads a weight as torch lays it."
    if facts.lanes == "1":
        return "Returns a new tensor [taps, C_out, C_in / groups], C_in contiguous" + rounded + "."
    span = " * span" if _places(plan) > 1 else ""
    return (
        f"Returns a new tensor [taps, C_out * phases, C_in / groups{span}]: what leads from\n"
        f"neighbouring inputs to neighbouring outputs{rounded}."
    )
