"""What a tile takes of an SM, by hand: registers of a thread, shared memory, programs at once.

What would break it: a buffer or an operand that is left out or counted twice, a limit of the SM
that is not asked for. What a compiler makes of tiles, test_planned.py and test_window.py ask;
counts and limits are written out here, the fitted numbers are the model's own.
"""

from __future__ import annotations

import pytest

from convgen import find_target, parse
from convgen.families import matrix_registers as r
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import decompose
from convgen.geometry.problem import problem_of
from convgen.geometry.tile import Tile
from convgen.planning.forms import form_of
from convgen.planning.resources import Use, occupancy, resident, use_of

LAYER = "ConvTranspose2d(64, 64, 3, padding=1, bias=False, input=(8, 64, 64, 64)"
LAST = f"{LAYER}, layout=channels_last"
STRIDED = "ConvTranspose2d(64, 64, 4, stride=2, padding=1, bias=False, input=(8, 64, 64, 64)"
THIRDS = "ConvTranspose2d(64, 64, 3, stride=3, bias=False, input=(8, 64, 64, 64)"
# Of each of 128 threads: 128 * 64 / 128 = 64 sums, 128 * 32 / 128 = 32 inputs, 16 weights.
BLOCKS = {"block_m": 128, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 3}
HALF = BLOCKS | {"block_m": 64}  # 32 sums, 16 inputs, 16 weights
ROWS = BLOCKS | {"rows": 4, "block_k": 16}
PAIRS = BLOCKS | {"block_n": 32, "block_k": 16, "family": "polyphase", "span": 2}
WINDOW = {"family": "window"}
STENCIL = {"block_m": 256, "block_n": 1, "block_k": 1, "num_warps": 4, "num_stages": 2}
STENCIL |= {"family": "stencil", "span": 4}


def use(text: str, target: str, tile: dict[str, object]) -> Use:
    """Return what a tile of a layer is estimated to take."""
    spec, made = parse(text + ")"), Tile(**tile)
    phases = decompose(spec)
    form = form_of(spec, phases, problem_of(spec, phases), made, FAMILIES)
    return use_of(spec, form, made, find_target(target))


# Three stages have two steps in flight, of 128 x 32 inputs and 64 x 32 weights, and what products
# read from shared memory has one buffer more.
SHARED: dict[str, tuple[str, str, dict[str, object], int]] = {
    "mma.sync reads registers": (LAYER, "rtx4090", BLOCKS, 2 * (128 + 64) * 32 * 4),
    "wgmma reads weights; inputs are rounded in registers": (
        LAYER, "h100", BLOCKS,
        2 * (128 + 64) * 32 * 4 + 64 * 32 * 4,
    ),
    "wgmma reads both where the copy is rounded": (
        LAYER, "h100", BLOCKS | {"relayout": True},
        3 * (128 + 64) * 32 * 4,
    ),
    "wgmma reads both of 16 bits": (
        f"{LAST}, dtype=float16", "h100", BLOCKS,
        3 * (128 + 64) * 32 * 2,
    ),
    "inputs that are staged have one buffer": (
        f"{LAYER}, dtype=float16", "rtx4090", BLOCKS,
        2 * 64 * 32 * 2 + 128 * 32 * 2,
    ),
    "four stages": (
        LAYER, "rtx4090", BLOCKS | {"num_stages": 4},
        3 * (128 + 64) * 32 * 4,
    ),
    "the output's way to its layout needs more than a step": (
        LAYER, "rtx4090", BLOCKS | {"num_stages": 2, "block_k": 16},
        128 * 64 * 4,
    ),
    "one tap and all channels in one step: no pipeline": (
        "ConvTranspose2d(32, 64, 1, bias=False, input=(8, 32, 64, 64)", "h100",
        BLOCKS | {"block_n": 16}, (128 + 16) * 32 * 4,
    ),
    "barriers of boxes: 8 bytes for each of two boxes in three stages": (
        f"{LAST}, dtype=float16", "h100", HALF | {"family": "window"},
        3 * (64 + 64) * 32 * 2 + 3 * 2 * 8,
    ),
    # Four rows of a kernel of three read six rows of inputs, by 3 rows of weights; 16 deep.
    "blocks of rows": (LAYER, "rtx4090", ROWS, 2 * (6 * 128 + 3 * 64) * 16 * 4),
    # Tensor memory adds up 12 products in 4 rows: each of them has its input, six more than rows.
    "blocks of rows of Blackwell": (
        f"{LAST}, dtype=float16", "b200", ROWS | {"block_m": 64},
        3 * (6 * 64 + 3 * 64) * 16 * 2 + 6 * 64 * 16 * 2,
    ),
    # Two inputs of 16 channels are 32 deep; 32 channels of four outputs are 128 columns.
    "pairs of inputs": (STRIDED, "rtx4090", PAIRS, 2 * (128 + 128) * 32 * 4),
    "depthwise: from the loads' layout to the store's": (
        LAYER + ", groups=64", "rtx4090", STENCIL,
        256 * 4 * 4,
    ),
    "depthwise in channels_last: it stores as it loads": (
        LAST + ", groups=64", "rtx4090",
        STENCIL | {"family": "direct", "span": 1, "block_m": 16, "block_n": 64}, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory(name: str) -> None:
    text, target, tile, shared = SHARED[name]
    assert use(text, target, tile).shared == shared


OTHER = r.OTHER_REGISTERS
# At most: what a tile may spill by.
REGISTERS: dict[str, tuple[str, str, dict[str, object], int]] = {
    "sums and both operands": (LAYER, "rtx4090", BLOCKS, OTHER + 64 + 32 + 16),
    "eight warps share them": (
        LAYER, "rtx4090", BLOCKS | {"num_warps": 8},
        OTHER + 32 + 16 + 8,
    ),
    "two registers a double": (
        f"{LAYER}, dtype=float64", "a100", HALF,
        OTHER + 2 * (32 + 16 + 16),
    ),
    "operands in three parts": (
        f"{LAYER}, precision=tf32x3", "rtx4090", HALF,
        OTHER + 32 + 3 * (16 + 16),
    ),
    "a stride: every second output has an address of its own": (
        STRIDED, "rtx4090", BLOCKS,
        OTHER + 64 + 32 + 16 + 64 // 2,
    ),
    "groups of the row on Hopper: the inputs, to be rounded": (
        STRIDED, "h100", PAIRS | {"span": 1, "block_k": 32, "block_n": 16},
        OTHER + 128 * 64 // 128 // 2 + 32,
    ),
    "pairs of inputs, 128 columns; a stage more": (
        STRIDED, "rtx4090", PAIRS,
        r.OTHER_GROUPED + 128 + (128 + 128) * 32 // 128 + r.STAGE_GROUPED,
    ),
    "pairs of 16 bits: two in a register": (
        f"{STRIDED}, dtype=float16", "rtx4090", PAIRS,
        r.OTHER_GROUPED + 128 + (128 + 128) * 32 // 128 // 2 + r.STAGE_GROUPED,
    ),
    "blocks of rows on Hopper: four sums": (
        LAYER, "h100", ROWS | {"block_m": 64},
        r.OTHER_ROWS + 4 * 32,
    ),
    # A box of 64 positions of a row is a matrix as it lies. In 16 bits products read it there;
    # in float32 it is rounded on the way, in registers, unless the copy was.
    "boxes as they lie": (
        f"{LAST}, dtype=float16", "h100", HALF | {"family": "window"},
        OTHER + 32,
    ),
    "boxes that are rounded": (LAST, "h100", HALF | {"family": "window"}, OTHER + 32 + 16),
    "boxes of a rounded copy": (
        LAST, "h100", HALF | {"family": "window", "relayout": True},
        OTHER + 32,
    ),
    # Two rows of 64 are laid out anew.
    "boxes that are turned": (
        f"{LAST}, dtype=float16", "h100", BLOCKS | {"family": "window"},
        OTHER + 64 + 32,
    ),
    "channels in no vectors: each input has an address": (
        f"{LAST}, dtype=float16".replace("(64, 64", "(60, 64").replace("(8, 64", "(8, 60"),
        "h100", HALF, OTHER + 32 + 32 + r.ELEMENT * 16,
    ),
    # Three outputs a position have four columns, of which one is masked: 16 channels are 64.
    "groups of three outputs: the inputs, and masks": (
        THIRDS, "h100", PAIRS | {"span": 1, "block_k": 32, "block_n": 16},
        OTHER + 64 + 32 + 64 // 4,
    ),
    "pointers of run-time strides: three of four sums": (
        STRIDED.replace("(8, 64, 64, 64)", "None"), "h100",
        PAIRS | {"span": 1, "block_k": 32, "block_n": 16}, OTHER + 32 + 32 + 3 * 32 // 4,
    ),
    "pairs of 60 channels: the last block of 16 is masked, each of 32 inputs of a thread": (
        STRIDED.replace("(64,", "(60,").replace("(8, 64", "(8, 60"), "rtx4090",
        PAIRS | {"num_stages": 2}, r.OTHER_GROUPED + 128 + (128 + 128) * 32 // 128 + 48,
    ),
    # mma.sync: 64 sums, 24 registers of both operands (32 x 64 is two warps by two, 16 x 32 of
    # each, 16 deep), 6 rows of inputs.
    "blocks of rows by mma.sync": (
        LAYER, "rtx4090", ROWS | {"block_m": 32},
        round(r.OTHER_ROW_FRAGMENTS + r.ROW_SUM * 64 + r.ROW_OPERAND * 24
              + r.ROW_INPUT * 6),
    ),
    # 256 positions of 4 outputs by 128 threads; the products of a tap beside their sums.
    "depthwise": (LAYER + ", groups=64", "rtx4090", STENCIL, OTHER + 2 * 8),
}  # fmt: skip


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_at_most(name: str) -> None:
    text, target, tile, registers = REGISTERS[name]
    assert use(text, target, tile).registers == registers


LAST16 = f"{LAST}, dtype=float16"
OPEN = LAYER.split(", input")[0]
SINGLE = {"block_m": 128, "block_n": 32, "block_k": 32, "family": "polyphase"}  # 64 columns
# Registers that a tile may be estimated to take, of the 255 there are; 0 for one that is not tried.
MOST: dict[str, tuple[str, str, dict[str, object], int]] = {
    "single outputs": (LAYER, "h100", BLOCKS, 255 - r.MARGIN),
    "pairs of inputs": (STRIDED, "h100", PAIRS, 255 - r.MARGIN_GROUPED),
    "pairs of inputs by mma.sync": (STRIDED, "rtx4090", PAIRS, 255 - r.MARGIN_FRAGMENTS),
    # A thread's part of the inputs: 128 * 32 elements are 32 registers of each of 128 threads.
    "more inputs than 32 registers": (LAYER, "h100", BLOCKS | {"block_k": 64}, 0),
    "as many of 16 bits": (LAST16, "h100", BLOCKS | {"block_k": 64}, 255 - r.MARGIN),
    "16 inputs in three parts": (f"{LAYER}, precision=tf32x3", "h100", HALF, 0),
    "8 inputs in three parts": (
        f"{LAYER}, precision=tf32x3", "h100", HALF | {"block_k": 16}, 255 - r.MARGIN,
    ),
    "open sizes, 64 deep": (
        STRIDED.replace("(8, 64, 64, 64)", "None"), "h100",
        BLOCKS | SINGLE | {"block_k": 64, "num_warps": 8}, 0,
    ),
    "known sizes, 64 deep": (
        STRIDED, "h100", BLOCKS | SINGLE | {"block_k": 64, "num_warps": 8}, 255 - r.MARGIN,
    ),
    "pairs of 16 bits, which Triton cannot lay out for Blackwell": (
        f"{STRIDED}, dtype=float16", "b200", PAIRS, 0,
    ),
    "pairs of 32 bits there": (STRIDED, "b200", PAIRS, 255 - r.MARGIN_GROUPED),
    "boxes": (LAST16, "h100", HALF | {"family": "window"}, 255 - r.MARGIN),
    "boxes of 8 positions a warp": (
        LAST16, "h100", HALF | {"family": "window", "num_warps": 8}, 0,
    ),
    "boxes on a card without": (LAST16, "a100", HALF | {"family": "window"}, 0),
    "boxes of half a group": (f"{LAST16}, groups=2", "h100", HALF | WINDOW, 255 - r.MARGIN),
    "boxes of more than a group": (
        f"{LAST16}, groups=2", "h100", HALF | WINDOW | {"block_k": 64, "num_warps": 4}, 0,
    ),
    # Blocks of rows. wgmma: 4 * 64 * 64 sums of 128 threads are 128, the most there may be.
    "rows": (LAYER, "h100", ROWS | {"block_m": 64}, 255),
    "rows, 256 sums": (LAYER, "h100", ROWS, 0),
    "rows, 128 bytes deep": (LAYER, "h100", ROWS | {"block_m": 64, "block_k": 32}, 0),
    "rows of 32 positions": (LAYER, "h100", ROWS | {"block_m": 32}, 0),
    "rows, 8 positions a warp": (LAYER, "h100", ROWS | {"block_m": 64, "num_warps": 8}, 0),
    "rows in three parts": (
        f"{LAYER}, precision=tf32x3", "h100", ROWS | {"block_m": 64, "block_n": 32}, 0,
    ),
    # 12 steps of 12 products; 32 deep six of them: 72 products, which ptxas unrolls.
    "rows of 16 bits, 144 products": (LAST16, "h100", ROWS | {"block_m": 64}, 255),
    "rows of 16 bits, 72 products": (
        LAST16, "h100", ROWS | {"block_m": 64, "block_k": 32}, 0,
    ),
    "rows of 16 bits, 72 products of half the sums": (
        LAST16, "h100", ROWS | {"block_m": 64, "block_k": 32, "block_n": 32}, 255,
    ),
    # Tensor memory: columns of 4 * 64 sums of 64 rows, two buffers: 512, all there are.
    "rows of Blackwell": (LAST16, "b200", ROWS | {"block_m": 64}, 255),
    "rows of Blackwell, 128 positions": (LAST16, "b200", ROWS | {"num_warps": 8}, 0),
    # Of 5 x 5, 20 products add to four sums five times each: four buffers.
    "rows of Blackwell, 5 x 5": (
        LAST16.replace("64, 3, padding=1", "64, 5, padding=2"), "b200", ROWS | {"block_m": 64}, 0,
    ),
    # mma.sync: 64 sums and 24 registers of operands are crowded, but 144 products no longer
    # unrolled; 32 deep they are 72.
    "rows by mma.sync": (LAYER, "rtx4090", ROWS | {"block_m": 32}, 255 - r.MARGIN_ROW_FRAGMENTS),
    "rows by mma.sync, 72 products": (
        LAYER, "rtx4090", ROWS | {"block_m": 32, "block_k": 32}, 0,
    ),
    # Extents of run time: inputs of a step are loads of a thread, one by one or 16 bytes at once.
    "open rows, 8 loads": (OPEN, "h100", ROWS | {"block_m": 64}, 255),
    "open rows, 16 loads": (
        f"{OPEN}, dtype=float16", "h100",
        ROWS | {"block_m": 64, "block_n": 32, "block_k": 32}, 0,
    ),
    "open rows, 16 inputs of 16 bits in 2 loads": (
        f"{LAST16.split(', input')[0]}, layout=channels_last, dtype=float16", "h100",
        ROWS | {"block_m": 64, "block_n": 32, "block_k": 32}, 255,
    ),
    "open rows and channels by mma.sync": (
        "ConvTranspose2d(None, 64, 3", "rtx4090", ROWS | {"block_m": 32, "block_n": 32}, 0,
    ),
    "open rows and channels by wgmma": (
        "ConvTranspose2d(None, 64, 3", "h100", ROWS | {"block_m": 64, "block_n": 32}, 255,
    ),
    "rows by mma.sync, 64 doubles": (
        f"{LAYER}, dtype=float64", "a100", ROWS | {"block_m": 32, "block_n": 32}, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOST)
def test_registers_that_a_tile_may_take(name: str) -> None:
    text, target, tile, most = MOST[name]
    spec, made = parse(text + ")"), Tile(**tile)
    phases = decompose(spec)
    form = form_of(spec, phases, problem_of(spec, phases), made, FAMILIES)
    assert form.family.most_registers(spec, form, made, find_target(target)) == most


# On average: of them an SM holds its programs.
EXPECTED: dict[str, tuple[str, str, dict[str, object], float]] = {
    "wgmma, inputs that are rounded, one by one": (
        LAYER, "h100", BLOCKS,
        r.EXPECTED + 0.9 * 64 + 1.1 * 32 + 0.7 * 32,
    ),
    "wgmma, of a copy: four at once, none in registers": (
        LAYER, "h100", BLOCKS | {"relayout": True},
        r.EXPECTED + 0.9 * 64 + 0.7 * 32 / 4,
    ),
    "16 bits: eight at once": (
        f"{LAST}, dtype=float16", "h100", BLOCKS,
        r.EXPECTED + 0.9 * 64 + 0.7 * 32 / 8,
    ),
    "boxes": (LAST, "h100", HALF | {"family": "window"}, r.EXPECTED_BOX + 32 + 16),
    "boxes that are turned, two in a register": (
        f"{LAST}, dtype=float16", "h100", BLOCKS | {"family": "window"},
        r.EXPECTED_BOX + 64 + 16,
    ),
    # Four warps on 128 x 64 are four by one: 32 rows and all 64 columns, 32 deep, of a warp.
    "mma.sync holds its part of both operands": (
        LAYER, "rtx4090", BLOCKS,
        r.EXPECTED_FRAGMENTS + 1.1 * 64 + 0.6 * (32 + 64) * 32 / 32,
    ),
    "in float64 what it is at most": (
        f"{LAYER}, dtype=float64", "a100", HALF,
        OTHER + 2 * (32 + 16 + 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_registers_on_average(name: str) -> None:
    text, target, tile, registers = EXPECTED[name]
    assert use(text, target, tile).expected == round(registers)


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "programs"),
    [
        # 2048 threads of an H100 are 16 programs of 128, which 32 registers each leave alone.
        ("h100", 4, 32, 0, 16),
        ("h100", 8, 32, 0, 8),
        # An SM of an RTX 3090 holds 16 blocks, however few their threads.
        ("rtx3090", 1, 16, 0, 16),
        # 65536 registers are 4 programs of 128 threads of 128 each; they come in eights.
        ("h100", 4, 128, 0, 4),
        ("h100", 4, 129, 0, 3),
        ("h100", 4, 96, 0, 5),
        ("h100", 4, 97, 0, 4),  # as if it were 104: 13 312 of a program; 12 416 would be five
        # 228 KB are four programs of 56 KB and the KB that CUDA keeps for each, or three.
        ("h100", 4, 32, 56 * 1024, 4),
        ("h100", 4, 32, 56 * 1024 + 1, 3),
        ("rtx4090", 4, 32, 49 * 1024, 2),
        ("rtx4090", 4, 32, 49 * 1024 + 1, 1),
    ],
)
def test_programs_of_an_sm(
    target: str, num_warps: int, registers: int, shared: int, programs: int
) -> None:
    assert resident(find_target(target), num_warps, registers, shared) == programs


def test_occupancy_is_of_expected_registers() -> None:
    """Of 160 at most, three programs of 128 threads were held; 128 on average are four."""
    h100, tile = find_target("h100"), Tile(**BLOCKS)
    assert occupancy(tile, h100, Use(registers=160, expected=128, shared=0)) == 4
    # A tile that none was to be held of runs alone: the estimate is no limit.
    assert occupancy(tile, h100, Use(registers=255, expected=600, shared=0)) == 1
