"""The measure of KernelBench's networks: real runs of made-up problems, and what the report says.

What would break it: wrong numbers that count as right, or right ones that do not; a crash that
loses other ways; results that a further run measures again; figures in a mean that are not
comparable.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernelbench_problem
import run_kernelbench_networks

PROBLEM = """
import os
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(channels, 2, 3, stride=2)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        if type(self.conv_transpose) is not nn.ConvTranspose2d:
            pass
        return torch.tanh(self.norm(self.conv_transpose(x)))

def get_inputs():
    return [torch.rand(4, 4, 5, 6)]

def get_init_inputs():
    return [4]
"""
WAYS = list(run_kernelbench_networks.WAYS)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a right problem, one that is wrong when replaced, and one that crashes then."""
    texts = {
        "level2/5_right.py": PROBLEM,
        "level2/7_wrong.py": PROBLEM.replace("pass", "x = x + 0.03 * x.flip(0)"),
        "level2/9_crash.py": PROBLEM.replace("pass", "os._exit(3)"),
        "level3/1_other.py": "class Model: ...",
    }
    for name, text in texts.items():
        path = tmp_path / "KernelBench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.interpreter
def test_networks_are_measured_checked_and_resumed(
    checkout: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(checkout / "inductor"))
    output = checkout / "rows.jsonl"
    run = [str(checkout), "-o", str(output), "--device", device]
    with pytest.raises(SystemExit) as ended:
        run_kernelbench_networks.main([*run, "--only", "2/5"])
    assert ended.value.code == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert list(row["ways"]) == WAYS
    of_any = {"conv_transpose2d_kernel": 1, "conv_transpose2d_pack_kernel": 1}
    of_examples = {"conv_transpose2d_rung1_kernel": 1, "conv_transpose2d_pack_rung1_kernel": 1}
    of_last = {"conv_transpose2d_rung1_kernel": 1, "conv_transpose2d_pack_kernel": 1}
    launches = {  # whatever layout a graph has them in
        way: {name.replace("_last_", "_"): n for name, n in answer["convgen_launches"].items()}
        for way, answer in row["ways"].items()
    }
    assert not any(answer["left"] for answer in row["ways"].values())
    assert launches == {
        "torch": {},
        "compiled": {},
        "replaced": of_any,
        "examples": of_examples,
        "replaced-compiled": of_any,
        "examples-compiled": of_last,
        "backend": of_any,
    }
    with output.open("a") as file:
        file.write('{"problem": "2/7", "na')  # a run that was ended there
    few = ["--only", "2/7,2/9", "--ways", "replaced,torch", "--workers", "2"]
    with pytest.raises(SystemExit) as ended:
        run_kernelbench_networks.main([*run, *few])
    assert ended.value.code == 1
    capsys.readouterr()

    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is measured again
    with pytest.raises(SystemExit) as ended:
        run_kernelbench_networks.main([*run, "--only", "2/5,2/7", "--ways", "replaced,torch"])
    assert ended.value.code == 1
    known = run_kernelbench_networks.read(output)
    rows = {problem: row["ways"] for problem, row in known.items()}
    assert rows["2/9"]["replaced"]["failed"].startswith("the process ended with 3")
    assert rows["2/9"]["torch"]["right"]
    assert not rows["2/7"]["replaced"]["right"]
    assert rows["2/7"]["torch"]["right"]
    told = capsys.readouterr().out
    assert "2/7 replaced: numbers are off: relative error" in told
    ratio = rows["2/5"]["torch"]["ms"] / rows["2/5"]["replaced"]["ms"]
    assert f"torch / replaced: geometric mean {ratio:.2f}x of 1, lowest" in told
    assert ("no measurement of speed" in told) == (device == "cpu")
    assert "2 problems, 2 measured, 1 of them right in every way" in told


class Limited(nn.Module):
    """A layer that has memory for four images, and something after it."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.layer, self.after = nn.ConvTranspose1d(2, 3, 3), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("more than four images")
        return self.after(self.layer(x))


def test_float64_computes_a_part_at_a_time_if_the_whole_does_not_fit() -> None:
    model, x = Limited(nn.InstanceNorm1d(3)), torch.rand(9, 2, 5)
    whole = model.after(model.layer(x)).detach()
    with torch.no_grad():
        output, images = kernelbench_problem.exact_output(model, (x,))
    assert images == 4
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), whole)


def test_no_part_stands_for_a_batch_that_layers_mix() -> None:
    with (
        torch.no_grad(),
        pytest.raises(kernelbench_problem.UncheckedError, match="its layers mix the batch"),
    ):
        kernelbench_problem.exact_output(Limited(nn.BatchNorm1d(3)), (torch.rand(9, 2, 5),))


def test_one_wrong_number_among_many_shows() -> None:
    exact = torch.ones(1000, 1000, dtype=torch.float64)
    output = exact.float()
    output[700, 3] = 1.5
    assert kernelbench_problem.errors(output, exact) == (0.5 / 1000, 0.5)
    output[700, 3] = float("nan")
    assert all(each != each for each in kernelbench_problem.errors(output, exact))
    with pytest.raises(ArithmeticError, match="shape"):
        kernelbench_problem.errors(output[:1], exact)


def test_convolutions_cut_off_to_tf32_and_nothing_else_does() -> None:
    """A significand of TF32 has ten bits after the point."""
    fine, coarse = 1 + 2.0**-10 - 2.0**-14, 1 + 2.0**-10
    model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(fine)
        cutting = kernelbench_problem.cutting_off_to_tf32(model)
        assert cutting(torch.full((1, 1, 1), fine).double()).item() == fine
        assert cutting(torch.full((1, 1, 1), coarse).double()).item() == coarse * fine
        assert model[0].weight.item() == fine


def row_of(problem: str, machine: str = "one", **ms: float) -> dict[str, Any]:
    answer = {"right": True, "error": 0.0, "worst": 0.0, "allowed": [1.0, 1.0]}
    launches = {"convgen_launches": {"conv_transpose2d_kernel": 1}}
    ways = {way: {"ms": each, **answer, **launches} for way, each in ms.items()}
    return {"problem": problem, "machine": {"device": machine}, "layers": 1, "ways": ways}


def test_the_report_compares_by_level(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row_of("2/1", torch=8.0, replaced=1.0),
        row_of("2/2", torch=0.96, replaced=1.0),
        row_of("2/3", torch=1.0, replaced=4.0),
        row_of("2/4", torch=0.97, replaced=1.0),
        row_of("3/1", torch=3.0, replaced=1.0),
    ]
    ways = ["torch", "replaced"]
    assert run_kernelbench_networks.report({row["problem"]: row for row in rows}, 6, ways) == 0
    told = capsys.readouterr().out
    slower = "lowest 0.25x (2/3), 2 below 0.97: 2/3 0.250x, 2/2 0.960x\n"
    assert f"level 2  torch / replaced: geometric mean 1.17x of 4, {slower}" in told
    none = "lowest 3.00x (3/1), 0 below 0.97\n"
    assert f"level 3  torch / replaced: geometric mean 3.00x of 1, {none}" in told
    assert "6 problems, 5 measured, 5 of them right in every way" in told
    assert "backend:" not in told


def test_the_report_says_what_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"2/1": row_of("2/1", torch=1.0), "2/2": row_of("2/2", "other", torch=1.0, replaced=1.0)}
    rows["2/2"]["ways"]["replaced"]["convgen_launches"] = {}
    assert run_kernelbench_networks.report(rows, 2, ["torch", "replaced"]) == 1
    told = capsys.readouterr().out
    assert "2/1 replaced: failed: not measured" in told
    assert "2/2 replaced: no kernel of convgen's ran" in told
    assert "different machines" in told


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    lines = [row_of("2/1", torch=1.0), row_of("2/2", torch=1.0), row_of("2/1", torch=2.0)]
    text = "\n".join(map(json.dumps, lines)) + "\n" + json.dumps(row_of("2/3", torch=1.0))[:30]
    (tmp_path / "rows.jsonl").write_text(text)
    rows = run_kernelbench_networks.read(tmp_path / "rows.jsonl")
    assert {problem: row["ways"]["torch"]["ms"] for problem, row in rows.items()} == {
        "2/1": 2.0,
        "2/2": 1.0,
    }
    assert run_kernelbench_networks.is_complete(rows["2/2"], ["torch"])
    assert not run_kernelbench_networks.is_complete(rows["2/2"], ["torch", "backend"])


@pytest.mark.parametrize("only", ["", "2/6", "3/1"])
def test_a_checkout_without_such_problems_is_told(checkout: Path, only: str) -> None:
    folder = checkout if only else checkout / "KernelBench"
    with pytest.raises(SystemExit, match="no such problem"):
        run_kernelbench_networks.main([str(folder), "-o", str(checkout / "rows"), "--only", only])
