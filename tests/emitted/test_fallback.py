"""Graphs that were made of an emitted layer, and meet what its file was not generated for.

The layer itself is left to torch then, with a warning (test_module.py). A graph has only the
operator, which must do the same: a ValueError there would be one that torch's layer never raises.
Tools that count or translate a graph's operators must find torch's own numbers in it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import convgen
from convgen import parse
from convgen.compiler import compile_kernel
from convgen.execution import oracle
from convgen.execution.loading import load_module
from test_gradient import H100, choices_of

pytestmark = pytest.mark.interpreter

OPEN = "ConvTranspose2d(4, 6, 3, stride=2, padding=1, dtype=float64)"
KNOWN = f"{OPEN[:-1]}, input=(2, 4, 5, 6))"
LAST = f"{OPEN[:-1]}, layout=channels_last)"
BOTH = f"{OPEN[:-1]}, rungs=((2, 4, 5, 6),), layout=any)"  # nothing of these is left to torch
STAGED = f"relu | {OPEN} | tanh"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    """The function from a spec's text to its module."""
    folder = tmp_path_factory.mktemp("fallback")

    @functools.cache
    def load(text: str) -> ModuleType:
        name = f"fallback_{len(list(folder.iterdir()))}"
        return load_module(convgen.emit(text), name, folder)

    return load


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, dtype=torch.float64, device=device)


def traced(layer: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.trace(layer, (x,))


def symbolic(layer: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.fx.symbolic_trace(layer)


def exported(layer: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    dynamic = (
        {0: torch.export.Dim("batch", max=99)} if layer.weight.dtype == torch.float64 else None
    )
    return torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)).module()


GRAPHS = {"jit.trace": traced, "fx": symbolic, "export": exported}
# What is changed of the input that the graph was made with; sizes are part of an export.
CHANGES = {
    "layout": lambda x: x.contiguous(memory_format=torch.channels_last),
    "other layout": lambda x: x.contiguous(),
    "batch": lambda x: torch.cat([x, x]),
    "height": lambda x: x[:, :, 1:],
}
CASES = [
    (graph, text, change)
    for graph in GRAPHS
    for text, change in (
        (OPEN, "layout"),
        (LAST, "other layout"),
        (KNOWN, "batch"),
        (KNOWN, "height"),
        (STAGED, "layout"),
        (BOTH, "layout"),
        (BOTH, "batch"),
        (BOTH, "height"),
    )
    if not (graph == "export" and (text == KNOWN or change == "height"))
]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize(("graph", "text", "change"), CASES)
def test_a_graph_computes_what_its_file_is_not_for(
    graph: str,
    text: str,
    change: str,
    load: Callable[[str], ModuleType],
    x: torch.Tensor,
    device: str,
) -> None:
    layer = load(text).ModelNew(device=device)
    served = x.contiguous(memory_format=torch.channels_last) if text == LAST else x
    call = GRAPHS[graph](layer, served)
    given = CHANGES[change](served).detach().requires_grad_()
    output = call(given)
    exact = by_definition(text, given, layer)
    np.testing.assert_allclose(output.detach().cpu().numpy(), exact, rtol=1e-12, atol=1e-12)
    # Later operators of a graph go by the format that the fake promised: torch's own if torch
    # computes. A kernel follows the input in float64 too, for which torch's output on a GPU is
    # always channels_first (an H200, torch 2.11).
    assert output.stride() == fake(load(text).OPERATOR, given, layer).stride()
    if text == BOTH:
        assert output.is_contiguous(memory_format=suggest_memory_format(given))
    elif text != STAGED:
        plain = nn.ConvTranspose2d(4, 6, 3, 2, 1, device=device, dtype=torch.float64)
        assert output.stride() == plain(given).stride()
    (gradient,) = torch.autograd.grad(output.sum(), given)
    assert gradient.shape == given.shape
    np.testing.assert_allclose(
        call(served).detach().cpu().numpy(), by_definition(text, served, layer)
    )


def fake(operator: Callable[..., torch.Tensor], x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Return what the operator gives for fake tensors."""
    tensors = [t.detach() for t in (x, layer.weight, layer.bias)]
    with FakeTensorMode() as mode:
        return operator(*map(mode.from_tensor, tensors))


def by_definition(text: str, x: torch.Tensor, layer: nn.Module) -> np.ndarray:
    """Return the layer's output by scatter, and its stages."""
    spec = parse(text)
    tensors = [t.detach().cpu().numpy() for t in (x, layer.weight, layer.bias)]
    if text == STAGED:
        tensors[0] = np.maximum(tensors[0], 0)
    output = oracle.scatter(spec, *tensors)
    return np.tanh(output) if text == STAGED else output


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_still_refuses(
    backend: str, load: Callable[[str], ModuleType], x: torch.Tensor
) -> None:
    """Somebody calls it for the kernel; torch in its place would be a slowness without a word."""
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, device=x.device)
    bias = torch.zeros(6, dtype=torch.float64, device=x.device)
    compiled = torch.compile(load(OPEN).conv_transpose2d, backend=backend)
    with pytest.raises(Exception, match="this file was generated for layout channels_first"):
        compiled(x.contiguous(memory_format=torch.channels_last), weight, bias)


def test_a_gradient_is_torch_s_where_the_output_was(tmp_path: Path, device: str) -> None:
    """The gradient's kernel has the file's sizes and dtype in it."""
    text = "ConvTranspose2d(4, 6, 3, padding=1, dtype=float64, input=(2, 4, 5, 6))"
    text_of = compile_kernel(parse(text), H100, choices=choices_of(text, None)).text
    layer = load_module(text_of, "fallback_gradient", tmp_path).ModelNew(device=device)
    graph = torch.fx.symbolic_trace(layer)
    for shape, dtype in (((3, 4, 7, 6), torch.float64), ((2, 4, 5, 6), torch.float32)):
        copied = copy.deepcopy(graph).to(dtype)
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        output = copied(x)
        grad = torch.randn_like(output)
        (found,) = torch.autograd.grad(output, x, grad)
        weight = layer.weight.detach().double()
        want = nn.functional.conv2d(grad.double(), weight, padding=1)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def test_flops_are_counted_as_torch_s(tmp_path: Path, device: str) -> None:
    """Of the layer, batched or not, and of the gradients, one of them by a kernel."""
    text = "ConvTranspose2d(4, 6, 3, padding=1, groups=2, dtype=float64)"
    source = compile_kernel(parse(text), H100, choices=choices_of(text, None)).text
    layer = load_module(source, "fallback_flops", tmp_path).ModelNew(device=device)
    plain = nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2, device=device, dtype=torch.float64)
    for shape in ((2, 4, 5, 6), (4, 5, 6)):
        counts = []
        for each in (plain, layer):
            x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                each(x).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own exporter
@pytest.mark.parametrize("text", [OPEN, BOTH])
def test_onnx_gets_torch_s_operator(
    text: str, load: Callable[[str], ModuleType], x: torch.Tensor, tmp_path: Path
) -> None:
    """ONNX has no operator of convgen's; whoever runs the file has no convgen either."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    model = nn.Sequential(load(text).ModelNew(device=x.device), nn.ReLU()).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("ConvTranspose") == 1
