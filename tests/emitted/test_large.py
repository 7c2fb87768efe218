"""Tensors beyond 2^31 elements: offsets must be int64 where the sizes need them.

What would break it: an int32 base, a tile offset that wraps, a grid axis past its limit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from convgen import emit, parse
from convgen.execution.loading import load_module
from drawing import each_form

LARGE = (
    # 2.4e9 elements an image: int64 from one channel to the next.
    (
        "ConvTranspose1d(8, 8, 3, padding=1, bias=False, input=(1, 8, 300000000), dtype=float16)",
        (1, 8, 300000000),
    ),
    # 2.2e9 elements a channel: int64 inside the tile as well.
    (
        "ConvTranspose1d(1, 1, 3, padding=1, bias=False, input=(1, 1, 2200000000), dtype=float16)",
        (1, 1, 2200000000),
    ),
    # Sizes at run time: int64 bases.
    ("ConvTranspose1d(8, 8, 3, padding=1, bias=False, dtype=float16)", (300, 8, 1000000)),
    # Many images: int64 from one image to the next.
    (
        "ConvTranspose2d(64, 64, 1, bias=False, input=(40000, 64, 32, 32), dtype=float16)",
        (40000, 64, 32, 32),
    ),
)


def forms_of(images: int, length: int) -> dict[str, str]:
    """Return the files of each family and span for a layer of that size."""
    spec = parse(f"ConvTranspose1d(4, 4, 3, input=({images}, 4, {length}))")
    return {form: source.text for form, source in each_form(spec).items()}


def test_known_sizes_choose_the_width_of_offsets() -> None:
    """int64 costs registers: it stands where a size needs it, and nowhere else."""
    for text in forms_of(1, 10**6).values():
        assert "int64" not in text
    for form, text in forms_of(4000, 10**6).items():  # 4e6 elements an image, 1.6e10 in all
        wide = [line.split()[0] for line in text.splitlines() if "int64" in line]
        copy = ["x_tile", "copy_tile"] if form.endswith("copy") else []
        assert wide == ["x_tile", "y_tile", *copy]
    for form, text in forms_of(1, 3 * 10**9).items():
        assert "tl.cast(ci, tl.int64)" in text
        assert "tl.cast(position, tl.int64)" in text
        # As many positions as outputs; of groups there are fewer, and int32 counts them.
        assert ("tl.cast(tile, tl.int64)" in text) != form.startswith("polyphase")


@pytest.mark.parametrize("beyond", [False, True])
def test_positions_are_int64_from_where_int32_ends(beyond: bool) -> None:
    """Positions are the start of a tile and a lane: the last tile may hang over the last one.

    A tile before 2**31 all of int32 holds; from the first position that it does not, none may be
    computed in it. Blocks divide 2**31, so that no tile hangs over it.
    """
    block = 512  # no tile has more positions
    length = 2**31 + 1 if beyond else 2**31 - 2 * block
    spec = parse(f"ConvTranspose1d(1, 1, 1, bias=False, input=(1, 1, {length}))")
    text = each_form(spec)["gather 1"].text
    found = re.search(r"BLOCK_M = tl.constexpr\((\d+)\)", text)
    assert found is not None
    assert block % int(found[1]) == 0
    assert ("position = tl.cast(tile, tl.int64) * BLOCK_M" in text) == beyond
    assert ("position = tile * BLOCK_M" in text) != beyond


@pytest.mark.gpu
@pytest.mark.parametrize(("text", "shape"), LARGE)
def test_large_tensors_match_their_parts(text: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Slices from both ends equal the same kernel's result on the slices alone."""
    spec = parse(text)
    module = load_module(emit(spec), "large", tmp_path)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(shape, dtype=torch.float16, device="cuda").uniform_(-1, 1, generator=generator)
    k = spec.kernel_size
    weight = torch.randn(spec.in_channels, spec.out_channels, *k, device="cuda").half()
    y = getattr(module, f"conv_transpose{spec.rank}d")(x, weight)
    function = getattr(torch.nn.functional, f"conv_transpose{spec.rank}d")
    for end in (slice(0, 1000), slice(-1000, None)):
        part = x[-1:, ..., end] if end.start else x[:1, ..., end]
        want = function(part.double(), weight.double(), padding=spec.padding).half()
        got = y[-1:, ..., end] if end.start else y[:1, ..., end]
        inner = slice(1, -1) if spec.rank == 1 else slice(None)  # a cut end has lost a neighbour
        assert torch.allclose(got[..., inner], want[..., inner], rtol=2e-3, atol=2e-3)
