"""A copy of the input before the kernel, in channels_last: who gets one, and what it computes.

What would break it: a copy with elements out of place, at the edge of a tile or of an image, one
that stores around its memory for want of a mask, a mask or a division that its sizes make needless,
lanes that stand idle where a narrower tile fits, an image's offset that int32 does not hold, a
kernel that reads the copy as if it were the input, operands rounded to TF32 in neither place, a
copy that no report mentions, and a gradient's kernel that expects one which nobody makes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from convgen import ConvTransposeSpec, SpecError, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.cubin import read_launches
from convgen.execution.loading import laid_out, load_module
from convgen.execution.verify import allowed, measure
from convgen.explain import explain
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import decompose
from convgen.geometry.problem import problem_of
from convgen.geometry.tile import Tile
from convgen.planning.choices import key_of, read_choices
from convgen.planning.family import Form
from convgen.planning.forms import form_of
from convgen.planning.input_copy import CopyTile, copy_tile, relayout_refusal
from convgen.planning.resources import use_of
from convgen.tables.targets import TARGETS
from drawing import BEST, draw, opened
from running import worked

H100 = find_target("h100")
LAYER = "ConvTranspose2d(32, 16, 3, padding=1, input=(2, 32, 20, 24))"

REFUSED = {
    **{
        f"{before}ConvTranspose2d(32, 16, 3, input=(2, 32, 20, 24), layout=channels_last{more})": (
            "and is not rounded"
        )
        for before, more in (
            ("", ", dtype=float16"),
            ("", ", precision=tf32x3"),
            ("", ", precision=ieee"),
            ("add(1.0) | ", ""),  # the sum is what is rounded
        )
    },
    "ConvTranspose2d(32, 16, 3, input=(2, 32, 20, 24), dtype=float64)": "float64",
    "ConvTranspose2d(None, 16, 3, input=(2, None, 20, 24))": "run time",
    "ConvTranspose2d(6, 16, 3, input=(2, 6, 20, 24))": "6 channels",
    "ConvTranspose2d(8, 16, 3, groups=2, input=(2, 8, 20, 24), dtype=float16)": "4 channels",
    "ConvTranspose2d(64, 16, 3, input=(2, 64, 8192, 4096))": "2**31 - 1 elements",
}


def copying(spec: ConvTransposeSpec) -> list[Tile]:
    """Return the best tiles of each form that reads a copy."""
    tiles = [c.tile for c in plan(spec, H100).ranking if c.tile.relayout]
    forms = dict.fromkeys((tile.family, tile.rows) for tile in tiles)
    return [t for form in forms for t in [t for t in tiles if (t.family, t.rows) == form][:BEST]]


@pytest.mark.parametrize("text", REFUSED)
def test_who_gets_no_copy(text: str) -> None:
    reason = relayout_refusal(parse(text))
    assert reason is not None
    assert REFUSED[text] in reason
    assert copying(parse(text)) == []
    tile = dataclasses.replace(plan(parse(text), H100).tile, relayout=True, family="gather")
    with pytest.raises(SpecError, match="with a copy of the input serves"):
        plan(parse(text), H100, tile)


def served(seed: int) -> ConvTransposeSpec:
    """Return a drawn layer whose channels come in vectors: in channels_last one that is rounded.

    Raises:
        SpecError: it has no output.
    """
    spec, source = draw(seed)[0], random.Random(seed)
    channels = spec.groups * source.choice((8, 16, 24))
    stride = source.choice((1, spec.stride[-1]))
    padding = min(spec.output_padding[-1], max(stride, spec.dilation[-1]) - 1)
    last = spec.rank > 1 and source.random() < 0.4
    dtype = "float32" if last else source.choice(("float32", "float16", "bfloat16"))
    return dataclasses.replace(
        spec,
        stride=(*spec.stride[:-1], stride),
        output_padding=(*spec.output_padding[:-1], padding),
        in_channels=channels,
        input=(spec.batch, channels, *spec.spatial),
        layout="channels_last" if last else "channels_first",
        dtype=dtype,
        precision=None,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("share", range(4))
def test_layers_of_copies_match_the_oracle(share: int, tmp_path: Path, device: str) -> None:
    """All ranks, strides and dilations, one row and several, images that share a tile."""
    met = set()
    for seed in range(7000 + share, 7064, 4):
        try:
            spec = served(seed)
        except SpecError:
            continue
        emitted = opened(spec) if seed % 3 == 0 else spec
        tile = random.Random(seed).choice(copying(emitted))
        module = load_module(compile_kernel(emitted, H100, tile).text, f"copy_{seed}", tmp_path)
        exact, error, faithful = measure(spec, module, device, seed)
        assert exact, f"seed {seed}, {tile}: {spec}"
        assert error <= allowed(spec, faithful), f"seed {seed}, {tile}: {spec}"
        met.add((tile.family, spec.layout))
    assert {family for family, _ in met} >= {"gather", "polyphase"}
    assert {layout for _, layout in met} == {"channels_first", "channels_last"}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("add(1.0) | {}) | relu", "tf32"),  # the stage is the kernel's: the copy is as the input is
        *(("{}, precision=" + each + ")", each) for each in ("tf32", "tf32x3", "ieee")),
        ("{}, layout=channels_last) | relu", "tf32"),
    ],
)
def test_operands_are_rounded_once(text: str, precision: str, tmp_path: Path, device: str) -> None:
    spec = parse(text.format(LAYER[:-1]))
    tile = copying(spec)[0]
    source = compile_kernel(spec, H100, tile)
    module = load_module(source.text, f"rounded_{precision}", tmp_path)
    exact, error, faithful = measure(spec, module, device, 3)
    assert exact is not False
    assert error <= allowed(spec, faithful)
    assert source.text.count("x = round_to_tf32(x)") == (precision == "tf32")


SHAPES = [
    *((2, 8, 7), (1, 72, 130), (3, 16, 9, 8), (1, 64, 8, 8), (2, 24, 3, 5, 7)),
    *((2, 24, 16, 16), (1, 40, 5, 7, 3), (2, 48, 9, 33), (3, 48, 16, 16), (2, 32, 19, 20)),
]
ROOM = 2**16  # elements around a copy


class Guarded:
    """The kernel that copies, its copy in the midst of memory that it has no business in."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda x, copy, *sizes, **options: self.launch(grid, x, copy, sizes, options)

    def launch(
        self, grid: Any, x: torch.Tensor, copy: torch.Tensor, sizes: Any, options: Any
    ) -> Any:
        around = torch.full((x.numel() + 2 * ROOM,), 7.0, dtype=x.dtype, device=x.device)
        compiled = self.kernel[grid](x, around[ROOM:-ROOM], *sizes, **options)
        assert (around[:ROOM] == 7.0).all()
        assert (around[-ROOM:] == 7.0).all()
        copy.as_strided((x.numel(),), (1,)).copy_(around[ROOM:-ROOM])
        return compiled


@pytest.mark.interpreter
@pytest.mark.parametrize("known", ["all", "extents", "channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_copy_is_the_input_in_channels_last(
    shape: tuple[int, ...], known: str, tmp_path: Path, device: str
) -> None:
    """Infinity and NaN too; tiles of the copy hang over channels and positions of an image."""
    spec = shaped(shape, known)
    source = compile_kernel(spec, H100, copying(spec)[0])
    module = load_module(source.text, "copied", tmp_path)
    guard(module)
    x = torch.randn(shape, device=device, dtype=torch.float16)
    x.view(-1)[:2] = torch.tensor([torch.inf, torch.nan])
    copy = module._copied(x)
    assert torch.equal(copy.nan_to_num(7.0, 8.0), x.nan_to_num(7.0, 8.0))
    assert copy.isnan().sum() == 1
    assert copy.movedim(1, -1).is_contiguous()


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 3], ids=str)
def test_a_rounded_copy_is_the_input_to_nearest(
    shape: tuple[int, ...], tmp_path: Path, device: str
) -> None:
    """Ties go away from zero; infinity and NaN stay."""
    layer = f"ConvTranspose{len(shape) - 2}d({shape[1]}, 16, 3, input={shape}"
    spec = parse(f"{layer}, layout=channels_last)")
    source = compile_kernel(spec, H100, copying(spec)[0])
    module = load_module(source.text, "rounded", tmp_path)
    guard(module, "rounded_kernel")
    x = laid_out(torch.randn(shape, device=device), "channels_last")
    x.as_strided((4,), (1,)).copy_(torch.tensor([torch.inf, torch.nan, 1 + 2**-11, -1 - 2**-12]))
    given = x.double().cpu().numpy()
    size = np.where(np.isfinite(given), np.abs(given), 1.0)
    unit = 2.0 ** (np.floor(np.log2(size)) - 10)
    rounded = np.copysign(np.floor(size / unit + 0.5) * unit, given)
    copy = module._copied(x)
    expected = np.where(np.isfinite(given), rounded, given)
    assert np.array_equal(copy.cpu().numpy(), expected, equal_nan=True)
    assert copy.movedim(1, -1).is_contiguous()


def shaped(shape: tuple[int, ...], known: str = "all") -> ConvTransposeSpec:
    """Return a layer of float16 whose input has this shape, of which a part may be `known`."""
    size = (None, *shape[1:]) if known == "extents" else shape
    layer = f"ConvTranspose{len(shape) - 2}d({shape[1]}, 16, 3, input={size}, dtype=float16)"
    return opened(parse(layer)) if known == "channels" else parse(layer)


def guard(module: ModuleType, kernel: str = "channels_last_kernel") -> None:
    """Let a file's copies be watched."""
    setattr(module, kernel, Guarded(getattr(module, kernel)))


def test_images_that_a_copy_cannot_index_are_refused(tmp_path: Path) -> None:
    """With open extents at run time, as offsets in an image of the copy are 32-bit integers."""
    spec = opened(parse(LAYER))
    module = load_module(compile_kernel(spec, H100, copying(spec)[0]).text, "large", tmp_path)
    channels, most = spec.in_channels, 2**31
    assert channels is not None
    side = math.isqrt(most // channels)
    for extent, fits in ((side - 32, True), (side + 32, False)):
        output = module._output_shape((1, channels, extent, extent), spec.out_channels)
        refusal = module._mismatch_of_sizes((1, channels, extent, extent), output)
        assert (refusal is None) is fits


@pytest.mark.interpreter
@pytest.mark.parametrize("channels", [24, 40, 48])
def test_layers_of_padded_channels_match_the_oracle(
    channels: int, tmp_path: Path, device: str
) -> None:
    """Of an open batch too, and images that are no whole tiles."""
    spec = parse(f"ConvTranspose2d({channels}, 16, 3, padding=1, input=(None, {channels}, 7, 9))")
    module = load_module(compile_kernel(spec, H100, copying(spec)[0]).text, "padded", tmp_path)
    guard(module)
    sized = dataclasses.replace(spec, input=(3, channels, 7, 9))
    exact, error, faithful = measure(sized, module, device, 5)
    assert exact
    assert error <= allowed(sized, faithful)


CI_MASK, POSITION_MASK = "(ci < C_IN)[:, None]", "(position < H_IN * W_IN)[None, :]"
NEEDED = {  # shape: the mask of a copy's elements; what tells its programs apart
    (4, 32, 16, 16): ("", "tile image"),
    (2, 48, 16, 16): ("", "ci_tile image"),
    (2, 48, 16, 32): ("", "ci_tile tile image"),
    (1, 48, 16, 32): ("", "ci_tile tile"),
    (2, 64, 8, 8): ("", "image"),
    (1, 64, 8, 8): ("", "tile"),
    (1, 64, 16, 16): ("", "tile"),
    (2, 24, 16, 16): (CI_MASK, "tile image"),
    (2, 72, 8, 8): (CI_MASK, "ci_tile image"),
    (2, 32, 9, 7): (POSITION_MASK, "image"),
    (2, 48, 9, 33): (POSITION_MASK, "ci_tile tile image"),
    (2, 40, 9, 13): (f"{CI_MASK} & {POSITION_MASK}", "tile image"),
}


@pytest.mark.parametrize("shape", NEEDED, ids=str)
@pytest.mark.parametrize("batch", ["known", "open"])
def test_a_copy_has_what_its_sizes_need(shape: tuple[int, ...], batch: str) -> None:
    """No other mask, no division by a number of tiles that is 1, and none of a lone tile."""
    mask, numbered = NEEDED[shape]
    coordinates = numbered.split()
    if batch == "open" and shape[0] == 1:
        coordinates = [name for name in coordinates if shape[2:] != (8, 8)] + ["image"]
    kernel = kernel_of(shaped(shape, "extents" if batch == "open" else "all"))
    assert re.findall(r"x_mask = (.*)", kernel) == [mask] * bool(mask)
    assert kernel.count(", mask=x_mask)") == 2 * bool(mask)
    assert re.findall(r"^    (\w*tile|image) = .*program", kernel, re.MULTILINE) == coordinates
    names = {"channel_tiles": "ci_tile", "position_tiles": "tile"}
    divided = [name for name, of in names.items() if of in coordinates[:-1]]
    assert set(re.findall(r"\w+_tiles", kernel)) == set(divided)
    assert kernel.count("%") == len(divided)
    assert kernel.count("tl.int64") == 2 * (batch == "open")


def kernel_of(spec: ConvTransposeSpec) -> str:
    """Return the text of the kernel that copies the input."""
    text = compile_kernel(spec, H100, copying(spec)[0]).text
    return text[text.index("def channels_last_kernel") : text.index("def pack_weight")]


@pytest.mark.parametrize(("batch", "wide"), [(64, False), (65, True), (2**12, True)])
def test_images_that_int32_does_not_reach_are_counted_in_int64(batch: int, wide: bool) -> None:
    """The last image of 64 starts below 2**31, of 65 at it."""
    kernel = kernel_of(shaped((batch, 64, 512, 1024)))
    assert kernel.count("tl.cast(image, tl.int64)") == 2 * wide


TILES = {
    (8, 4096): CopyTile(512, 8),
    (16, 4096): CopyTile(256, 16),
    (24, 4096): CopyTile(128, 32),
    (32, 4096): CopyTile(128, 32),
    (40, 4096): CopyTile(64, 64),
    (48, 4096): CopyTile(256, 16),
    (72, 4096): CopyTile(64, 64),
    (96, 4096): CopyTile(128, 32),
    (1024, 4096): CopyTile(64, 64),
    (48, 65): CopyTile(128, 16),
    (1024, 16): CopyTile(16, 64),
    (1024, 3): CopyTile(16, 64),
}


@pytest.mark.parametrize(("channels", "inputs"), TILES)
def test_tiles_of_a_copy_fit_the_channels(channels: int, inputs: int) -> None:
    """None of their lanes is idle where 16, 32 or 64 channels divide those of the layer."""
    assert copy_tile(shaped((2, channels, inputs))) == TILES[channels, inputs]


@pytest.mark.parametrize(
    ("layout", "copied", "kernel"),
    [
        ("channels_first", " in channels_last, rounded to TF32", "channels_last_kernel"),
        ("channels_last", " rounded to TF32", "rounded_kernel"),
    ],
)
def test_a_copy_is_told(layout: str, copied: str, kernel: str) -> None:
    spec = dataclasses.replace(parse(LAYER), layout=layout)
    source = compile_kernel(spec, H100, copying(spec)[0])
    header = source.text[: source.text.index("# grid")]
    assert header.endswith(f", of a copy of the input{copied}\n")
    rows = {name: str(value) for part in explain(source.plan) for name, value in part.rows}
    assert rows["copies"].startswith(f"one of every input,{copied}")
    assert rows["copy"].endswith("model and measured times include it")
    assert copied in rows["copy"]
    assert f"a workspace of {2 * 32 * 20 * 24 * 4} bytes" in rows["memory"]
    assert [launch.kernel for launch in read_launches(source.text)] == [
        "conv_transpose2d_kernel",
        "conv_transpose2d_pack_kernel",
        kernel,
    ]


LARGE = [
    "ConvTranspose2d(512, 256, 9, bias=False, input=(4, 512, 7, 32), dtype=float16)",
    "ConvTranspose2d(256, 256, 3, bias=False, input=(16, 256, 64, 64))",
    "ConvTranspose2d(1024, 512, 4, stride=2, padding=1, bias=False, input=(16, 1024, 16, 16))",
    "ConvTranspose2d(64, 64, 3, input=(8, 64, 64, 64), dtype=float16, layout=channels_last)",
]


@pytest.mark.compile
def test_the_tiles_that_take_most_shared_memory_fit() -> None:
    """Products that read the input from shared memory too keep one step of it more there."""
    jobs = []
    for spec in map(parse, LARGE):
        problem = problem_of(spec, decompose(spec))
        forms: dict[Form, list[tuple[int, Tile]]] = {}
        for candidate in plan(spec, H100).ranking:
            form = form_of(spec, decompose(spec), problem, candidate.tile, FAMILIES)
            if form.relayout or spec.layout == "channels_last":
                shared = use_of(spec, form, candidate.tile, H100).shared
                forms.setdefault(form, []).append((shared, candidate.tile))
        largest = [max(tiles, key=lambda t: t[0])[1] for tiles in forms.values()]
        jobs += [(str(spec), "h100", dataclasses.asdict(tile), False) for tile in largest]
    rows = worked("compile_worker.py", jobs)
    assert len(rows) >= 2 * len(LARGE)
    assert [(*job, row) for job, row in zip(jobs, rows, strict=True) if over(row)] == []


def over(row: dict[str, int]) -> bool:
    return row["shared"] > H100.shared_per_block


@pytest.mark.gpu
def test_a_copy_is_all_the_workspace(tmp_path: Path) -> None:
    spec = parse("ConvTranspose2d(64, 64, 3, bias=False, input=(4, 64, 128, 128), dtype=float16)")
    module = load_module(compile_kernel(spec, H100, copying(spec)[0]).text, "memory", tmp_path)
    x = torch.randn(4, 64, 128, 128, device="cuda", dtype=torch.float16)
    packed = module.pack_weight(torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.float16))
    module.conv_transpose2d_packed(x, packed)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = module.conv_transpose2d_packed(x, packed)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= x.nbytes + y.nbytes + 2 * 2**9


def test_cards_it_was_not_measured_on_make_no_copy_by_themselves() -> None:
    """What it gains there nobody knows, what it takes of memory is known; H200 is a Hopper."""
    spec = parse("ConvTranspose2d(2048, 256, 4, stride=2, padding=1, input=(32, 2048, 8, 6))")
    copying = {target.name for target in TARGETS if plan(spec, target).tile.relayout}
    assert copying == {"h100", "h200"}


@pytest.mark.parametrize(("value", "reason"), [(True, "has no copy"), (1, "true or false")])
def test_choices_of_copies_are_read(value: object, reason: str, tmp_path: Path) -> None:
    """A tile may have one; the gradient's launch makes none."""
    tile = dataclasses.asdict(copying(parse(LAYER))[0])
    found = {"tile": tile | {"relayout": value}, "ms": 1.0, "torch_ms": 2.0}
    key = key_of(parse(LAYER))
    row = {"spec": key, "tile": tile, "ms": 1.0, "tried": 1}
    where = {"device": "a card", "torch": "2", "triton": "3", "date": "2026-01-01"}
    whole = {"schema": 1, "target": "h100", "measured": where}
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(whole | {"choices": [row]}))
    assert read_choices(path, FAMILIES).table[key].tile.relayout
    path.write_text(json.dumps(whole | {"choices": [row | {"input_gradient": found}]}))
    with pytest.raises(SpecError, match=reason):
        read_choices(path, FAMILIES)
