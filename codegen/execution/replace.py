"""Replacing the transposed convolutions of a torch model by emitted layers.

Beside the stages; needs torch and triton, imported when a function is called. Input: a model;
output: the same model, whose layers run emitted files.

A layer stays the same object and changes its class, as with torch's parametrizations, so that
references to it (in parents, hooks and optimizers) and its attributes stay valid.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compiler import compile_kernel
from ..errors import EditedError, ProjectError, SpecError, shown, text_of, visible
from ..files import check_private, is_regular, make_folder, on_disk, write_text
from ..language.spec import ConvTransposeSpec
from .loading import module_of
from .local_gpu import local_target

DEVICES = ("cpu", "cuda", "meta")  # allowed devices of a layer now; its kernel runs on CUDA
# Folder by process id: a fork inherits the entry of its parent, whose folder may be removed first.
_OWN: dict[int, Path] = {}


def replace_layers(
    model: Any,
    target: str | None,
    precision: str | None,
    dtype: str | None,
    folder: str | os.PathLike[str] | None,
) -> dict[str, str]:
    """Implement `convgen.replace_layers`, which documents it; on an error nothing is changed."""
    target, precision, dtype = _checked_arguments(model, target, precision, dtype, folder)
    specs: dict[str, ConvTransposeSpec] = {}
    left: dict[str, str] = {}
    classes: dict[ConvTransposeSpec, type] = {}
    layers = _transposed(model)
    for name, layer in layers.items():
        try:
            spec = _spec_of(layer, target, precision, dtype)
            if spec not in classes:
                classes[spec] = _load(spec, folder).ModelNew
            specs[name] = spec
        except _LeftError as error:
            left[name] = str(error)
    if left:
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left.items())
        warnings.warn(f"left as they are: {reasons}", stacklevel=3)
    for name, spec in specs.items():
        _become(layers[name], classes[spec])
    return {name: str(spec) for name, spec in specs.items()}


def freeze_layers(model: Any, *, frozen: bool) -> list[str]:
    """Implement `convgen.freeze` and `convgen.unfreeze`, which document it."""
    _check_module(model)
    layers = {name: each for name, each in model.named_modules() if hasattr(each, "_convgen")}
    for layer in layers.values():
        layer.freeze() if frozen else layer.unfreeze()
    return list(layers)


class _LeftError(Exception):
    """A layer stays torch's; the message says why."""


def _checked_arguments(
    model: Any, target: str | None, precision: str | None, dtype: str | None, folder: object
) -> tuple[str | None, str | None, str | None]:
    """Return target, precision and dtype, each None or an exact str."""
    _check_module(model)
    if dtype is not None and text_of(dtype) not in ("float16", "bfloat16"):
        raise SpecError(
            f"dtype must be None (that of the parameters), float16 or bfloat16 (for autocast), "
            f"got {shown(dtype)}",
            "dtype",
        )
    if folder is not None and not _is_path(folder):
        raise SpecError(f"folder must be a path or None, got {shown(folder)}", "folder")
    # Reuse the checks and messages of a spec; the layer does not matter.
    checked = ConvTransposeSpec(
        rank=1, kernel_size=(1,), target=target, precision=precision, dtype=dtype or "float32"
    )
    return (
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


def _check_module(model: object) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module, got {shown(model)}", "model")


def _transposed(model: Any) -> dict[str, Any]:
    """Return torch's transposed convolutions of a model by their names, each once."""
    from torch import nn
    from torch.nn.parameter import is_lazy

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and not hasattr(layer, "_convgen")
    }
    for name, layer in layers.items():
        if any(map(is_lazy, layer.parameters())):
            raise SpecError(
                f"layer {name!r} is lazy and not initialised: run the model once first", "model"
            )
    return layers


def _spec_of(
    layer: Any, target: str | None, precision: str | None, dtype: str | None
) -> ConvTransposeSpec:
    """Return the spec of a layer; raises _LeftError if it must stay torch's."""
    from torch import Tensor, nn
    from torch.nn.utils.parametrize import type_before_parametrizations

    kind = type_before_parametrizations(layer)
    if kind not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        raise _LeftError(f"{kind.__name__} is a subclass of torch's layer")
    if "forward" in vars(layer):
        raise _LeftError("its forward was set on the layer itself")
    with _at_rest(layer):
        weight = layer.weight
        if type(weight) not in (Tensor, nn.Parameter):
            raise _LeftError(f"its weight is a {type(weight).__name__}")
        if weight.device.type not in DEVICES:
            raise _LeftError(f"it lies on {weight.device}, not on {' or '.join(DEVICES[:2])}")
        try:
            spec: ConvTransposeSpec = ConvTransposeSpec.from_module(layer)
        except SpecError as error:
            raise _LeftError(str(error)) from None
    spec = dataclasses.replace(spec, target=target or _target_at(weight.device))
    if spec.dtype != "float32":
        return spec
    return dataclasses.replace(spec, precision=precision, dtype=dtype or spec.dtype)


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


def _load(spec: ConvTransposeSpec, folder: str | os.PathLike[str] | None) -> Any:
    """Return the module of a spec's file; write the file and load it where not yet done.

    Raises:
        EditedError: the file exists with another content.
        ProjectError: other users may change it.
        MachineError: it cannot be written.
    """
    try:
        text = compile_kernel(spec).text
    except SpecError as error:  # no launch grid holds it
        raise _LeftError(str(error)) from None
    try:
        home = Path(folder or _own_folder()).resolve()
    except (OSError, RuntimeError) as error:  # a link in a circle
        raise ProjectError(f"cannot write {folder}: {visible(str(error))}") from None
    make_folder(home)
    check_private(home)
    path = home / f"{_stem(spec, text)}.py"
    if not os.path.lexists(path):
        write_text(path, text, private=True)
    elif not is_regular(path) or on_disk(path) != text:
        raise EditedError(f"{path} was edited: move it, or give another folder")
    check_private(path)  # unpickling imports this file
    name = _module_name(path) if folder else path.stem
    if name not in sys.modules:
        sys.modules[name] = module_of(text, path, name)  # where pickle looks classes up
    return sys.modules[name]


def _own_folder() -> Path:
    """Return a folder that is removed when this process ends; a new one if it has vanished."""
    process = os.getpid()
    try:
        check_private(_OWN[process])
    except (KeyError, ProjectError):
        _OWN[process] = Path(tempfile.mkdtemp(prefix="convgen_"))
        atexit.register(_remove, _OWN[process], process)
    return _OWN[process]


def _remove(folder: Path, process: int) -> None:
    """Remove the folder of a process when it ends, but not when a fork of it ends."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _stem(spec: ConvTransposeSpec, text: str) -> str:
    """Return a readable file name, made unique by a hash."""

    def axes(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values if len(set(values)) > 1 else values[:1]))

    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return (
        f"conv_transpose{spec.rank}d_{spec.in_channels}_{spec.out_channels}"
        f"_k{axes(spec.kernel_size)}_s{axes(spec.stride)}_{spec.dtype}_{digest}"
    )


def _module_name(path: Path) -> str:
    """Return the shortest name by which a file can be imported, its stem if there is none."""
    names = []
    for root in (Path(entry).resolve() for entry in sys.path):
        if path.is_relative_to(root):
            parts = path.relative_to(root).with_suffix("").parts
            if all(part.isidentifier() for part in parts):
                names.append(".".join(parts))
    return min(names, key=lambda name: name.count("."), default=path.stem)


def _become(layer: Any, made: type) -> None:
    """Make a layer an instance of an emitted class; its parameters are not touched."""
    from torch import nn
    from torch.nn.utils.parametrize import is_parametrized

    fresh = made(device="meta")  # which draws no random number
    own = vars(nn.Module())
    vars(layer).update({name: value for name, value in vars(fresh).items() if name not in own})
    if is_parametrized(layer):  # keep the class's properties, which compute the tensors
        mixed = {name: value for name, value in vars(type(layer)).items() if name != "__dict__"}
        mixed.pop("__weakref__", None)
        made = type(f"Parametrized{made.__name__}", (made,), mixed)
    layer.__class__ = made
