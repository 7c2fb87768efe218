"""The backend of torch.compile: a graph's transposed convolutions, and only those, run kernels.

What would break it: a spec that is not the call's (autocast, layout, an integer where torch takes
several), a compilation a size, gradients that stop at the operator, a graph for no GPU that is
changed, arguments that are given by name.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.utils import run_and_get_code

from convgen import parse
from convgen.compiler import plan as planned
from convgen.language.spec import LAYOUTS
from convgen.network import backend
from convgen.planning.choices import key_of, text_of
from convgen.tables.targets import DEFAULT_TARGET, find_target

pytestmark = pytest.mark.interpreter


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[str]]:
    """The specs that files were emitted for, in order; their folder is the test's own."""
    found: list[str] = []
    operator_of = backend._operator_of

    def noted(spec: Any, prefer: str, choices: Any) -> Any:
        found.append(str(spec).removesuffix(")").partition(", target=")[0] + ")")
        return operator_of(spec, prefer, choices)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "_operator_of", noted)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def rewritten(function: Any, **options: Any) -> Any:
    """Compile as the backend does, with AOT alone in the place of Inductor."""

    def compiler(graph: Any, inputs: Any) -> Any:
        backend._rewrite(graph, "fastest", None)
        return aot_eager(graph, inputs)

    return torch.compile(function, backend=compiler, **options)


def network(device: str) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers).to(device, torch.float64)


def test_torch_finds_it_and_inductor_compiles_the_rest(specs: list[str], device: str) -> None:
    """Forward and backward, as a user calls it."""
    assert "convgen" in torch._dynamo.list_backends()
    model = network(device)
    x = torch.randn(2, 3, 5, 6, device=device, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="convgen", options={"epilogue_fusion": False})
    outcomes = []
    for each in (model, compiled):
        output = each(x)
        parameters = [x, *model.parameters()]
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)
    layer = "ConvTranspose2d(4, 6, kernel_size=4, stride=2, padding=1, input=(2, 4, 5, 6)"
    assert specs == [f"{layer}, dtype=float64, layout=any)"]


def test_ten_lengths_are_two_compilations(specs: list[str], device: str) -> None:
    layer = nn.ConvTranspose1d(4, 2, 4, 2, 1).to(device, torch.float64)
    compiled = rewritten(layer)
    for length in range(5, 15):
        x = torch.randn(2, 4, length, device=device, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(specs) == 2
    assert parse(specs[1]).input == (2, 4, None)


# Each is in float64, and its file serves any layout.
CALLS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "by position": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 1, 1),
        "ConvTranspose2d(4, 6, 3, 2, 1, 1, input=(2, 4, 5, 7))",
    ),
    "by name": (
        lambda x, w, b: F.conv_transpose2d(
            input=x, weight=w, bias=b, stride=(2, 1), dilation=(1, 2)
        ),
        "ConvTranspose2d(4, 6, 3, (2, 1), dilation=(1, 2), input=(2, 4, 5, 7))",
    ),
    "no bias, groups": (
        lambda x, w, b: F.conv_transpose2d(x, w, groups=2),
        "ConvTranspose2d(4, 12, 3, groups=2, bias=False, input=(2, 4, 5, 7))",
    ),
    "unbatched": (
        lambda x, w, b: F.conv_transpose2d(x[0], w, b),
        "ConvTranspose2d(4, 6, 3, input=(1, 4, 5, 7))",
    ),
    "channels_last, cut": (  # dense in no format: its strides decide, as in torch
        lambda x, w, b: F.conv_transpose2d(x.to(memory_format=torch.channels_last)[:, :, 1:], w, b),
        "ConvTranspose2d(4, 6, 3, input=(2, 4, 4, 7))",
    ),
    "channels_last": (
        lambda x, w, b: F.conv_transpose2d(x.to(memory_format=torch.channels_last), w, b),
        "ConvTranspose2d(4, 6, 3, input=(2, 4, 5, 7))",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_has_its_own_spec(name: str, specs: list[str], device: str) -> None:
    call, text = CALLS[name]
    given = {"device": device, "dtype": torch.float64}
    tensors = torch.randn(2, 4, 5, 7, **given), torch.randn(4, 6, 3, 3, **given)
    bias = torch.randn(6, **given)
    got, want = rewritten(call)(*tensors, bias), call(*tensors, bias)
    torch.testing.assert_close(got, want)
    if device == "cpu":  # on a GPU torch has no channels_last for float64
        assert got.stride() == want.stride()
    text = f"{text.removesuffix(')')}, dtype=float64, layout=any)"
    assert [str(parse(each)) for each in specs] == [str(parse(text))]


def test_a_call_that_torch_refuses_has_torch_s_error(specs: list[str], device: str) -> None:
    x, w = torch.ones(2, 3, 5, device=device), torch.ones(4, 2, 3, device=device)
    with pytest.raises(Exception, match="to have 4 channels, but got 3 channels"):
        rewritten(F.conv_transpose1d)(x, w)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_decides_the_dtype(inside: bool, specs: list[str], device: str) -> None:
    """Around the compiled function it is no node of the graph."""
    layer = nn.ConvTranspose1d(4, 2, 4, 2, 1).to(device)
    x = torch.randn(2, 4, 5, device=device)

    def within(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            y = layer(x)
        return y.float() + layer(x)

    with torch.autocast(device, torch.bfloat16, enabled=not inside):
        function = within if inside else layer
        got, want = rewritten(function)(x), function(x)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    dtypes = [parse(each).dtype for each in specs]
    assert dtypes == (["bfloat16", "float32"] if inside else ["bfloat16"])


def test_torch_s_setting_of_tf32_is_kept(
    specs: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = nn.ConvTranspose1d(4, 2, 4).to(device)
    rewritten(layer)(torch.randn(2, 4, 5, device=device))
    assert [parse(each).precision for each in specs] == ["ieee"]


def test_settings_that_differ_are_no_error(
    specs: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then torch's switch for both convolutions and recurrent layers cannot be read."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)  # which is set back for both
    cudnn.conv.fp32_precision = "ieee"
    layer = nn.ConvTranspose1d(4, 2, 4).to(device)
    rewritten(layer)(torch.randn(2, 4, 5, device=device))
    assert [parse(each).precision for each in specs] == ["ieee"]


SIZES = "(2, 4, 5, 6)"


def measured(folder: Path, target: str | None = None) -> Path:
    """Write a choices file, as tune does, in which the layer's kernel takes twice torch's time."""
    card, rows = find_target(backend._target() or DEFAULT_TARGET), []
    for layout in LAYOUTS:
        spec = parse(f"ConvTranspose2d(4, 6, 4, 2, 1, input={SIZES}, layout={layout})")
        tile = dataclasses.asdict(planned(spec, card).tile)
        row = {"spec": key_of(spec), "tile": tile, "ms": 1.0, "tried": 3}
        rows.append(row | {"torch": {"ms": 0.5, "best_ms": 0.5}})
    path = folder / "choices.json"
    path.write_text(text_of(target or card.name, {"device": "a card"}, rows), "utf-8")
    return path


@pytest.mark.parametrize("prefer", ["fastest", "kernel"])
def test_a_user_s_measurements_are_an_option(
    prefer: str, specs: list[str], device: str, tmp_path: Path
) -> None:
    """Inductor must not see it, nor the choice; it refuses options that it does not know."""
    layer = nn.ConvTranspose2d(4, 6, 4, 2, 1).to(device)
    x = torch.randn(2, 4, 5, 6, device=device)
    options = {"choices": str(measured(tmp_path)), "prefer": prefer}
    with torch.no_grad():
        compiled = torch.compile(layer, backend="convgen", options=options)
        got, (code,) = run_and_get_code(compiled, x)
        torch.testing.assert_close(got, layer(x), rtol=1e-2, atol=1e-2)
    assert len(specs) == 1
    assert bool(re.search(r"= getattr\(torch\.ops\.convgen_", code)) is (prefer == "kernel")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (3, r"options\['choices'\] must be a path or None, got 3"),
        ("a100", "choices.json has choices for a100, not for "),
    ],
)
def test_choices_must_be_a_file_for_this_gpu(
    choices: Any, message: str, device: str, tmp_path: Path
) -> None:
    given = measured(tmp_path, target=choices) if choices == "a100" else choices
    layer = nn.ConvTranspose1d(4, 2, 4).to(device)
    compiled = torch.compile(layer, backend="convgen", options={"choices": given})
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(2, 4, 5, device=device))
    torch._dynamo.reset()


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_batch_that_depends_on_data_is_no_error(specs: list[str], device: str) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, 2, 1).to(device)
    x, few = torch.randn(4, 4, 5, 6, device=device), torch.tensor([True, False, True, True])

    def call(x: torch.Tensor, few: torch.Tensor) -> Any:
        return layer(x[few])

    compiled = rewritten(call, fullgraph=True)
    with torch.no_grad():
        found = compiled(x, few.to(device))
        torch.testing.assert_close(found, layer(x[few.to(device)]), rtol=1e-2, atol=1e-2)
    assert [parse(each).input for each in specs] == [(None, 4, 5, 6)]


def test_what_is_preferred_is_one_of_two(device: str) -> None:
    layer = nn.ConvTranspose1d(4, 2, 4).to(device)
    compiled = torch.compile(layer, backend="convgen", options={"prefer": "torch"})
    with pytest.raises(Exception, match=r"options\['prefer'\] must be one of fastest, kernel, got"):
        compiled(torch.randn(2, 4, 5, device=device))
    torch._dynamo.reset()


def test_without_a_gpu_a_graph_stays_as_it_is() -> None:
    """In a process without Triton's interpreter, which this one may have."""
    code = (
        "import torch; from convgen.network import backend\n"
        "kept = []\n"
        "def compiler(graph, inputs):\n"
        "    backend._rewrite(graph, 'fastest', None)\n"
        "    kept.extend(str(node.target) for node in graph.graph.nodes)\n"
        "    return graph.forward\n"
        "layer = torch.nn.ConvTranspose1d(4, 2, 4)\n"
        "torch.compile(layer, backend=compiler)(torch.ones(1, 4, 5))\n"
        "assert any('conv_transpose1d' in each for each in kept), kept\n"
        "assert not any('convgen' in each for each in kept), kept\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
