"""The stencil family: depthwise layers whose rows come in whole groups, against the oracle.

What would break it: an input beside a group that is taken from the next row, outputs that are laid
side by side in the wrong order, a weight of another tap, a group that hangs over its row.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from convgen import ConvTransposeSpec, SpecError, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import load_module
from convgen.execution.verify import allowed, measure
from convgen.families.stencil import STENCIL
from drawing import draw

SHARES = 4
DRAWN = 64


def whole_rows(spec: ConvTransposeSpec, source: random.Random) -> ConvTransposeSpec:
    """Return a depthwise `spec` whose rows have `stride` outputs for each input.

    Raises:
        SpecError: it has no output, or no output padding makes them so.
    """
    assert spec.input is not None
    assert spec.in_channels is not None
    channels = max(2, min(spec.in_channels, 5))
    stride, kernel = source.choice((1, 2, 2, 4)), source.randint(1, 5)
    dilation = source.choice((1, 1, 3))
    reach = dilation * (kernel - 1)
    padding = max(0, -(-(reach - stride + 1) // 2)) + source.choice((0, 0, 1))

    def last(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:-1], value)

    return dataclasses.replace(
        spec,
        groups=channels,
        in_channels=channels,
        out_channels=channels,
        kernel_size=last(spec.kernel_size, kernel),
        stride=last(spec.stride, stride),
        padding=last(spec.padding, padding),
        dilation=last(spec.dilation, dilation),
        output_padding=last(spec.output_padding, stride - 1 + 2 * padding - reach),
        input=(spec.batch, channels, *spec.spatial[:-1], source.choice((4, 8, 16, 24))),
        layout="channels_first",
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("share", range(SHARES))
def test_depthwise_layers_of_whole_rows_match_the_oracle(
    share: int, tmp_path: Path, device: str
) -> None:
    """All dtypes and ranks; strides and dilations of the last axis that the family serves."""
    met = set()
    for seed in range(share, DRAWN, SHARES):
        source = random.Random(seed)
        try:
            spec = whole_rows(draw(2000 + seed)[0], source)
        except SpecError:
            continue
        tiles = [c.tile for c in plan(spec).ranking if c.tile.family == "stencil"]
        if not tiles:
            assert STENCIL.refusal(spec), f"seed {seed}: {spec}"
            continue
        tile = source.choice(tiles)
        module = load_module(compile_kernel(spec, None, tile).text, f"stencil_{seed}", tmp_path)
        exact, error, faithful = measure(spec, module, device, seed, rounds=False)
        assert exact, f"seed {seed}, {tile}: {spec}"
        assert error <= allowed(spec, faithful), f"seed {seed}, {tile}: {spec}"
        met.add((tile.span, spec.stride[-1]))
    assert len(met) >= 3


LAYER = "ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6, input=(2, 6, 5, 8)"


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stages_after_the_layer_are_applied(dtype, tmp_path, device):
    spec = parse(f"{LAYER}, dtype={dtype}) | tanh | mul(0.5)")
    tile = next(c.tile for c in plan(spec).ranking if c.tile.family == "stencil")
    module = load_module(compile_kernel(spec, None, tile).text, f"stages_{dtype}", tmp_path)
    _, error, faithful = measure(spec, module, device, 0, rounds=False)
    assert error <= allowed(spec, faithful)


def test_a_group_is_loaded_as_one_and_its_neighbours_one_by_one():
    """Kernel 4, stride 2, padding 1: one input before a group of 4 and one after it."""
    spec = parse(f"{LAYER})")
    tile = next(
        c.tile for c in plan(spec).ranking if (c.tile.family, c.tile.span) == ("stencil", 4)
    )
    text = compile_kernel(spec, None, tile).text
    kernel = text[text.index("def conv_transpose2d_kernel") : text.index("def pack_weight")]
    assert kernel.count("x = tl.load(x_tile + x_step + x_lanes,") == 1
    assert "before_1 = tl.load(x_tile + x_step + group_lanes - 1," in kernel
    assert "after_1 = tl.load(x_tile + x_step + group_lanes + 4," in kernel
    assert "before_2" not in kernel
    # Outputs 0 and 7 of the group by hand: 2 * i + k = o + 1, i from the group's first input.
    assert "y_0 = x_0 * w_1 + before_1 * w_3" in kernel
    assert "y_7 = after_1 * w_0 + x_3 * w_2" in kernel


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer_of_whole_rows_takes_it(dtype):
    """Where memory bounds all, whole vectors come first; a vector has 16 bytes."""
    layer = LAYER.replace("(2, 6, 5, 8)", "(16, 6, 256, 256)")
    tile = plan(parse(f"{layer}, dtype={dtype})")).tile
    assert tile.family == "stencil"
    assert tile.span == {"float32": 4, "float16": 8}[dtype]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ConvTranspose2d(6, 12, 3, groups=6, input=(1, 6, 8, 8))", "not depthwise"),
        (f"{LAYER}, layout=channels_last)", "channels_last"),
        (f"relu | {LAYER})", "stages before"),
        (f"{LAYER.replace('5, 8', '5, None')})", "left to run time"),
        (f"{LAYER.replace('5, 8', '5, 9')})", "not whole groups"),
        (f"{LAYER.replace('padding=1', 'padding=0')})", "not whole groups"),
        ("ConvTranspose1d(6, 6, 3, stride=3, groups=6, input=(1, 6, 8))", "stride 3"),
        (
            "ConvTranspose1d(6, 6, 2, 2, 1, 1, groups=6, dilation=2, input=(1, 6, 8))",
            "no tap reaches",
        ),
        ("ConvTranspose1d(6, 6, 33, 1, 16, groups=6, input=(1, 6, 8))", "at most 64"),
        ("ConvTranspose1d(6, 6, 7, 1, 9, groups=6, dilation=3, input=(1, 6, 8))", "at most 8"),
    ],
)
def test_other_layers_are_left_to_other_families(text, reason):
    spec = parse(text)
    refused = STENCIL.refusal(spec)
    assert refused is not None
    assert reason in refused
    assert all(candidate.tile.family != "stencil" for candidate in plan(spec).ranking)
