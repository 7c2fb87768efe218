"""What Inductor makes of the operators of emitted files: what costs the graph least.

Beside the stages; needs torch. Input: the operator of a file, and its spec; output: none, but a
lowering that Inductor finds for the operator. It becomes a call without the dispatcher. If the file
is for whatever layout arrives, the call is in the layout that suits the graph, or of torch's
convolution where that was measured to be faster. Graphs mean the same with it and without: Inductor
gives what a graph returns the strides that it has with torch's layer, and copies where a later
operator needs others.

Inductor takes a second to import, and a model may never be compiled: the lowerings are registered
when it is imported. It keeps compiled graphs on disk, by the names of operators, which stand for
the emitted file and the version of convgen. What else decides, choices and what is preferred, goes
into torch's tag of its caches.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..language.spec import ANY, LAYOUTS, ConvTransposeSpec
from ..language.torch_module import layout_of
from ..planning.choices import Choices
from .graph_choice import choice_of
from .preference import PREFER, is_as_precise

LOG = logging.getLogger("convgen")  # its level INFO tells what was chosen for a graph
BY_TORCH = "torch's convolution"
MODULE = "torch._inductor.lowering"  # which has all lowerings
TAG = " convgen:"  # what follows the user's own tag
CALLS = "in_graphs"  # the attribute of an operator that graphs call instead, if it is there


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a lowering goes by: the spec of the operator's file, choices, and what is preferred."""

    spec: ConvTransposeSpec
    choices: Choices | None
    prefer: str


_layers: dict[Any, _Layer] = {}  # by operator, which Inductor has for its own as soon as it can


def lower(
    file: dict[str, Any], spec: ConvTransposeSpec, choices: Choices | None, prefer: str
) -> None:
    """Let Inductor choose how a file's layer is computed in graphs; of two calls, the last counts.

    Args:
        file: the names of an emitted module.
        spec: the file's; Inductor has a choice if it is of `layout=any`.
        choices: measured tiles that the file was planned with, beside the package's own.
        prefer: "fastest", or "kernel" if torch's convolution shall not take its place.
    """
    from ..execution.graph_calls import GraphCalls

    operator = file["OPERATOR"].default
    setattr(operator, CALLS, GraphCalls(file))
    _layers[operator] = _Layer(spec, choices, prefer)
    _tag_caches()
    if MODULE in sys.modules:
        _register(sys.modules[MODULE], operator)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _tag_caches() -> None:
    """Tell torch's caches of compiled graphs what else than the operators' names decides."""
    from torch.compiler import config

    others = [
        f"{operator} {layer.prefer} {layer.choices and layer.choices.identity}"
        for operator, layer in _layers.items()
        if layer.prefer != PREFER[0] or layer.choices is not None
    ]
    digest = hashlib.sha256("\n".join(sorted(others)).encode()).hexdigest()
    theirs = config.cache_key_tag.partition(TAG)[0]
    config.cache_key_tag = theirs + (TAG + digest if others else "")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers what waits for Inductor as soon as its lowerings are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return what others find for that module, with a loader that also registers; else None."""
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)  # of no use any more
        found = importlib.util.find_spec(fullname)
        if found is not None and found.loader is not None:
            found.loader = _Registering(found.loader)
        return found


class _Registering(importlib.abc.Loader):
    """Loads a module as another loader does, then registers what waits for it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return what the other loader creates."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        self._loader.exec_module(module)
        for operator in _layers:
            _register(module, operator)


def _register(lowering: Any, operator: Any) -> None:
    """Register what an operator becomes: a call, as of any operator, or torch's convolution."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    fallback = lowering.fallback_handler(operator, add_to_fallback_set=False)

    def call(*tensors: Any) -> Any:
        made = fallback(*tensors)
        if not (V.graph.cpp_wrapper or V.graph.fx_wrapper):  # those name operators only
            for each in reversed(V.graph.operations):
                if isinstance(each, ir.FallbackKernel) and each.op_overload is operator:
                    name = each.python_kernel_name
                    # A graph that Inductor kept may run where nobody asked for the attribute.
                    each.python_kernel_name = f"getattr({name}, {CALLS!r}, {name})"
                    break
        return made

    def lowered(input: Any, weight: Any, bias: Any) -> Any:
        layer = _layers[operator]
        input, by_torch = _chosen(input, layer)
        if not by_torch:
            return call(input, weight, bias)
        spec = layer.spec
        convolution = lowering.lowerings[lowering.aten.convolution.default]
        geometry = (list(spec.stride), list(spec.padding), list(spec.dilation))
        return convolution(
            input, weight, bias, *geometry, True, list(spec.output_padding), spec.groups
        )

    lowering.register_lowering(operator, type_promotion_kind=None)(lowered)


def _chosen(input: Any, layer: _Layer) -> tuple[Any, bool]:
    """Return the input of the node that Inductor lowers, and whether torch's convolution takes it.

    The input is in channels_last if that suits the graph, else as it is.
    """
    from torch._inductor import config, ir
    from torch._inductor.virtualized import V

    spec, node = layer.spec, V.graph.current_node
    if spec.layout != ANY:
        return input, False
    given, weight = (_example(each.meta["val"]) for each in node.args[:2])
    if given is None or weight is None or given.dim() != spec.rank + 2:
        return input, False
    order = ir.NHWC_STRIDE_ORDER if spec.rank == 2 else ir.NHWDC_STRIDE_ORDER
    input.realize()
    is_free = False
    if ir.is_storage_and_layout(input):
        _, layout = ir.as_storage_and_layout(input, freeze=False)
        is_free = isinstance(layout, ir.FlexibleLayout) or layout.is_stride_ordered(order)
    before = layout_of(given)
    chosen = choice_of(
        node,
        spec,
        tuple(given.shape),
        max(before, layout_of(weight), key=LAYOUTS.index),  # that of the output, as torch has it
        layer.choices,
        is_free=is_free,
        is_captured=config.triton.cudagraphs,
        torch_too=layer.prefer == PREFER[0] and _may_be_torch(spec),
    )
    if chosen is None:
        return input, False
    what = BY_TORCH if chosen.by_torch else "the kernel"
    LOG.info("%s at %s in a graph: %s, in %s", spec, tuple(given.shape), what, chosen.layout)
    if chosen.layout != before:
        input = ir.ExternKernel.require_stride_order(input, order)
    return input, chosen.by_torch


def _may_be_torch(spec: ConvTransposeSpec) -> bool:
    """Whether torch's convolution is as precise as a file's kernel, whatever torch is set to later.

    A file for `ieee` is for more than TF32, which torch may be set to when a graph is run.
    """
    return spec.precision != "ieee" and is_as_precise(spec)


def _example(tensor: Any) -> Any:
    """Return a tensor of a graph with the numbers of the example as its sizes and strides.

    None if only the data decide one of them.
    """
    import torch

    found = [
        each if isinstance(each, int) else each.node.hint if each.node.has_hint() else None
        for each in (*tensor.shape, *tensor.stride())
    ]
    if None in found:
        return None
    sizes, strides = found[: tensor.dim()], found[tensor.dim() :]
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device="meta")
