"""What becomes of an operator in a graph of Inductor's: the graph's numbers and strides stay.

What would break it: a layout that the graph would have to undo, a choice by the wrong axis of a
reduction, torch's convolution with another precision or where a kernel is preferred, an operator
that Inductor does not find as it was imported too early or too late, graphs of symbolic sizes.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import convgen
from convgen import ConvTransposeSpec, parse
from convgen.compiler import plan
from convgen.network import inductor
from convgen.network.graph_choice import (
    COPIED,
    OVER_CHANNELS,
    POOLED,
    RESHAPED,
    RETURNED,
    WITHIN_ROWS,
    Choice,
    choice_of,
    passes_behind,
)
from convgen.planning.choices import MODEL_ALONE, Choices, key_of
from convgen.planning.plan import Measured, MeasuredTorch

# What Inductor says on a GPU of a softmax that it splits.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled")

FIRST, LAST = "channels_first", "channels_last"
CALL = re.compile(r"= getattr\(torch\.ops\.convgen_\w+\.\w+\.default, 'in_graphs', ")
CONVOLUTION = torch.ops.aten.convolution.default


def node_of(behind: Callable[[torch.Tensor], object], rank: int = 2) -> Any:
    """Return the node of a layer with six channels in the graph of it and what is behind it."""
    import torch._inductor.lowering  # which the decomposition of pools needs
    from torch._inductor.decomposition import select_decomp_table

    def network(x: torch.Tensor, weight: torch.Tensor) -> object:
        return behind(getattr(F, f"conv_transpose{rank}d")(x, weight))

    x, weight = torch.randn(2, 4, *[8] * rank), torch.randn(4, 6, *[3] * rank)
    table = {k: v for k, v in select_decomp_table().items() if k is not CONVOLUTION}
    graph = make_fx(network, decomposition_table=table)(x, weight)
    return next(each for each in graph.graph.nodes if each.target is CONVOLUTION)


@pytest.mark.parametrize(
    ("behind", "passes"),
    [
        (lambda y: y, COPIED),
        (lambda y: (y.relu(), y), COPIED),
        (lambda y: F.gelu(y * 2 + 1), RETURNED),
        (lambda y: (y.relu(), y.mean((2, 3))), RETURNED),
        (lambda y: y.mean((2, 3)), 0),
        (lambda y: y.sum(), 0),
        (lambda y: y.sum((0, 2, 3)), 0),
        (lambda y: y.tanh().amax(1), OVER_CHANNELS),
        (lambda y: y.amin(-3, keepdim=True), OVER_CHANNELS),
        (lambda y: y.softmax(1), OVER_CHANNELS + RETURNED),
        (lambda y: y.mean(3), WITHIN_ROWS),
        (lambda y: F.layer_norm(y, (10,)), WITHIN_ROWS + RETURNED),
        (lambda y: F.group_norm(y, 3), RESHAPED),
        (lambda y: F.max_pool2d(y.relu(), 2), POOLED),
        (lambda y: y.flatten(2).sum(), 0),
    ],
)
def test_what_is_behind_a_layer_counts(behind: Callable[[Any], object], passes: float) -> None:
    """By pointwise operators it is reached, and each kind of operator counts once."""
    assert passes_behind(node_of(behind)) == pytest.approx(passes)


def layer(text: str) -> ConvTransposeSpec:
    return parse(f"ConvTranspose{text[:-1]}, layout=any, target=h200)")


def chosen(
    behind: Callable[[Any], object],
    spec: ConvTransposeSpec,
    sizes: tuple[int, ...],
    choices: Choices | None = MODEL_ALONE,
    **others: Any,
) -> Choice:
    """Return the choice for a layer whose input, but for `others`, comes in channels_first."""
    given: dict[str, Any] = {"layout": FIRST, "is_free": False, "is_captured": True} | others
    given.setdefault("torch_too", True)
    node = node_of(behind, len(sizes) - 2)
    layout = given.pop("layout")
    found = choice_of(node, spec, sizes, layout, choices, **given)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "sizes", "better"),
    [  # times measured on an H200: 1.06 and 1.59 ms; 0.93 and 0.45 ms
        ("2d(64, 64, 3, stride=2, padding=1, output_padding=1)", (128, 64, 128, 128), LAST),
        ("3d(3, 16, 3, stride=2, padding=1)", (128, 3, 16, 32, 32), FIRST),
    ],
)
def test_the_faster_kernel_is_chosen(text: str, sizes: tuple[int, ...], better: str) -> None:
    """Behind it nothing matters; the file's rungs are not what is asked for."""
    spec = layer(f"{text[:-1]}, rungs=(({', '.join(map(str, sizes))}),))")
    assert chosen(torch.sum, spec, sizes).layout == better


def test_a_copy_and_what_is_behind_tip_the_scales() -> None:
    """A layer with two kernels of nearly the same predicted time, but for a copy of its input."""
    spec, sizes = layer("2d(64, 128, 3)"), (16, 64, 512, 512)
    found = {
        (name, free): chosen(behind, spec, sizes, is_free=free).layout
        for name, behind in (("sum", torch.sum), ("norm", lambda y: F.group_norm(y, 3)))
        for free in (False, True)
    }
    expected = {("sum", False): FIRST, ("sum", True): LAST, ("norm", False): FIRST}
    assert found == expected | {("norm", True): FIRST}


def test_an_input_in_channels_last_keeps_it() -> None:
    """Although the other kernel is twice as fast: torch's output would have that layout."""
    spec, sizes = layer("3d(3, 16, 3, stride=2, padding=1)"), (128, 3, 16, 32, 32)
    assert chosen(torch.sum, spec, sizes, layout=LAST).layout == LAST


SMALL = (2, 4, 5, 6)


def measured(torch_ms: dict[str, float], sizes: str = "2, 4, 5, 6") -> Choices:
    """Return choices in which the kernel of each layout takes 1 ms, and torch what is given."""
    table = {}
    for layout, ms in torch_ms.items():
        spec = parse(f"ConvTranspose2d(4, 6, 3, input=({sizes}), layout={layout}, target=h200)")
        of_torch = MeasuredTorch(ms, ms)
        table[key_of(spec)] = Measured(plan(spec).tile, 1.0, 3, "a card", torch=of_torch)
    return Choices("h200", table)


@pytest.mark.parametrize(
    ("torch_ms", "others", "expected"),
    [
        ({FIRST: 0.97, LAST: 1.5}, {}, (FIRST, True)),
        ({FIRST: 0.99, LAST: 0.99}, {}, (FIRST, False)),  # which is as fast
        ({FIRST: 0.97, LAST: 0.5}, {}, (LAST, True)),
        ({FIRST: 0.5, LAST: 0.97}, {"layout": LAST}, (LAST, True)),
        ({FIRST: 0.5, LAST: 0.5}, {"torch_too": False}, (FIRST, False)),
    ],
)
def test_torch_computes_what_it_is_faster_at(
    torch_ms: dict[str, float], others: dict[str, Any], expected: tuple[str, bool]
) -> None:
    found = chosen(torch.sum, layer("2d(4, 6, 3)"), SMALL, measured(torch_ms), **others)
    assert (found.layout, found.by_torch) == expected


def test_torch_s_bias_is_added_apart_before_a_pool() -> None:
    """Which takes a pass over the output; pointwise operators and sums add it on their way."""
    spec, sizes = layer("2d(4, 6, 3)"), (512, 4, 512, 512)
    choices = measured({FIRST: 0.9, LAST: 9.0}, ", ".join(map(str, sizes)))
    for behind, by_torch in ((torch.sum, True), (lambda y: F.max_pool2d(y, 2), False)):
        for bias in (False, True):
            found = chosen(behind, dataclasses.replace(spec, bias=bias), sizes, choices)
            assert found.by_torch is (by_torch or not bias)


@pytest.mark.parametrize(
    ("text", "is_captured", "by_torch"),
    [
        ("2d(4, 6, 3)", False, True),
        ("2d(4, 6, 3)", True, False),
        ("2d(6, 6, 3, groups=6)", False, False),
    ],
)
def test_a_launch_that_packs_has_to_be_worth_its_time_on_the_host(
    text: str, is_captured: bool, by_torch: bool
) -> None:
    """A kernel that reads the weight as it is needs none, nor does the replay of a graph."""
    spec = layer(text)
    channels = spec.in_channels
    known = parse(f"{spec}".replace("layout=any", f"input=(2, {channels}, 5, 6)"))
    choices = Choices(
        "h200",
        {
            key_of(each): Measured(
                plan(each).tile, 0.010, 3, "a card", torch=MeasuredTorch(0.015, 0.015)
            )
            for each in (dataclasses.replace(known, layout=name) for name in (FIRST, LAST))
        },
    )
    found = chosen(torch.sum, spec, (2, channels or 0, 5, 6), choices, is_captured=is_captured)
    assert found.by_torch is by_torch


def test_times_of_open_sizes_decide_nothing() -> None:
    """They were taken at nominal sizes, and not at those of the graph."""
    choices = measured({FIRST: 0.001, LAST: 0.001}, "2, 4, None, None")
    assert not chosen(torch.sum, layer("2d(4, 6, 3)"), SMALL, choices).by_torch


def test_what_no_launch_grid_holds_stays_as_it_is() -> None:
    """Its file has no kernel for these sizes either, and torch computes them."""
    sizes, spec = (2**31, 64, 16, 16), layer("2d(64, 64, 3)")
    others = {"is_free": True, "is_captured": True, "torch_too": True}
    assert choice_of(node_of(torch.sum), spec, sizes, FIRST, None, **others) is None


class Network(nn.Module):
    """A layer behind an operator that reads its input in either layout, or none."""

    def __init__(self, rank: int, first: Callable[[Any], Any]) -> None:
        super().__init__()
        self.up = getattr(nn, f"ConvTranspose{rank}d")(4, 6, 2, stride=2)
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.first(x)).softmax(1) * 2


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What every graph is told, and what was last asked; the caches are the test's own."""
    told: dict[str, Any] = {"layout": LAST, "by_torch": False, "asked": []}

    def given(node: Any, spec: Any, sizes: Any, layout: str, choices: Any, **others: Any) -> Choice:
        told["asked"].append({"sizes": tuple(sizes), "layout": layout} | others)
        return Choice(1.0, told["layout"], by_torch=told["by_torch"])

    monkeypatch.setattr(inductor, "choice_of", given)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    return told


def layouts_seen(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[bool]:
    """Return a list that gets, at each call of the operator, whether it is in channels_last."""
    seen: list[bool] = []
    file = sys.modules[type(model.up).__module__]
    plan_of = file._plan_of

    def noted(input: torch.Tensor, weight: torch.Tensor) -> Any:
        seen.append(plan_of(input, weight).CHANNELS_LAST)
        return plan_of(input, weight)

    monkeypatch.setattr(file, "_plan_of", noted)
    return seen


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("first", "is_free", "rank", "dynamic"),
    [
        (nn.Identity(), False, 2, False),
        (torch.tanh, True, 2, True),
        (nn.Identity(), False, 3, True),
        (torch.tanh, True, 3, False),
    ],
)
def test_a_compiled_network_takes_the_layout_that_is_chosen(
    first: Callable[[Any], Any],
    is_free: bool,
    rank: int,
    dynamic: bool,
    answer: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """Its numbers and its output's strides stay; so do those of an input in channels_last."""
    torch.manual_seed(0)
    model = Network(rank, first).to(device).requires_grad_(False)
    x = torch.randn(2, 4, *range(3, 3 + rank), device=device)
    want = model(x)
    convgen.replace_layers(model, target="h200")
    seen = layouts_seen(monkeypatch, model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    got = compiled(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert got.stride() == want.stride()
    asked = {"sizes": tuple(x.shape), "is_free": is_free, "torch_too": True}
    assert answer["asked"] == [asked | {"layout": FIRST, "is_captured": False}]
    last = x.to(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    got = compiled(last)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert [each["layout"] for each in answer["asked"]] == [FIRST, LAST]
    assert seen == [True, True]


@pytest.mark.interpreter
@pytest.mark.parametrize(("rank", "layout"), [(2, FIRST), (2, LAST), (3, LAST)])
def test_torch_s_convolution_takes_an_operator_s_place(
    layout: str, rank: int, answer: dict[str, Any], device: str
) -> None:
    """In either layout; with the numbers, strides and gradients of torch's own layer."""
    answer.update(layout=layout, by_torch=True)
    torch.manual_seed(0)
    model = Network(rank, nn.Identity()).to(device)
    x = torch.randn(2, 4, *range(3, 3 + rank), device=device, requires_grad=True)
    want = model(x)
    gradients = torch.autograd.grad(want.square().sum(), [x, *model.parameters()])
    convgen.replace_layers(model, target="h200")
    got, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert "convolution(" in code
    assert not CALL.search(code)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert got.stride() == want.stride()
    found = torch.autograd.grad(got.square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.interpreter
def test_a_weight_in_channels_last_decides_as_in_torch(
    answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The graph brings the input into its layout, where it can be computed so."""
    model = Network(2, torch.tanh).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 3, device=device)
    want = model.requires_grad_(False)(x)
    convgen.replace_layers(model, target="h200")
    file, given = sys.modules[type(model.up).__module__], []
    plan_of = file._plan_of
    monkeypatch.setattr(
        file, "_plan_of", lambda input, weight: given.append(input) or plan_of(input, weight)
    )
    got = torch.compile(model)(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert got.stride() == want.stride()
    assert [each["layout"] for each in answer["asked"]] == [LAST]
    assert [each.is_contiguous(memory_format=torch.channels_last) for each in given] == [True]


@pytest.mark.interpreter
@pytest.mark.parametrize("by_torch", [True, False])
def test_the_backend_takes_what_is_chosen_too(
    by_torch: bool, answer: dict[str, Any], device: str
) -> None:
    answer.update(by_torch=by_torch)
    torch.manual_seed(0)
    model = Network(2, nn.Identity()).to(device).requires_grad_(False)
    x = torch.randn(2, 4, 5, 3, device=device)
    want = model(x)
    got, (code,) = run_and_get_code(torch.compile(model, backend="convgen"), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert bool(CALL.search(code)) is not by_torch


@pytest.mark.interpreter
def test_torch_takes_no_place_where_a_kernel_is_wanted(answer: dict[str, Any], device: str) -> None:
    """One that is preferred, or more precise than torch may be set to be; the last call counts.

    Of the graphs that Inductor keeps on disk it takes none that was made with another preference.
    """
    tag = torch.compiler.config.cache_key_tag
    model = Network(2, nn.Identity()).to(device).requires_grad_(False)
    x = torch.randn(2, 4, 5, 3, device=device)
    found = []
    kernel = {"prefer": "kernel"}
    for given in ({}, {"strict": True}, kernel, {"precision": "ieee"}, {}, kernel, {}):
        convgen.replace_layers(model, target="h200", **given)
        torch.compiler.reset()
        torch.compile(model)(x)
        found.append([each["torch_too"] for each in answer["asked"]])
        answer["asked"].clear()
    assert found == [[True], [False], [], [False], [], [], []]
    assert torch.compiler.config.cache_key_tag == tag


@pytest.mark.interpreter
def test_torch_takes_no_place_of_a_kernel_that_rounds_otherwise(
    answer: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer was replaced when torch might round to TF32."""
    model = Network(2, nn.Identity()).to(device).requires_grad_(False)
    convgen.replace_layers(model, target="h200")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compile(model)(torch.randn(2, 4, 5, 3, device=device))
    assert [each["torch_too"] for each in answer["asked"]] == [False]


@pytest.mark.parametrize("first", ["torch._inductor.lowering", "convgen"])
def test_inductor_finds_the_operator_whenever_it_is_imported(first: str, tmp_path: Path) -> None:
    """Before the layer is replaced or after it; replacing does not import it."""
    code = f"""
import sys, torch, {first}
import convgen
finders = list(sys.meta_path)
model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3), torch.nn.ConvTranspose1d(4, 6, 3))
loaded = "torch._inductor" in sys.modules
convgen.replace_layers(model, target="h200")
assert ("torch._inductor" in sys.modules) == loaded == ({first!r} != "convgen")
import torch._inductor.lowering
operators = [sys.modules[type(each).__module__].OPERATOR.default for each in model]
print([each in torch._inductor.lowering.lowerings for each in operators], sys.meta_path == finders)
"""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert made.stdout == "[True, True] True\n", made.stderr
