"""Tiles of the kernel that packs the weight: cases worked by hand.

A tile in channels_last has 1024 elements: its outputs first, at most those of the layer, and as
many taps as are left, at most those of a contiguous weight's tile.
"""

from __future__ import annotations

import pytest

from convgen import parse
from convgen.compiler import plan
from convgen.kernels.pack_tiles import last_output, tile_of


@pytest.mark.parametrize(
    ("layer", "last", "output"),
    [
        ("2d(64, 64, 3)", (1, 32), 63),  # 1024 / (32 inputs * 32 outputs) = 1 tap
        ("2d(64, 3, 7)", (8, 4), 3),  # 1024 / (32 * 4) = 8
        ("2d(128, 100, 3)", (8, 4), 99),  # 100 has tiles of 4 without a mask: gcd(100, 32)
        ("2d(128, 33, 3)", (1, 32), 63),  # none has: two tiles of 32 reach beyond 33
        ("2d(512, 1, 3)", (16, 1), 0),  # 32 taps would fit; a contiguous weight's tile has 16
    ],
)
def test_a_tile_in_channels_last_is_filled_with_outputs_and_then_with_taps(layer, last, output):
    found = plan(parse(f"ConvTranspose{layer}"))
    tile = tile_of(found, found.sizes)
    assert tile.last == last
    assert last_output(tile, found.spec.out_channels) == output
