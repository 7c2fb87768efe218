"""Lanes that a masked load leaves out, in an interpreter that leaves anything there.

What would break it: padding, or a channel beyond the last one, that is zero by no word of the file.
On a GPU it is what a register held before: mostly zero, and now and then not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convgen import find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import load_module
from test_memory import LAYERS, Layer, load_layer

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def poisoned_loads(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked loads give NaN where their mask is false and they name nothing else.

    A GPU leaves in a register what was there; the interpreter puts a zero, as most kernels want.
    """
    if device == "cuda":
        pytest.skip("the interpreter's loads are what is poisoned")
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def poisoned(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        found = load(self, ptrs, mask, other, *rest, **options)
        if other is None:
            # bfloat16 is held as bits
            nan = math.nan if np.issubdtype(found.data.dtype, np.floating) else 0x7FC0
            found.data = np.where(mask.data, found.data, np.array(nan, dtype=found.data.dtype))
        return found

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", poisoned)


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_masked_load_leaves_out_is_zero_by_its_own_words(
    name: str, tmp_path: Path, device: str
) -> None:
    """Padding, and channels beyond the last one, of inputs and of weights that are packed."""
    layer = load_layer(name, tmp_path, device)
    x, w, b = layer.tensors()
    assert torch.equal(layer.function(x, w, b), layer.want(x, w, b))


MASKED = {  # kernels whose loads are their own; boxes have zeros by the unit that loads them
    "stencil": ("1d(3, 3, 4, 2, 1, groups=3, input=(2, 3, 16))", "stencil", "rtx4090"),
    "a stencil of rows": ("2d(3, 3, 3, 1, 1, groups=3, input=(1, 3, 5, 8))", "stencil", "rtx4090"),
    "copy": ("2d(16, 6, 3, padding=1, input=(2, 16, 3, 5))", "gather", "h100"),
}


@pytest.mark.parametrize("name", MASKED)
def test_what_other_loads_leave_out_is_zero_too(name: str, tmp_path: Path, device: str) -> None:
    text, family, target = MASKED[name]
    spec, gpu = parse(f"ConvTranspose{text}"), find_target(target)
    wanted = family, name == "copy"
    ranking = plan(spec, gpu).ranking
    tile = next(c.tile for c in ranking if (c.tile.family, c.tile.relayout) == wanted)
    file = load_module(compile_kernel(spec, gpu, tile).text, "masked", tmp_path)
    layer = Layer(spec, family, file, device)
    x, w, b = layer.tensors()
    assert torch.equal(layer.function(x, w, b), layer.want(x, w, b))


def test_a_load_without_words_for_the_rest_is_seen(tmp_path: Path, device: str) -> None:
    """Breaks if the two tests above could not fail: here the words are taken out."""
    spec = parse("ConvTranspose1d(5, 6, 3, input=(2, 5, 13))")
    text = compile_kernel(spec).text
    assert "_mask, other=0.0)" in text
    bare = load_module(text.replace("_mask, other=0.0)", "_mask)"), "bare", tmp_path)
    layer = Layer(spec, "planned", bare, device)
    assert layer.function(*layer.tensors()).isnan().any()
