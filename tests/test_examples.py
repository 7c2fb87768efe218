"""The examples: what they compute without a GPU, and on one their whole run.

What would break it: an example that no longer fits the package, or a reference that is wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import compare_with_torch
import plot_comparison
import run_kernelbench
from convgen import ConvTransposeSpec
from convgen.execution import oracle
from convgen.execution.loading import load_module
from drawing import draw

CASE = {
    "id": "small",
    "rank": 2,
    "batch": 2,
    "in_channels": 8,
    "out_channels": 4,
    "input": [9, 7],
    "kernel_size": [3, 4],
    "stride": [2, 2],
    "padding": [1, 1],
    "output_padding": [0, 1],
    "dilation": [1, 1],
    "groups": 2,
    "bias": True,
}


@pytest.mark.parametrize("seed", range(40))
def test_the_reference_on_the_gpu_is_the_oracle(seed: int) -> None:
    """Two scatters, written apart, in exact integers."""
    spec, _ = draw(seed)
    random = np.random.default_rng(seed)
    weight_shape = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    arrays = [random.integers(-2, 3, shape) for shape in (spec.input, weight_shape)]
    bias = random.integers(-2, 3, spec.out_channels) if spec.bias else None
    tensors = [torch.from_numpy(array) for array in arrays]
    got = compare_with_torch.scatter(
        spec, *tensors, None if bias is None else torch.from_numpy(bias)
    )
    assert np.array_equal(got.numpy(), oracle.scatter(spec, *arrays, bias))


def test_a_case_is_the_layer_it_says() -> None:
    assert compare_with_torch.spec_of(CASE, "float16") == ConvTransposeSpec(
        rank=2,
        in_channels=8,
        out_channels=4,
        kernel_size=(3, 4),
        stride=2,
        padding=1,
        output_padding=(0, 1),
        groups=2,
        input=(2, 8, 9, 7),
        dtype="float16",
    )


def test_the_plot_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    row = {"case": "bench_57", "torch_ms": 2.0, "convgen_ms": 1.0}
    rows = [row | {"dtype": dtype} for dtype in ("float32", "float16")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    picture = tmp_path / "picture.svg"
    plot_comparison.main([str(tmp_path / "rows.json"), str(picture), "a card, a date"])
    assert "<svg" in picture.read_text()


@pytest.mark.gpu
def test_the_comparison_runs(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [CASE]}))
    result = tmp_path / "result.json"
    compare_with_torch.main([str(tmp_path / "cases.json"), "--json", str(result)])
    rows = json.loads(result.read_text())
    assert [row["dtype"] for row in rows] == ["float32", "float16", "bfloat16", "float64"]
    # Relative errors of TF32 and of the 16-bit types' own rounding; float64 is nearly exact.
    most = {"float32": 6e-4, "float16": 6e-4, "bfloat16": 5e-3, "float64": 1e-14}
    assert all(row["convgen_error"] <= most[row["dtype"]] for row in rows)


PROBLEM = """
import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, channels, kernel, groups, ignored):
        super().__init__()
        self.layer = nn.ConvTranspose1d(channels, channels, kernel, stride=2, groups=groups)

    def forward(self, x):
        return self.layer(x)


def get_inputs():
    return [torch.rand(2, 4, 9)]


def get_init_inputs():
    return [4, 3, 2, "ignored"]
"""


@pytest.mark.interpreter
def test_a_kernelbench_problem_becomes_the_file_that_is_handed_over(tmp_path, device):
    """The adapter takes the problem's own arguments; the weights are those of its Model."""
    folder = tmp_path / "KernelBench" / "level1"
    folder.mkdir(parents=True)
    (folder / "7_conv_transposed.py").write_text(PROBLEM)
    (folder / "8_relu.py").write_text("class Model: ...")
    arguments = [str(tmp_path), "--target", "h100", "--only-write", "-o", str(tmp_path / "out")]
    run_kernelbench.main([*arguments, "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["problem"] == 7
    assert "groups=2" in row["spec"]
    assert "precision=tf32x3" in row["spec"]
    text = (tmp_path / "out" / "7_conv_transposed.py").read_text()
    module = load_module(text, "handed_over", tmp_path)
    torch.manual_seed(0)
    made = module.ModelNew(4, 3, 2, "ignored").to(device)
    names: dict[str, object] = {}
    exec(PROBLEM, names)
    torch.manual_seed(0)
    model = names["Model"](4, 3, 2, "ignored").to(device)
    x = torch.rand(2, 4, 9, device=device)
    with torch.no_grad():
        assert torch.allclose(made(x), model(x), atol=1e-5)


def evaluation(reference, source, **options):
    """Answer as KernelBench's eval.py, which times torch only while it checks for a speedup."""
    assert "class ModelNew(ModelNew)" in source
    assert options["measure_performance"]
    assert options["excessive_speedup_threshold"] == float("inf")
    wrong = "wrong" in reference
    return SimpleNamespace(
        compiled=True,
        correctness=not wrong,
        runtime=-1.0 if wrong else 2.0,
        ref_runtime=8.0 if options["check_for_excessive_speedup"] else -1.0,
        metadata={"max_difference": "much"} if wrong else {},
    )


def test_what_kernelbench_says_is_told(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "KernelBench" / "level1"
    folder.mkdir(parents=True)
    (folder / "7_conv_transposed.py").write_text(PROBLEM)
    (folder / "9_conv_transposed.py").write_text(f"{PROBLEM}# wrong")
    package, module = ModuleType("kernelbench"), ModuleType("kernelbench.eval")
    module.eval_kernel_against_ref = evaluation
    monkeypatch.setitem(sys.modules, "kernelbench", package)
    monkeypatch.setitem(sys.modules, "kernelbench.eval", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = tmp_path / "rows.json"
    run_kernelbench.main([str(tmp_path), "--target", "h100", "--json", str(result)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("correct  torch 8.0 ms  convgen 2.0 ms  4.00x")
    assert lines[3].endswith("not correct or not timed: {'max_difference': 'much'}")
    assert lines[4:] == ["1 of 2 correct, geometric mean 4.00x"]
    assert [row["correct"] for row in json.loads(result.read_text())] == [True, False]


def test_a_checkout_without_problems_is_told(tmp_path):
    with pytest.raises(SystemExit, match="no such problem"):
        run_kernelbench.main([str(tmp_path), "--target", "h100"])
