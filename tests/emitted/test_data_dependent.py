"""Sizes that only the data decide, such as a number of nonzero elements: a graph has to trace them.

What would break it: a check that asks for such a size, a kernel of fixed sizes that gets others, an
output format that the graph did not promise.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import convgen
from convgen.execution.loading import load_module
from test_gradient import emitted

pytestmark = pytest.mark.interpreter

OPEN = "ConvTranspose2d(4, 6, 3, dtype=float64)"
FILES = {
    "open": OPEN,
    "channels last": f"{OPEN[:-1]}, layout=channels_last)",
    "any layout": f"{OPEN[:-1]}, layout=any)",
    "fixed": f"{OPEN[:-1]}, input=(2, 4, 4, 3))",
}
# Inputs of n nonzero elements.
INPUTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "images": lambda x, n: x.view(n, 1, 1, 1).expand(n, 4, 4, 3).contiguous(),
    "rows": lambda x, n: x.view(1, 1, n, 1).expand(2, 4, n, 3).contiguous(),
    "rows in channels last": lambda x, n: (
        x.view(1, 1, n, 1).expand(2, 4, n, 3).contiguous(memory_format=torch.channels_last)
    ),
    "unbatched": lambda x, n: x.view(1, n, 1).expand(4, n, 3).contiguous(),
    "rows and columns": lambda x, n: x.sum() + torch.zeros(2, 4, n, n, dtype=x.dtype),
}


class Found(nn.Module):
    """A layer after what makes its input of the nonzero elements."""

    def __init__(self, layer: nn.Module, make: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.make = layer, make

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found = given[given.nonzero().flatten()]
        return self.layer(self.make(found, found.shape[0]))


def compiled(net: nn.Module, given: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    run(given)
    return run


def exported(net: nn.Module, given: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.export(net, (given,), strict=False).module()


GRAPHS: dict[str, Callable[..., Any]] = {"compile": compiled, "export": exported}


@pytest.fixture(autouse=True)
def dynamic_outputs() -> Iterator[None]:
    """Have Dynamo trace operators whose outputs' sizes depend on data."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.fixture
def pair_of(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[nn.Module, nn.Module]]:
    """The function from an emitted file to its layer, and torch's of the same weight."""

    def pair_of(text: str) -> tuple[nn.Module, nn.Module]:
        name = f"of_{tmp_path.name}"  # Dynamo imports it once a process
        module = load_module(text, name, tmp_path)
        monkeypatch.setitem(sys.modules, name, module)
        layer = module.ModelNew(device=device)
        twin = nn.ConvTranspose2d(4, 6, 3, device=device, dtype=torch.float64)
        twin.load_state_dict(layer.state_dict())
        return layer, twin

    return pair_of


# Compiled each; exported that file which every replaced layer has.
TRACED = [
    *itertools.product(FILES, INPUTS, ["compile"]),
    *itertools.product(["any layout"], INPUTS, ["export"]),
]


@pytest.mark.parametrize(("file", "name", "graph"), TRACED)
@pytest.mark.filterwarnings("ignore:computed by torch")
def test_what_torch_s_layer_traces(
    file: str, name: str, graph: str, pair_of: Callable[..., Any], device: str
) -> None:
    """The graph serves other data too, whichever of them a file's kernel is for."""
    layer, twin = pair_of(convgen.emit(FILES[file]))
    given = torch.tensor([1.0, 0, 2, 3, 0, 4], dtype=torch.float64, device=device)
    try:
        GRAPHS[graph](Found(twin, INPUTS[name]), given)
    except (RuntimeError, GuardOnDataDependentSymNode) as error:
        pytest.skip(f"torch's layer is not traced: {str(error).splitlines()[0]}")
    run = GRAPHS[graph](Found(layer, INPUTS[name]), given)
    for data in (given, torch.arange(6.0, dtype=torch.float64, device=device) + 1):
        want = Found(twin, INPUTS[name])(data)
        got = run(data)
        torch.testing.assert_close(got, want)
        if device == "cpu":  # on a GPU torch's output in float64 is always contiguous
            assert got.stride() == want.stride()


@pytest.mark.parametrize("name", ["images", "rows"])
@pytest.mark.parametrize("file", ["open", "fixed"])
@pytest.mark.filterwarnings("ignore:computed by torch")
def test_a_gradient_of_unknown_sizes_is_torch_s(
    file: str, name: str, pair_of: Callable[..., Any], device: str
) -> None:
    """A gradient in a graph computes what torch's does, whatever the data."""
    text = emitted(FILES[file])
    assert "def _start_gradient(" in text
    layer, twin = pair_of(text)
    given = torch.tensor([1.0, 0, 2, 3, 0], dtype=torch.float64, device=device, requires_grad=True)
    try:
        compiled(Found(twin, INPUTS[name]), given)
    except (RuntimeError, GuardOnDataDependentSymNode) as error:
        pytest.skip(f"torch's layer is not traced: {str(error).splitlines()[0]}")
    run = compiled(Found(layer, INPUTS[name]), given)
    gradients = [
        torch.autograd.grad((net(given) ** 2).sum(), given)[0]
        for net in (run, Found(twin, INPUTS[name]))
    ]
    torch.testing.assert_close(*gradients)


# What a size that is a symbol needs is loaded when there is one.
FRESH = """
import ast, operator, sys, torch
import up

for node in ast.walk(ast.parse(open("up.py").read())):
    name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    if name.startswith("torch.") and name.replace(".", "").isidentifier() and "_cuda" not in name:
        operator.attrgetter(name.removeprefix("torch."))(torch)  # no name that others import

from torch.utils.flop_counter import FlopCounterMode
from up import ModelNew

class Subclass(torch.Tensor):
    pass

layer, x = ModelNew(), torch.ones(2, 4, 5, 5, dtype=torch.float64)
shapes = [layer.to("meta")(x.to("meta")).shape]
layer = ModelNew()
shapes.append(layer(x.as_subclass(Subclass)).shape)
assert "torch.fx.experimental.symbolic_shapes" not in sys.modules
with FlopCounterMode(display=False) as counter:
    shapes.append(layer(x).shape)
assert counter.get_total_flops() == 2 * 2 * 4 * 6 * 9 * 25
assert shapes == [(2, 6, 7, 7)] * 3
"""


def test_a_process_without_symbols_has_no_size_that_data_decide(tmp_path: Path) -> None:
    """Checks that run without a graph: on meta tensors, on subclasses and under a mode."""
    (tmp_path / "up.py").write_text(convgen.emit(OPEN))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], cwd=tmp_path, text=True, stderr=-1
    )
    assert (done.returncode, done.stderr) == (0, "")
