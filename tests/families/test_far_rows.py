"""Masks in rows beyond int32, in the interpreter, without memory: addresses are only noted.

What would break it: a mask computed in int32 whose index wraps: it stores past the row, or not at
all, or takes inputs for padding.
"""

import numpy as np
import pytest
import torch

from convgen import parse
from convgen.execution.loading import load_module
from drawing import each_form

pytestmark = pytest.mark.interpreter

LAYERS = (
    "ConvTranspose1d(2, 2, 4, 2, 1, bias=False, input=(1, 2, 1500000001), precision=ieee)",
    "ConvTranspose1d(2, 2, 3, bias=False, input=(1, 2, 2999999999), precision=ieee)",
    "ConvTranspose1d(2, 2, 4, 4, bias=False, input=(1, 2, 1100000001), precision=ieee)",
)


@pytest.fixture
def accesses(monkeypatch, device):
    """What the kernel would load and store: (addresses, mask) of each, none of them done."""
    if device != "cpu":
        pytest.skip("notes what the interpreter does")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    loads, stores = [], []

    def load(self, ptrs, mask, other, *rest, **options):
        loads.append((ptrs.data.astype(np.int64), mask.data.copy()))
        zeros = np.zeros(ptrs.data.shape, np.float32)
        return other or TensorHandle(zeros, ptrs.dtype.scalar.element_ty)

    def store(self, ptrs, value, mask, *rest, **options):
        stores.append((ptrs.data.astype(np.int64), mask.data.copy()))

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    return loads, stores


@pytest.mark.parametrize("part", [1.0, 0.75])
@pytest.mark.parametrize("text", LAYERS)
def test_masks_hold_beyond_int32(text, part, tmp_path, accesses):
    """An index that wraps stores past the row, or not at all, or takes inputs for padding."""
    loads, stores = accesses
    spec = parse(text)
    extent, output, stride = spec.spatial[0], spec.output_spatial[0], spec.stride[0]
    for form, source in each_form(spec).items():
        tile = source.plan.tile
        phases = stride if tile.family == "gather" else 1
        width = stride if tile.family == "gather" else stride * tile.span
        number = int((-(-output // width) - 1) // tile.block_m * part)
        moved = source.text.replace(
            "program = tl.program_id(0)", f"program = tl.program_id(0) + {number * phases}"
        ).replace("tile = tl.program_id(0)", f"tile = tl.program_id(0) + {number}")
        assert moved != source.text
        module = load_module(moved, form.replace(" ", "_"), tmp_path)
        x, w, y = (torch.zeros(16) for _ in range(3))
        loads.clear(), stores.clear()
        module.conv_transpose1d_kernel[(1,)](x, w, y)
        ((places, stored),) = stores
        first = (places[0] - y.data_ptr()) // 4  # of channel 0
        assert np.array_equal(stored[0], (first >= 0) & (first < output)), form
        places, loaded = loads[0]
        if places.shape[0] == tile.block_m:
            places, loaded = places.T, loaded.T
        first = (places[0] - x.data_ptr()) // 4
        assert np.array_equal(loaded[0], (first >= 0) & (first < extent)), form
