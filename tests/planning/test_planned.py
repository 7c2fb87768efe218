"""Layers as they are planned: machine code without spills, within the memories of the target.

What would break it: an estimate of registers or of a memory that leaves something out, on
some target or in some dtype. Real layers (layers.convgen) and drawn ones, each on one target and in
one dtype; spills.py does all of them.
"""

from __future__ import annotations

from collections import Counter

import pytest

import layers
from convgen import TARGETS, ConvTransposeSpec, find_target
from planned import TENSOR_COLUMNS, reason_for
from running import worked

DRAWN = 30
NAMES = [target.name for target in TARGETS]


def jobs() -> list[tuple[str, str]]:
    """Return layers and targets; each pair of a target and a dtype comes round in turn."""
    specs: list[ConvTransposeSpec] = layers.drawn_layers(DRAWN)
    for spec in layers.real_layers():
        specs += layers.in_layouts(spec)
    pairs = [(name, dtype) for dtype in layers.DTYPES for name in NAMES]
    found = []
    for number, spec in enumerate(specs):
        name, dtype = pairs[number % len(pairs)]
        found.append((str(layers.in_dtype(spec, dtype)), name))
    return found


def test_every_target_has_layers_of_every_dtype():
    count = Counter((name, layers.dtype_of(spec)) for spec, name in jobs())
    assert len(count) == len(NAMES) * len(layers.DTYPES)
    assert min(count.values()) >= 4
    assert sum(count.values()) >= 150


@pytest.mark.compile
@pytest.mark.parametrize("name", NAMES)
def test_planned_layers_do_not_spill(name: str) -> None:
    mine = [job for job in jobs() if job[1] == name]
    rows = list(zip(mine, worked("compile_worker.py", mine), strict=True))
    most = find_target(name).shared_per_block
    assert [row for row in rows if row[1]["shared"] > most] == []
    assert [row for row in rows if row[1]["tensor"] > TENSOR_COLUMNS] == []
    spilled = [(job, row) for job, row in rows if row["spills"]]
    assert [
        (job, row)
        for job, row in spilled
        if reason_for(name, max(row["registers"]), row["spills"]) is None
    ] == []


@pytest.mark.compile
def test_blocks_of_many_products_fit_the_memories_of_blackwell() -> None:
    """With rows, each sum has buffers in tensor memory, each input copies in shared memory."""
    specs = [
        "ConvTranspose2d(64, 128, 5, padding=1, input=(512, 64, 32, 32))",
        "ConvTranspose2d(100, 1024, 4, input=(64, 100, 1, 1), dtype=float16, layout=channels_last)",
        "ConvTranspose2d(56, 1, 9, 2, 4, 1, input=(1, 56, 256, 256), dtype=float16)",
    ]
    rows = worked("compile_worker.py", [(spec, "b200") for spec in specs])
    assert [row for row in rows if row["tensor"] > TENSOR_COLUMNS] == []
    assert [row for row in rows if row["shared"] > find_target("b200").shared_per_block] == []
