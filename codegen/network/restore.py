"""Classes of the layers of a torch model: to an emitted one, and back to that of before.

Beside the stages; needs torch and triton, imported when a function is called. Input: a model or a
layer of it; output: the same, whose class has changed.

A layer stays the same object and changes its class, as with torch's parametrizations, so that
references to it (in parents, hooks and optimizers) and its attributes stay valid.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from ..errors import SpecError
from .layers import LeftError, check_module, original_of, record_of, torch_kinds, where

# What an emitted layer has of its own among its attributes.
OWN = ("_calls", "_frozen", "_notice", "_strict", "_replaced")


def restore_layers(model: Any) -> list[str]:
    """Implement `convgen.restore_layers`, which documents it."""
    check_module(model)
    layers = {name: each for name, each in model.named_modules() if record_of(each) is not None}
    originals = {}
    for name, layer in layers.items():
        try:
            originals[name] = original_of(layer)
        except LeftError as error:
            raise SpecError(f"{where(name)} cannot be restored: {error}", "model") from None
    for name, layer in layers.items():
        restore(layer, originals[name])
    return list(layers)


def restore(layer: Any, original: type) -> None:
    """Make a layer an instance of the class that it had before it was replaced."""
    for name in OWN:
        vars(layer).pop(name, None)
    _set_class(layer, original)


def become(layer: Any, made: type, original: type) -> None:
    """Make a layer an instance of an emitted class; its parameters are not touched."""
    from torch import nn

    for name in OWN:
        vars(layer).pop(name, None)
    fresh = made(device="meta")  # which draws no random number
    own = vars(nn.Module())
    for name, value in vars(fresh).items():  # a stride that was edited to be an integer, or a list
        if name not in own and vars(layer).get(name) != value:
            vars(layer)[name] = value
    _set_class(layer, made if original in torch_kinds() else derived(made, original))
    layer._new_calls()  # replicas of the layer count into them


@functools.cache
def derived(made: Any, original: Any) -> Any:
    """Return a user's subclass of torch's layer that computes as an emitted class."""

    def reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (made, original), layer.__getstate__()

    def scriptable(layer: Any) -> Any:
        plain = original.__new__(original)
        vars(plain).update(vars(made.__prepare_scriptable__(layer)))
        return plain

    def fill(names: dict[str, Any]) -> None:
        names |= {name: getattr(original, name) for name in ("__init__", "__doc__", "_get_name")}
        names |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
        names["__reduce_ex__"] = reduced  # this class has no name that pickle could look up
        names["__prepare_scriptable__"] = scriptable

    return types.new_class(original.__name__, (made, original), exec_body=fill)


def _unpickled(made: Any, original: Any) -> Any:
    kind = derived(made, original)
    return kind.__new__(kind)


def _set_class(layer: Any, kind: type) -> None:
    """Set the class of a layer; a parametrized one keeps the properties that compute tensors."""
    from torch.nn.utils.parametrize import is_parametrized

    if is_parametrized(layer):
        mixed = {name: value for name, value in vars(type(layer)).items() if name != "__dict__"}
        mixed.pop("__weakref__", None)
        kind = type(f"Parametrized{kind.__name__}", (kind,), mixed)
    layer.__class__ = kind
