"""Tuning: what is tried, what is left out, and what an interrupted run keeps.

What would break it: a form that is never tried, a tile that spills or does not fit and is timed
all the same, rows of an earlier run that are lost or measured again, a file of another card that is
added to. Timing itself needs a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from convgen import ConvgenError, find_target, parse
from convgen.cli.commands import main
from convgen.compiler import plan
from convgen.errors import SpecError
from convgen.execution.cubin import compilers
from convgen.families.registry import FAMILIES
from convgen.geometry.gradient import input_gradient
from convgen.geometry.phases import decompose
from convgen.geometry.tile import Tile
from convgen.language.spec import LAYOUTS
from convgen.language.torch_module import layout_of
from convgen.measuring import tune as tuning
from convgen.measuring.tile_times import gradient_times, torch_times
from convgen.measuring.tune import _fits, shortlist, tune
from convgen.planning.candidates import best_tile, rank_tiles
from convgen.planning.choices import key_of, read_choices, shipped, text_of
from convgen.planning.plan import Candidate, MeasuredGradient, MeasuredTorch

LAYER = "ConvTranspose2d(32, 32, 4, stride=2, padding=1, bias=False, input=(8, 32, 32, 32))"
MEASURED = {"device": "a card", "torch": "2", "triton": "3", "date": "2026-01-01"}
TILE = Tile(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=2)
H100 = find_target("h100")


def ranking_of(text: str) -> tuple[Candidate, ...]:
    """Return what tune chooses from."""
    return rank_tiles(parse(text), decompose(parse(text)), H100, FAMILIES)


class NoExecutor(Executor):
    """Fails the test if anything is measured."""

    def submit(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"measured again: {arguments}")


def rows(text: str) -> list[dict[str, Any]]:
    return [{"spec": key_of(parse(text)), "tile": dataclasses.asdict(TILE), "ms": 1.0, "tried": 3}]


@pytest.mark.parametrize("count", [1, 4, 8, 48])
def test_a_shortlist_has_the_model_s_choice_and_every_form(count):
    ranking = ranking_of("ConvTranspose2d(32, 32, 3, padding=1, input=(8, 32, 32, 32))")
    tiles = shortlist(ranking, count)
    assert len(tiles) == len(set(tiles)) == count
    forms = {(c.tile.family, c.tile.span, c.tile.rows) for c in ranking}
    if count >= 2 * len(forms):
        assert {(tile.family, tile.span, tile.rows) for tile in tiles} == forms
    if count >= 4:
        assert ranking[0].tile in tiles


def test_a_shortlist_is_the_same_every_time():
    """Another draw after an interruption would measure other tiles than before."""
    ranking = ranking_of(LAYER)
    assert shortlist(ranking, 30) == shortlist(ranking, 30)


def test_a_small_layer_is_tried_whole():
    ranking = ranking_of(LAYER)[:5]
    assert set(shortlist(ranking, 48)) == {candidate.tile for candidate in ranking}


@pytest.mark.parametrize(
    ("target", "known", "tried"),
    [("h100", True, True), ("h200", True, True), ("h100", False, False), ("a100", True, False)],
)
def test_what_was_measured_on_the_architecture_is_tried_again(monkeypatch, target, known, tried):
    """Else another search with few tiles could ship a slower one in its place."""
    text, own = next(
        (text, own)
        for text, own in shipped("h100", FAMILIES).table.items()
        if own.tile not in shortlist(ranking_of(text), 1)
    )
    executor = ThreadPoolExecutor(1)
    monkeypatch.setattr(tuning, "_fits", lambda *of: True)
    monkeypatch.setattr(tuning, "_compilers", lambda: executor)
    first, *others = [tile for tile, _ in tuning._compiling.__wrapped__(text, target, 1, known)]
    assert first == best_tile(parse(text), decompose(parse(text)), find_target(target), FAMILIES)
    assert (own.tile in others) == tried


def test_a_worker_without_processes_does_not_compile_while_it_measures(monkeypatch):
    """Its compilers are a thread, which takes Triton's driver from the one that measures."""
    later = ThreadPoolExecutor(1)
    started = []

    def compiling(text, *of):
        started.append(text)
        return [(TILE, later.submit(time.sleep, 0.2))]

    def fastest(spec, target, jobs):
        assert all(fits.done() for _, fits in jobs)
        return 1.0, TILE, 1, 1.0

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    monkeypatch.setattr(tuning, "_may_have_children", lambda: False)
    monkeypatch.setattr(tuning, "_compiling", compiling)
    monkeypatch.setattr(tuning, "_fastest", fastest)
    monkeypatch.setattr(tuning, "torch_times", lambda *of: MeasuredTorch(1.0, 1.0))
    tuning.measure(key_of(parse(LAYER)), "h100", 4, (LAYER.replace("4,", "6,"),))
    assert started == [key_of(parse(LAYER))]


class Remembering(Executor):
    """Measures nothing: remembers what it was asked for, and answers at once."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Any, ...]] = []

    def submit(self, function: Any, *arguments: Any, **options: Any) -> Any:
        self.jobs.append(arguments)
        row = rows(arguments[0])[0] | {"measured": MEASURED}
        done: Future[Any] = Future()
        done.set_result(row)
        return done


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    """What the file has is neither measured again nor lost when the next row is written."""
    output, other = tmp_path / "h100.json", LAYER.replace("8, 32", "4, 32")
    known = rows(LAYER)[0] | {"ms": 0.25}
    output.write_text(text_of("h100", MEASURED, [known]), "utf-8")
    executor = Remembering()
    made = list(tune([parse(LAYER), parse(other)], H100, output, executor, 4))
    assert [job[0] for job in executor.jobs] == [key_of(parse(other))]
    assert made == rows(other)
    found = json.loads(output.read_text("utf-8"))
    assert sorted(found["choices"], key=lambda row: row["ms"]) == [known, *rows(other)]
    assert found["measured"] == MEASURED
    # And with nothing left to do it leaves the file alone.
    before = output.read_bytes()
    assert list(tune([parse(LAYER), parse(other)], H100, output, NoExecutor(), 4)) == []
    assert output.read_bytes() == before


def test_a_file_that_cannot_be_written_stops_it_before_it_measures(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConvgenError, match="file is a file, not a folder"):
        list(tune([parse(LAYER)], H100, tmp_path / "file" / "h100.json", NoExecutor(), 4))


@pytest.mark.parametrize(("gpus", "ahead"), [(1, ["B", "C", None]), (2, ["C", None, None])])
def test_a_worker_compiles_what_it_will_measure_next(tmp_path, gpus, ahead):
    """Another worker's spec would be compiled twice, its own would wait for the compiler."""
    texts = [LAYER.replace("8, 32", f"{batch}, 32") for batch in (1, 2, 4)]
    executor = Remembering()
    list(tune([parse(text) for text in texts], H100, tmp_path / "o.json", executor, 4, gpus))
    names = dict(zip("ABC", map(key_of, map(parse, texts)), strict=True))
    assert [job[0] for job in executor.jobs] == list(names.values())
    assert [job[3] for job in executor.jobs] == [(names[a],) if a else () for a in ahead]


def test_tiles_that_do_not_fit_are_not_timed():
    """In processes of their own, as tune has them: this one has Triton for interpreting."""
    large = dataclasses.replace(TILE, block_m=128, block_n=256, block_k=64, num_stages=4)
    with compilers() as pool:
        fits = [pool.submit(_fits, LAYER, "rtx4090", tile) for tile in (TILE, large)]
        assert [job.result() for job in fits] == [True, False]


@pytest.mark.parametrize(
    ("spills", "shared", "fits"),
    [
        (tuning.MOST_SPILLS, 99 * 1024, True),  # all that a block of an RTX 4090 may have
        (tuning.MOST_SPILLS + 1, 0, False),
        (0, 99 * 1024 + 1, False),
    ],
)
def test_tiles_that_spill_are_not_timed_either(monkeypatch, spills, shared, fits):
    """Their loop goes to local memory: a time of theirs says nothing of the tile."""
    binary = SimpleNamespace(spills=spills, shared=shared)
    monkeypatch.setattr("convgen.execution.cubin.compile_for", lambda *of: binary)
    assert _fits(LAYER, "rtx4090", TILE) is fits


def test_a_worker_ends_when_its_work_does(root: Path):
    """Its compilers wait for work and it for them, unless they are told to end."""
    subprocess.run([sys.executable, root / "tests/support/tune_worker.py"], check=True, timeout=100)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_row_has_the_gradient_of_the_input_where_a_kernel_could_give_it(
    stride, tmp_path, monkeypatch
):
    """Without it no file would ever have that kernel; of a strided layer nothing can be timed."""
    text = key_of(parse(LAYER.replace("stride=2", f"stride={stride}")))
    compiled = []
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    monkeypatch.setattr(tuning, "_compiling", lambda spec, *of: compiled.append(spec) or [])
    monkeypatch.setattr(tuning, "_fastest", lambda *of: (1.0, TILE, 3, 1.0))
    monkeypatch.setattr(tuning, "gradient_times", lambda *of: (0.5, 0.75))
    monkeypatch.setattr(tuning, "torch_times", lambda *of: MeasuredTorch(0.875, 0.625))
    row = tuning.measure(text, "h100", 4)
    where = row.pop("measured")
    path = tmp_path / "choices.json"
    path.write_text(text_of("h100", where, [row]), "utf-8")
    measured = read_choices(path, FAMILIES).table[text]
    found = measured.gradient
    assert measured.torch == MeasuredTorch(0.875, 0.625)
    backs = [str(input_gradient(parse(text)))] if stride == 1 else []
    assert compiled == [text, *backs]
    assert found == (MeasuredGradient(TILE, 0.5, 0.75) if stride == 1 else None)


TIMED = {
    # In its own layout, in the other, the change of layout; what torch takes, and at its best.
    "2d(4, 6, 3, input=(2, 4, 5, 7))": ([3.0, 1.0, 0.5], (3.0, 1.5)),
    "2d(4, 6, 3, input=(2, 4, 5, 7), layout=channels_last)": ([1.0, 0.5, 2.0], (2.0, 1.5)),
    "3d(4, 6, 3, input=(2, 4, 3, 5, 7))": ([2.0, 1.5, 0.75], (2.0, 2.0)),
    "1d(4, 6, 3, input=(2, 4, 5))": ([2.0], (2.0, 2.0)),
}


@pytest.mark.parametrize("layer", TIMED)
def test_torch_is_timed_in_both_layouts(layer, monkeypatch):
    """What is timed computes the layer, or changes the layout of its input to the other one."""
    times, expected = TIMED[layer]
    spec, left, shapes, layouts = parse(f"ConvTranspose{layer}"), list(times), [], []

    def timed(call, **options):
        shapes.append(tuple(call().shape))
        layouts.append(layout_of(call()))  # the output's is the input's
        return left.pop(0)

    monkeypatch.setattr("triton.testing.do_bench", timed)
    found = torch_times(spec, "cpu")
    assert (found.ms, found.best_ms) == expected
    assert left == []
    output = spec.input[0], spec.out_channels, *spec.output_spatial
    assert shapes.count(output) == min(len(times), 2)
    assert shapes.count(spec.input) == len(times) - min(len(times), 2)
    of_calls = [layouts[at] for at, shape in enumerate(shapes) if shape == output]
    assert of_calls == list(LAYOUTS[: len(of_calls)])
    turned = [layouts[at] for at, shape in enumerate(shapes) if shape == spec.input]
    assert spec.layout not in turned


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_torch_multiplies_as_the_spec_says(precision, monkeypatch):
    """The backend asks for `ieee` where torch may not use TF32, which is several times as fast."""
    seen = []

    def timed(call, **options):
        seen.append(torch.backends.cudnn.allow_tf32)
        return 1.0

    monkeypatch.setattr("triton.testing.do_bench", timed)
    layer = f"ConvTranspose1d(4, 6, 3, input=(2, 4, 5), precision={precision})"
    torch_times(parse(layer), "cpu")
    assert seen == [precision == "tf32"]


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_torch_s_gradient_multiplies_as_the_spec_says(precision, device, monkeypatch):
    """A faster one in TF32 would keep the kernel out of files that are in `ieee`."""
    seen = []

    def timed(call, **options):
        seen.append(torch.backends.cudnn.allow_tf32)
        return float(len(seen))

    monkeypatch.setattr("triton.testing.do_bench", timed)
    spec = parse(f"ConvTranspose2d(4, 6, 3, input=(2, 4, 5, 6), precision={precision})")
    back = plan(input_gradient(spec), H100)
    plain = [c.tile for c in back.ranking if c.tile.family == "gather" and not c.tile.relayout]
    assert gradient_times(spec, H100, plan(spec, H100).tile, plain[0], device) == (1.0, 2.0)
    assert seen == [precision == "tf32"] * 2


def test_a_file_of_another_target_is_refused(tmp_path):
    output = tmp_path / "choices.json"
    output.write_text(text_of("a100", MEASURED, rows(LAYER)), "utf-8")
    with pytest.raises(SpecError, match="has choices for a100, not h100"):
        list(tune([parse(LAYER)], H100, output, NoExecutor(), 4))
    assert json.loads(output.read_text("utf-8"))["target"] == "a100"


def test_what_is_no_file_of_choices_is_overwritten_only_with_force(tmp_path):
    output = tmp_path / "choices.json"
    output.write_text("mine")
    with pytest.raises(ConvgenError, match=r"not JSON: .*; --force overwrites it"):
        list(tune([parse(LAYER)], H100, output, NoExecutor(), 4))
    assert output.read_text() == "mine"
    list(tune([parse(LAYER)], H100, output, Remembering(), 4, force=True))
    assert list(read_choices(output, FAMILIES).table) == [key_of(parse(LAYER))]
    # What it has is kept: nothing is measured again.
    assert list(tune([parse(LAYER)], H100, output, NoExecutor(), 4, force=True)) == []


def test_a_pipe_gets_all_choices_at_once(tmp_path):
    """It is neither read nor replaced, nor written to after each spec."""
    output = tmp_path / "choices"
    os.mkfifo(output)
    texts = [LAYER.replace("8, 32", f"{batch}, 32") for batch in (1, 2)]
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(output.read_text)
        list(tune([parse(text) for text in texts], H100, output, Remembering(), 4))
        found = json.loads(read.result(20))["choices"]
    assert {row["spec"] for row in found} == {key_of(parse(text)) for text in texts}
    assert output.is_fifo()


def test_without_a_gpu_the_command_says_so(tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = CliRunner().invoke(main, ["tune", LAYER, "-o", str(tmp_path / "out.json")])
    assert done.exit_code == 2
    assert "tune needs a CUDA GPU" in done.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.gpu
def test_a_layer_is_tuned(tmp_path: Path):
    output = tmp_path / "choices.json"
    done = CliRunner().invoke(main, ["tune", LAYER, "-o", str(output), "--tiles", "4"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(output.read_text("utf-8"))["choices"]
    assert [row["spec"] for row in found] == [key_of(parse(LAYER))]
    assert found[0]["first_ms"] >= found[0]["ms"] > 0
    assert found[0]["torch"]["ms"] >= found[0]["torch"]["best_ms"] > 0


@pytest.mark.gpu
def test_the_gradient_of_a_layer_s_input_is_tuned(tmp_path: Path):
    output, layer = tmp_path / "choices.json", LAYER.replace("stride=2", "stride=1")
    done = CliRunner().invoke(main, ["tune", layer, "-o", str(output), "--tiles", "4"])
    assert done.exit_code == 0, done.stderr
    found = read_choices(output, FAMILIES).table[key_of(parse(layer))].gradient
    assert found is not None
    assert min(found.ms, found.torch_ms) > 0
