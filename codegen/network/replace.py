"""Replacing the transposed convolutions of a torch model by emitted layers.

Beside the stages; needs torch and triton, imported when a function is called. Input: a model;
output: the same model, whose layers run emitted files, but for those that torch computes faster.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..compiler import compile_kernel
from ..compiler import plan as plan_of
from ..errors import SpecError, shown, text_of
from ..execution.loading import kept_module
from ..language.parser import parse
from ..language.spec import LAYOUTS, ConvTransposeSpec
from ..planning.choices import Choices, check_targets
from ..tables.targets import DEFAULT_TARGET
from ..values import check_choice
from .calls import Call
from .examples import dtype_of, example_calls, rungs_of
from .inductor import lower
from .layers import (
    LEFT,
    LeftError,
    Selection,
    Wishes,
    check_module,
    chosen,
    is_emitted,
    layout_for,
    left_of,
    original_of,
    record_of,
    spec_of,
    spec_text,
    transposed,
    where,
)
from .preference import (
    FASTER,
    PREFER,
    Times,
    allows_tf32,
    choices_given,
    is_as_precise,
    is_path,
    is_slower,
    times_of,
)
from .restore import become, restore

IEEE = "ieee: torch.backends.cudnn.allow_tf32 was False"


@dataclass(frozen=True, slots=True)
class _Meant:
    """What a layer is to be.

    Attributes:
        spec: of its file.
        note: how the spec came about, if that needs saying.
        original: the class that the layer has without an emitted one.
        layouts: of the inputs that arrive, as far as is known.
        times: of each known size in each of these layouts, None where nobody measured torch's.
    """

    spec: ConvTransposeSpec
    note: str
    original: type
    layouts: tuple[str, ...]
    times: tuple[Times | None, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return what is noted of the layer, whether it is replaced or left to torch."""
        times = tuple(asdict(each) for each in self.times if each is not None)
        return {"spec": str(self.spec), "layouts": self.layouts, "times": times}

    def refusal(self) -> str:
        """Return why the layer is left to torch, which was measured to be faster."""
        return "; ".join([FASTER, *(str(each) for each in self.times)])


@dataclass(frozen=True, slots=True)
class _Planned:
    """What becomes of a layer.

    Attributes:
        meant: what it is to be.
        made: the emitted class; None if the layer has it already.
        folder: of the user's, that has its file; empty if the file goes with the process.
        choices: hash of the choices given, or empty.
    """

    meant: _Meant
    made: type | None
    folder: str
    choices: str


def replace_layers(
    model: Any,
    *,
    target: str | None,
    precision: str | None,
    dtype: str | None,
    folder: str | os.PathLike[str] | None,
    example_inputs: object,
    include: Selection,
    exclude: Selection,
    prefer: str,
    choices: str | os.PathLike[str] | None,
    strict: bool,
) -> dict[str, str]:
    """Implement `convgen.replace_layers`, which documents it; on an error nothing is changed."""
    check_module(model)
    wishes = _checked_arguments(target, precision, dtype, folder, strict)
    prefer = check_choice("prefer", prefer, PREFER)
    measured = choices_given("choices", choices)
    layers = chosen(model, include, exclude)
    calls = example_calls(model, layers, example_inputs)
    meant, left = _meant(layers, wishes, calls, measured)
    slower = _slower(meant) if prefer == "fastest" else {}
    files: dict[ConvTransposeSpec, type] = {}
    plans: dict[str, _Planned] = {}
    for name, each in meant.items():
        if name in slower:
            continue
        try:
            plans[name] = _planned(layers[name], each, measured, folder, files)
        except LeftError as error:
            left[name] = str(error)
    # That torch is faster needs no warning: nothing is lost.
    refused = left | {name: each.refusal() for name, each in slower.items() if strict}
    if refused:
        _tell({name: refused[name] for name in layers if name in refused}, strict)
    for name, planned in plans.items():
        _apply(layers[name], name, planned, strict)
        file = type(layers[name]).forward.__globals__
        lower(file, planned.meant.spec, measured, "kernel" if strict else prefer)
    for name in (*left, *slower):
        _give_back(layers[name])
    for name, each in slower.items():
        vars(layers[name])[LEFT] = each.record()
    return {
        name: spec_text(layer) for name, layer in transposed(model).items() if is_emitted(layer)
    }


def freeze_layers(model: Any, *, frozen: bool) -> list[str]:
    """Implement `convgen.freeze` and `convgen.unfreeze`, which document it."""
    check_module(model)
    layers = {name: each for name, each in model.named_modules() if is_emitted(each)}
    for layer in layers.values():
        layer.freeze() if frozen else layer.unfreeze()
    return list(layers)


def _checked_arguments(
    target: str | None, precision: str | None, dtype: str | None, folder: object, strict: object
) -> Wishes:
    """Return target, precision and dtype, each None or an exact str."""
    if dtype is not None and text_of(dtype) not in ("float16", "bfloat16"):
        raise SpecError(
            f"dtype must be None (that of the parameters), float16 or bfloat16 (for autocast), "
            f"got {shown(dtype)}",
            "dtype",
        )
    if folder is not None and not is_path(folder):
        raise SpecError(f"folder must be a path or None, got {shown(folder)}", "folder")
    if not isinstance(strict, bool):
        raise SpecError(f"strict must be True or False, got {shown(strict)}", "strict")
    # Reuse the checks and messages of a spec; the layer does not matter.
    checked = ConvTransposeSpec(
        rank=1, kernel_size=(1,), target=target, precision=precision, dtype=dtype or "float32"
    )
    return Wishes(
        checked.target,
        None if precision is None else checked.precision,
        None if dtype is None else checked.dtype,
    )


def _meant(
    layers: dict[str, Any],
    wishes: Wishes,
    calls: dict[str, tuple[Call, ...]] | None,
    choices: Choices | None,
) -> tuple[dict[str, _Meant], dict[str, str]]:
    """Return what layers are to be, and why others must stay torch's.

    `calls` are those with example inputs, None without. Layers of a file of their owner's are in
    neither.
    """
    meant: dict[str, _Meant] = {}
    left: dict[str, str] = {}
    for name, layer in layers.items():
        if is_emitted(layer) and record_of(layer) is None:
            continue
        try:
            each = _one_meant(layer, wishes, None if calls is None else calls[name])
        except LeftError as error:
            left[name] = str(error)
        else:
            times = times_of(each.spec, each.layouts, choices)
            meant[name] = replace(each, times=times)
    if choices is not None and meant:
        check_targets(choices, {each.spec.target or DEFAULT_TARGET for each in meant.values()})
    return meant, left


def _slower(meant: dict[str, _Meant]) -> dict[str, _Meant]:
    """Return the layers whose kernels were measured to be slower than torch at all known sizes.

    In a graph of Inductor's torch may be faster than it is here, in another layout: it is asked
    again there.
    """
    return {
        name: each
        for name, each in meant.items()
        if is_slower(each.times) and is_as_precise(each.spec)
    }


def _one_meant(layer: Any, wishes: Wishes, calls: Sequence[Call] | None) -> _Meant:
    """Return what a layer is to be, without times; raises LeftError if it must stay torch's."""
    original, note = original_of(layer), ""
    dtype = dtype_of(calls) if wishes.dtype is None and calls else None
    if dtype is not None:  # a precision is for float32, which these calls have not
        wishes = replace(wishes, dtype=dtype, precision=None)
    if wishes.precision is None and wishes.dtype is None and not allows_tf32():
        wishes, note = replace(wishes, precision="ieee"), IEEE
    spec = spec_of(layer, wishes)
    layouts = _layouts(layer, spec.layout, calls)
    spec = replace(spec, layout=layout_for(spec.rank))
    spec = _with_rungs(spec, layer, calls)
    note = note if spec.dtype == "float32" else ""
    return _Meant(spec, note, original, layouts)


def _layouts(layer: Any, of_weight: str, calls: Sequence[Call] | None) -> tuple[str, ...]:
    """Return the layouts that a layer computes in: torch's rule is channels_last if one is."""
    if of_weight == "channels_last":
        return (of_weight,)
    if calls is not None:
        return tuple(sorted({call.layout for call in calls}))
    before = record_of(layer) or left_of(layer)
    return LAYOUTS[:1] if before is None else before["layouts"]


def _planned(
    layer: Any,
    meant: _Meant,
    choices: Choices | None,
    folder: str | os.PathLike[str] | None,
    files: dict[ConvTransposeSpec, type],
) -> _Planned:
    """Return what becomes of a layer; `files` has the classes that were made, and gets its."""
    spec, record = meant.spec, record_of(layer)
    digest = "" if choices is None else choices.identity
    same = record is not None and record["choices"] == digest
    if record is not None and same and record["spec"] == str(spec) and folder is None:
        return _Planned(meant, None, record["folder"], digest)
    if spec not in files:
        spec, text = _emitted(spec, choices)
        files[spec] = kept_module(spec, text, folder).ModelNew
    is_made = record is not None and bool(record["folder"]) and isinstance(layer, files[spec])
    made = None if is_made else files[spec]
    kept = "" if folder is None else os.fspath(folder)
    return _Planned(replace(meant, spec=spec), made, kept, digest)


def _emitted(spec: ConvTransposeSpec, choices: Choices | None) -> tuple[ConvTransposeSpec, str]:
    """Return a spec and its file's text, without the rungs that no launch grid holds."""
    try:
        return spec, compile_kernel(spec, choices=choices).text
    except SpecError as error:
        kept = tuple(rung for rung in spec.rungs if _has_plan(spec, rung, choices))
        if kept == spec.rungs:
            raise LeftError(str(error)) from None
    return _emitted(replace(spec, rungs=kept), choices)


def _has_plan(
    spec: ConvTransposeSpec, rung: tuple[int | None, ...], choices: Choices | None
) -> bool:
    try:
        plan_of(replace(spec, input=rung, rungs=()), choices=choices)
    except SpecError:
        return False
    return True


def _with_rungs(
    spec: ConvTransposeSpec, layer: Any, calls: Sequence[Call] | None
) -> ConvTransposeSpec:
    """Return a spec with the sizes of calls as rungs; without examples those of before stay."""
    record = record_of(layer) or left_of(layer)
    rungs: tuple[tuple[int | None, ...], ...] = ()
    if calls is not None:
        rungs = rungs_of(calls)
    elif record is not None:
        rungs = parse(record["spec"]).rungs
    with contextlib.suppress(SpecError):  # the layer's geometry has changed since
        return replace(spec, rungs=rungs)
    return spec


def _tell(left: dict[str, str], strict: bool) -> None:
    """Say which layers stay torch's, as a warning or an error."""
    reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left.items())
    if strict:
        raise SpecError(f"strict=True, and layers would stay torch's: {reasons}", "strict")
    warnings.warn(f"left as they are: {reasons}", stacklevel=4)


def _apply(layer: Any, name: str, plan: _Planned, strict: bool) -> None:
    """Change a layer as planned."""
    meant = plan.meant
    if plan.made is not None:
        become(layer, plan.made, meant.original, bool(plan.folder))
    others = {"note": meant.note, "folder": plan.folder, "choices": plan.choices}
    vars(layer).update(
        _replaced=meant.record() | others,
        _strict=strict,
        _notice=_notice(name, strict),
    )


def _give_back(layer: Any) -> None:
    """Make a layer torch's again that was replaced before and no longer is to be."""
    vars(layer).pop(LEFT, None)
    if record_of(layer) is not None:
        with contextlib.suppress(LeftError):  # something else has changed its class
            restore(layer, original_of(layer))


def _notice(name: str, strict: bool) -> str:
    """Return what a layer says when torch has to compute; the reason takes the place of `{}`."""
    of = where(name).replace("{", "{{").replace("}", "}}")
    what = "strict=True, and this call needs torch" if strict else "computed by torch"
    return (
        f"{of}: {what}: {{}}. If the layer has changed, convgen.replace_layers(model) again plans "
        "for what it is now (for autocast, with dtype=); convgen.report(model) lists all such calls"
    )
