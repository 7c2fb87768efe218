"""The transposed convolutions of a torch model: which there are, which are meant, and their specs.

Beside the stages; needs torch, imported when a function is called. Input: a model; output: layers
by their names, a layer's spec, or the reason why it must stay torch's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import MachineError, SpecError, nearest, shown, text_of, visible
from ..execution.local_gpu import local_target
from ..language.spec import ANY, LAYOUTS, MEMORY_FORMATS, ConvTransposeSpec

DEVICES = ("cpu", "cuda", "meta")  # allowed devices of a layer now; its kernel runs on CUDA
# What an emitted class has instead of torch's, and what it needs torch's of: a user's subclass that
# has its own would no longer do what it does.
RELIED = (
    *("forward", "_output_padding", "_forward_torch", "_reason_for_torch", "_is_first", "weight"),
    *("bias", "freeze", "unfreeze", "_frozen", "_frozen_weight", "_calls", "_Calls", "_new_calls"),
    *("_convgen", "_notice", "_strict", "_stacklevel", "_replaced", "__prepare_scriptable__"),
    *("__getstate__", "__reduce__", "__reduce_ex__", "__init_subclass__", "__slots__"),
)
LEFT = "_left_to_torch"  # the attribute of such a layer
Selection = str | Iterable[str] | Callable[[str, Any], bool] | None


class LeftError(Exception):
    """A layer stays torch's; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wishes:
    """What `replace_layers` was asked for; None where a layer decides by itself."""

    target: str | None
    precision: str | None
    dtype: str | None


def check_module(model: object) -> None:
    """Raise SpecError if `model` is no torch module, MachineError without torch."""
    try:
        from torch import nn
    except ImportError:
        raise MachineError("models need torch, of convgen's extra 'torch'") from None

    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module, got {shown(model)}", "model")


def torch_kinds() -> tuple[type, ...]:
    """Return torch's classes of transposed convolutions."""
    from torch import nn

    return nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


def transposed(model: Any) -> dict[str, Any]:
    """Return the transposed convolutions of a model by their names, each once, emitted or not."""
    kinds = torch_kinds()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def in_compiled(model: Any) -> set[str]:
    """Return the names of the transposed convolutions that lie in compiled modules."""
    prefixes = tuple(
        name and f"{name}."
        for name, module in model.named_modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    )
    return {name for name in transposed(model) if f"{name}.".startswith(prefixes)}


def is_emitted(layer: Any) -> bool:
    """Whether a layer runs an emitted file, by `replace_layers` or by its class."""
    return hasattr(type(layer), "_convgen")


def record_of(layer: Any) -> dict[str, Any] | None:
    """Return what `replace_layers` noted of a layer; None if the layer is none of its.

    Its keys are spec, note and folder; choices, a hash of those given, or empty; and those of
    `left_of`. Values are plain, so that pickles of layers with a folder do not need convgen.
    """
    record: dict[str, Any] | None = vars(layer).get("_replaced")
    return record


def left_of(layer: Any) -> dict[str, Any] | None:
    """Return what `replace_layers` noted of a layer that it left to torch by its times, else None.

    Its keys are spec, with the known sizes; layouts, in which inputs arrive; and times, the fields
    of `Times` for each that was measured.
    """
    left: dict[str, Any] | None = vars(layer).get(LEFT)
    return left


def layout_for(rank: int) -> str:
    """Return the layout of a layer's file: whatever arrives, where torch has two."""
    return ANY if rank in MEMORY_FORMATS else LAYOUTS[0]


def where(name: str) -> str:
    """Return a layer's name as messages have it."""
    return f"layer {name!r}" if name else "the model"


# ---- which are meant ----


def chosen(model: Any, include: Selection, exclude: Selection) -> dict[str, Any]:
    """Return the transposed convolutions that are meant, by their names.

    Raises:
        SpecError: an argument is no selection or names what the model has not, or a layer that is
            meant is lazy and not initialised.
    """
    from torch.nn.parameter import is_lazy

    layers = transposed(model)
    names: dict[int, list[str]] = {id(layer): [] for layer in layers.values()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if id(layer) in names:
            names[id(layer)].append(name)
    meant = set(layers) if include is None else _matching("include", include, layers, names)
    meant -= set() if exclude is None else _matching("exclude", exclude, layers, names)
    found = {name: layer for name, layer in layers.items() if name in meant}
    for name, layer in found.items():
        if any(map(is_lazy, layer.parameters())):
            raise SpecError(
                f"layer {name!r} is lazy and not initialised: run the model once first", "model"
            )
    return found


def _matching(
    argument: str, selection: Any, layers: dict[str, Any], names: dict[int, list[str]]
) -> set[str]:
    """Return the names of the layers that an argument selects; `names` has all of each layer."""
    if callable(selection):
        return {name for name, layer in layers.items() if selection(name, layer)}
    matched = set()
    for pattern in _patterns(argument, selection):
        found = {
            name
            for name, layer in layers.items()
            if any(each == pattern or fnmatchcase(each, pattern) for each in names[id(layer)])
        }
        if not found:
            known = tuple(name for each in names.values() for name in each)
            raise SpecError(
                f"{argument} must name transposed convolutions of the model, got {shown(pattern)}"
                f"{_below(pattern, known) or nearest(pattern, known)}; it has {_listed(known)}",
                argument,
            )
        matched |= found
    return matched


def _patterns(argument: str, selection: Any) -> list[str]:
    """Return the names that an argument gives, as exact str."""
    several = text_of(selection) is None and isinstance(selection, Iterable)
    given = [text_of(each) for each in (selection if several else [selection])]
    patterns = [each for each in given if each is not None]
    if len(patterns) != len(given):
        raise SpecError(
            f"{argument} must be a name, a list of names or a function (name, layer) -> bool, "
            f"got {shown(selection)}",
            argument,
        )
    return patterns


def _below(name: str, known: tuple[str, ...]) -> str:
    """Return the hint for the name of a module that holds layers."""
    return f" (did you mean {name}.*?)" if any(k.startswith(f"{name}.") for k in known) else ""


def _listed(names: tuple[str, ...]) -> str:
    """Return names for a message, the first ten of many."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(visible(name) or "''" for name in names[:10]) or "none") + more


# ---- what a layer is ----


def original_of(layer: Any) -> type:
    """Return the class that a layer has but for convgen, and but for its parametrizations.

    Raises:
        LeftError: its class was changed after it was replaced.
    """
    from torch.nn.utils.parametrize import type_before_parametrizations

    kind: type = type_before_parametrizations(layer)
    if record_of(layer) is None:
        return kind
    original: type = kind.__bases__[-1]
    if hasattr(original, "_convgen") or not hasattr(kind, "_convgen"):
        raise LeftError(f"its class became {kind.__name__} after it was replaced")
    return original


def spec_of(layer: Any, wishes: Wishes) -> ConvTransposeSpec:
    """Return the spec of a layer; raises LeftError if it must stay torch's."""
    from torch import Tensor, nn

    _check_class(original_of(layer))
    if "forward" in vars(layer):
        raise LeftError("its forward was set on the layer itself")
    with _at_rest(layer):
        weight = layer.weight
        if type(weight) not in (Tensor, nn.Parameter):
            raise LeftError(f"its weight is a {type(weight).__name__}")
        if weight.device.type not in DEVICES:
            raise LeftError(f"it lies on {weight.device}, not on {' or '.join(DEVICES[:2])}")
        try:
            spec: ConvTransposeSpec = ConvTransposeSpec.from_module(layer)
        except SpecError as error:
            raise LeftError(str(error)) from None
    spec = dataclasses.replace(spec, target=wishes.target or _target_at(weight.device))
    if spec.dtype != "float32":
        return spec
    dtype = wishes.dtype or spec.dtype
    return dataclasses.replace(spec, precision=wishes.precision, dtype=dtype)


def _check_class(kind: type) -> None:
    """Raise LeftError for a subclass of torch's that an emitted class cannot stand in for."""
    kinds = torch_kinds()
    if kind in kinds:
        return
    torchs = next(each for each in kind.__mro__ if each in kinds)
    own = [
        name
        for name in RELIED
        if inspect.getattr_static(kind, name, None)
        is not inspect.getattr_static(torchs, name, None)
    ]
    if own:
        raise LeftError(f"its class {kind.__name__} overrides {', '.join(own)}")
    if type(kind) is not type:
        raise LeftError(f"its class {kind.__name__} is made by {type(kind).__name__}, not by type")


@contextlib.contextmanager
def _at_rest(layer: Any) -> Iterator[None]:
    """Set parametrizations to eval mode: in training, spectral_norm updates when it is read."""
    import torch
    from torch.nn.utils.parametrize import is_parametrized

    parts = list(layer.parametrizations.modules()) if is_parametrized(layer) else []
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _target_at(device: Any) -> str | None:
    """Return the target nearest to a device's GPU, or to the current one; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    with torch.cuda.device(device if device.type == "cuda" else None):
        return local_target().name


def spec_text(layer: Any) -> str:
    """Return the spec of an emitted layer: as noted, or as its file's header has it."""
    record = record_of(layer)
    if record is not None:
        return str(record["spec"])
    # A package's layer for several targets has those of the files that it has used.
    for each in (*vars(layer).get("_layers", {}).values(), layer):
        module = sys.modules.get(type(each).__module__)
        path = getattr(module, "__file__", None) or type(each).forward.__code__.co_filename
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = re.search(r"^# spec: (.*)$", Path(path).read_text("utf-8"), re.MULTILINE)
            if found:
                return found[1]
    return str(layer)
