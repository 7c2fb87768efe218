"""The direct family: depthwise layers of every kind against the oracle.

What would break it: a channel that reads another's weights, a phase that lands in the wrong column,
a mask of channels that is lost, a stage that is applied to padding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from convgen import ConvTransposeSpec, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import load_module
from convgen.execution.verify import allowed, measure
from convgen.families.direct import DIRECT
from drawing import draw

SHARES = 4
DRAWN = 48


def depthwise(spec: ConvTransposeSpec, *, opened: bool) -> ConvTransposeSpec:
    """Return `spec` with a group for each channel; `opened` leaves sizes to run time."""
    assert spec.input is not None
    assert spec.in_channels is not None
    channels = max(2, min(spec.in_channels, 9))
    spatial = [None if opened and size % 2 else size for size in spec.spatial]
    batch = None if opened else spec.batch
    return dataclasses.replace(
        spec,
        groups=channels,
        in_channels=channels,
        out_channels=channels,
        input=(batch, channels, *spatial),
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("share", range(SHARES))
def test_depthwise_layers_match_the_oracle(share: int, tmp_path: Path, device: str) -> None:
    """All dtypes, ranks, strides, dilations, bias; sizes known and left to run time."""
    for seed in range(share, DRAWN, SHARES):
        known = depthwise(draw(1000 + seed)[0], opened=False)
        emitted = depthwise(known, opened=bool(seed % 3))
        tiles = [c.tile for c in plan(emitted).ranking if c.tile.family == "direct"]
        source = compile_kernel(emitted, None, tiles[seed % min(12, len(tiles))])
        module = load_module(source.text, f"direct_{seed}", tmp_path)
        exact, error, faithful = measure(known, module, device, seed, rounds=False)
        assert exact, f"seed {seed}: {emitted}"
        assert error <= allowed(known, faithful), f"seed {seed}: {emitted}"


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stages_are_applied_and_padding_stays_zero(dtype, layout, tmp_path, device):
    """sigmoid(0) is not 0: a padded input would add to the sum."""
    layer = "ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6, input=(2, 6, 5, 7)"
    spec = parse(f"sigmoid | {layer}, dtype={dtype}, layout={layout}) | tanh | mul(0.5)")
    tile = next(c.tile for c in plan(spec).ranking if c.tile.family == "direct")
    name = f"stages_{dtype}_{layout}"
    module = load_module(compile_kernel(spec, None, tile).text, name, tmp_path)
    _, error, faithful = measure(spec, module, device, 0, rounds=False)
    assert error <= allowed(spec, faithful)


@pytest.mark.parametrize(
    "text",
    [
        "ConvTranspose2d(6, 12, 3, groups=6)",
        "ConvTranspose2d(6, 6, 3, groups=3)",
        "ConvTranspose2d(6, 6, 3, groups=3, layout=channels_last)",
        "ConvTranspose2d(1, 1, 3)",
        "ConvTranspose1d(6, 6, 3, stride=64, groups=6)",
    ],
)
def test_other_layers_are_left_to_other_families(text):
    spec = parse(text)
    assert DIRECT.refusal(spec)
    assert all(candidate.tile.family != "direct" for candidate in plan(spec).ranking)


@pytest.mark.parametrize("others", ["", ", input=(16, 64, 64, 64), layout=channels_last"])
def test_a_depthwise_layer_takes_it(others):
    """The planner's costs are a guess here; multiplying zeros in matrix units is never right."""
    layer = "ConvTranspose2d(64, 64, 4, stride=2, padding=1, groups=64"
    assert plan(parse(f"{layer}{others})")).family == DIRECT
