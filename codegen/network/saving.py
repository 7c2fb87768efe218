"""Saving models whose layers run emitted files: what a pickle has, what an exported program lacks.

Beside the stages; needs torch and triton, imported when a function is called. Input: an emitted
class, and whether its file lies in a folder of the user's; output: a class that pickles, in a
module whose operator says when it is recorded into what another process cannot load.

With a folder, a pickle names the file's class, and convgen is not needed where it is loaded.
Without one, the file goes when the process ends: a pickle has the spec, and convgen emits it again.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from typing import Any

from ..compiler import compile_kernel
from ..execution.loading import kept_module
from ..language.parser import parse
from .layers import record_of, torch_kinds

LOST = (
    "the file of {} goes when this process ends, and another process cannot load a program that "
    "calls its operator: convgen.replace_layers(model, folder=...) keeps the file, which has to be "
    "imported before the program is loaded; convgen.restore_layers(model) makes it torch's"
)


def class_of(made: Any, original: Any, is_kept: bool) -> Any:
    """Return the class of a layer: `made`, or a user's subclass of torch's that computes as it.

    Args:
        made: an emitted class.
        original: the class that the layer has without convgen.
        is_kept: whether the file of `made` lies in a folder of the user's.
    """
    module: Any = sys.modules[made.__module__]
    if "__reduce_ex__" not in vars(made):
        made.__reduce_ex__ = _reduced
        made.__name__ = made.__bases__[-1].__name__  # what torchinfo prints, and FSDP2 a part of
    operator = vars(module.OPERATOR).get("kept")  # None if nothing stands around it
    if is_kept and operator is not None:
        module.OPERATOR = operator
    elif not is_kept and operator is None:
        module.OPERATOR = _temporary(module.OPERATOR, made.__module__)
    return made if original in torch_kinds() else _derived(made, original)


@functools.cache
def _derived(made: Any, original: Any) -> Any:
    def scriptable(layer: Any) -> Any:
        plain = original.__new__(original)
        vars(plain).update(vars(made.__prepare_scriptable__(layer)))
        return plain

    def fill(names: dict[str, Any]) -> None:
        names |= {name: getattr(original, name) for name in ("__init__", "__doc__", "_get_name")}
        names |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
        names["__prepare_scriptable__"] = scriptable

    return types.new_class(original.__name__, (made, original), exec_body=fill)


def _reduced(layer: Any, protocol: Any) -> Any:
    """Return what makes a copy of a layer; this method is that of every replaced one."""
    record, bases = record_of(layer), type(layer).__bases__
    made, original = (type(layer), None) if bases[-1] in torch_kinds() else bases
    if record is not None and not record["folder"]:
        return _emitted, (made.__module__, record["spec"], original), layer.__getstate__()
    if original is None:  # a class with a name
        return object.__reduce_ex__(layer, protocol)
    return _unpickled, (made, original), layer.__getstate__()


def _unpickled(made: Any, original: Any) -> Any:
    kind = class_of(made, original, is_kept=True)
    return kind.__new__(kind)


def _emitted(name: str, spec_text: str, original: Any) -> Any:
    """Return a layer that runs a spec's file: this process's of that name, or one emitted now."""
    module: Any = sys.modules.get(name)
    if module is None:
        spec = parse(spec_text)
        module = kept_module(spec, compile_kernel(spec).text, None)
    made = module.ModelNew
    kind = class_of(made, original or made.__bases__[-1], is_kept=False)
    return kind.__new__(kind)


def _temporary(operator: Any, name: str) -> Any:
    """Return what calls an operator, and warns if a program records it that may be saved."""
    import torch

    def call(input: Any, weight: Any, bias: Any) -> Any:
        # In this order: whatever a compiled graph asks is a guard, checked at each of its calls.
        in_graph = torch.compiler.is_dynamo_compiling()
        if not in_graph and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            warnings.warn(LOST.format(name), stacklevel=2)
        return operator(input, weight, bias)

    call.kept = operator  # type: ignore[attr-defined]
    call.default = operator.default  # type: ignore[attr-defined]
    return call
