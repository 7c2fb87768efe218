"""Classes of the layers of a torch model: to an emitted one, and back to that of before.

Beside the stages; needs torch and triton, imported when a function is called. Input: a model or a
layer of it; output: the same, whose class has changed.

A layer stays the same object and changes its class, as with torch's parametrizations, so that
references to it (in parents, hooks and optimizers) and its attributes stay valid.
"""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from .layers import LEFT, LeftError, check_module, original_of, record_of, transposed, where
from .saving import class_of

# What an emitted layer has of its own among its attributes, or one that was left to torch.
OWN = ("_calls", "_frozen", "_notice", "_strict", "_replaced", LEFT)


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
    for layer in transposed(model).values():
        vars(layer).pop(LEFT, None)
    return list(layers)


def restore(layer: Any, original: type) -> None:
    """Make a layer an instance of the class that it had before it was replaced."""
    for name in OWN:
        vars(layer).pop(name, None)
    _set_class(layer, original)


def become(layer: Any, made: type, original: type, is_kept: bool) -> None:
    """Make a layer an instance of an emitted class; its parameters are not touched.

    Args:
        layer: a transposed convolution.
        made: the emitted class.
        original: the class that the layer has without convgen.
        is_kept: whether the file of `made` lies in a folder of the user's.
    """
    from torch import nn

    for name in OWN:
        vars(layer).pop(name, None)
    fresh = made(device="meta")  # which draws no random number
    own = vars(nn.Module())
    for name, value in vars(fresh).items():  # a stride that was edited to be an integer, or a list
        if name not in own and vars(layer).get(name) != value:
            vars(layer)[name] = value
    _set_class(layer, class_of(made, original, is_kept))
    layer._new_calls()  # replicas of the layer count into them


def _set_class(layer: Any, kind: type) -> None:
    """Set the class of a layer; a parametrized one keeps the properties that compute tensors."""
    from torch.nn.utils.parametrize import is_parametrized

    if is_parametrized(layer):
        mixed = {name: value for name, value in vars(type(layer)).items() if name != "__dict__"}
        mixed.pop("__weakref__", None)
        kind = type(f"Parametrized{kind.__name__}", (kind,), mixed)
    layer.__class__ = kind
