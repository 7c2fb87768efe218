"""The backend of `torch.compile(model, backend="convgen")`.

Beside the stages; torch finds it as an entry point of `torch_dynamo_backends`. Input: a graph of
Dynamo's, in which a transposed convolution is one node; output: what Inductor makes of the graph
after each such node has become the operator of a file that is emitted for its sizes.

Inductor compiles everything else, and the whole graph where nothing lies on a CUDA device. A
convolution that no spec can express stays torch's, and where torch was measured to be faster,
Inductor takes its convolution (inductor.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compiler import compile_kernel
from ..errors import SpecError
from ..execution.loading import kept_module
from ..execution.local_gpu import local_target
from ..language.spec import ConvTransposeSpec
from ..planning.choices import Choices, check_targets
from ..tables.targets import DEFAULT_TARGET
from ..values import check_choice
from .inductor import lower
from .layers import layout_for
from .preference import PREFER, allows_tf32, choices_given

# Parameters of torch.conv_transpose1d and its siblings, after input, weight and bias.
_GEOMETRY = ("stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def compile_graph(
    graph: Any,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compile a graph of Dynamo's: its transposed convolutions by convgen, the rest by Inductor.

    Args:
        graph: a `torch.fx.GraphModule`; it is changed.
        example_inputs: fake or real tensors and numbers.
        mode: as `torch.compile` takes it for Inductor.
        options: likewise; and `prefer`: "fastest", the default, leaves to Inductor what it was
            measured to compute faster, "kernel" nothing; and `choices`, a choices file that is
            preferred to the package's own.

    Returns:
        A callable, as Inductor's `compile_fx` returns it.

    Raises:
        SpecError: `prefer` is neither of the two, or `choices` is no choices file, or one for
            another GPU.
        ProjectError: other users may write to the folder of the emitted files, or the choices file
            cannot be read.
        MachineError: that folder cannot be written.
    """
    import torch

    others = dict(options or {})
    prefer = check_choice("options['prefer']", others.pop("prefer", PREFER[0]), PREFER)
    choices = choices_given("options['choices']", others.pop("choices", None))
    if choices is not None:
        check_targets(choices, {_target() or DEFAULT_TARGET})
    _rewrite(graph, prefer, choices)
    inductor = torch._TorchCompileInductorWrapper(mode, others or None, dynamic=None)
    return inductor(graph, example_inputs)


def _rewrite(graph: Any, prefer: str, choices: Choices | None) -> None:
    """Put the operator of an emitted file in the place of each transposed convolution."""
    for node, autocast in _with_autocast(list(graph.graph.nodes)):
        spec = _spec_of(node, autocast)
        input, weight, bias = _given(node, ("input", "weight", "bias"), {"bias": None})
        operator = None if spec is None else _operator_of(spec, prefer, choices)
        if operator is None:
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(operator, (input, weight, bias))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.recompile()


def _with_autocast(nodes: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield nodes with the dtypes of autocast there, by type of device; in the order of a graph.

    Autocast that is on around the compiled function is no node, but is still on now.
    """
    import torch
    from torch.amp import autocast_mode

    kinds = [kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    dtypes: dict[str, Any] = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
    entered: dict[Any, dict[str, Any]] = {}
    for node in nodes:
        if node.target is autocast_mode._enter_autocast:
            entered[node] = dtypes
            kind, dtype, enabled, *_ = node.args
            others = {each: value for each, value in dtypes.items() if each != kind}
            given = torch.get_autocast_dtype(kind) if dtype is None else dtype
            dtypes = others | ({kind: given} if enabled else {})
        elif node.target is autocast_mode._exit_autocast:
            dtypes = entered.get(node.args[0], dtypes)
        else:
            yield node, dtypes


def _spec_of(node: Any, autocast: dict[str, Any]) -> ConvTransposeSpec | None:
    """Return the spec of a node that a kernel can compute, None for any other."""
    import torch

    functions = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    if node.op != "call_function" or node.target not in functions:
        return None
    rank = 1 + functions.index(node.target)
    nodes = _given(node, ("input", "weight", "bias"), {"bias": None})
    tensors: list[Any] = [getattr(each, "meta", {}).get("example_value") for each in nodes]
    if not all(isinstance(each, torch.Tensor) for each in tensors[: 2 + (nodes[2] is not None)]):
        return None
    input, weight, bias = tensors
    if not _has_kernels(input) or not all(type(size) is int for size in weight.shape):
        return None
    names: dict[str, Any] = dict(zip(_GEOMETRY, _given(node, _GEOMETRY, _DEFAULTS), strict=True))
    dtype, precision = _precision(input, autocast)
    sizes = tuple(size if type(size) is int else None for size in input.shape)
    try:
        return ConvTransposeSpec(
            rank=rank,
            in_channels=weight.shape[0],
            out_channels=weight.shape[1] * names["groups"],
            kernel_size=tuple(weight.shape[2:]),
            bias=bias is not None,
            input=sizes if len(sizes) == rank + 2 else (1, *sizes),
            layout=layout_for(rank),
            target=_target(),
            dtype=dtype,
            precision=precision,
            **names,
        )
    except (SpecError, TypeError):  # sizes that are no numbers: torch's error, or torch's result
        return None


def _target() -> str | None:
    """Return the target of this machine's GPU, None without one."""
    import torch

    return local_target().name if torch.cuda.is_available() else None


def _has_kernels(tensor: Any) -> bool:
    """Whether emitted kernels run where a tensor lies: on CUDA, or in Triton's interpreter."""
    import triton

    return bool(tensor.is_cuda or (triton.knobs.runtime.interpret and tensor.device.type == "cpu"))


def _given(node: Any, names: tuple[str, ...], defaults: dict[str, Any]) -> list[Any]:
    """Return arguments of a node by their names, however it was given them."""
    order = ("input", "weight", "bias", *_GEOMETRY)
    placed = dict(zip(order, node.args, strict=False))
    return [placed.get(name, node.kwargs.get(name, defaults.get(name))) for name in names]


def _precision(input: Any, autocast: dict[str, Any]) -> tuple[str, str | None]:
    """Return dtype and precision that torch's own convolution of `input` has, None for tf32."""
    import torch

    dtype = input.dtype
    if dtype.itemsize < 8:  # autocast leaves float64 alone
        dtype = autocast.get(input.device.type, dtype)
    exact = dtype == torch.float32 and not allows_tf32()
    return str(dtype).removeprefix("torch."), "ieee" if exact else None


def _operator_of(spec: ConvTransposeSpec, prefer: str, choices: Choices | None) -> Any:
    """Return the operator of a spec's file, which lies in Inductor's cache; None without a plan."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with contextlib.suppress(SpecError):  # no launch grid holds it
        text = compile_kernel(spec, choices=choices).text
        file = vars(kept_module(spec, text, Path(cache_dir()) / "convgen"))
        lower(file, spec, choices, prefer)
        return file["OPERATOR"].default
    return None
