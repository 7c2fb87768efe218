"""Replacing the transposed convolutions of a torch model by emitted layers.

Beside the stages; needs torch and triton, imported when a function is called. Input: a model;
output: the same model, whose layers run emitted files.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..compiler import compile_kernel
from ..compiler import plan as plan_of
from ..errors import SpecError, shown, text_of
from ..execution.loading import kept_module
from ..language.parser import parse
from ..language.spec import ConvTransposeSpec
from .calls import Call
from .examples import dtype_of, example_calls, rungs_of
from .layers import (
    LeftError,
    Selection,
    Wishes,
    allows_tf32,
    check_module,
    chosen,
    is_emitted,
    layout_for,
    original_of,
    record_of,
    spec_of,
    spec_text,
    transposed,
    where,
)
from .restore import become, restore

IEEE = "ieee: torch.backends.cudnn.allow_tf32 was False"


@dataclass(frozen=True, slots=True)
class _Planned:
    """What becomes of a layer.

    Attributes:
        spec: of its file.
        note: how the spec came about, if that needs saying.
        made: the emitted class; None if the layer has it already.
        original: the class without it.
        folder: of the user's, that has its file; empty if the file goes with the process.
    """

    spec: ConvTransposeSpec
    note: str
    made: type | None
    original: type
    folder: str


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
    strict: bool,
) -> dict[str, str]:
    """Implement `convgen.replace_layers`, which documents it; on an error nothing is changed."""
    check_module(model)
    wishes = _checked_arguments(target, precision, dtype, folder, strict)
    layers = chosen(model, include, exclude)
    calls = example_calls(model, layers, example_inputs)
    files: dict[ConvTransposeSpec, type] = {}
    plans: dict[str, _Planned] = {}
    left: dict[str, str] = {}
    for name, layer in layers.items():
        if is_emitted(layer) and record_of(layer) is None:
            continue  # its owner's, from a file of theirs
        try:
            made = None if calls is None else calls[name]
            plans[name] = _planned(layer, wishes, made, folder, files)
        except LeftError as error:
            left[name] = str(error)
    if left:
        _tell(left, strict)
    for name, planned in plans.items():
        _apply(layers[name], name, planned, strict)
    for name in left:
        _give_back(layers[name])
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
    if folder is not None and not _is_path(folder):
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


def _is_path(value: object) -> bool:
    """Whether `value` can name a file: text that the system and Triton can encode."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]  # it raises what it is caught for
        return isinstance(text, str) and bool(text) and "\0" not in text and bool(text.encode())
    except (TypeError, ValueError):
        return False


def _planned(
    layer: Any,
    wishes: Wishes,
    calls: Sequence[Call] | None,
    folder: str | os.PathLike[str] | None,
    files: dict[ConvTransposeSpec, type],
) -> _Planned:
    """Return what becomes of a layer; `files` has the classes that were made, and gets its.

    `calls` are those with example inputs, None without.
    """
    original, note = original_of(layer), ""
    dtype = dtype_of(calls) if wishes.dtype is None and calls else None
    if dtype is not None:  # a precision is for float32, which these calls have not
        wishes = replace(wishes, dtype=dtype, precision=None)
    if wishes.precision is None and wishes.dtype is None and not allows_tf32():
        wishes, note = replace(wishes, precision="ieee"), IEEE
    spec = spec_of(layer, wishes)
    spec = replace(spec, layout=layout_for(spec.rank))
    spec = _with_rungs(spec, layer, calls)
    note = note if spec.dtype == "float32" else ""
    record = record_of(layer)
    if record is not None and record["spec"] == str(spec) and folder is None:
        return _Planned(spec, note, None, original, record["folder"])
    if spec not in files:
        spec, text = _emitted(spec)
        files[spec] = kept_module(spec, text, folder).ModelNew
    is_made = record is not None and bool(record["folder"]) and isinstance(layer, files[spec])
    made = None if is_made else files[spec]
    return _Planned(spec, note, made, original, "" if folder is None else os.fspath(folder))


def _emitted(spec: ConvTransposeSpec) -> tuple[ConvTransposeSpec, str]:
    """Return a spec and its file's text, without the rungs that no launch grid holds."""
    try:
        return spec, compile_kernel(spec).text
    except SpecError as error:
        kept = tuple(rung for rung in spec.rungs if _has_plan(spec, rung))
        if kept == spec.rungs:
            raise LeftError(str(error)) from None
    return _emitted(replace(spec, rungs=kept))


def _has_plan(spec: ConvTransposeSpec, rung: tuple[int | None, ...]) -> bool:
    try:
        plan_of(replace(spec, input=rung, rungs=()))
    except SpecError:
        return False
    return True


def _with_rungs(
    spec: ConvTransposeSpec, layer: Any, calls: Sequence[Call] | None
) -> ConvTransposeSpec:
    """Return a spec with the sizes of calls as rungs; without examples those of before stay."""
    record = record_of(layer)
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
        raise SpecError(f"strict=True, and layers cannot be replaced: {reasons}", "strict")
    warnings.warn(f"left as they are: {reasons}", stacklevel=4)


def _apply(layer: Any, name: str, plan: _Planned, strict: bool) -> None:
    """Change a layer as planned."""
    if plan.made is not None:
        become(layer, plan.made, plan.original, bool(plan.folder))
    vars(layer).update(
        _replaced={"spec": str(plan.spec), "note": plan.note, "folder": plan.folder},
        _strict=strict,
        _notice=_notice(name, strict),
    )


def _give_back(layer: Any) -> None:
    """Make a layer torch's again that was replaced before and can no longer be."""
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
