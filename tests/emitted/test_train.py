"""examples/train.py at a tiny size: both models, with torch's layers and with convgen's.

What would break it: a gradient that is wrong, a packed weight that lags behind the optimizer, a
layer that is not replaced (the rounding to TF32 would be missing), a noise that is estimated as 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

import train
from convgen import parse

pytestmark = pytest.mark.interpreter

SMALL = {
    "dcgan": ("--width", 4, "--image", 16, "--batch", 4),
    "unet": ("--width", 4, "--image", 16, "--batch", 2, "--levels", 2),
}


def run(folder: Path, model: str, *arguments: object) -> dict[str, Any]:
    """Return what the example writes; warnings are errors, so nothing falls back to torch."""
    words = ("--model", model, *SMALL[model], *arguments, "--json", folder / "result.json")
    train.main([str(word) for word in words])
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(("model", "layers"), [("dcgan", 3), ("unet", 2)])
def test_in_float64_training_is_the_same(
    model: str, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, model, "--steps", 3, "--precision", "float64")
    assert [parse(text).dtype for text in result["layers"].values()] == ["float64"] * layers
    assert max(result["difference"]) < 1e-10
    assert max(result["noise"]) < 1e-10
    curves = result["losses"]["torch"], result["losses"]["convgen"]
    for name in curves[0][0]:
        want, got = ([losses[name] for losses in curve] for curve in curves)
        assert got == pytest.approx(want, rel=1e-10)
        assert len(set(want)) == 3  # it does train
    printed = capsys.readouterr().out.splitlines()
    assert f"{curves[1][2][name]:9.6f}" in printed[-4]
    assert printed[-3] == "state_dict: loaded both ways"


def test_in_tf32_the_difference_is_of_the_size_of_the_noise(tmp_path: Path, device: str) -> None:
    """On the CPU torch does not round to TF32, which is the rounding that the noise stands for."""
    result = run(tmp_path, "unet", "--steps", 2)
    assert max(result["difference"]) > 0 or device == "cuda"
    assert max(result["difference"]) < 10 * max(result["noise"])
    assert 0 < max(result["noise"]) < 1e-2


def test_a_perturbed_weight_moves_by_one_rounding() -> None:
    """Noise from another distance would excuse errors, or blame convgen for none."""
    torch.manual_seed(0)
    for exponent, most in ((-11, 2**-11), (-24, 2**-23)):
        model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(8, 8, 3))
        before = [layer.weight.detach().clone() for layer in model]
        train.perturb(model, exponent)
        assert torch.equal(model[0].weight, before[0])
        moved = (model[1].weight / before[1] - 1).abs()
        assert moved.min() > 0
        assert moved.max() <= 1.01 * most


def emptied(layer: nn.Module, keys: object) -> None:
    nn.init.zeros_(layer.weight)


def test_a_state_that_does_not_arrive_is_told() -> None:
    """The check of the example itself: a model that lost a key, or that packs what it loads."""
    plain, other = nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)
    train.exchange(plain, other)
    other.bias = None
    with pytest.raises(RuntimeError, match=r"(Unexpected|Missing) key"):
        train.exchange(plain, other)
    other = nn.ConvTranspose1d(2, 2, 3)
    other.register_load_state_dict_post_hook(emptied)
    with pytest.raises(AssertionError, match="changed when it was loaded"):
        train.exchange(plain, other)


@pytest.mark.parametrize("wrong", [["--image", "24"], ["--image", "4"], ["--steps", "0"]])
def test_sizes_that_no_model_has_are_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(wrong)
    assert f"got {wrong[1]}" in capsys.readouterr().err


# That the kernel runs under autocast is the emitted file's part, and tested there.
def test_under_autocast_files_are_for_its_dtype(tmp_path: Path) -> None:
    result = run(tmp_path, "unet", "--steps", 2, "--amp", "bfloat16")
    assert [parse(text).dtype for text in result["layers"].values()] == ["bfloat16"] * 2
    assert max(result["difference"]) < 10 * max(result["noise"])
