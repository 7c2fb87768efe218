"""Sizes at the limits of int32 and of a grid: what an emitted file serves, and what it refuses.

What would break it: an offset that wraps round in the last tile of the largest image that is
served, a size that is refused without need, memory that is taken before a call is refused.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import pytest
import torch

from test_wrapper import LAST, PLAIN, REFUSAL, Layer

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def load(tmp_path_factory, device):
    """The function from a spec's text to its `Layer`."""
    folder, count = tmp_path_factory.mktemp("limits"), itertools.count()
    return functools.cache(lambda text: Layer(text, f"limits_{next(count)}", folder, device))


HUGE = (
    (PLAIN, (1, 4, 2**16, 2**16)),
    (PLAIN, (2**17, 4, 5, 5)),
    ("ConvTranspose1d(4, 6, 3, stride=2)", (1, 4, 2**31)),
    (f"{PLAIN[:-1]}, layout=channels_last)", (2, 4, 2**15, 2**15)),
)


@pytest.mark.parametrize(("text", "shape"), HUGE)
def test_sizes_beyond_int32_are_refused_before_memory_is_taken(text, shape, load):
    """These inputs are one number with stride 0; a copy or an output of them takes gigabytes."""
    layer = load(text)
    _, w, b = layer.tensors()
    x = torch.empty(1, device=w.device).expand(shape)
    for function, weight in ((layer.function, w), (layer.packed, layer.file.pack_weight(w))):
        with pytest.raises(ValueError, match=f"{REFUSAL}.*got input"):
            function(x, weight, b)


def is_served(layer, *shape):
    """Whether a call of an input of that shape is; nothing is computed or kept."""
    _, w, b = layer.tensors(channels=shape[1])
    x = torch.empty(shape, device="meta")
    x = x.contiguous(memory_format=LAST[2]) if layer.spec.layout == "channels_last" else x
    with contextlib.suppress(ValueError):
        return layer.function(x, w.to("meta"), b if b is None else b.to("meta")) is not None
    return False


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_last_lane_of_the_widest_image_has_an_offset_below_int32s_limit(layout, load):
    """The last tile hangs over the end of the positions, and its lanes are added up all the same.

    A layer of one tap, so that an output is a position: its tile's last one, and of that the last
    channel of a block.
    """
    layer = load(f"ConvTranspose2d(3, 3, 1, bias=False, layout={layout})")
    low, high = 1, 2**31  # served, and not
    assert is_served(layer, 1, 3, 1, low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_served(layer, 1, 3, 1, middle) else (low, middle)
    block = layer.file.BLOCK_M.value
    last = -(-low // block) * block - 1
    channel = max(layer.file.BLOCK_K.value, layer.file.BLOCK_N.value) - 1
    far = channel * low + last if layout == "channels_first" else 3 * last + channel
    assert 2**31 - 2**18 < far < 2**31


def test_as_many_images_as_a_grid_has_programs_are_served(load):
    layer = load("ConvTranspose2d(3, 3, 1, bias=False)")
    assert is_served(layer, 65535, 3, 1, 1)
    assert not is_served(layer, 65536, 3, 1, 1)


def test_channels_beyond_int32_are_refused_too(load):
    """A program reads the weights of a block of channels, each of which has all input channels."""
    layer = load("ConvTranspose1d(None, 6, 3, stride=2, bias=False)")
    number = torch.empty(1, device=layer.tensors()[1].device)
    with pytest.raises(ValueError, match=f"{REFUSAL}.*got input"):
        layer.function(number.expand(1, 2**27, 1), number.expand(2**27, 6, 3), None)
