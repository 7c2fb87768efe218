"""bench-model: how the ways of a model are measured, and what is made of the measurements.

What would break it: a way that is compared with itself, wrong numbers that pass, a share that
counts a call twice, a way whose failure takes the others with it, a setting that does not reach the
model. Without a GPU it runs in Triton's interpreter, where the times mean nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from convgen.errors import ModelError, SpecError
from convgen.measuring import model_bench
from convgen.measuring.model_bench import WAYS, machine, measure, steps
from convgen.measuring.model_report import finished, table
from convgen.measuring.model_run import Setting, relative_error
from convgen.measuring.plot import draw_model_plot

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 4, 2, 1)
    )


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile by Dynamo alone: Inductor takes seconds a graph."""
    monkeypatch.setattr(model_bench, "BACKENDS", dict.fromkeys(model_bench.BACKENDS, "eager"))
    torch._dynamo.reset()


# ---- measuring ----


@pytest.mark.interpreter
def test_every_way_computes_the_model_and_is_timed_in_turns(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """With the compilers that a user gets, and a clock whose every call takes longer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    ends = itertools.accumulate(n // 2 + 1 if n % 2 else 0 for n in itertools.count())
    done: list[str] = []
    setting = Setting(device=device, rounds=3)
    model, before = network(), torch.get_rng_state()
    weight = model[2].weight.detach().clone()
    got = measure(model, [X], setting, clock=lambda: float(next(ends)), advance=done.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[2].weight, weight)
    assert type(model[2]) is nn.ConvTranspose2d
    assert len(done) == steps(setting) == 8
    # The first call takes 1 s, the second 2 s: of the first way 1, 6 and 11 s.
    assert {name: row["samples"] for name, row in got["ways"].items()} == {
        name: [1e3 * n, 1e3 * (n + 5), 1e3 * (n + 10)] for n, name in enumerate(WAYS, 1)
    }
    assert [row["ms"] for row in got["ways"].values()] == [6e3, 7e3, 8e3, 9e3, 10e3]
    # Of no way exactly 0, which would be that of float64 against itself.
    assert all(1e-9 < row["relative_error"] < 1e-6 for row in got["ways"].values())
    assert (got["reference"], got["no_float64"], got["roundoff"]) == ("float64", None, 2**-24)
    assert all(row["device_ms"] > 0 for row in got["ways"].values())
    (layer,) = got["layers"]
    assert (layer["name"], layer["torch_calls"]) == ("2", {})
    assert layer["kernel_calls"] > setting.rounds
    assert "rungs=((2, 4, 4, 5),)" in layer["spec"]  # sizes of the run have their own kernel
    assert finished({}, got)["passed"]


class Spy(nn.Module):
    """Notes how it is called."""

    seen: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 2, 2)

    def forward(self, x: Any, flag: Any = None) -> dict[str, Any]:
        kind, layout = x.device.type, torch.channels_last
        formats = [each.is_contiguous(memory_format=layout) for each in (x, self.up.weight)]
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        kept = (self.training, torch.is_grad_enabled(), autocast, all(formats), x.dtype)
        if not torch.compiler.is_compiling():
            self.seen.append(kept)
        return {"count": x.shape, "up": self.up(x), "flag": flag}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("setting", "numbers", "timed"),
    [
        ({}, (False, False, False, False), (False, False, False, False)),
        (
            {"train": True, "channels_last": True},
            (False, True, False, True),
            (True, True, False, True),
        ),
        (
            {"autocast": "bfloat16"},
            (False, False, torch.bfloat16, False),
            (False, False, torch.bfloat16, False),
        ),
    ],
    ids=["plain", "train", "autocast"],
)
def test_settings_reach_the_model(
    device: str,
    eager: None,
    setting: dict[str, Any],
    numbers: tuple[Any, ...],
    timed: tuple[Any, ...],
) -> None:
    Spy.seen = []
    got = measure(Spy(), [X, torch.zeros(2)], Setting(device=device, rounds=1, **setting))
    assert all("ms" in row for row in got["ways"].values())
    # In float64 first, which autocast would leave anyway, then as it is.
    exact, first, *_ = Spy.seen
    assert exact == (*numbers[:2], False, numbers[3], torch.float64)
    assert first == (*numbers, torch.float32)
    assert Spy.seen[-1][:4] == timed
    assert got["roundoff"] == (2**-8 if "autocast" in setting else 2**-11)
    assert got["calls"] == 1  # autocast calls the operator from within the operator
    assert finished({}, got)["passed"]


@pytest.mark.interpreter
@pytest.mark.parametrize("train", [False, True])
def test_wrong_numbers_show(
    device: str, eager: None, monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    """Of an output; in training also of a gradient, with the output as it should be."""
    replace = model_bench.replace_layers

    def wrong(model: Any, **options: Any) -> Any:
        found = replace(model, **options)
        if train:
            model[2].weight.register_hook(lambda gradient: 1.5 * gradient)
        else:
            model[2].weight.data.mul_(1.01)
        return found

    monkeypatch.setattr(model_bench, "replace_layers", wrong)
    got = finished({}, measure(network(), [X], Setting(device=device, rounds=1, train=train)))
    off = {name for name, row in got["ways"].items() if row["off"]}
    assert off == {"replaced", "replaced_compiled"}
    assert not got["passed"]


@pytest.mark.interpreter
def test_a_way_that_fails_leaves_the_others(
    device: str, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such\n\033[31mcompiler")

    monkeypatch.setitem(model_bench.BACKENDS, "compiled", broken)
    ways = measure(network(), [X], Setting(device=device, rounds=1))["ways"]
    assert "no such \\x1b[31mcompiler" in ways["compiled"]["failed"]
    assert [name for name in WAYS if "ms" in ways[name]] == [w for w in WAYS if w != "compiled"]


class Tired(nn.ConvTranspose1d):
    """Raises at its ninth call: the first, 3 to warm up and 3 that are profiled go well."""

    calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        if self.calls == 9:
            raise RuntimeError("out of memory")
        return super().forward(x)


def test_a_way_that_fails_while_it_is_timed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_bench, "WAYS", ("torch", "replaced"))
    done: list[str] = []
    x = torch.randn(1, 2, 3)
    got = measure(Tired(2, 2, 2), [x], Setting(device=device, rounds=3), advance=done.append)
    assert got["ways"]["torch"] == {"failed": "RuntimeError: out of memory"}
    assert len(done) == 5
    assert finished({}, got)["passed"]
    assert got["layers"][0]["reason"] == "its class Tired overrides forward"


class Single(nn.ConvTranspose1d):
    def forward(self, x: Any) -> Any:
        if x.dtype == torch.float64:
            raise TypeError("expected float32")
        return super().forward(x)


def test_a_model_that_has_no_float64_is_compared_with_torch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_bench, "WAYS", ("torch", "replaced"))
    got = finished(
        {}, measure(Single(2, 2, 2), [torch.randn(1, 2, 3)], Setting(device=device, rounds=1))
    )
    assert (got["reference"], got["no_float64"]) == ("torch", "TypeError: expected float32")
    assert got["ways"]["torch"]["relative_error"] < 1e-6
    assert got["limit"] == 32 * 2**-11


class Functional(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return super().forward(x).mean() + F.conv_transpose2d(x, self.weight).mean()


def test_calls_are_seen_also_without_a_layer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="convgen"` replaces them, too."""
    monkeypatch.setattr(model_bench, "WAYS", ("torch", "replaced"))
    got = measure(Functional(3, 3, 3), [X], Setting(device=device, rounds=1))
    assert (got["layers"], got["calls"]) == ([], 1)
    assert 0 < got["share"] < 1


def test_times_on_a_gpu_are_those_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events as the profiler has them: operators with their kernels' times, then the kernels.

    Autocast calls the operator from within the operator; Inductor annotates spans of the GPU's
    time, which hold kernels that are there on their own.
    """
    operator = "aten::conv_transpose2d"
    outer = event(operator, DeviceType.CPU, total=600)
    inner = event(operator, DeviceType.CPU, total=500, parent=event("x", DeviceType.CPU, 0, outer))
    kernels = [event(name, DeviceType.CUDA, total) for name, total in (("cast", 100), ("up", 500))]
    others = [event("aten::relu", DeviceType.CPU, 900), event("relu", DeviceType.CUDA, 900)]
    graph = event("graph", DeviceType.CUDA, 1500)
    graph.is_user_annotation = True
    events = 3 * [outer, inner, *kernels, *others, graph]
    calls: list[None] = []

    class Profile(contextlib.nullcontext[Any]):
        def __init__(self, activities: list[Any], acc_events: bool) -> None:
            super().__init__(self)
            assert activities == [ProfilerActivity.CPU, ProfilerActivity.CUDA]

        def events(self) -> list[Any]:
            return events

    monkeypatch.setattr("torch.profiler.profile", Profile)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    gpu = Setting(device="cuda")
    seen = model_bench._profiled(lambda: calls.append(None), gpu)
    assert len(calls) == 3
    assert (seen.device_ms, seen.layers_ms, seen.calls) == (1.5, 0.6, 1)
    events.clear()
    assert model_bench._profiled(lambda: None, gpu).device_ms is None


def event(name: str, kind: Any, total: float, parent: Any = None) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=kind,
        device_time_total=total,
        self_device_time_total=0 if kind == DeviceType.CPU else total,
        cpu_parent=parent,
        is_user_annotation=False,
    )


class Words(nn.ConvTranspose1d):
    def forward(self, x: Any) -> Any:
        return [str(super().forward(x).shape)]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Conv1d(2, 2, 2), SpecError, "the model has no transposed convolution"),
        (nn.ConvTranspose1d(3, 2, 2), ModelError, r"the model's forward failed\n  RuntimeError"),
        (Words(2, 2, 2), ModelError, "TypeError: it returns no floating-point tensor"),
        (nn.LazyConvTranspose1d(2, 2), SpecError, "lazy parameters: let FACTORY run it once"),
        (nn.Bilinear(2, 2, 2), SpecError, "does not take 1 inputs"),
        (nn.ConvTranspose1d(2, 2, 2).requires_grad_(False), SpecError, "train needs a model with"),
        (3, SpecError, "model must be a torch.nn.Module"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_that_cannot_be_measured(
    device: str, model: Any, error: type, message: str
) -> None:
    setting = Setting(device=device, rounds=1, train=message.startswith("train"))
    with pytest.raises(error, match=message):
        measure(model, [torch.randn(1, 2, 3)], setting)


def test_the_error_is_of_the_worst_tensor() -> None:
    """Relative to its own norm: a small one beside a large one counts as much."""
    want = [torch.tensor([3.0, 4.0]), torch.tensor([300.0, 400.0])]
    got = [torch.tensor([3.0, 4.5]), torch.tensor([300.0, 401.0])]
    assert relative_error(got, want) == pytest.approx(0.1)  # 0.5 of 5; of the other 1 of 500
    assert relative_error(want, want) == 0
    assert relative_error([torch.tensor([2.0 + 1.0j])], [torch.tensor([2.0 + 0.0j])]) == 0.5
    assert relative_error([torch.tensor([0.5])], [torch.tensor([0.0])]) == 0.5
    nan = [torch.tensor([math.nan, 4.0]), torch.tensor([0.0, 0.0])]
    assert math.isnan(relative_error(nan, want))
    assert math.isnan(relative_error(nan[::-1], want))
    with pytest.raises(ValueError, match="other shapes"):
        relative_error([torch.ones(1, 2), want[1]], want)
    with pytest.raises(ValueError, match="other shapes"):
        relative_error(want[:1], want)


def test_the_report_says_where_it_was_made() -> None:
    found = machine("cpu")
    assert found["torch"] == torch.__version__
    assert (found["device"], found["target"], found["cudnn"]) == ("cpu", None, None)


# ---- the report ----

HEAD = {
    "date": "2026-11-30T12:00:00+00:00",
    "convgen": "0.1.0",
    "device": "The Card",
    "target": "h100",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cudnn": 91900,
    "model": "nets:UNet",
    "inputs": ["4,3,256,256", "4:int64"],
    "autocast": "bfloat16",
    "channels_last": True,
    "train": True,
    "rounds": 3,
}


def layer(name: str, reason: str = "", **torch_calls: int) -> dict[str, Any]:
    return {"name": name, "emitted": not reason, "reason": reason, "torch_calls": torch_calls}


def measured(**changes: Any) -> dict[str, Any]:
    """Return measurements: torch takes 4 ms, the others 2 ms, and one fails."""
    errors = {"torch": 3e-4, "replaced": 4e-4, "compiled": 3e-4, "replaced_compiled": 5e-4}
    row = {"ms": 2.0, "samples": [1.0, 2.0, 9.0], "device_ms": 1.5}
    ways = {name: row | {"relative_error": error} for name, error in errors.items()}
    ways["torch"] |= {"ms": 4.0, "samples": [2.0, 4.0, 18.0]}
    ways["backend_convgen"] = {"failed": "RuntimeError: no compiler"}
    for name, error in changes.pop("errors", {}).items():
        ways[name]["relative_error"] = error
    facts = {"calls": 4, "share": 0.234, "reference": "float64", "no_float64": None}
    layers = [layer("up.0"), layer("up.1", "it is odd"), layer("", **{"other sizes": 3})]
    return facts | {"roundoff": 2**-11, "ways": ways, "layers": layers} | changes


@pytest.mark.parametrize(
    ("changes", "limit", "off"),
    [
        ({}, 4 * 2**-11, set()),  # a roundoff is 4.9e-4
        ({"errors": {"replaced": 1.94e-3}}, 4 * 2**-11, set()),
        ({"errors": {"replaced": 1.96e-3}}, 4 * 2**-11, {"replaced"}),
        # Of a deep network torch's own error is more than a roundoff.
        ({"errors": {"torch": 0.01, "replaced": 0.039}}, 0.04, set()),
        ({"errors": {"torch": 0.01, "replaced": 0.041}}, 0.04, {"replaced"}),
        ({"errors": {"replaced": None}}, 4 * 2**-11, {"replaced"}),
        ({"errors": {"torch": None, "replaced": None}}, None, set()),
        ({"reference": "torch", "errors": {"torch": 0.0, "replaced": 0.015}}, 32 * 2**-11, set()),
        ({"reference": "torch", "errors": {"replaced": 0.016}}, 32 * 2**-11, {"replaced"}),
        ({"reference": "torch", "errors": {"torch": None}}, None, set()),
    ],
)
def test_what_rounding_does_not_explain_is_off(
    changes: dict[str, Any], limit: float | None, off: set[str]
) -> None:
    report = finished(HEAD, measured(**changes))
    assert report["limit"] == (None if limit is None else pytest.approx(limit))
    assert {name for name, row in report["ways"].items() if row.get("off")} == off
    assert report["passed"] == (not off)


def test_speedups_are_over_torch() -> None:
    ways = finished(HEAD, measured())["ways"]
    assert [row.get("over_torch") for row in ways.values()] == [1.0, 2.0, 2.0, 2.0, None]
    given = measured()
    # The host takes three times as long from some moment of the second round on.
    given["ways"]["torch"]["samples"] = [1.0, 1.0, 3.0]
    given["ways"]["replaced"]["samples"] = [0.5, 1.5, 1.5]
    assert finished(HEAD, given)["ways"]["replaced"]["over_torch"] == 2.0
    given["ways"]["torch"] = {"failed": "out of memory"}
    report = finished(HEAD, given)
    assert report["ways"]["replaced"]["over_torch"] is None
    assert "replaced               2.000        -     1.500   4.0e-04" in table(report)


def test_the_table() -> None:
    lines = table(finished(HEAD, measured(errors={"replaced": 0.5}))).splitlines()
    assert lines == [
        "The Card, torch 2.11.0, cuDNN 91900, Triton 3.6.0, convgen 0.1.0 for h100, "
        "2026-11-30T12:00:00+00:00",
        "nets:UNet (4,3,256,256 and 4:int64), forward and backward in train mode, "
        "autocast bfloat16, channels last",
        "times of a call in ms; wall: median of 3 rounds, all ways in turns; "
        "x torch: median of each round's ratio; "
        "GPU: sum of its kernels' durations, by torch.profiler",
        "",
        "way                     wall  x torch       GPU     error",
        "torch                  4.000     1.00     1.500   3.0e-04",
        "replaced               2.000     2.00     1.500   5.0e-01  wrong numbers",
        "compiled               2.000     2.00     1.500   3.0e-04",
        "replaced_compiled      2.000     2.00     1.500   5.0e-04",
        "backend_convgen    failed: RuntimeError: no compiler",
        "",
        "transposed convolutions: 4 calls a forward, 23% of its GPU time in torch",
        "errors are relative to the model in float64",
        "numbers are wrong above 2.0e-03, 4 times torch's or 4 roundoffs",
        "stays torch's: up.1: it is odd",
        "computed by torch: the model itself, 3 calls: other sizes",
    ]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"share": None},
            ["transposed convolutions: 4 calls a forward, - of its GPU time in torch"],
        ),
        (
            {"errors": {"torch": None}},
            ["numbers are not compared: torch's are not finite"],
        ),
        (
            {"reference": "torch", "no_float64": "TypeError: no"},
            [
                "errors are relative to torch: in float64 the model fails, TypeError: no",
                "numbers are wrong above 1.6e-02, 32 roundoffs",
            ],
        ),
    ],
)
def test_what_is_not_known_is_said(changes: dict[str, Any], lines: list[str]) -> None:
    assert {*lines} <= {*table(finished(HEAD, measured(**changes))).splitlines()}


def test_the_plot_has_two_bars_for_each_way_that_ran() -> None:
    report = finished(HEAD, measured(errors={"replaced": 0.5}))
    picture = draw_model_plot(report)
    assert picture == draw_model_plot(report)
    tree = ElementTree.fromstring(picture)
    paths = tree.iter("{http://www.w3.org/2000/svg}path")
    bars = [path for path in paths if path.get("clip-path") and path.get("d").count("L") == 3]
    assert len(bars) == 8
    for text in ("The Card", "nets:UNet", "failed", "wrong numbers", "4.000", "wall time"):
        assert f"<!-- {text}" in picture or text in picture
