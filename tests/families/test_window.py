"""The window family: operands that come in boxes of tensors, against the oracle and the compiler.

What would break it: a box that starts one input or one weight off, padding that is not read as
zero, lanes past the end of a row that are stored, channels of another group in a product, a tensor
whose address no box may start from, machine code for another box than the launch's, a tile that
takes more of a card than was estimated.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from convgen import ConvTransposeSpec, SpecError, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import load_module
from convgen.execution.verify import allowed, measure
from convgen.explain import explain
from convgen.families.registry import FAMILIES
from convgen.families.window import WINDOW
from convgen.geometry.boxes import box_of
from convgen.geometry.phases import decompose
from convgen.geometry.problem import problem_of
from convgen.geometry.tile import Tile
from convgen.planning.choices import Choices, key_of
from convgen.planning.forms import form_of
from convgen.planning.plan import Measured
from convgen.planning.resources import use_of
from drawing import draw, opened
from running import worked

H100 = find_target("h100")
SHARES = 4
DRAWN = 64
LAST = "layout=channels_last"
LAYER = f"ConvTranspose2d(32, 16, 3, padding=1, input=(None, 32, 20, 24), {LAST})"

REFUSED = {
    f"ConvTranspose2d(None, 16, 3, input=(2, None, 20, 24), {LAST})": "run time",
    f"ConvTranspose2d(6, 16, 3, input=(2, 6, 20, 24), {LAST})": "6 channels",
    f"ConvTranspose2d(32, 16, 3, input=(2, 32, 20, 24), {LAST}, dtype=float64)": "as a single",
    f"ConvTranspose2d(32, 16, 3, input=(2, 32, 20, 24), {LAST}, precision=tf32x3)": "as a single",
    f"ConvTranspose2d(32, 16, 3, input=(2, 32, 20, 24), {LAST}, autotune=blocks)": "autotune",
    f"sigmoid | ConvTranspose2d(32, 16, 3, input=(2, 32, 20, 24), {LAST})": "maps 0 to",
}


def windows(spec: ConvTransposeSpec, rows: int | None = None) -> list[Tile]:
    """Return the tiles of the family, best first; those of blocks of `rows`."""
    tiles = [c.tile for c in plan(spec, H100).ranking if c.tile.family == "window"]
    return [tile for tile in tiles if rows in (None, tile.rows)]


def served(seed: int) -> ConvTransposeSpec:
    """Return a drawn layer with channels in vectors and rows that are worth a tile.

    Raises:
        SpecError: it has no output.
    """
    spec, source = draw(seed)[0], random.Random(seed)
    channels = spec.groups * source.choice((8, 16, 24, 32, 48))
    if spec.groups > 1:
        channels = spec.groups * source.choice((16, 32))
    layouts = ("channels_first", "channels_last") if spec.rank > 1 else ("channels_first",)
    return dataclasses.replace(
        spec,
        in_channels=channels,
        input=(spec.batch, channels, *spec.spatial[:-1], source.randint(33, 48)),
        layout=source.choice(layouts),
        dtype=source.choice(("float32", "float16", "bfloat16")),
        precision=None,
        autotune="none",
    )


@pytest.mark.parametrize("text", REFUSED)
def test_who_is_refused(text: str) -> None:
    reason = WINDOW.refusal(parse(text))
    assert reason is not None
    assert REFUSED[text] in reason
    assert windows(parse(text)) == []


def test_who_has_no_such_unit() -> None:
    """Ada has none; consumer Blackwell has one, but multiplies from registers."""
    for name in ("rtx4090", "a100", "rtx5090"):
        assert not any(
            c.tile.family == "window" for c in plan(parse(LAYER), find_target(name)).ranking
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("share", range(SHARES))
def test_layers_match_the_oracle(share: int, tmp_path: Path, device: str) -> None:
    """All ranks, strides, dilations and groups, one row and several, with a copy and without."""
    met = set()
    for seed in range(share, DRAWN, SHARES):
        try:
            spec = served(9000 + seed)
        except SpecError:
            continue
        emitted = opened(spec) if seed % 3 == 0 else spec
        tiles = windows(emitted)
        if not tiles:
            reason = WINDOW.refusal(spec)
            copied = spec.layout == "channels_first" and spec.stride[-1] > 1
            assert reason or copied, f"seed {seed}: {spec}"
            continue
        source = random.Random(seed)
        rows = source.choice(sorted({tile.rows for tile in tiles}))
        tile = source.choice([tile for tile in tiles if tile.rows == rows])
        text = compile_kernel(emitted, H100, tile).text
        module = load_module(text, f"window_{seed}", tmp_path)
        exact, error, faithful = measure(spec, module, device, seed)
        assert exact, f"seed {seed}, {tile}: {spec}"
        assert error <= allowed(spec, faithful), f"seed {seed}, {tile}: {spec}"
        met |= {spec.rank, tile.relayout, ("rows", tile.rows > 1)}
    assert met >= {2, False, ("rows", True), ("rows", False)}


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [1, 4])
def test_a_number_reaches_its_own_outputs_alone(rows: int, tmp_path: Path, device: str) -> None:
    """NaN tells what was read: the end of a row by the next, another group, another image."""
    spec = parse(
        f"ConvTranspose2d(64, 24, 3, padding=1, groups=2, bias=False, input=(2, 64, 6, 9), {LAST})"
    )
    source = compile_kernel(spec, H100, windows(spec, rows)[0])
    module = load_module(source.text, f"reach_{rows}", tmp_path)
    x = torch.zeros(2, 64, 6, 9, device=device).to(memory_format=torch.channels_last)
    x[0, 40, 3, 8] = torch.nan
    y = module.conv_transpose2d(x, torch.ones(64, 12, 3, 3, device=device))
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 12:, 2:5, 7:] = True
    assert torch.equal(y.isnan(), reached)


@pytest.mark.interpreter
def test_channels_and_boxes_that_hang_over_have_masks_of_their_own(
    tmp_path: Path, device: str
) -> None:
    """A condition on the whole tile joins that of the channels, next to one on several axes."""
    spec = parse("ConvTranspose3d(16, 40, 3, input=(1, 16, 3, 5, 9))")
    tile = next(t for t in windows(spec, 4) if t.block_n == 32)
    source = compile_kernel(spec, H100, tile)
    assert "y_inside = y_inside_co & (block_h * ROWS + 3 < H_OUT)" in source.text
    exact, error, faithful = measure(spec, load_module(source.text, "masks", tmp_path), device, 1)
    assert exact
    assert error <= allowed(spec, faithful)


@pytest.mark.interpreter
def test_rows_share_the_condition_of_a_phase_that_is_shorter(tmp_path: Path, device: str) -> None:
    """Where a box has one place along an axis it is one of the whole tile, of no lane."""
    spec = parse("ConvTranspose3d(16, 40, 3, stride=(2, 1, 1), input=(1, 16, 2, 5, 253))")
    source = compile_kernel(spec, H100, windows(spec, 4)[0])
    assert "q_d = program" in source.text
    assert "y_inside_dw = (q_d * 2 + residue_d < D_OUT) & (q_w < W_OUT)" in source.text
    exact, *_ = measure(spec, load_module(source.text, "masks", tmp_path), device, 1)
    assert exact


@pytest.mark.interpreter
def test_operands_may_start_anywhere(tmp_path: Path, device: str) -> None:
    """Torch's tensors start at multiples of 64 bytes, views of them at any element."""
    spec = parse(LAYER)
    module = load_module(compile_kernel(spec, H100, windows(spec)[0]).text, "anywhere", tmp_path)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 20, 24, 32, generator=generator).to(device).permute(0, 3, 1, 2)
    weight = torch.randn(32, 16, 3, 3, generator=generator).to(device)
    bias, packed = torch.randn(16, generator=generator).to(device), module.pack_weight(weight)
    expected = module.conv_transpose2d(x, weight, bias)

    def moved(dense: torch.Tensor) -> torch.Tensor:
        room = torch.full((dense.numel() + 1,), torch.nan, device=device)
        room[1:] = dense.flatten()
        return room[1:].view(dense.shape)

    odd = moved(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert odd.data_ptr() % 16 != 0
    assert torch.equal(module.conv_transpose2d(odd, weight, bias), expected)
    assert torch.equal(module.conv_transpose2d_packed(x, moved(packed), bias), expected)
    one = x[:1].as_strided((1, 32, 20, 24), (1, 1, 24 * 32, 32))  # the stride of one image is free
    assert torch.equal(module.conv_transpose2d(one, weight, bias), expected[:1])
    assert module.conv_transpose2d(x[:0], weight, bias).shape == (0, 16, 20, 24)


COMPILED = (
    f"ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 1024, 1024), {LAST}",
    f"ConvTranspose3d(48, 48, 3, stride=2, padding=1, input=(4, 48, 32, 32, 32), {LAST}",
    "ConvTranspose2d(64, 128, (3, 5), bias=False, input=(64, 64, 128, 256)",
    "ConvTranspose1d(128, 64, 5, padding=2, input=(4, 128, 4096)",
)


def drawn_tiles(text: str) -> list[tuple[str, Tile]]:
    """Return the best tiles of one row and of several, and some of the others."""
    spec, source = parse(text), random.Random(text)
    tiles = windows(spec)
    best = [tile for rows in sorted({t.rows for t in tiles}) for tile in windows(spec, rows)[:2]]
    return [(text, tile) for tile in [*best, *source.sample(tiles, 3)]]


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_take_what_was_estimated(dtype: str) -> None:
    """The planner leaves out what would not fit; what spills or fails would be seen by users.

    An estimate far above leaves out tiles that fit: a buffer too many is 4 KB or more.
    """
    pairs = [pair for text in COMPILED for pair in drawn_tiles(f"{text}, dtype={dtype})")]
    jobs = [(text, "h100", dataclasses.asdict(tile), False) for text, tile in pairs]
    spare = []
    for (text, tile), row in zip(pairs, worked("compile_worker.py", jobs), strict=True):
        spec = parse(text)
        phases = decompose(spec)
        form = form_of(spec, phases, problem_of(spec, phases), tile, FAMILIES)
        use, where = use_of(spec, form, tile, H100), f"{tile}: {text}"
        assert row["spills"] <= 8, where
        assert row["shared"] <= use.shared + 256, where
        assert use.registers - 64 <= row["registers"][0] <= use.registers + 16, where
        spare.append(use.shared - row["shared"])
    assert sum(bytes <= 256 for bytes in spare) >= 0.9 * len(spare)


@pytest.mark.compile
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_boxes_are_loaded_by_the_unit_that_has_them(target: str) -> None:
    """Both operands, in every step; the JIT compiles for the boxes that the file's text names."""
    spec = parse(LAYER)
    tile = windows(spec, 2)[0]
    source = compile_kernel(spec, find_target(target), tile)
    capability = {"h100": 90, "b200": 100}[target]
    (code,) = worked("asm_worker.py", [(source.text, spec.dtype, capability)])
    assert code["ptx"].count("cp.async.bulk.tensor.4d.shared") >= 4
    assert code["ptx"].count("cp.async.bulk.tensor.2d.shared") >= 3
    assert "cp.async.c" not in code["ptx"]
    ((launched, read),) = worked(
        "launch_worker.py", [(str(spec), target, dataclasses.asdict(tile))]
    )
    assert launched == read


MEASURED = {  # a layer, a card and channels of a step that no box of that layer may have there
    "a step reaches into another group": (
        f"ConvTranspose2d(48, 32, 3, groups=2, input=(1, 48, 8, 8), dtype=float16, {LAST})",
        "h100",
        16,
    ),
    "a card that loads no boxes": (LAYER, "a100", 32),
}


@pytest.mark.parametrize("why", MEASURED)
def test_a_measured_tile_that_no_box_serves_is_refused(why: str) -> None:
    """An infinity of one group would reach another, and the card would have no such unit."""
    text, target, depth = MEASURED[why]
    spec = parse(text)
    tile = dataclasses.replace(windows(parse(LAYER))[0], block_m=64, block_k=depth, num_warps=4)
    choices = Choices(target, {key_of(spec): Measured(tile, 0.5, 7, "a card")})
    with pytest.raises(SpecError, match=f"cannot run on {target}: boxes need"):
        plan(spec, find_target(target), choices=choices)


def test_explain_says_that_boxes_need_no_mask() -> None:
    (section,) = explain(plan(parse(LAYER), H100, windows(parse(LAYER))[0]), "index")
    assert "outside" in dict(section.rows)["x mask"]
    assert dict(section.rows)["x access"] != ""


def test_explain_says_when_it_copies() -> None:
    spec = parse(LAYER)
    (section,) = explain(plan(spec, H100, windows(spec)[0]), "wrapper")
    assert "do not start at a multiple of 16 bytes" in dict(section.rows)["copies"]


@pytest.mark.parametrize(
    ("extents", "count", "blocked", "box"),
    [
        ((8, 1026, 1026), 64, False, (1, 1, 64)),  # long rows: a run of one
        ((64, 130, 260), 128, False, (1, 4, 32)),  # of runs of 128, a third would hang over
        ((64, 65, 260), 64, True, (1, 1, 64)),  # but blocks of rows have one
        ((64, 4, 4), 64, False, (16, 1, 4)),  # images share a box
        ((8, 66, 33, 66), 64, True, (1, 4, 1, 16)),
        ((3, 14), 128, False, (4, 32)),
    ],
)
def test_boxes_cover_images_with_little_beyond(
    extents: tuple[int, ...], count: int, blocked: bool, box: tuple[int, ...]
) -> None:
    """Positions outside are computed for nothing."""
    assert box_of(extents, count, blocked) == box
