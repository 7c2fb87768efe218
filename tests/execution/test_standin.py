"""Stand-ins: what `verify` runs in place of a layer that is too large to be checked as it is.

What would break it: a check that never ends or eats the memory; a stand-in that is smaller than it
has to be, or of another kind than the layer; a part that was not checked and passes.
"""

from __future__ import annotations

import json
import math

import pytest

from convgen import parse
from convgen.execution.standin import MOST_ELEMENTS, concrete, stand_in
from convgen.geometry.phases import decompose
from hard import HARD, verified
from running import run

# Of each kind one that the suite runs; `python tests/support/hard.py` runs all.
FEW = (
    "ConvTranspose2d(1, 1, 1, padding=3000)",
    "ConvTranspose2d(1, 1, 1, stride=4096)",
    "ConvTranspose2d(1, 1, 2, dilation=1048576)",
)


def products(spec):
    """Products of an input and a weight, in all of a layer whose sizes are known."""
    return math.prod((*spec.input, *spec.kernel_size, spec.out_channels // spec.groups))


def elements(spec):
    images = spec.batch * spec.out_channels * math.prod(spec.output_spatial)
    return math.prod(spec.input) + images + spec.in_channels * math.prod(spec.kernel_size)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("text", HARD)
def test_what_runs_is_bounded(text, small):
    """In the interpreter, and on a GPU, where the oracle runs on the host all the same."""
    spec = parse(text)
    found = stand_in(spec, None, None, small=small)
    assert products(found.sized) <= 5e8
    assert elements(found.sized) <= MOST_ELEMENTS
    for name in ("dtype", "precision", "layout", "bias", "before", "after"):
        assert getattr(found.sized, name) == getattr(spec, name)


@pytest.mark.parametrize(
    "text",
    [
        "ConvTranspose2d(64, 32, 4, stride=2, padding=1)",
        "ConvTranspose1d(512, 256, 16, stride=8, padding=4, input=(16, 512, 8192))",
        "ConvTranspose3d(64, 64, 3, stride=2, dilation=3, groups=4, output_padding=1)",
        "ConvTranspose2d(16, 16, 7, padding=3, dilation=5, dtype=float16)",
    ],
)
def test_an_ordinary_layer_keeps_its_geometry(text):
    spec = parse(text)
    found = stand_in(spec, None, None, small=True)
    assert found.sized == concrete(spec, small=True)
    assert not found.geometry


def test_on_a_gpu_what_the_oracle_can_afford_runs_as_it_is():
    spec = parse("ConvTranspose2d(16, 8, 3, input=(4, 16, 100, 100))")
    found = stand_in(spec, None, None, small=False)
    assert found.sized == spec
    assert not found.reduced


def test_smaller_extents_come_before_a_smaller_kernel():
    found = stand_in(parse("ConvTranspose2d(64, 64, 16)"), None, None, small=True)
    assert found.sized.kernel_size == (16, 16)
    assert not found.geometry


@pytest.mark.parametrize(
    "text",
    [
        "ConvTranspose2d(4, 4, 3, stride=7, padding=1048576)",
        "ConvTranspose2d(4, 4, 2, stride=6, dilation=1048574, padding=11)",
        "ConvTranspose1d(4, 4, 5, stride=9, dilation=1048576, padding=1048570)",
    ],
)
def test_padding_and_dilation_are_reduced_and_the_phases_stay(text):
    """Each output's taps, of one residue modulo the stride, are what the kernel unrolls."""
    spec = parse(text)
    found = stand_in(spec, None, None, small=True).sized
    assert (found.stride, found.kernel_size) == (spec.stride, spec.kernel_size)
    assert max(*found.padding, *found.dilation) < 100
    for big, little in zip(decompose(spec), decompose(found), strict=True):
        assert big.padding % big.stride == little.padding % little.stride
        assert big.dilation % big.stride == little.dilation % little.stride
        assert (big.gaps, big.tap_step, big.most_taps) == (
            little.gaps,
            little.tap_step,
            little.most_taps,
        )


@pytest.mark.parametrize(
    "text",
    ["ConvTranspose2d(64, 64, 256, stride=256)", "ConvTranspose1d(8, 8, 4096, stride=4096)"],
)
def test_a_kernel_as_wide_as_its_stride_stays_so(text):
    found = stand_in(parse(text), None, None, small=True)
    assert found.geometry
    assert found.sized.kernel_size == found.sized.stride


@pytest.mark.interpreter
@pytest.mark.parametrize("text", FEW)
def test_verify_takes_at_most_a_minute_and_2_gb(text):
    """Without bounds these took 4 GB, or ended as an internal error."""
    code, seconds, memory, output = verified(text)
    assert code == 0, output
    assert "sizes and geometry reduced" in output
    assert seconds < 60
    assert memory < 2048


@pytest.mark.interpreter
def test_what_takes_too_long_is_not_verified(device):
    """It must not pass, and the report says what was left out."""
    text = "ConvTranspose2d(64, 64, 16)"
    done = run("verify", text, "--seconds", "1")
    assert done.exit_code == 1
    assert done.stdout.startswith("NOT VERIFIED: ConvTranspose2d(")
    assert "too large: the 1 s are over, the rest was not verified" in done.stdout
    done = run("verify", text, "--seconds", "1", "--json")
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)["kernels"]
    assert (row["passed"], row["error"]) == (False, None)


@pytest.mark.parametrize("value", ["0", "-1", "0.5", "1000000", "x"])
def test_wrong_seconds_are_told(value):
    done = run("verify", FEW[0], "--seconds", value)
    assert done.exit_code == 2
    assert "--seconds" in done.stderr
