"""Compiling: emitted files become machine code within each card's limits, with no GPU present.

What would break it: a kernel that only the interpreter accepts, a tile past a card's shared memory,
registers that spill.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from convgen import TARGETS, find_target, parse
from convgen.cli.commands import main as cli
from convgen.compiler import compile_kernel, plan
from convgen.families.registry import FAMILIES
from convgen.geometry.problem import problem_of
from convgen.planning.forms import form_of
from convgen.planning.plan import KernelPlan
from convgen.planning.resources import Use, use_of
from convgen.project.table import read_table
from convgen.tables.targets import GpuTarget
from planned import reason_for
from running import worked

# One target an architecture that the table has.
ARCHITECTURES = {t.compute_capability: t.name for t in reversed(TARGETS)}
SPILLS = 16  # bytes a thread: room for what ptxas does in a prologue, not for a loop
OTHERS = (
    "ConvTranspose2d(64, 64, 4, stride=2, padding=1, precision=tf32x3)",
    "ConvTranspose2d(64, 64, 3, input=(4, 64, 64, 64), precision=bf16x6)",
    "ConvTranspose1d(64, 32, 4, stride=2, precision=ieee)",
    "ConvTranspose1d(64, 64, 8, stride=4, dtype=float64)",
    "sigmoid | ConvTranspose3d(16, 3, 3, stride=2, groups=1, dtype=bfloat16) | tanh | clamp(0, 1)",
    "ConvTranspose2d(64, 64, 4, stride=2, autotune=launch, input=(1, 64, 32, 32))",
    "ConvTranspose2d(6, 6, 3, groups=6, dilation=2, layout=channels_last)",
    "ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 128, 128), dtype=float16)",
)


@pytest.mark.compile
@pytest.mark.parametrize("capability", sorted(ARCHITECTURES), ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_files_fit_the_card(capability: tuple[int, int], root: Path) -> None:
    target = find_target(ARCHITECTURES[capability])
    kernels = read_table(root).kernels
    # Those of several targets are planned anew for this one.
    layers = dict.fromkeys(str(replace(kernel.spec, target=None)) for kernel in kernels)
    specs = [*layers, *OTHERS]
    # What packs a weight has no products, whose code is what cards differ in: it is compiled for
    # one of them, and for every layer of test_planned.py.
    turn, turns = sorted(ARCHITECTURES).index(capability), len(ARCHITECTURES)
    jobs = [(spec, target.name, None, n % turns == turn) for n, spec in enumerate(specs)]
    binaries = list(zip(specs, worked("compile_worker.py", jobs), strict=True))
    assert [row for row in binaries if row[1]["shared"] > target.shared_per_block] == []
    unexplained = [
        (spec, row)
        for spec, row in binaries
        if row["spills"] and reason_for(target.name, max(row["registers"]), row["spills"]) is None
    ]
    assert unexplained == []


@pytest.mark.compile
@pytest.mark.parametrize("target", ["rtx4090", "h100"])
def test_what_is_compiled_is_what_the_file_launches(target: str) -> None:
    """Triton's key is of signature, constants, options and attributes: one hash tells them all."""
    keys = worked("launch_worker.py", [(spec, target) for spec in OTHERS])
    assert len({read for _, read in keys}) == len(OTHERS)
    assert [launched for launched, _ in keys] == [read for _, read in keys]


def resident_by_hand(target: str, warps: int, registers: int, shared: int) -> int:
    """Return the programs of an SM by NVIDIA's occupancy calculator, for two cards of known sizes.

    A warp takes registers in units of 256, a program 1 KB of shared memory more than its own.
    """
    most_warps, kilobytes, most = {"rtx4090": (48, 100, 24), "h100": (64, 228, 32)}[target]
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // of_a_warp // 4 * 4 // warps  # four schedulers share them
    by_shared = kilobytes * 1024 // (-(-shared // 128) * 128 + 1024)
    return min(most, most_warps // warps, by_registers, by_shared)


@pytest.mark.compile
def test_the_command_compiles_for_a_list_of_targets() -> None:
    """The schema is a contract: other programs read it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    spec = "ConvTranspose1d(16, 16, 4, stride=2, input=(1, 16, 64))"
    done = subprocess.run(
        [sys.executable, "-m", "convgen", "compile", spec, "--target", "rtx4090,h100", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == 1
    rows = [(row["name"], row["target"]) for row in report["kernels"]]
    names = "conv_transpose1d", "conv_transpose1d_pack"
    assert rows == [(name, target) for target in ("rtx4090", "h100") for name in names]
    for row in report["kernels"]:
        assert set(row) == {"name", "target", "registers", "spills", "shared", "occupancy"}
        by_hand = resident_by_hand(row["target"], 4, row["registers"], row["shared"])
        assert row["occupancy"] == by_hand
    jobs = []
    for target, capability in (("rtx4090", 89), ("h100", 90)):
        source = compile_kernel(parse(spec), find_target(target))
        tile = source.plan.tile
        assert (tile.block_m, tile.block_n, tile.block_k, tile.num_stages) == (32, 8, 16, 4)
        jobs.append((source.text, "float32", capability))
    layers = [row for row in report["kernels"] if row["name"] == "conv_transpose1d"]
    for row, code in zip(layers, worked("asm_worker.py", jobs), strict=True):
        # ptxas counts one or two beyond the highest that an instruction names.
        highest = max(int(number) for number in re.findall(r"\bR(\d+)\b", code["sass"]))
        assert highest < row["registers"] <= highest + 3
        assert row["spills"] == code["sass"].count("STL") == 0
        # Three steps in flight of 32 inputs and 8 * 2 weights, 16 deep, of 4 bytes.
        assert row["shared"] == 3 * (32 + 8 * 2) * 16 * 4


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_kernel_that_cannot_run_is_an_error(extra: list[str], monkeypatch) -> None:
    """A script that compiles for a card would take it for good."""
    row = {"name": "up", "target": "h100", "registers": 4, "spills": 0, "shared": 240000}
    monkeypatch.setattr("convgen.cli.compile.resources_of", lambda *of: [row | {"occupancy": 0}])
    done = CliRunner().invoke(cli, ["compile", "ConvTranspose1d(4, 4, 3)", *extra])
    assert done.exit_code == 1
    assert done.stderr == "Error: up for h100 needs more resources than an SM has\n"
    assert "240000" in done.stdout


@pytest.mark.compile
def test_the_kernel_of_the_gradient_is_compiled_too() -> None:
    """An H100's choices have one for this layer: what it takes would go unseen until a backward."""
    target = find_target("h100")
    layer = "ConvTranspose2d(32, 32, 3, bias=False, input=(8, 32, 512, 1024), dtype=float16"
    spec = parse(f"{layer}, target=h100)")
    assert plan(spec, target).gradient is not None
    (row,) = worked("compile_worker.py", [(str(spec), "h100")])
    kernels = row["registers"]
    assert len(kernels) == 4  # the layer's, its gradient's, and those that pack for the two
    assert row["spills"] <= SPILLS
    made = plan(spec, target)
    for registers, each in zip(kernels, (made, made.gradient), strict=False):
        most = estimated(each, target).registers
        assert most - 64 <= registers <= most


ODD = {  # layers whose rows have an odd number of positions, or one that run time decides, or apart
    "gather": ("ConvTranspose2d(32, 32, 3, input=(4, 32, 31, 31))", ("gather", 1)),
    "rows": ("ConvTranspose2d(32, 32, 3, input=(4, 32, 31, 31))", ("gather", 2)),
    "polyphase": (
        "ConvTranspose2d(32, 32, 4, stride=2, padding=1, input=(4, 32, 32, 32))",
        ("polyphase", 1),
    ),
    "open": ("ConvTranspose3d(32, 32, 4, stride=2, padding=1)", ("polyphase", 1)),
    "halves": (
        "ConvTranspose2d(32, 32, 4, stride=2, padding=1, input=(4, 32, 32, 32), dtype=float16)",
        ("polyphase", 1),
    ),
    "direct": (
        "ConvTranspose2d(32, 32, 4, stride=2, padding=1, groups=32, input=(4, 32, 32, 32))",
        ("direct", 1),
    ),
    "apart": (
        "ConvTranspose2d(32, 32, 4, stride=2, padding=1, input=(4, 32, 32, 32))",
        ("gather", 1),
    ),
    "folded": ("ConvTranspose1d(32, 32, 4, stride=2, input=(64, 32, 14))", ("polyphase", 1)),
}
LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<.*threadsPerWarp = \[([\d, ]+)\]", re.MULTILINE)
READ = re.compile(r"%x\w* = (?:tt\.load|ttg\.async_copy_global\w*) .*?tensor<(\d+)x\d+x!.*?(#\w+)>")


WRITE = re.compile(r"tt\.store .*?tensor<(\d+)x(?:\d+x)?!.*?(#\w+)>")


@pytest.mark.compile
@pytest.mark.parametrize("name", ODD)
def test_neighbouring_threads_have_neighbours_of_a_row(name: str) -> None:
    """Else a warp reads or writes 32 channels, each in a line of its own: up to 8 times slower.

    Triton takes the wrong dimension of a tile where it sees no run along either, and which one that
    is depends on its version.
    """
    text, form = ODD[name]
    spec = parse(text)
    # A tile of x with the shape of w's would have its layout, too; one of as many positions as
    # channels would not tell the dimensions of y apart; in a copy channels are neighbours.
    ranking = [c.tile for c in plan(spec).ranking if not c.tile.relayout]
    tiles = [each for each in ranking if each.block_k < each.block_m != each.block_n]
    tile = next(t for t in tiles if (t.family, t.rows if name == "rows" else t.span) == form)
    source = compile_kernel(spec, tile=tile)
    (code,) = worked("asm_worker.py", [(source.text, spec.dtype, 90)])
    layouts = {
        layout: list(map(int, lanes.split(", "))) for layout, lanes in LAYOUT.findall(code["ttgir"])
    }
    for pattern in (READ, WRITE):
        found = pattern.findall(code["ttgir"])
        assert found
        for rows, layout in found:
            # Positions lie along the first dimension, the only one, or the last one.
            first = int(rows) == tile.block_m
            assert layouts[layout][0 if first else -1] >= 8


def estimated(made: KernelPlan, target: GpuTarget) -> Use:
    """Return what the planner takes a kernel's tile for."""
    form = form_of(made.spec, made.phases, problem_of(made.spec, made.phases), made.tile, FAMILIES)
    return use_of(made.spec, form, made.tile, target)


BRIEF = "ConvTranspose2d(64, 64, kernel_size=3, stride=1, bias=False, input=(8, 64, 1024, 1024))"


def loop_of(sass: str) -> str:
    """Return the longest loop of a kernel's SASS, from its label to the branch back to it."""
    lines = sass.splitlines()
    labels = {line.rstrip(":"): n for n, line in enumerate(lines) if line.startswith(".L_x_")}
    branches = {n: re.search(r"BRA `\((\.L_x_\d+)\)", line) for n, line in enumerate(lines)}
    spans = [(labels[found[1]], n) for n, found in branches.items() if found]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return "\n".join(lines[first : last + 1])


@pytest.mark.compile
def test_the_brief_s_kernel_loads_ahead_of_its_products() -> None:
    """On its RTX 4090, as planned: a wait for all loads would stop the matrix units in each step.

    Loads commit in groups (LDGDEPBAR); DEPBAR.LE SB0, N waits until N groups are in flight.
    """
    spec, target = parse(BRIEF), find_target("rtx4090")
    source = compile_kernel(spec, target)
    (code,) = worked("asm_worker.py", [(source.text, spec.dtype, 89)])
    loop = loop_of(code["sass"])
    (groups,) = re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", loop)
    assert int(groups, 16) > 1
    assert int(groups, 16) >= loop.count("LDGDEPBAR") > 0  # a whole step
    (takes,) = worked("compile_worker.py", [(BRIEF, "rtx4090")])
    assert takes["spills"] == 0
    assert takes["registers"][0] <= 200
    assert takes["shared"] <= 99 * 1024
    # Two of three stages are in flight; a buffer more would be a third of it.
    assert 0 <= estimated(source.plan, target).shared - takes["shared"] <= 256


ADDED = re.compile(r"add\.s64\s+(%rd\d+), %rd\d+, (\d+);")
HALF = re.compile(r"ld\.global\.b16 \{[^}]*\}, \[ (%rd\d+) \+ 0 \]")


@pytest.mark.compile
@pytest.mark.parametrize("target", ["a100", "rtx4090", "h100"])
def test_channels_of_16_bit_inputs_are_constants_apart(target: str) -> None:
    """Breaks if each input has an address of its own again, in registers that its load waits for.

    A layer of a vocoder, in the model's tile: ptxas then loaded its inputs one after the other.
    """
    row = 12000
    size = f"bias=False, input=(16, 64, {row})"
    layer = f"ConvTranspose1d(64, 32, 4, stride=2, padding=1, {size}, dtype=float16)"
    spec, gpu = parse(layer), find_target(target)
    capability = int(gpu.arch.removeprefix("sm_"))
    source = compile_kernel(spec, gpu)
    (code,) = worked("asm_worker.py", [(source.text, spec.dtype, capability)])
    channels = {name for name, by in ADDED.findall(code["ptx"]) if int(by) % (2 * row) == 0}
    addresses = set(HALF.findall(code["ptx"]))
    assert len(addresses) >= 16
    assert len(addresses - channels) <= len(addresses) // 16
