"""Products on Hopper: no step overwrites the registers that a product of the last one still reads.

What would break it: a kernel whose products Triton lets run on while the next step's inputs come
into their registers. The numbers are then wrong now and then, where loads are early.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from convgen import emit, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import load_module
from convgen.project.table import read_table
from running import worked

LAST = "layout=channels_last"
# Kernels whose inputs pass through registers, with one product a step: rounded, joined, in boxes of
# several axes, behind a stage; with and without a copy, of one row and of blocks of rows.
LAYERS = (
    f"ConvTranspose2d(256, 256, 2, stride=2, bias=False, input=(100, 256, 14, 14), {LAST})",
    "ConvTranspose2d(256, 256, 2, stride=2, bias=False, input=(100, 256, 14, 14), dtype=float16)",
    "ConvTranspose1d(256, 256, 7, padding=3, bias=False, input=(8, 256, 16000), dtype=float16)",
    "ConvTranspose2d(512, 256, 3, stride=2, padding=1, output_padding=1, input=(8, 512, 32, 32))",
    f"relu | ConvTranspose2d(64, 64, 3, input=(8, 64, 128, 128), dtype=bfloat16, {LAST})",
    "ConvTranspose3d(64, 64, 3, padding=1, input=(2, 64, 48, 48, 48), dtype=float16)",
)
# A tile that gave wrong numbers on an H100 (Triton 3.6): the first layer's, as it was.
WRONG = {
    "block_m": 64,
    "block_n": 256,
    "block_k": 32,
    "num_warps": 4,
    "num_stages": 3,
    "family": "window",
}
DCGAN = "ConvTranspose2d(512, 256, 4, stride=2, padding=1, bias=False, input=(64, 512, 4, 4))"
TILES = 4  # the model's first ones, of each layer
SHIPPED = 12  # measured ones of a target, all through its file


def examined(jobs: list[tuple[object, ...]]) -> list[tuple[list[int], list[str]]]:
    """Return what wgmma_worker.py finds of each file: its products, and what overwrites them."""
    (rows,) = worked("wgmma_worker.py", [jobs])
    return rows


@pytest.mark.compile
def test_no_product_loses_its_operand() -> None:
    target = find_target("h100")
    jobs = []
    for layer in LAYERS:
        tiles = [c.tile for c in plan(parse(layer), target).ranking]
        boxed = [tile for tile in tiles if tile.family == "window"]
        jobs += [(layer, tile) for tile in dict.fromkeys((*tiles[:TILES], *boxed[: TILES // 2]))]
    rows = examined([(s, "h100", dataclasses.asdict(t), True) for s, t in jobs])
    wrong = [(job, lines) for job, (_, lines) in zip(jobs, rows, strict=True) if lines]
    assert wrong == []
    assert sum(products[0] > 0 for products, _ in rows) > len(jobs) // 2


@pytest.mark.compile
def test_no_shipped_kernel_loses_an_operand(root: Path) -> None:
    """Nor any of generated/, which may run on a Hopper whatever it was planned for."""
    jobs = []
    for name in ("h100", "h200"):
        data = json.loads(
            (root / f"codegen/planning/measured/{name}.json").read_text(encoding="utf-8")
        )
        rows = data["choices"]
        jobs += [(row["spec"], name, None, True) for row in rows[:: len(rows) // SHIPPED]]
    jobs += [(str(k.spec), k.target, None, True) for k in read_table(root).kernels]
    rows = examined(jobs)
    wrong = [(job, lines) for job, (_, lines) in zip(jobs, rows, strict=True) if lines]
    assert wrong == []
    assert sum(any(products) for products, _ in rows) > len(jobs) // 2


@pytest.mark.parametrize("layer", LAYERS)
def test_only_a_file_for_a_hopper_waits_in_its_kernel(layer: str) -> None:
    """Others read as code for their own card; on a Hopper their loops are not pipelined."""
    for target in ("rtx4090", "a100", "h100", "h200", "b200"):
        text = emit(parse(layer), find_target(target))
        kernel = text[text.index("@triton.jit") : text.index("def pack_weight(")]
        hopper = find_target(target).compute_capability[0] == 9
        assert hopper or not re.search("settle|Hopper", kernel), target
        assert not (hopper and "_num_stages" in text), target
        if "\n        x = round_to_tf32(x)" in kernel:  # in the loop
            assert hopper == ("settle(tl.dot(" in kernel), target
            assert hopper != ("num_stages=_num_stages(" in text), target


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("family", ["gather", "window"])
def test_rows_that_a_dilation_parts_wait_for_each_other(family: str, dilation: int) -> None:
    """Each product is waited for after which nothing else in the step reads its sum.

    By hand: row r of a block reads the inputs r, r + d and r + 2 d. Rows a multiple of d apart have
    inputs in common, others never have: those are d chains of products, each with an end.
    """
    size = "input=(8, 64, 64, 64), layout=channels_last"
    text = f"ConvTranspose2d(64, 64, 3, dilation=({dilation}, 1), {size})"
    spec, target = parse(text), find_target("h100")
    tile = next(
        c.tile
        for c in plan(spec, target).ranking
        if (c.tile.family, c.tile.rows, c.tile.relayout) == (family, 4, False)
    )
    kernel = compile_kernel(spec, target, tile).text.partition("def pack_weight(")[0]
    products = re.findall(r"(acc_\d) = (settle\()?tl\.dot\(.*, (acc_\d), ", kernel)
    assert len(products) == 4 * 3
    assert all(target == addend for target, _, addend in products)
    waits = [(n, acc) for n, (acc, settled, _) in enumerate(products) if settled]
    assert len(waits) == dilation
    assert waits[-1][0] == len(products) - 1
    assert len({int(acc.removeprefix("acc_")) % dilation for _, acc in waits}) == dilation
    assert not any(acc == later for n, acc in waits for later, *_ in products[n + 1 :])


@pytest.mark.parametrize(
    ("triton_version", "capability", "stages"),
    [
        ("3.6.0", (9, 0), 1),
        ("3.8.1+git1234", (9, 0), 1),
        ("3.9.0", (9, 0), 3),
        ("3.10.0", (9, 0), 3),
        ("3.6.0", (8, 9), 3),
        ("3.6.0", (10, 0), 3),
        ("3.6.0", None, 3),
    ],
)
def test_loops_are_pipelined_but_for_another_files_hopper(
    triton_version: str,
    capability: tuple[int, int] | None,
    stages: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = load_module(emit(parse(LAYERS[0]), find_target("rtx4090")), "ada", tmp_path)
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert module._num_stages(3) == stages


def warpgroup_tile(layer: str, target: str) -> dict[str, object]:
    """Return the model's first tile of as many positions as an instruction of a Hopper takes."""
    ranking = plan(parse(layer), find_target(target)).ranking
    return dataclasses.asdict(next(c.tile for c in ranking if c.tile.block_m >= 64))


@pytest.mark.compile
def test_no_kernel_for_another_card_loses_an_operand_on_a_hopper() -> None:
    targets = ("rtx4090", "a100")
    jobs = [
        (layer, each, warpgroup_tile(layer, each), True) for layer in LAYERS for each in targets
    ]
    rows = examined(jobs)
    assert [(job, lines) for job, (_, lines) in zip(jobs, rows, strict=True) if lines] == []
    assert sum(any(products) for products, _ in rows) > len(jobs) // 2
    tile = warpgroup_tile(DCGAN, "rtx4090")
    ((_, lost),) = examined([(DCGAN, "rtx4090", tile, False)])
    assert lost != []


@pytest.mark.interpreter
def test_another_card_gets_the_stages_that_were_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned file's configs serve every card of a process: after a Hopper, too."""
    text = "ConvTranspose1d(16, 16, 3, input=(1, 16, 8), autotune=launch)"
    module = load_module(emit(parse(text), find_target("rtx4090")), "tuned_ada", tmp_path)
    assert hasattr(module, "_num_stages")  # its loop has something to wait for
    planned, found = [config.num_stages for config in module.CONFIGS], []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.ones(1, 16, 8, device=device), torch.ones(16, 16, 3, device=device)
    for stages in (lambda planned: 1, lambda planned: planned):
        monkeypatch.setattr(module, "_num_stages", stages)
        module.TUNED.clear()
        module.conv_transpose1d(x, weight, torch.ones(16, device=device))
        found.append([config.num_stages for config in module.CONFIGS])
    assert found == [[1] * len(planned), planned]


@pytest.mark.compile
def test_the_waits_are_what_saves_them() -> None:
    """Without them this Triton's machine code has the fault that wrong numbers were seen of."""
    jobs = [(LAYERS[0], "h100", WRONG, settled) for settled in (True, False)]
    (_, saved), (_, lost) = examined(jobs)
    assert saved == []
    assert lost != []
