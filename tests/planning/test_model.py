"""The model's figures by hand: what a tile has to do, and how long that takes on a target.

What would break it: programs, steps or bytes that are miscounted, a price that is paid twice or
left out, a partial wave that takes no time. Counts and the rates of data sheets are written out
here; what each costs is the model's own number (costs.py), which a fit changes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from convgen import find_target, parse
from convgen.families import depthwise as d
from convgen.families import matrix_costs as m
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import decompose
from convgen.geometry.problem import problem_of
from convgen.geometry.tile import Tile
from convgen.planning import costs as c
from convgen.planning.costs import Least, Work, cost_of_work, least_ms_of_work, least_of, work_of
from convgen.planning.forms import form_of

# 64 channels of 8 images, 64 x 64 in and out: 4096 positions an image, 9 taps.
LAYER = "ConvTranspose2d(64, 64, 3, padding=1, bias=False, input=(8, 64, 64, 64)"
LAST16 = f"{LAYER}, layout=channels_last, dtype=float16"
# 4 x 4, stride 2: 128 x 128 out, in 4 phases of 64 x 64 with 2 x 2 taps each.
STRIDED = "ConvTranspose2d(64, 64, 4, stride=2, padding=1, bias=False, input=(8, 64, 64, 64)"
DEPTHWISE = "ConvTranspose2d(64, 64, 3, padding=1, bias=False, groups=64, input=(8, 64, 64, 64)"
BLOCKS = {"block_m": 128, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 3}
ROWS = BLOCKS | {"block_m": 64, "block_k": 16, "rows": 4}
PAIRS = BLOCKS | {"block_n": 32, "block_k": 16, "family": "polyphase", "span": 2}
ONE = {"block_n": 1, "block_k": 1, "num_warps": 4, "num_stages": 2}
# FLOP/ns of an SM: of the data sheet's TFLOP/s.
H100, H100_16, A100, RTX4090 = 494.7e3 / 132, 989.4e3 / 132, 156e3 / 108, 82.6e3 / 128


def work(text: str, target: str, tile: dict[str, object]) -> Work:
    """Return what the model says of a tile of a layer."""
    spec = parse(text + ")")
    phases = decompose(spec)
    problem = problem_of(spec, phases)
    made = Tile(**tile)
    return work_of(
        spec, problem, form_of(spec, phases, problem, made, FAMILIES), made, find_target(target)
    )


def dot(m: int, n: int, k: int) -> int:
    """Return the operations of a product."""
    return 2 * m * n * k


def step(inputs: float, weights: float) -> float:
    """Return nanoseconds of a step without its products; `weights` in bytes."""
    return c.STEP + inputs + weights * m.LOAD_WEIGHT


# 128 x 32 inputs and 64 x 32 weights a step, 128 x 64 outputs: 32 tiles an image, all channels.
GATHER = step(128 * 32 * m.LOAD_POSITIONS[4][1], 64 * 32 * 4)
GATHER_BYTES = 256 * 4 * (18 * (128 + 64) * 32 + 128 * 64)

# A layer, a target and a tile: programs, steps (9 taps, 64 / 32 blocks of channels), bytes, and ns.
WORK: dict[str, tuple[str, str, dict[str, object], int, float, int, Callable[[], float]]] = {
    "single outputs": (
        LAYER, "h100", BLOCKS, 256, 18, GATHER_BYTES,
        lambda: 18 * (GATHER + dot(128, 64, 32) / H100) + 128 * 64 * m.STORE,
    ),
    "eight warps": (
        LAYER, "h100", BLOCKS | {"num_warps": 8}, 256, 18, GATHER_BYTES,
        lambda: c.SPLIT * (18 * (GATHER + dot(128, 64, 32) / H100) + 128 * 64 * m.STORE),
    ),
    "few positions take the older instructions": (
        LAYER, "h100", BLOCKS | {"block_m": 32}, 1024, 18, 1024 * 4 * (18 * 96 * 32 + 32 * 64),
        lambda: 18 * (
            step(32 * 32 * m.LOAD_POSITIONS[4][1], 64 * 32 * 4)
            + dot(32, 64, 32) / H100 / m.SUSTAINED_OLD[9]
        ) + 32 * 64 * m.STORE,
    ),
    "an A100": (
        LAYER, "a100", BLOCKS, 256, 18, GATHER_BYTES,
        lambda: 18 * (GATHER + dot(128, 64, 32) / A100 / m.SUSTAINED_OLD[8]) + 128 * 64 * m.STORE,
    ),
    "an RTX 4090, whose products and loads overlap": (
        LAYER, "rtx4090", BLOCKS, 256, 18, GATHER_BYTES,
        lambda: (
            (18 * dot(128, 64, 32) / RTX4090 / 0.95) ** 4
            + (18 * GATHER + 128 * 64 * m.STORE) ** 4
        ) ** 0.25,
    ),
    "three products for one": (
        f"{LAYER}, precision=tf32x3", "h100", BLOCKS, 256, 18, GATHER_BYTES,
        lambda: 18 * (GATHER + 3 * dot(128, 64, 32) / H100) + 128 * 64 * m.STORE,
    ),
    "a copy of the input: 8 * 64 * 64 * 64 elements, read and written": (
        LAYER, "h100", BLOCKS | {"relayout": True}, 256, 18, GATHER_BYTES + 2 * 8_388_608,
        lambda: 18 * (step(128 * 32 * m.LOAD_COPY[4], 64 * 32 * 4) + dot(128, 64, 32) / H100)
        + 128 * 64 * m.STORE,
    ),
    "two groups, of 32 channels each: a tile of 64 columns for each": (
        f"{LAYER}, groups=2", "h100", BLOCKS, 512, 9, 512 * 4 * (9 * (128 + 64) * 32 + 128 * 64),
        lambda: 9 * (GATHER + dot(128, 64, 32) / H100) + 128 * 64 * m.STORE,
    ),
    "images of 3 x 3 share tiles: 72 positions in tiles of 32": (
        LAYER.replace("64, 64, 64)", "64, 3, 3)"), "h100", BLOCKS | {"block_m": 32}, 3, 18,
        3 * 4 * (18 * 96 * 32 + 32 * 64),
        lambda: 18 * (
            step(32 * 32 * m.LOAD_POSITIONS[4][1], 64 * 32 * 4)
            + dot(32, 64, 32) / H100 / m.SUSTAINED_OLD[9]
        ) + 32 * 64 * m.STORE,
    ),
    "channels_last": (
        LAST16, "h100", BLOCKS, 256, 18, GATHER_BYTES // 2,
        lambda: 18 * (step(128 * 32 * m.LOAD_CHANNELS[2], 64 * 32 * 2) + dot(128, 64, 32) / H100_16)
        + 128 * 64 * m.STORE_CHANNELS[2],
    ),
    "channels that come in no vectors: 60 are two blocks of 32": (
        LAST16.replace("(64, 64, 3", "(60, 64, 3").replace("(8, 64", "(8, 60"),
        "h100", BLOCKS, 256, 18, GATHER_BYTES // 2,
        lambda: 18 * (
            step(128 * 32 * m.LOAD_CHANNELS[2] * m.APART, 64 * 32 * 2) + dot(128, 64, 32) / H100_16
        ) + 128 * 64 * m.STORE_CHANNELS[2],
    ),
    "boxes of 2 x 64 positions, which are turned": (
        LAST16, "h100", BLOCKS | {"family": "window"}, 256, 18, GATHER_BYTES // 2,
        lambda: 18 * (
            c.STEP + 2 * m.BOX + 128 * 32 * m.LOAD_BOX[2] * m.TURNED
            + 64 * 32 * 2 * m.LOAD_BOX_WEIGHT + dot(128, 64, 32) / H100_16
        ) + 128 * 64 * m.STORE_BOX,
    ),
    "boxes of 64 positions of a row": (
        LAST16, "h100", BLOCKS | {"family": "window", "block_m": 64}, 512, 18,
        512 * 2 * (18 * (64 + 64) * 32 + 64 * 64),
        lambda: 18 * (
            c.STEP + 2 * m.BOX + 64 * 32 * m.LOAD_BOX[2] + 64 * 32 * 2 * m.LOAD_BOX_WEIGHT
            + dot(64, 64, 32) / H100_16
        ) + 64 * 64 * m.STORE_BOX,
    ),
    "a stride: 4 phases, of 4 taps and 2 blocks of channels": (
        STRIDED, "h100", BLOCKS, 1024, 8, 1024 * 4 * (8 * (128 + 64) * 32 + 128 * 64),
        lambda: 8 * (GATHER + dot(128, 64, 32) / H100)
        + 128 * 64 * m.STORE_STRIDED * (64 / 16) ** m.STORE_STRIDED_GROWTH,
    ),
    # Of a row pairs of inputs make 4 outputs; the first one begins 1 before it: 33 of them. 64 of
    # these rows are 2112 positions, 17 tiles; 2 tiles of channels, 2 phases of rows. Steps: 2 taps
    # of rows, 2 pairs, 4 blocks of 16 channels. 32 channels of 4 outputs are 128 columns.
    "pairs of inputs": (
        STRIDED, "h100", PAIRS, 17 * 8 * 2 * 2, 16, 544 * 4 * (16 * (128 + 128) * 32 + 128 * 128),
        lambda: 16 * (
            step(128 * 32 * m.LOAD_POSITIONS[4][2], 128 * 32 * 4) + dot(128, 128, 32) / H100
        ) + 128 * 128 * m.STORE_GROUPS[4],
    ),
    "pairs in rows of odd extent: 63 inputs, 126 outputs, 32 groups": (
        STRIDED.replace("64, 64)", "64, 63)"), "h100", PAIRS, 16 * 8 * 2 * 2, 16,
        512 * 4 * (16 * (128 + 128) * 32 + 128 * 128),
        lambda: 16 * (
            step(128 * 32 * m.LOAD_POSITIONS[4][2] * m.ODD_PAIRS[4], 128 * 32 * 4)
            + dot(128, 128, 32) / H100
        ) + 128 * 128 * m.STORE_GROUPS[4],
    ),
    # 64 rows are 16 blocks, 1024 positions, 16 tiles of 64. A step has one of 3 taps of the last
    # axis: 6 rows of inputs and 3 of weights, 12 products. 4 blocks of 16 channels: 12 steps.
    "blocks of 4 rows": (
        LAYER, "h100", ROWS, 128, 12, 128 * 4 * (12 * (6 * 64 + 3 * 64) * 16 + 4 * 64 * 64),
        lambda: m.UNROLLED * (
            12 * (
                step(6 * 64 * 16 * m.LOAD_POSITIONS[4][1], 3 * 64 * 16 * 4)
                + 12 * dot(64, 64, 16) / H100
            ) + 4 * 64 * 64 * m.STORE
        ),
    ),
    # 4 outputs a position: 1024 positions an image, 4 tiles of each of 64 channels. A step loads 4
    # inputs a position, and 4 weights of the channel.
    "depthwise, groups of 4": (
        DEPTHWISE, "h100", ONE | {"family": "stencil", "span": 4, "block_m": 256}, 2048, 3,
        2048 * 4 * (3 * (256 * 4 + 4) + 256 * 4),
        lambda: 3 * (c.STEP + 256 * (3 * d.LOAD + 4 * d.PRODUCT))
        + 256 * 4 * d.STORE[4],
    ),
    "depthwise, single outputs of 4 channels": (
        DEPTHWISE, "h100", ONE | {"family": "direct", "block_m": 256, "block_n": 4},
        16 * 16 * 8, 9, 2048 * 4 * (9 * (256 + 1) * 4 + 256 * 4),
        lambda: 9 * (c.STEP + 256 * 4 * (d.LOAD + d.PRODUCT))
        + 256 * 4 * d.STORE[4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_the_work_of_a_tile(name: str) -> None:
    text, target, tile, programs, steps, asked, ns = WORK[name]
    found = work(text, target, tile)
    assert (found.programs, found.steps, found.l2_bytes) == (programs, steps, asked)
    assert found.ns == pytest.approx(ns(), rel=1e-9)
    assert found.copied == (2 * 8_388_608 if "relayout" in tile else 0)
    assert not found.staged


def test_single_elements_of_16_bits_are_staged() -> None:
    """A tap shifts them, and an asynchronous copy has 32 bits; those of pairs are together."""
    half = f"{STRIDED}, dtype=float16"
    assert work(half, "h100", BLOCKS).staged
    assert not work(half, "h100", PAIRS).staged
    assert work(f"{LAYER}, dtype=float16", "h100", BLOCKS).staged
    assert not work(f"{LAYER}, dtype=float16", "h100", BLOCKS | {"relayout": True}).staged


# ---- times ----

IDLE = Least(flops=0, dram_bytes=0, roofline_ms=0.0, bound="memory")  # nothing moves
US = 1e-3  # of the model's milliseconds
LAUNCH = 0.86 * US


def some(programs: int, *, steps: float = 10, ns: float = 20_000.0, l2_bytes: int = 0) -> Work:
    return Work(programs, steps, ns, staged=False, l2_bytes=l2_bytes, copied=0)


def time_of(found: Work, occupied: int, target: str, stages: int = 3, least: Least = IDLE) -> float:
    """Return the model's milliseconds."""
    return cost_of_work(found, stages, occupied, find_target(target), least).model_ms


@pytest.mark.parametrize(
    ("programs", "occupied", "waves", "tail", "us"),
    [
        # 132 SMs of two programs: 264 of 20 us each, of which an SM has one after the other.
        (264, 2, 1.0, 0.0, 40),
        (265, 2, 265 / 264, 1 - 1 / 264, 80),  # one more, and all wait for a second wave
        (528, 2, 2.0, 0.0, 80),
        (7 * 264 + 1, 2, 7 + 1 / 264, 1 - 1 / 264, 320),
        # From eight waves on programs have drifted apart, and a part of a wave is one.
        (8 * 264 + 66, 2, 8.25, 0.75, 330),
        # Alone on an SM: launch to last store takes 3 us, each of 10 steps 0.29 us, and its work.
        (100, 1, 100 / 132, 1 - 100 / 132, 25.9),
    ],
)
def test_the_time_of_waves(
    programs: int, occupied: int, waves: float, tail: float, us: float
) -> None:
    cost = cost_of_work(some(programs), 3, occupied, find_target("h100"), IDLE)
    assert (cost.programs, cost.occupancy) == (programs, occupied)
    assert cost.waves == pytest.approx(waves)
    assert cost.tail == pytest.approx(tail)
    assert cost.model_ms == pytest.approx(us * US + LAUNCH, rel=1e-9)


def test_a_step_that_waits_for_its_loads_leaves_an_sm_idle() -> None:
    """Of one wave of two programs, 10 steps each: with one buffer, or inputs through registers."""
    full = 40 * US + LAUNCH
    staged = Work(264, 10, 20_000.0, staged=True, l2_bytes=0, copied=0)
    assert time_of(some(264), 2, "h100") == pytest.approx(full)
    assert time_of(some(264), 2, "h100", stages=2) == pytest.approx(full + 10 * 0.19 * US)
    assert time_of(staged, 2, "h100") == pytest.approx(full + 10 * 0.041 * US)
    assert time_of(staged, 2, "h100", stages=2) == pytest.approx(full + 10 * 0.231 * US)
    # 128 SMs of an RTX 4090: either one takes as long as both.
    for found, stages, open_us in ((some(256), 3, 0), (some(256), 2, 6), (staged, 3, 12)):
        took = time_of(found, 2, "rtx4090", stages)
        waves = 1 if found.programs == 256 else 2
        assert took == pytest.approx(waves * 40 * US + open_us * US + LAUNCH)


def test_memory_and_l2_run_beside_the_programs() -> None:
    """On an H100, in eighth powers: 40 us of programs, 40 of memory and 40 of L2.

    Memory: 90 % of 3352 GB/s move 120.672 MB in 40 us. L2: half of what programs ask for comes
    from it, 8100 GB/s: 648 MB.
    """
    least = Least(flops=0, dram_bytes=120_672_000, roofline_ms=0.036, bound="memory")
    asked = some(264, l2_bytes=648_000_000)
    assert time_of(some(264), 2, "h100", least=least) == pytest.approx(40 * 2**0.125 * US + LAUNCH)
    assert time_of(asked, 2, "h100") == pytest.approx(40 * 2**0.125 * US + LAUNCH)
    assert time_of(asked, 2, "h100", least=least) == pytest.approx(40 * 3**0.125 * US + LAUNCH)


def test_a_copy_runs_before_the_programs() -> None:
    """100.56 MB at 90 % of 3352 GB/s take 33.333 us, and its launch 1.8 us."""
    copied = Work(264, 10, 20_000.0, staged=False, l2_bytes=0, copied=100_560_000)
    took = time_of(copied, 2, "h100")
    assert took == pytest.approx((40 + 100 / 3 + 1.8) * US + LAUNCH)


def test_the_least_time_of_a_work_is_below_all_its_tiles() -> None:
    """Nobody waits and no wave is partial: 265 programs of 20 us on 132 SMs."""
    target = find_target("h100")
    least = least_ms_of_work(some(265), target, IDLE)
    assert least == pytest.approx(265 / 132 * 20 * US + LAUNCH)
    for stages, occupied in ((2, 1), (3, 2), (4, 8)):
        assert least <= time_of(some(265), occupied, "h100", stages)


# The brief's layer, 618.475 GFLOP (test_explain.py) and 4303.512 MB in float32.
BRIEF = "ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 1024, 1024)"


@pytest.mark.parametrize(
    ("options", "target", "ms", "bound"),
    [
        ("", "rtx4090", 618.475291 / 82.6, "compute"),
        (", precision=tf32x3", "rtx4090", 3 * 618.475291 / 82.6, "compute"),
        (", precision=bf16x3", "rtx4090", 3 * 618.475291 / 165.2, "compute"),
        (", precision=bf16x6", "rtx4090", 6 * 618.475291 / 165.2, "compute"),
        (", precision=ieee", "h100", 618.475291 / 66.9, "compute"),
        (", dtype=float16", "rtx4090", 618.475291 / 165.2, "compute"),
        (", dtype=bfloat16", "h100", 4303.511552 / 2 / 3352, "memory"),
        (", dtype=float64", "a100", 618.475291 / 19.5, "compute"),
    ],
)
def test_rooflines(options: str, target: str, ms: float, bound: str) -> None:
    """GFLOP over TFLOP/s, or MB over GB/s; a precision takes so many products for one."""
    spec = parse(f"{BRIEF}{options})")
    least = least_of(spec, problem_of(spec, decompose(spec)), find_target(target))
    assert least.bound == bound
    assert least.roofline_ms == pytest.approx(ms, rel=1e-6)
