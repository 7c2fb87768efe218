"""The glue of emitted files, imported as the module that it is, of a sample layer in 2-D.

The layer has a kernel of 4, stride 2 and padding 1, from 16 channels to 8, of images of any size.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from convgen.templates import runtime
from convgen.templates.runtime import (
    _call,
    _check_as_torch,
    _fits,
    _input_shape,
    _is_channels_last,
    _is_dense,
    _mismatch,
    _output_shape,
    _refuse,
)

CUDA = torch.device("cuda", 0)
FIRST, LAST = (16 * 5 * 7, 35, 7, 1), (16 * 5 * 7, 1, 112, 16)  # strides of [2, 16, 5, 7]
WEIGHT = (16, 8, 4, 4)


def mismatch(
    shape=(2, 16, 5, 7), stride=FIRST, weight=WEIGHT, bias=(8,), dtypes=None, devices=None
):
    dtypes = (torch.float32,) * 3 if dtypes is None else dtypes
    devices = (CUDA,) * 3 if devices is None else devices
    return _mismatch(shape, stride, weight, bias, dtypes, devices)


def test_a_call_that_fits_has_no_mismatch():
    assert mismatch() is None
    assert mismatch((1, 16, 1, 1)) is None
    assert mismatch((16, 5, 7), (35, 7, 1)) is None  # unbatched


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"bias": None}, "bias=True, got bias=None"),
        ({"stride": LAST}, "layout channels_first, got channels_last"),
        (
            {"dtypes": (torch.float16, torch.float32, torch.float32)},
            "torch.float32, got torch.float16 and torch.float32 and torch.float32",
        ),
        (
            {"devices": (CUDA, torch.device("cuda", 1), CUDA)},
            "one CUDA device, got cuda:0 and cuda:1",
        ),
        ({"weight": (16, 9, 4, 4), "bias": (9,)}, "weight (16, 8, 4, 4), got (16, 9, 4, 4)"),
        (
            {"shape": (2, 15, 5, 7), "weight": (15, 8, 4, 4)},
            "input (None, 16, None, None), got (2, 15, 5, 7)",
        ),
    ],
)
def test_a_mismatch_says_what_was_wanted_and_got(given, text):
    assert mismatch(**given) == text
    with pytest.raises(ValueError, match=r"^this file was generated for "):
        _refuse(mismatch(**given))


def test_nothing_is_refused_without_a_mismatch():
    assert _refuse(None) is None


def test_a_layer_s_weight_decides_on_the_layout_too():
    """Torch's output is in channels_last if input or weight is."""
    call = ((2, 16, 5, 7), FIRST, WEIGHT, (8,), (torch.float32,) * 3, (CUDA,) * 3)
    assert _mismatch(*call, (128, 16, 4, 1)) is None
    assert _mismatch(*call, (128, 1, 32, 8)) == "layout channels_first, got channels_last"


@pytest.mark.parametrize(
    ("shape", "weight", "bias"),
    [
        ((2, 15, 5, 7), WEIGHT, (8,)),  # channels
        ((2, 16, 5, 7), WEIGHT, (9,)),  # bias
        ((5, 7), WEIGHT, None),  # dimensions
        ((2, 16, 0, 7), WEIGHT, None),  # no input
    ],
)
def test_what_no_layer_accepts_raises_torch_s_own_error(shape, weight, bias):
    one = torch.zeros(())
    tensors = one.expand(shape), one.expand(weight), None if bias is None else one.expand(bias)
    with pytest.raises(RuntimeError) as own:
        torch.nn.functional.conv_transpose2d(*tensors, 2, 1)
    with pytest.raises(RuntimeError) as ours:
        _check_as_torch(shape, weight, bias)
    assert str(ours.value) == str(own.value)


def test_shapes_of_output_and_input():
    # (5 - 1) * 2 - 2 * 1 + (4 - 1) + 1 = 10, (7 - 1) * 2 - 2 + 4 = 14
    assert _output_shape((2, 16, 5, 7), 8) == (2, 8, 10, 14)
    assert _output_shape((1, 16, 1, 1), 3) == (1, 3, 2, 2)
    # What the gradient's kernel computes: 10 + 2 * 1 - (4 - 1), at stride 1
    assert _input_shape((2, 8, 10, 14), 16) == (2, 16, 9, 13)


def test_shapes_that_fit():
    assert _fits((2, 16, 5), (None, 16, None))
    assert not _fits((2, 16, 5), (None, 15, None))
    assert not _fits((2, 16), (None, 16, None))
    assert not _fits((2, 16, 5, 7), (None, 16, None))


@pytest.mark.parametrize(
    ("shape", "stride", "last"),
    [
        ((2, 16, 5, 7), FIRST, False),
        ((2, 16, 5, 7), LAST, True),
        ((16, 5, 7), (1, 112, 16), False),  # unbatched: none has four axes
        ((2, 1, 5, 7), (35, 1, 7, 1), True),  # one channel is both
        ((2, 1, 5, 7), (35, 35, 7, 1), False),
        ((1, 16, 1, 1), (16, 1, 16, 16), True),
        ((2, 16, 5, 7), (0, 0, 0, 0), False),
        ((2, 16, 5, 7), (16, 1, 0, 0), False),
    ],
)
def test_channels_last_is_what_torch_takes_for_it(shape, stride, last):
    assert _is_channels_last(shape, stride) is last
    tensor = torch.empty(4000).as_strided(shape, stride)
    suggested = torch._prims_common.suggest_memory_format(tensor) if tensor.dim() == 4 else None
    assert (suggested == torch.channels_last) is last


def test_density_in_an_order_of_axes():
    assert _is_dense((2, 16, 5, 7), FIRST, (3, 2, 1, 0))
    assert not _is_dense((2, 16, 5, 7), FIRST, (1, 3, 2, 0))
    assert _is_dense((2, 16, 5, 7), LAST, (1, 3, 2, 0))
    assert not _is_dense((2, 16, 5, 7), (561, 35, 7, 1), (3, 2, 1, 0))  # a gap between images
    assert _is_dense((1, 16, 5, 7), (9, 35, 7, 1), (3, 2, 1, 0))  # of one image no stride counts


def test_a_call_is_metadata():
    x, weight = torch.empty(2, 16, 5, 7), torch.empty(WEIGHT, dtype=torch.float16)
    cpu = torch.device("cpu")
    call = _call(x, weight, weight.shape, None, cast=False)
    assert call == (x.shape, FIRST, WEIGHT, None, (torch.float32, torch.float16), (cpu, cpu))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = _call(x, weight, weight.shape, torch.empty(8), cast=True)
    assert call[3:5] == ((8,), (torch.bfloat16,) * 3)


def test_the_sample_s_layer_is_torch_s():
    layer = runtime.ModelNew(dtype=torch.float64)
    own = torch.nn.ConvTranspose2d(16, 8, 4, 2, 1, dtype=torch.float64)
    assert repr(layer) == repr(own)
    assert list(layer.state_dict()) == list(own.state_dict())
    layer.load_state_dict(own.state_dict())
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="computed by torch: this file was generated for torch.float32, got"
    ):
        assert torch.equal(layer(x), own(x))


def test_no_index_is_a_truth_value():
    """Dynamo of torch 2.11 traces no `pair[flag]`, which Python and later versions take."""
    tree = ast.parse(Path(runtime.__file__).read_text("utf-8"))
    tested = (ast.BoolOp, ast.Compare)
    found = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and any(isinstance(n, tested) for n in ast.walk(node.slice))
    ]
    assert found == []
