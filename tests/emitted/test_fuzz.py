"""Fuzzing in the suite: specs that hypothesis draws and shrinks, and the script for long runs.

Numbers are compared with scatter, exactly on integers and within a bound on normal data. What would
break it: a wrong tap, shift, mask, offset, stage or launch extent in any form of kernel, and an
output that is never stored. The examples are the same in every run; hypothesis prints how a
falsified one is run again.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import trials
from bounding import bounded
from convgen import parse
from convgen.execution.oracle import reference
from convgen.geometry.tile import Tile
from convgen.rendering.render import KernelSource
from fuzz import main, target_of
from running import worked
from trials import Trial, compiled, draw_trial, held, problem, shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES, SHARES = 60, 3  # so that workers of pytest-xdist can divide the work


@pytest.fixture
def filled() -> Iterator[None]:
    """New tensors are full of NaN, so that an output that is not stored shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _trial(
    text: str, stages: int | None, shapes: tuple[tuple[tuple[int, ...], int], ...], data: int
) -> Trial:
    """Return a trial of inputs and output channels; its tile is the planner's, or one of 64."""
    spec = parse(text)
    tile = None
    if stages:
        tile = Tile(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=stages)
    sizes = [
        dataclasses.replace(spec, input=shape, in_channels=shape[1], out_channels=channels)
        for shape, channels in shapes
    ]
    return Trial(emitted=spec, tile=tile, sizes=(sizes[0], sizes[-1]), data=data)


# What it found wrong on an H100 (Triton 3.6, 2026-11): LLVM and ptxas on index math of axes that
# differ (taps.py), LLVM on lanes and channels (kernel.py).
FOUND = {
    "a constant that ptxas loses": dataclasses.replace(
        _trial(
            "ConvTranspose3d(48, 15, kernel_size=(2, 1, 1), stride=(3, 3, 1), padding=(0, 4, 0), "
            "output_padding=(6, 0, 0), groups=3, dilation=(7, 2, 1), input=(2, 48, 2, 5, 2), "
            "precision=tf32x3, grid=1, target=h100)",
            None,
            (((2, 48, 2, 5, 2), 15),),
            19351,
        ),
        tile=Tile(block_m=32, block_n=16, block_k=16, num_warps=4, num_stages=4),
    ),
    "flags that LLVM mixes up": _trial(
        "ConvTranspose3d(2, 1, kernel_size=3, stride=1, padding=(10, 1, 0), "
        "output_padding=(1, 0, 2), bias=False, dilation=(2, 5, 3), "
        "input=(1, 2, 16, None, None), precision=bf16x6, layout=channels_last, target=h100)",
        None,
        (((1, 2, 16, 2, 2), 1),),
        64695,
    ),
    "a lane in the channel, volumes": _trial(
        "relu | ConvTranspose3d(kernel_size=(3, 3, 1), stride=(3, 3, 1), padding=(0, 1, 0), "
        "bias=False, input=(3, None, 4, 2, None), precision=bf16x6, layout=channels_last, grid=1, "
        "target=h100)",
        4,
        (((3, 17, 4, 2, 5), 1), ((3, 5, 4, 2, 1), 3)),
        51363,
    ),
    "a lane in the channel, images": _trial(
        "ConvTranspose2d(kernel_size=(7, 1), stride=(4, 1), padding=(6, 0), bias=False, "
        "input=(3, None, None, None), dtype=float64, layout=channels_last, grid=2, target=h100) "
        "| clamp(1.0, 3.0) | leaky_relu(0.5)",
        3,
        (((3, 5, 10, 8), 5), ((3, 3, 4, 2), 4)),
        23655,
    ),
    "a lane in the channel, dilated": _trial(
        "ConvTranspose3d(kernel_size=(2, 1, 3), stride=(2, 1, 4), padding=(0, 0, 1), "
        "output_padding=(1, 0, 1), dilation=(1, 1, 3), input=(5, None, None, 2, None), "
        "dtype=float64, layout=channels_last, grid=1, target=h100)",
        3,
        (((5, 16, 1, 2, 2), 17), ((5, 1, 2, 2, 2), 16)),
        64296,
    ),
}


@pytest.mark.interpreter
@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_is_right(name: str, tmp_path: Path, device: str) -> None:
    """On a GPU; the interpreter never had these wrong."""
    trial = FOUND[name]
    assert problem(trial, compiled(trial), "found", tmp_path, device) is None


@pytest.mark.compile
@pytest.mark.parametrize("name", FOUND)
def test_index_math_of_axes_that_differ_is_not_paired(name: str) -> None:
    """What the machine code was wrong for, in the vectors that LLVM made of index math."""
    trial = FOUND[name]
    (code,) = worked("asm_worker.py", [(compiled(trial).text, trial.emitted.dtype, 90)])
    assert FLAGGED.findall(code["llir"]) == []
    assert SHIFTED.findall(code["llir"]) == []
    assert unread(code["ptx"]) == []


# A lane shifted by 31 beside a channel: of the first nobody reads the result, but its flag.
SHIFTED = re.compile(r"= shl nuw[^<\n]*<2 x i32> %\d+, <i32 31, i32 \d+>.*")
# Vectors of differences that LLVM takes for never negative.
FLAGGED = re.compile(r"= sub nuw [^<\n]*<\d+ x i\d+>.*")
SET = re.compile(r"^\s*(?:@!?%p\d+ )?[a-z][\w.:]*\s+\{?([^;]*?)[,}] ", re.MULTILINE)
PAIR = re.compile(r"mov\.b32\s+(%r\d+), \{(%rs\d+), (%rs\d+)\};")
CONSTANT = re.compile(r"mov\.b32\s+(%r\d+), -?\d+;")
SUM = re.compile(r"add\.s16x2\s+%r\d+, (%r\d+), (%r\d+);")


def unread(ptx: str) -> list[str]:
    """Return the sums of a constant and a pair of which one half is never set."""
    known = {name for names in SET.findall(ptx) for name in re.findall(r"%rs\d+", names)}
    pairs = {pair for pair, *halves in PAIR.findall(ptx) if not known.issuperset(halves)}
    constants = set(CONSTANT.findall(ptx))
    sums = ((match.group(), set(match.groups())) for match in SUM.finditer(ptx))
    return [text for text, terms in sums if terms & pairs and terms & constants]


@pytest.mark.interpreter
@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("share", range(SHARES))
def test_drawn_specs_match_the_oracle(share: int, device: str) -> None:
    """Whatever the language can say must come out right."""

    @settings(
        max_examples=EXAMPLES // SHARES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @seed(share)
    @given(st.randoms(use_true_random=False))
    def match(source: random.Random) -> None:
        trial = draw_trial(source, target_of(device))
        with tempfile.TemporaryDirectory() as folder:
            found = problem(trial, compiled(trial), "fuzzed", Path(folder), device)
        assert found is None, f"{found}\n{trial}"

    match()


FAULTS = {  # each with a file that takes the same tensors and gives an output of the same shape
    "another padding": ("{}(3, 5, 3, 3, 0, input=(2, 3, 9))", "{}(3, 5, 3, 3, 1, 2)"),
    "a lost stage": ("{}(2, 3, 2, input=(1, 2, 4)) | relu", "{}(2, 3, 2)"),
    "a stage on padding": ("sigmoid | {}(2, 3, 3, input=(1, 2, 4))", "{}(2, 3, 3) | sigmoid"),
    "a stage a thousandth off": (
        "{}(2, 3, 2, input=(1, 2, 4)) | mul(0.5)",
        "{}(2, 3, 2) | mul(0.501)",
    ),
    "truncated parts": (
        "{}(9, 3, 4, input=(1, 9, 40), precision=tf32x3)",
        "{}(9, 3, 4, precision=tf32)",
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds(fault: str, tmp_path: Path, device: str) -> None:
    """Else the test above could not fail: here the file is of another spec."""
    known, other = (parse(text.format("ConvTranspose1d")) for text in FAULTS[fault])
    trial = Trial(emitted=other, tile=None, sizes=(known, known), data=1)
    assert "outputs are wrong" in (problem(trial, compiled(trial), "fault", tmp_path, device) or "")


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "bf16x3", "bf16x6", "ieee"])
def test_the_bound_is_broken_by_a_lost_product(precision: str) -> None:
    """One tap of one channel at one edge, and an output of nothing but zeros, must exceed it."""
    spec = parse("ConvTranspose1d(8, 4, 3, stride=2, bias=False, input=(2, 8, 20))")
    spec = dataclasses.replace(spec, precision=precision)
    random = np.random.default_rng(3)
    x, weight = (held(spec, random.standard_normal(shape)) for shape in shapes(spec))
    want, most = bounded(spec, x, weight, None)
    x[:, 5, -1] = 0
    lost = np.abs(reference(spec, x, weight) - want)
    reached = [-3, -2, -1]
    assert (lost > most)[..., reached].mean() > 0.9
    assert (np.abs(want) > most).mean() > 0.9


def fuzz(*arguments: str) -> int:
    """Run the script in this process."""
    return main(["--seed", "5", "--device", DEVICE, *arguments])


@pytest.mark.interpreter
@pytest.mark.usefixtures("filled")
def test_the_script_counts_goes_on_and_says_how_to_run_a_spec_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong file, and one that raises, must be told and leave the others be."""
    result = tmp_path / "out.json"
    assert fuzz("--specs", "4", "--json", str(result)) == 0
    passed = json.loads(result.read_text(encoding="utf-8"))
    assert (passed["specs"], passed["failed"]) == (4, [])
    assert fuzz("--only", "2") == 0
    alone = capsys.readouterr().out
    drawn = iter(range(9))

    def broken(trial: Trial) -> KernelSource:
        """The first file launches nothing, the third is no Python."""
        source = compiled(trial)
        faults = {0: ("if input.numel() == 0:", "if True:"), 2: ("import torch", "import torch as")}
        text = source.text.replace(*faults.get(next(drawn), ("", "")))
        # Files of one hash share an operator, which is then the whole file's.
        return dataclasses.replace(source, text=text.replace('"convgen_', '"broken_'))

    monkeypatch.setattr(trials, "compiled", broken)
    assert fuzz("--specs", "4", "--json", str(result)) == 1
    report, said = json.loads(result.read_text(encoding="utf-8")), capsys.readouterr().out
    assert report["forms"] == passed["forms"]
    assert [row["number"] for row in report["failed"]] == [0, 2]
    assert "outputs are wrong" in report["failed"][0]["problem"]
    assert "SyntaxError" in report["failed"][1]["problem"]
    assert all(f"--seed 5 --only {number} " in said for number in (0, 2))
    assert report["failed"][1]["trial"] in alone, "another spec than among others"


@pytest.mark.interpreter
@pytest.mark.usefixtures("filled")
def test_processes_run_the_same_specs(tmp_path: Path, root: Path) -> None:
    """A worker that draws for itself, or has no interpreter, gives another count or fails."""
    alone, both = tmp_path / "alone.json", tmp_path / "both.json"
    assert fuzz("--specs", "3", "--json", str(alone)) == 0
    script = [sys.executable, str(root / "tests/support/fuzz.py"), "--specs", "3", "--seed", "5"]
    command = [*script, "--processes", "2", "--json", str(both), "--device", DEVICE]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    counts = [json.loads(path.read_text(encoding="utf-8"))["forms"] for path in (alone, both)]
    assert counts[0] == counts[1]
