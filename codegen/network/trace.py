"""Tracing: the specs of a model's transposed convolutions, with the sizes that they are called at.

Beside the stages; needs torch, imported when a function is called. Input: a model and inputs of its
forward; output: a `Trace`. project/document.py writes it as the text of a `.convgen` file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MachineError, SpecError, visible
from ..language.spec import ConvTransposeSpec
from ..values import check_choice
from .calls import Call, random_restored, recorded, user_code
from .layers import LeftError, Wishes, check_module, spec_of, transposed

OPEN = ("batch", "all")
DTYPES = ("float16", "bfloat16")  # of autocast
_PACKAGE = str(Path(__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class TracedKernel:
    """A spec of a model, and the layers that it serves.

    Attributes:
        spec: the layer, with the sizes that were seen and are not open.
        layers: names in `named_modules()` of the layers, in the order of their first calls.
        resized: whether a call gave `output_size`; the spec has it as its output padding.
    """

    spec: ConvTransposeSpec
    layers: tuple[str, ...]
    resized: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward of a model called.

    Attributes:
        kernels: the distinct specs, in the order of their first calls.
        left: the layers that were called and have no spec, and scripted ones, with the reasons.
        uncalled: the layers that were not called.
    """

    kernels: tuple[TracedKernel, ...]
    left: dict[str, str]
    uncalled: tuple[str, ...]


def trace_layers(
    model: Any,
    inputs: Sequence[Any],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    opened: str | None = None,
    in_place: bool = False,
) -> Trace:
    """Run a model's forward once and return the specs of its transposed convolutions.

    It runs in eval mode under `torch.no_grad`, on a copy of the model and of the tensors among
    `inputs`; torch's, NumPy's and Python's random numbers go on afterwards as if it had not run.
    Only calls of layers are seen, no calls of `torch.nn.functional.conv_transpose2d`.

    Args:
        model: a `torch.nn.Module`.
        inputs: the positional arguments of its forward.
        dtype: "float16" or "bfloat16" to run under autocast of that dtype; None for no autocast.
        device: where it runs, "cpu" or "cuda".
        opened: "batch" leaves the batch open in the specs, "all" the batch and all spatial sizes;
            None leaves no size open.
        in_place: run the model itself instead of a copy: it stays in eval mode, on `device`, and
            what its forward changes stays changed. For a model that cannot be copied.

    Raises:
        SpecError: an argument is wrong.
        MachineError: `device` is "cuda" and there is no CUDA GPU.
        ModelError: the model's own code raised.
    """
    import torch

    check_module(model)
    check_choice("device", device, ("cpu", "cuda"))
    dtype = None if dtype is None else check_choice("dtype", dtype, DTYPES)
    opened = None if opened is None else check_choice("opened", opened, OPEN)
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("this needs a CUDA GPU, and torch sees none")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise SpecError("model lies on the device meta, without values", "model")
    check_inputs(model, inputs)
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    with random_restored(gpus):
        run = model if in_place else copied(model, "; in_place=True runs it")
        layers = transposed(run)
        found = _trace(layers, _calls(run, layers, inputs, dtype, device), opened)
        return dataclasses.replace(found, left=found.left | _scripted(run))


def check_inputs(model: Any, inputs: Sequence[Any]) -> None:
    """Raise SpecError if a model's forward does not take that many positional arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a scripted module
        return
    try:
        signature.bind(*inputs)
    except TypeError as error:
        said = f"forward{visible(str(signature))} does not take {len(inputs)} inputs"
        raise SpecError(f"{said}: {visible(str(error))}", "inputs") from None


def copied(model: Any, hint: str = "") -> Any:
    """Return a deep copy of a model; raises SpecError, which ends with `hint`, if there is none."""
    from torch import Tensor, no_grad

    # torch copies no tensor that was computed from parameters, as weight_norm's hook leaves one.
    attributes = (value for module in model.modules() for value in vars(module).values())
    computed = (each for each in attributes if isinstance(each, Tensor) and not each.is_leaf)
    memo = {id(tensor): tensor.detach().clone() for tensor in computed}
    try:
        with no_grad():  # else parameters of a scripted module are copied as results
            return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's attributes raise
        said = visible(f"{type(error).__name__}: {error}")
        raise SpecError(f"model cannot be copied ({said}){hint}", "model") from None


# ---- calls ----


def _calls(
    model: Any, layers: dict[str, Any], inputs: Sequence[Any], dtype: str | None, device: str
) -> list[Call]:
    """Return the distinct calls of a model's layers during its forward, in order."""
    import torch

    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(recorded(layers))
        if dtype is not None:
            stack.enter_context(torch.autocast(device, getattr(torch, dtype)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(user_code("the model's forward"))
        model.to(device).eval()(*(_moved(value, device) for value in inputs))
    if dtype is None:  # what a model's own autocast does is not the caller's wish
        calls = [dataclasses.replace(call, dtype=None) for call in calls]
    return list(dict.fromkeys(calls))


def _scripted(model: Any) -> dict[str, str]:
    """Return the layers that `torch.jit.script` has compiled, with the reason why they stay."""
    from torch.jit import RecursiveScriptModule

    return {
        name: "it is scripted, which hides its calls"
        for name, module in model.named_modules()
        if isinstance(module, RecursiveScriptModule)
        and re.fullmatch("ConvTranspose[123]d", module.original_name)
    }


def _moved(value: Any, device: str) -> Any:
    """Return a copy of a tensor on a device, in its memory format; other values as they are."""
    from torch import Tensor

    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


# ---- specs ----


def _trace(layers: dict[str, Any], calls: list[Call], opened: str | None) -> Trace:
    found: dict[ConvTransposeSpec, list[Call]] = {}
    left: dict[str, dict[str, None]] = {}
    for call in calls:
        try:
            found.setdefault(_spec_at(layers[call.name], call, opened), []).append(call)
        except (LeftError, SpecError) as error:
            left.setdefault(call.name, {})[str(error)] = None
    kernels = (
        TracedKernel(
            spec,
            tuple(dict.fromkeys(call.name for call in served)),
            any(call.output is not None for call in served),
        )
        for spec, served in found.items()
    )
    called = {call.name for call in calls}
    return Trace(
        tuple(kernels),
        {name: "; ".join(reasons) for name, reasons in left.items()},
        tuple(name for name in layers if name not in called),
    )


def _spec_at(layer: Any, call: Call, opened: str | None) -> ConvTransposeSpec:
    """Return the spec of a call; raises LeftError or SpecError if there is none."""
    if hasattr(layer, "_convgen"):
        raise LeftError("it runs an emitted kernel already")
    spec = dataclasses.replace(spec_of(layer, Wishes(None, None, None)), target=None)
    changes: dict[str, Any] = {}
    if call.layout == "channels_last":  # torch's rule: one of input and weight is enough
        changes["layout"] = call.layout
    if not call.batched and "channels_last" in (call.layout, spec.layout):
        raise LeftError("its input has no batch, and a kernel for channels_last needs one")
    if call.dtype is not None and spec.dtype != "float64":  # which autocast leaves
        changes |= {"dtype": call.dtype, "precision": None}
    if call.output is not None:
        extents = zip(call.output, call.shape[2:], spec.stride, strict=True)
        least = [size - (n - 1) * s for size, n, s in extents]
        paddings = zip(least, spec.output_growth, spec.output_padding, strict=True)
        changes["output_padding"] = tuple(g - growth + op for g, growth, op in paddings)
    if opened != "all":
        batch = None if opened == "batch" else call.shape[0]
        changes["input"] = (batch, *call.shape[1:]) if call.shape else ()
    return dataclasses.replace(spec, **changes)
