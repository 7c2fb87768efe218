"""The layout in which a compiled graph computes a layer: who changes it, and that nobody sees it.

What would break it: strides of the output that are not those without convgen, a change beside
convolutions whose layouts Inductor decides, a gradient that is computed in other layouts, a layer
that is slower for the copy, an unbatched input, which has no channels_last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch._dynamo.backends.debugging import aot_eager

from convgen import find_target, parse
from convgen.compiler import plan
from convgen.language.spec import ConvTransposeSpec
from convgen.network import backend, graph_layout
from convgen.network.graph_layout import gains_in_channels_last

H200 = find_target("h200")
# Measured on an H200 (torch 2.11, Triton 3.6, 2026-11-30), ms: first; last; a copy of the input.
GAINS = {
    # 1.65; 1.05; 0.25
    "ConvTranspose2d(64, 64, 3, 2, 1, 1, input=(128, 64, 128, 128), layout=any)": True,
    # 0.61; 0.42; 0.03
    "ConvTranspose3d(32, 64, 3, 2, 1, 1, input=(32, 32, 16, 32, 32), layout=any)": True,
    # 2.97; 2.84; 0.53
    "ConvTranspose2d(64, 128, 3, input=(16, 64, 512, 512), layout=any)": False,
    # 0.45; 0.96; 0.01
    "ConvTranspose3d(3, 16, 3, 2, 1, input=(128, 3, 16, 32, 32), layout=any)": False,
    # Nobody knows how large its inputs are.
    "ConvTranspose2d(64, 64, 3, 2, 1, 1, layout=any)": False,
    "ConvTranspose2d(64, 64, 3, 2, 1, 1, input=(None, 64, 128, 128), layout=any)": False,
    # There is no kernel for channels_last.
    "ConvTranspose2d(64, 64, 3, 2, 1, 1, input=(128, 64, 128, 128))": False,
}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def operands(spec: ConvTransposeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input and a weight of the layer, without memory."""
    sizes = [8 if size is None else size for size in spec.input or (None,) * (spec.rank + 2)]
    assert spec.in_channels is not None
    assert spec.out_channels is not None
    sizes[1] = spec.in_channels
    weight = spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size
    return torch.empty(sizes, device="meta"), torch.empty(weight, device="meta")


@pytest.mark.parametrize("text", GAINS)
def test_a_layer_changes_if_that_is_faster(text: str) -> None:
    spec = parse(text)
    assert gains_in_channels_last(plan(spec, H200), *operands(spec)) is GAINS[text]


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_in_channels_last_stays_so(which: int) -> None:
    """The kernel for it runs anyway."""
    spec = parse(next(iter(GAINS)))
    given = list(operands(spec))
    given[which] = given[which].contiguous(memory_format=torch.channels_last)
    assert not gains_in_channels_last(plan(spec, H200), *given)


# ---- graphs ----


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[str]]:
    """Names of the nodes of rewritten graphs, where every layer that can change does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(graph_layout, "WORTH_LAST", math.inf)
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def rewritten(model: Any, targets: list[str]) -> Any:
    """Compile as the backend does, with AOT alone in the place of Inductor."""

    def compiler(graph: Any, inputs: Any) -> Any:
        backend._rewrite(graph)
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    return torch.compile(model, backend=compiler)


def layer(rank: int, device: str) -> nn.Module:
    kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    return kinds[rank](4, 6, 3, 2, 1).to(device, torch.float64)


def inputs(rank: int, device: str, batch: tuple[int, ...] = (2,)) -> torch.Tensor:
    sizes = (5, 4, 3)[:rank]
    return torch.randn(*batch, 4, *sizes, device=device, dtype=torch.float64)


@pytest.mark.interpreter
@pytest.mark.parametrize("rank", [2, 3])
def test_nobody_sees_the_change(rank: int, targets: list[str], device: str) -> None:
    """Numbers and strides are those of the model, of what follows too."""
    model, x = nn.Sequential(layer(rank, device), nn.Sigmoid()), inputs(rank, device)
    with torch.no_grad():
        want = model(x)
        got = rewritten(model, targets)(x)
        assert targets.count("contiguous") == 2
        torch.testing.assert_close(got, want, check_stride=True)
        both = rewritten(lambda x: (model[0](x), model[0](x).flatten()), targets)(x)
        torch.testing.assert_close(both[0], model[0](x), check_stride=True)
        torch.testing.assert_close(both[1], model[0](x).flatten())
    assert targets.count("contiguous") == 6


@pytest.mark.interpreter
def test_inductor_takes_the_change(targets: list[str], device: str) -> None:
    """The backend itself, two layers in a row."""
    parts = [layer(2, device), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2)]
    model, x = nn.Sequential(*parts).to(device, torch.float64), inputs(2, device)
    with torch.no_grad():
        got = torch.compile(model, backend="convgen")(x)
        torch.testing.assert_close(got, model(x), check_stride=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["rank 1", "recorded", "unbatched", "convolution", "last"])
def test_who_keeps_its_layout(case: str, targets: list[str], device: str) -> None:
    rank = 1 if case == "rank 1" else 2
    model, x = layer(rank, device), inputs(rank, device, () if case == "unbatched" else (2,))
    if case == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    if case == "convolution":
        model = nn.Sequential(model, nn.Conv2d(6, 2, 1).to(device, torch.float64))
    with torch.set_grad_enabled(case == "recorded"):
        got = rewritten(model, targets)(x)
        torch.testing.assert_close(got, model(x))
    assert any("convgen" in each for each in targets)
    assert "contiguous" not in targets
