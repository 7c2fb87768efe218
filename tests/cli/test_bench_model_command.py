"""`convgen bench-model`: from a model that a user names to a table, a report and a plot.

What would break it: output of the model in the report, a run of minutes before a mistyped option is
told, an exit code that hides wrong numbers. Without a GPU the model runs in Triton's interpreter;
Dynamo compiles without Inductor but for one test.
"""

from __future__ import annotations

import itertools
import json
import os
import sys

import pytest
import torch

from convgen.cli import bench_model
from convgen.measuring import model_bench
from running import run

NUMBERS = itertools.count()
NETS = """
from torch import nn


class Up(nn.ConvTranspose1d):
    def __init__(self):
        super().__init__(4, 2, 4, 2)


class Net(nn.Sequential):
    def forward(self, x):
        print("in forward")
        return super().forward(x)


def net():
    return Net(nn.ConvTranspose1d(4, 2, 4, 2))


def needs(depth):
    return Up()


def fixed():
    return Up().requires_grad_(False)


plain = nn.Conv1d(4, 2, 3)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The name of a module in the current folder."""
    name = f"timed_nets_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("KINETO_LOG_LEVEL", os.environ.get("KINETO_LOG_LEVEL", "6"))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def anywhere(monkeypatch, device):
    """Let the command run without a GPU."""
    monkeypatch.setattr(bench_model, "_device", lambda: device)
    monkeypatch.setattr(model_bench, "BACKENDS", dict.fromkeys(model_bench.BACKENDS, "eager"))


WORDS = ("--input", "1,4,9", "--rounds", "2")


@pytest.mark.interpreter
def test_table_report_and_plot(nets, anywhere, tmp_path):
    """Prints of the model are among the messages; the files may be written again."""
    words = ("bench-model", f"{nets}:net", *WORDS, "-o", "it.json", "--plot", "it.svg")
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert {*done.stderr.splitlines()} == {"in forward"}
    lines = done.stdout.splitlines()
    assert f", torch {torch.__version__}, cuDNN " in lines[0]
    assert lines[1] == (f"{nets}:net (1,4,9), forward in eval mode, no autocast, channels first")
    names = ["torch", "replaced", "compiled", "replaced_compiled", "backend_convgen"]
    assert [line.split()[0] for line in lines[5:10]] == names
    report = json.loads((tmp_path / "it.json").read_text())
    assert [*report][:2] == ["schema", "command"]
    assert (report["schema"], report["command"], report["passed"]) == (1, "bench-model", True)
    assert (report["model"], report["inputs"], report["rounds"]) == (f"{nets}:net", ["1,4,9"], 2)
    assert [len(way["samples"]) for way in report["ways"].values()] == [2] * 5
    assert "<title>convgen bench-model</title>" in (tmp_path / "it.svg").read_text()
    done = run(*words, "--json", "--train", "--autocast", "bfloat16", "--channels-last")
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "it.json").read_text())
    given = {name: report[name] for name in ("train", "autocast", "channels_last")}
    assert given == {"train": True, "autocast": "bfloat16", "channels_last": True}


@pytest.mark.interpreter
def test_wrong_numbers_are_exit_code_1(nets, anywhere, monkeypatch):
    def wrong(model, **options):
        model[0].bias.data.add_(1.0)

    monkeypatch.setattr(model_bench, "replace_layers", wrong)
    done = run("bench-model", f"{nets}:net", *WORDS)
    assert done.exit_code == 1
    assert done.stdout.count("  wrong numbers\n") == 2


@pytest.mark.gpu
def test_a_gpu_is_timed(nets):
    """With the compilers that a user gets: kernels are seen, and take no longer than the calls."""
    done = run("bench-model", f"{nets}:net", "--input", "8,4,4096", "--rounds", "5", "--json")
    assert done.exit_code == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["device"] == torch.cuda.get_device_name()
    assert all(0 < way["device_ms"] < way["ms"] for way in report["ways"].values())
    assert report["calls"] == 1
    assert 0.5 < report["share"] <= 1
    assert report["layers"][0]["torch_calls"] == {}


# ---- wrong input ----


def refused(*words, code=2):
    """Return the message of a command that must fail as a user's mistake."""
    done = run("bench-model", *words)
    assert (done.exit_code, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().startswith(("error: ", "usage: "))
    return done.stderr


def test_a_gpu_that_is_not_there(nets, monkeypatch):
    """It is told before the model is imported."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = "error: bench-model needs a CUDA GPU, and torch sees none\n"
    assert refused(f"{nets}x:net", "--input", "1,4,9") == said


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_package_that_is_not_there(nets, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    said = f"error: bench-model needs {missing}, of convgen's extra 'torch'\n"
    assert refused(f"{nets}:net", "--input", "1,4,9") == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "1,x"], "--input: must be sizes such as 4,3,256,256 or 1,80:float16, got"),
        (["--input", "1,4,9:float"], "--input: dtype must be one of float32, "),
        (["--autocast", "float32"], "Invalid value for '--autocast'"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
        (["--zap"], "No such option '--zap'"),
        (["-o", "/dev/null/it.json"], "cannot write"),
    ],
)
def test_a_wrong_option(nets, words, message):
    assert message in refused(f"{nets}:net", *words)


@pytest.mark.parametrize(
    ("factory", "words", "message"),
    [
        ("nett", ["1,4,9"], "has no nett (did you mean net"),
        ("needs", ["1,4,9"], "needs arguments (depth); name a function that needs none"),
        ("net", [], "error: --input: forward(x) does not take 0 inputs"),
        ("plain", ["1,4,9"], "error: the model has no transposed convolution"),
        ("fixed", ["1,4,9", "--train"], "error: --train: train needs a model with parameters"),
    ],
)
def test_a_model_that_does_not_fit(nets, anywhere, factory, words, message):
    given = ["--input", *words] if words else []
    assert message in refused(f"{nets}:{factory}", *given)


def test_a_model_that_fails_is_its_own_fault(nets, anywhere):
    message = refused(f"{nets}:Up", "--input", "1,5,9", code=1)
    assert "error: the model's forward failed\n  RuntimeError: Given transposed=1" in message


def test_a_file_of_something_else_is_kept(nets, anywhere, tmp_path):
    """A report of bench is one, too."""
    report, plot = tmp_path / "it.json", tmp_path / "it.svg"
    report.write_text('{"schema": 1, "command": "bench", "ways": {}}')
    plot.write_text("<svg><title>convgen bench</title></svg>")
    for option, path, kind in (("-o", report, "report"), ("--plot", plot, "plot")):
        before = path.read_text()
        said = f"error: {path} is no {kind} of convgen bench-model; --force overwrites it\n"
        assert refused(f"{nets}:net", *WORDS, option, path) == said
        assert path.read_text() == before


@pytest.mark.interpreter
def test_force_overwrites_it(nets, anywhere, tmp_path):
    report = tmp_path / "it.json"
    report.write_text("mine")
    assert run("bench-model", f"{nets}:net", *WORDS, "-o", report, "--force").exit_code == 0
    assert json.loads(report.read_text())["command"] == "bench-model"
