"""Measured choices: a file's tiles come before the model's, for their spec and target alone.

What would break it: a tile that leaks into another target or another layer, a shipped file with a
tile that its spec cannot have, a broken file that is taken or gives a traceback, a header that does
not say that choices were given.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import pytest

from convgen import TARGETS, ConvgenError, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.errors import SpecError
from convgen.execution.standin import concrete
from convgen.execution.verify import verify
from convgen.explain import explain
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import decompose
from convgen.geometry.problem import problem_of
from convgen.geometry.tile import Tile
from convgen.planning.candidates import best_tile, rank_tiles
from convgen.planning.choices import Choices, key_of, read_choices, shipped, text_of, tile_of
from convgen.planning.forms import form_of
from convgen.planning.plan import Measured, MeasuredTorch
from drawing import draw
from running import make_project, run

LAYER = "ConvTranspose2d(64, 64, 4, stride=2, padding=1, input=(8, 64, 32, 32))"
TILE = Tile(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=2, family="polyphase")
MEASURED = {"device": "a card", "torch": "2", "triton": "3", "date": "2026-01-01"}


def row(text: str = LAYER, **changes: object) -> dict[str, object]:
    tile = dataclasses.asdict(TILE) | changes
    return {"spec": key_of(parse(text)), "tile": tile, "ms": 0.5, "tried": 7}


def written(tmp_path: Path, *rows: dict[str, object], target: str = "h100") -> Path:
    path = tmp_path / "choices.json"
    path.write_text(text_of(target, MEASURED, list(rows)), "utf-8")
    return path


def test_a_measured_tile_comes_before_the_model(tmp_path):
    choices = read_choices(written(tmp_path, row()), FAMILIES)
    made = plan(parse(LAYER), find_target("h100"), choices=choices)
    assert made.tile == TILE != made.ranking[0].tile
    reasons = dict(explain(made, "plan")[0].rows)
    assert "0.5000 ms, the fastest of 7 tried on a card" in str(reasons["why this tile"])


def test_the_times_of_torch_stand_beside_the_kernel_s(tmp_path):
    beside = {"torch": {"ms": 0.75, "best_ms": 0.625}}
    choices = read_choices(written(tmp_path, row() | beside), FAMILIES)
    made = plan(parse(LAYER), find_target("h100"), choices=choices)
    assert made.measured.torch == MeasuredTorch(0.75, 0.625)
    reasons = dict(explain(made, "plan")[0].rows)
    said = "torch's operator takes 0.7500 ms, 0.6250 ms in the better layout"
    assert str(reasons["why this tile"]).endswith(said)
    path = tmp_path / "choices.json"
    assert said in run("explain", LAYER, "--target", "h100", "--choices", path).stdout


def test_the_header_names_the_file_of_choices_by_its_hash(tmp_path):
    choices = read_choices(written(tmp_path, row()), FAMILIES)
    with_choices = compile_kernel(parse(LAYER), find_target("h100"), choices=choices).text
    assert f"# choices: sha256 {choices.digest}\n" in with_choices
    without = compile_kernel(parse(LAYER), find_target("h100")).text
    assert "# choices" not in without


def test_choices_stay_with_their_target(tmp_path):
    choices = read_choices(written(tmp_path, row()), FAMILIES)
    for target in TARGETS:
        made = plan(parse(LAYER), target, choices=choices)
        assert (made.measured is not None) == (target.name == "h100"), target.name


def test_a_file_for_another_target_is_told(tmp_path):
    """Left aside in silence, it would pass for used."""
    path = written(tmp_path, row())
    for command in ("emit", "explain"):
        done = run(command, LAYER, "--target", "a100", "--choices", path)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"{path} has choices for h100, not for a100" in done.stderr
        assert run(command, LAYER, "--target", "h100", "--choices", path).exit_code == 0


def shipped_layer() -> tuple[str, Tile]:
    """Return a layer for which the package has another tile than the model, and the model's."""
    h100 = find_target("h100")
    for text, measured in shipped("h100", FAMILIES).table.items():
        best = best_tile(parse(text), decompose(parse(text)), h100, FAMILIES)
        if best != measured.tile:
            return text, best
    raise AssertionError("the model agrees with all that was measured")


@pytest.mark.parametrize("command", ["emit", "explain"])
def test_no_choices_leave_all_to_the_model(command):
    """Neither a file's nor the package's; else nobody could see how well the model does."""
    text, best = shipped_layer()
    measured = run(command, text, "--target", "h100").stdout
    alone = run(command, text, "--target", "h100", "--choices", "none").stdout
    assert str(best) in alone
    assert alone != measured
    assert "# choices" not in alone


def test_a_file_without_choices_says_how_it_was_made():
    """Only where the package has some: elsewhere the file is that of the plain command."""
    text, _ = shipped_layer()
    alone = ("--target", "h100", "--choices", "none")
    line = next(line for line in run("emit", text, *alone).stdout.splitlines() if "emit" in line)
    assert line.endswith("--target h100 --choices none")
    assert run("emit", LAYER, *alone).stdout == run("emit", LAYER, "--target", "h100").stdout


def test_a_project_without_choices(tmp_path):
    text, best = shipped_layer()
    table = 'output = "kernels"\ntarget = "h100"\nspecs = ["up.convgen"]\n'
    for name, line in (("measured", ""), ("alone", 'choices = "none"\n')):
        root = make_project(tmp_path / name, table + line, up=f"up = {text}\n")
        assert run("build", root).exit_code == 0
        sources = run("list-files", "--sources", root).stdout.split()
        assert [Path(path).name for path in sources] == ["pyproject.toml", "up.convgen"]
    built = (tmp_path / "alone" / "kernels" / "up.py").read_text("utf-8")
    assert str(best) in built
    assert str(best) not in (tmp_path / "measured" / "kernels" / "up.py").read_text("utf-8")


@pytest.mark.parametrize(
    "other",
    [
        LAYER.replace("8, 64, 32", "9, 64, 32"),
        LAYER.replace("padding=1", "padding=0"),
        LAYER[:-1] + ", dtype=float16)",
        LAYER[:-1] + ", precision=ieee)",
        LAYER[:-1] + ", layout=channels_last)",
    ],
)
def test_another_layer_is_left_to_the_model(other):
    table = Choices("h100", {key_of(parse(LAYER)): Measured(TILE, 0.5, 7, "a card")})
    assert plan(parse(other), find_target("h100"), choices=table).measured is None


@pytest.mark.parametrize(
    "same",
    [
        f"relu | {LAYER} | tanh",
        LAYER[:-1] + ", bias=False)",
        LAYER[:-1] + ", grid=1)",
        LAYER[:-1] + ", target=a100)",
    ],
)
def test_stages_bias_and_grid_keep_the_tile(same):
    table = Choices("h100", {key_of(parse(LAYER)): Measured(TILE, 0.5, 7, "a card")})
    assert plan(parse(same), find_target("h100"), choices=table).tile == TILE


def test_an_autotuned_file_keeps_its_own_tiles():
    spec = parse(LAYER[:-1] + ", autotune=blocks)")
    table = Choices("h100", {key_of(spec): Measured(TILE, 0.5, 7, "a card")})
    assert plan(spec, find_target("h100"), choices=table).measured is None


def test_a_tile_that_cannot_serve_its_layer_is_refused():
    """Span 2 needs a known last extent; a file written by hand may say otherwise."""
    spec = parse("ConvTranspose2d(64, 64, 3, input=(8, 64, 32, None))")
    wrong = dataclasses.replace(TILE, span=2)
    table = Choices("h100", {key_of(spec): Measured(wrong, 0.5, 7, "a card")})
    with pytest.raises(SpecError, match="no kernel of family polyphase, span 2 and rows 1 serves"):
        plan(spec, find_target("h100"), choices=table)


def test_a_tile_that_no_card_can_hold_is_refused():
    """Compiling it would take minutes and fail, or spill all over."""
    wide = dataclasses.replace(TILE, block_m=1024, block_n=512)
    table = Choices("h100", {key_of(parse(LAYER)): Measured(wide, 0.5, 7, "a card")})
    with pytest.raises(SpecError, match="cannot run on h100"):
        plan(parse(LAYER), find_target("h100"), choices=table)


def test_a_file_that_has_no_row_for_a_layer_leaves_its_bytes_alone(tmp_path):
    """Else every kernel of a project would drift with each row that is added."""
    choices = read_choices(written(tmp_path, row()), FAMILIES)
    other = parse("ConvTranspose2d(8, 8, 3, input=(8, 8, 32, 32))")
    h100 = find_target("h100")
    assert compile_kernel(other, h100, choices=choices).text == compile_kernel(other, h100).text


def test_bfloat16_takes_what_was_measured_in_float16():
    spec = parse(LAYER[:-1] + ", dtype=bfloat16)")
    half = parse(LAYER[:-1] + ", dtype=float16)")
    table = Choices("h100", {key_of(half): Measured(TILE, 0.5, 7, "a card")})
    assert plan(spec, find_target("h100"), choices=table).tile == TILE


BROKEN = {
    "no JSON": "{",
    "no object": "[1]",
    "another schema": json.dumps({"schema": 9}),
    "no such target": text_of("gtx1", MEASURED, []),
    "a tile that lacks a field": text_of("h100", MEASURED, [row() | {"tile": {"block_m": 32}}]),
    "a block that is no power of two": text_of("h100", MEASURED, [row(block_m=48)]),
    "a block that is text": text_of("h100", MEASURED, [row(block_m="32")]),
    "a family that does not exist": text_of("h100", MEASURED, [row(family="magic")]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_a_clear_error(kind, tmp_path):
    path = tmp_path / "choices.json"
    path.write_text(BROKEN[kind], "utf-8")
    with pytest.raises(SpecError) as caught:
        plan(parse(LAYER), find_target("h100"), choices=read_choices(path, FAMILIES))
    assert str(caught.value)


def test_a_row_may_spell_its_layer_in_any_way(tmp_path):
    """A row that a hand wrote was ignored without a word where its text was not the key."""
    path = written(tmp_path, row() | {"spec": f"relu | {LAYER} | tanh"})
    assert (
        plan(parse(LAYER), find_target("h100"), choices=read_choices(path, FAMILIES)).tile == TILE
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"spec": "Conv(8)"}, ["choices.json, spec 'Conv(8)': ", " got Conv"]),
        ({"target": "foo"}, ["choices.json: target must be one of"]),
    ],
)
def test_what_is_wrong_with_a_file_names_it(tmp_path, changes, parts):
    path = written(tmp_path, row() | changes, target=changes.get("target", "h100"))
    with pytest.raises(SpecError) as caught:
        read_choices(path, FAMILIES)
    assert all(part in str(caught.value) for part in parts)


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ConvgenError, match="cannot read"):
        read_choices(tmp_path / "none.json", FAMILIES)


SHIPPED = sorted(entry.name for entry in (files("convgen.planning") / "measured").iterdir())


def test_something_is_shipped():
    """Without a file the package would plan by the model alone, and no test would say so."""
    assert {"h100.json", "h200.json"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tiles_serve_their_layers(name):
    """What a plan takes is what the file says; a tile that its layer cannot have raises."""
    target = find_target(name.removesuffix(".json"))
    text = (files("convgen.planning") / "measured" / name).read_text("utf-8")
    for row in json.loads(text)["choices"]:
        spec = parse(row["spec"])
        assert key_of(spec) == row["spec"]  # else nothing finds it
        made = plan(spec, target)
        assert dataclasses.asdict(made.tile) == {"rows": 1, "relayout": False, **row["tile"]}
        # No clock measured less than the data sheet allows, but for its rounding.
        assert row["ms"] >= made.cost.roofline_ms * 0.99, row["spec"]
        # Without a GPU `convgen verify` runs the tile on a smaller layer, which it has to serve.
        small = concrete(spec, small=True)
        phases = decompose(small)
        form_of(small, phases, problem_of(small, phases), made.tile, FAMILIES)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("ConvTranspose2d(64, 128, (3, 5), bias=False, input=(64, 64, 128, 256)", "gather"),
        (
            "ConvTranspose2d(64, 64, 4, stride=2, padding=1, groups=64, bias=False, "
            "input=(16, 64, 64, 64)",
            "stencil",
        ),
    ],
)
def test_verify_runs_tiles_that_need_whole_vectors(layer, family, device):
    spec, target = parse(f"{layer}, dtype=float16)"), find_target("h100")
    made = plan(spec, target)
    assert made.measured is not None
    assert (made.family.name, made.tile.relayout) == (family, family == "gather")
    report = verify(spec, target)
    assert report.passed
    assert report.reduced == (device == "cpu")


def test_a_tile_survives_the_file():
    assert tile_of(json.loads(json.dumps(dataclasses.asdict(TILE))), FAMILIES) == TILE


@pytest.mark.interpreter
def test_verify_says_which_products_the_interpreter_has(device):
    """An error far below what bf16x3 has would be taken for its own."""
    for precision, told in (("bf16x3", device == "cpu"), ("tf32x3", False)):
        spec = parse(f"ConvTranspose2d(16, 16, 3, input=(2, 16, 9, 9), precision={precision})")
        report = verify(spec)
        assert report.passed
        assert (f"no {precision} and multiplies in ieee" in report.where) == told


def test_a_measured_tile_needs_no_ranking(monkeypatch):
    """It takes longer than the rest of an emission: only who asks for the candidates waits."""

    def refuse(*_):
        raise AssertionError("ranked")

    monkeypatch.setattr("convgen.planning.planner.rank_tiles", refuse)
    monkeypatch.setattr("convgen.planning.planner.best_tile", refuse)
    spec = parse("ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 1024, 1024))")
    made = plan(spec, find_target("h100"))
    assert made.measured is not None
    assert made.gradient is not None  # nor does the tile of its kernel
    with pytest.raises(AssertionError, match="ranked"):
        _ = made.ranking


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_model_s_tile_is_the_first_of_its_ranking(target):
    """It is found without the cost of those that a bound of theirs rules out.

    Breaks if the bound is no bound: on layers of KernelBench and real ones, and on drawn ones.
    """
    layers = [parse(text) for text in list(shipped("h100", FAMILIES).table)[::8]]
    for spec in (*layers, *(draw(seed)[0] for seed in range(7000, 7012))):
        phases = decompose(spec)
        assert (
            best_tile(spec, phases, target, FAMILIES)
            == rank_tiles(spec, phases, target, FAMILIES)[0].tile
        ), spec


@pytest.mark.parametrize("block", ["block_m", "block_n", "block_k"])
def test_a_product_that_no_unit_has_is_refused(tmp_path, block):
    """Triton would end in a traceback, on whichever GPU."""
    choices = read_choices(written(tmp_path, row(**{block: 1})), FAMILIES)
    with pytest.raises(SpecError, match="16 positions, columns and input channels at least"):
        plan(parse(LAYER), find_target("h100"), choices=choices)
