"""The glue of an emitted file: `templates/runtime.py` with what the file states put in.

Stage 5, part of render. Input: a `KernelPlan` and the names of its wrapper; output: a `GlueText`,
the sections that `module.py.jinja` places.
"""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass, fields

from ..kernels.packing import packed_grouping, packed_taps
from ..language.spec import MEMORY_FORMATS, ConvTransposeSpec
from ..planning.plan import KernelPlan
from ..symbolic.sizes import AXES
from ..tables.dtypes import DTYPES
from .fold import Value, fold, read_source


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueText:
    """Sections of an emitted file, each without an empty line before or after it.

    Attributes:
        devices: constants of what a call may bring.
        functions: those that users call.
        launch: what launches need beside their kernels; empty if nothing.
        checks, modes: whether the kernel may compute a call, and who asks for it.
        gradients: shapes of the input's gradient, where a kernel computes that.
        backward: the gradients as torch asks for them.
        operator: what is registered as an operator of torch's.
        registration: that operator, and how gradients are recorded without it.
        layer: `ModelNew`.
    """

    devices: str
    functions: str
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
        repeats, unpipelined, precompiled: as in `FileContext`.
    """

    lanes: str
    rounds: bool
    checks: bool
    checks_gradient: bool
    repeats: bool
    unpipelined: bool
    precompiled: bool


@functools.cache
def runtime_text() -> str:
    """Return the source of the glue."""
    return (importlib.resources.files("convgen.templates") / "runtime.py").read_text("utf-8")


def glue_text(plan: KernelPlan, facts: GlueFacts) -> GlueText:
    """Return the glue of a file for `plan`."""
    values = _of_spec(plan.spec) | _of_weight(plan, facts)
    values |= {
        "HAS_GRADIENT": plan.gradient is not None,
        "CHECKS_SIZES": facts.checks,
        "CHECKS_GRADIENT": facts.checks_gradient,
        "REPEATS": facts.repeats,
        "UNPIPELINED": facts.unpipelined,
        "PRECOMPILED": facts.precompiled,
    }
    words = {
        f"{name}2d": f"{name}{plan.spec.rank}d" for name in ("conv_transpose", "ConvTranspose")
    }
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
    }


def _of_weight(plan: KernelPlan, facts: GlueFacts) -> dict[str, Value]:
    places = _places(plan)
    half = plan.spec.element.itemsize == 2  # under autocast one becomes another
    dtypes = [row.name for row in DTYPES if row.itemsize <= 4] if half else [plan.spec.dtype]
    return {
        "RAW_WEIGHT": plan.reads_raw_weight,
        "PACKED_TAPS": packed_taps(plan),
        "PACKED_DTYPES": f"{{{', '.join(f'torch.{name}' for name in dtypes)}}}",
        "PACKED_WEIGHT": _packed_weight(plan, facts),
        "HAS_LANES": facts.lanes != "1",
        "LANES": facts.lanes,
        "HAS_PLACES": places > 1,
        "PLACES": "SPAN.value" if places > 1 else "1",
    }


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
