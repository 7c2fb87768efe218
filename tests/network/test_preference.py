"""Layers that torch was measured to compute faster: `prefer` and `choices` of `replace_layers`.

What would break it: a layer replaced although a choices file says that torch wins, or left although
a size of it was never measured; times of the other layout; a report without the numbers; a second
call that decides otherwise. Choices files are written here, as `convgen tune` writes them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

import convgen
from convgen import SpecError, parse
from convgen.compiler import plan
from convgen.execution.local_gpu import local_target
from convgen.planning.choices import key_of, text_of
from convgen.tables.targets import find_target

pytestmark = pytest.mark.interpreter

TARGET = local_target().name if torch.cuda.is_available() else "rtx4090"
MEASURED = {"device": "a card", "torch": "2.9", "triton": "3.7", "date": "2026-01-02"}
FIRST, LAST = "channels_first", "channels_last"
LOST, WON, EQUAL = (1.0, 0.97, 0.97), (1.0, 1.5, 1.5), (1.0, 0.99, 0.99)  # kernel, torch, best
BEST_LOST = (1.0, 1.5, 0.97)
SMALL, LARGE = (2, 4, 5, 6), (2, 4, 7, 8)
Rows = dict[tuple[tuple[int, ...], str], tuple[float, float, float]]


def written(folder: Path, rows: Rows, target: str = TARGET) -> Path:
    """Write the choices of `up` at sizes and layouts."""
    found = []
    for (sizes, layout), (ms, torch_ms, best_ms) in rows.items():
        spec = parse(f"ConvTranspose2d(4, 4, 3, 2, 1, input={sizes}, dtype=float64)")
        spec = dataclasses.replace(spec, layout=layout)
        tile = dataclasses.asdict(plan(spec, find_target(target)).tile)
        beside = {"torch": {"ms": torch_ms, "best_ms": best_ms}}
        found.append({"spec": key_of(spec), "tile": tile, "ms": ms, "tried": 3} | beside)
    path = folder / "choices.json"
    path.write_text(text_of(target, MEASURED, found), "utf-8")
    return path


def up(device: str) -> nn.Module:
    return nn.ConvTranspose2d(4, 4, 3, 2, 1, dtype=torch.float64, device=device)


@pytest.fixture
def model(device: str) -> Any:
    return nn.ModuleDict({"up": up(device)})


def inputs(device: str, *called: tuple[tuple[int, ...], str]) -> Any:
    """Return a function that calls a model's layer at sizes and layouts."""
    tensors = [torch.randn(sizes, device=device, dtype=torch.float64) for sizes, _ in called]
    formats = {FIRST: torch.contiguous_format, LAST: torch.channels_last}
    made = [
        tensor.to(memory_format=formats[layout])
        for tensor, (_, layout) in zip(tensors, called, strict=True)
    ]
    return lambda model: [getattr(model, "_orig_mod", model)["up"](tensor) for tensor in made]


def the_row(model: nn.Module) -> Any:
    (row,) = convgen.report(model).layers
    return row


CASES: dict[str, tuple[Rows, list[tuple[tuple[int, ...], str]], str, bool]] = {
    "lost": ({(SMALL, FIRST): LOST}, [(SMALL, FIRST)], "fastest", False),
    "equal": ({(SMALL, FIRST): EQUAL}, [(SMALL, FIRST)], "fastest", True),
    "won": ({(SMALL, FIRST): WON}, [(SMALL, FIRST)], "fastest", True),
    "lost to a compiler alone": (
        {(SMALL, FIRST): BEST_LOST},
        [(SMALL, FIRST)],
        "fastest",
        True,
    ),
    "lost, but preferred": ({(SMALL, FIRST): LOST}, [(SMALL, FIRST)], "kernel", True),
    "no size known": ({(SMALL, FIRST): LOST}, [], "fastest", True),
    "lost in the other layout": ({(SMALL, FIRST): LOST}, [(SMALL, LAST)], "fastest", True),
    "lost in this layout": (
        {(SMALL, FIRST): WON, (SMALL, LAST): LOST},
        [(SMALL, LAST)],
        "fastest",
        False,
    ),
    "lost in one of two layouts": (
        {(SMALL, FIRST): WON, (SMALL, LAST): LOST},
        [(SMALL, LAST), (SMALL, FIRST)],
        "fastest",
        True,
    ),
    "lost at both sizes": (
        {(SMALL, FIRST): LOST, (LARGE, FIRST): LOST},
        [(SMALL, FIRST), (LARGE, FIRST)],
        "fastest",
        False,
    ),
    "lost at one of two sizes": (
        {(SMALL, FIRST): LOST, (LARGE, FIRST): WON},
        [(SMALL, FIRST), (LARGE, FIRST)],
        "fastest",
        True,
    ),
    "one of two sizes not measured": (
        {(SMALL, FIRST): LOST},
        [(SMALL, FIRST), (LARGE, FIRST)],
        "fastest",
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_replaced_unless_torch_won_at_all_its_sizes(
    name: str, model: Any, device: str, tmp_path: Path
) -> None:
    """Without a warning, which would be an error here: nothing is lost."""
    rows, called, prefer, replaced = CASES[name]
    reference = copy.deepcopy(model)
    calls = inputs(device, *called)
    path = written(tmp_path, rows)
    found = convgen.replace_layers(model, example_inputs=calls, prefer=prefer, choices=path)
    assert [*found] == (["up"] if replaced else [])
    assert (type(model["up"]) is not nn.ConvTranspose2d) is replaced
    for got, want in zip(calls(model), calls(reference), strict=True):
        torch.testing.assert_close(got, want)
    row = the_row(model)
    assert (row.emitted, row.kernel_calls) == (replaced, len(called) if replaced else 0)


def test_a_weight_in_channels_last_decides_the_layout(
    model: Any, device: str, tmp_path: Path
) -> None:
    path = written(tmp_path, {(SMALL, FIRST): WON, (SMALL, LAST): LOST})
    model.to(memory_format=torch.channels_last)
    calls = inputs(device, (SMALL, FIRST))
    assert not convgen.replace_layers(model, example_inputs=calls, choices=path)


def test_torch_s_best_time_counts_in_no_layer(model: Any, device: str, tmp_path: Path) -> None:
    """It is of another layout, which Inductor alone may choose, and asks for itself."""
    path = written(tmp_path, {(SMALL, FIRST): BEST_LOST})
    calls = inputs(device, (SMALL, FIRST))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    found = convgen.replace_layers(compiled, example_inputs=calls, choices=path)
    assert [*found] == ["_orig_mod.up"]


def test_torch_takes_no_layer_that_is_to_be_more_precise(device: str, tmp_path: Path) -> None:
    """Its time is of the layer's precision, but a call of it has what torch is set to."""
    spec = parse(f"ConvTranspose2d(4, 4, 3, 2, 1, input={SMALL}, precision=ieee)")
    tile = dataclasses.asdict(plan(spec, find_target(TARGET)).tile)
    row = {"spec": key_of(spec), "tile": tile, "ms": 1.0, "tried": 3}
    row |= {"torch": {"ms": 0.5, "best_ms": 0.5}}
    path = tmp_path / "choices.json"
    path.write_text(text_of(TARGET, MEASURED, [row]), "utf-8")
    model = nn.ModuleDict({"up": up(device).float()})
    given = {"example_inputs": lambda each: each["up"](torch.randn(SMALL, device=device))}
    found = convgen.replace_layers(model, precision="ieee", choices=path, **given)
    assert [*found] == ["up"]


def test_the_report_has_both_times_and_their_source(
    model: Any, device: str, tmp_path: Path
) -> None:
    path = written(tmp_path, {(SMALL, FIRST): (0.5, 0.375, 0.25)})
    calls = inputs(device, (SMALL, FIRST))
    convgen.replace_layers(model, example_inputs=calls, choices=path)
    report = convgen.report(model)
    (row,) = report.layers
    assert row.reason == 'torch was measured to be faster (prefer="kernel" replaces it even so)'
    want = {"input": [*SMALL], "layout": FIRST, "kernel_ms": 0.5, "torch_ms": 0.375}
    want |= {"torch_best_ms": 0.25, "target": TARGET, "measured": MEASURED, "file": str(path)}
    assert report.as_dict()["layers"][0]["times"] == [want]
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert str(report).splitlines()[2:4] == [
        f"       - {row.reason}",
        f"       - at {SMALL} in {FIRST} torch's operator takes 0.3750 ms (0.2500 ms in the better "
        f"layout), the kernel for {TARGET} 0.5000 ms (a card, torch 2.9, triton 3.7, 2026-01-02; "
        f"{path})",
    ]


def test_a_replaced_layer_tells_where_torch_is_faster(
    model: Any, device: str, tmp_path: Path
) -> None:
    """At one size of two, or as it was preferred; of sizes where the kernel won nothing is said."""
    path = written(tmp_path, {(SMALL, FIRST): LOST, (LARGE, FIRST): WON})
    calls = inputs(device, (SMALL, FIRST), (LARGE, FIRST))
    convgen.replace_layers(model, example_inputs=calls, choices=path)
    assert {times.input for times in the_row(model).times} == {SMALL, LARGE}
    notes = [line for line in str(convgen.report(model)).splitlines() if "- at" in line]
    assert [f"- at {SMALL} in {FIRST} torch's operator takes 0.9700" in each for each in notes] == [
        True
    ]


def test_strict_wants_kernels(model: Any, device: str, tmp_path: Path) -> None:
    path = written(tmp_path, {(SMALL, FIRST): (0.5, 0.375, 0.25)})
    given = {"example_inputs": inputs(device, (SMALL, FIRST)), "choices": path, "strict": True}
    message = (
        r"^strict=True, and layers would stay torch's: up: torch was measured to be faster "
        r'\(prefer="kernel" replaces it even so\); at .* 0\.3750 ms .* 0\.5000 ms'
    )
    with pytest.raises(SpecError, match=message):
        convgen.replace_layers(model, **given)
    assert type(model["up"]) is nn.ConvTranspose2d
    assert not the_row(model).times
    assert [*convgen.replace_layers(model, prefer="kernel", **given)] == ["up"]


def test_a_later_call_decides_by_the_sizes_of_the_first(
    model: Any, device: str, tmp_path: Path
) -> None:
    """In any order; what was left is given back, and what is restored is forgotten."""
    path = written(tmp_path, {(SMALL, LAST): LOST})
    calls = inputs(device, (SMALL, LAST))
    for prefer, replaced in (("fastest", False), ("kernel", True), ("fastest", False)):
        found = convgen.replace_layers(model, example_inputs=calls, choices=path, prefer=prefer)
        calls = None
        assert [parse(text).rungs for text in found.values()] == [(SMALL,)] * replaced
        row = the_row(model)
        assert (row.emitted, bool(row.reason), len(row.times)) == (replaced, not replaced, 1)
    found = convgen.replace_layers(model)  # without the file
    assert [parse(text).rungs for text in found.values()] == [(SMALL,)]
    assert not the_row(model).times
    assert not convgen.replace_layers(model, choices=path)
    assert convgen.restore_layers(model) == []
    assert the_row(model).reason.startswith("not replaced")
    assert [*convgen.replace_layers(model, choices=path)] == ["up"]
    assert not the_row(model).times


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_copies_and_pickles_of_a_layer_left_to_torch(
    model: Any, device: str, tmp_path: Path
) -> None:
    """They are torch's own, and scripted as such."""
    path = written(tmp_path, {(SMALL, FIRST): LOST})
    before = [*model.state_dict()]
    convgen.replace_layers(model, example_inputs=inputs(device, (SMALL, FIRST)), choices=path)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert the_row(each) == the_row(model)
        assert [*each.state_dict()] == before
    x = torch.randn(SMALL, device=device, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(model["up"])(x), model["up"](x))


def test_a_file_of_choices_has_the_tile(model: Any, device: str, tmp_path: Path) -> None:
    """Planned again with it, or without it: the emitted file names it by its hash."""
    path = written(tmp_path, {(SMALL, FIRST): WON})
    calls = inputs(device, (SMALL, FIRST))
    hashed = []
    for choices in (None, path, "none", None):
        convgen.replace_layers(
            model, example_inputs=calls, choices=choices, folder=tmp_path / "kernels"
        )
        file = type(model["up"]).forward.__globals__["__file__"]
        hashed.append("# choices: sha256 " in Path(file).read_text("utf-8"))
        same = type(model["up"])
        convgen.replace_layers(model, example_inputs=calls, choices=choices)
        assert type(model["up"]) is same
    assert hashed == [False, True, False, False]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "prefer": ({"prefer": "torch"}, "prefer must be one of fastest, kernel, got 'torch'"),
    "prefer's type": ({"prefer": None}, "prefer must be one of fastest, kernel, got None"),
    "choices": ({"choices": 3}, "choices must be a path or None, got 3"),
    "no file": ({"choices": "nowhere.json"}, "cannot read nowhere.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str, model: Any) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(convgen.ConvgenError, match=message):
        convgen.replace_layers(model, **arguments)
    assert type(model["up"]) is nn.ConvTranspose2d


def test_a_file_for_another_gpu_is_told(model: Any, tmp_path: Path) -> None:
    """Left aside in silence, it would pass for used."""
    path = written(tmp_path, {(SMALL, FIRST): LOST}, "a100" if TARGET != "a100" else "h100")
    with pytest.raises(SpecError, match=f"choices.json has choices for .*, not for {TARGET}$"):
        convgen.replace_layers(model, choices=path)
    assert type(model["up"]) is nn.ConvTranspose2d
