"""Tensors beyond 2^31 elements: offsets must be int64 where the sizes need them.

What would break it: an int32 base, a tile offset that wraps, a grid axis past its limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from convgen import emit, find_target, parse
from convgen.compiler import compile_kernel, plan
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

H100 = find_target("h100")
# Open layers, what is true of the tile's box, inputs of a size n that grows as far as the file
# serves them, and whether an image then has more elements than int32 counts.
BOXED = {
    "rows of a row block": (
        "ConvTranspose2d(64, 64, 3, layout=channels_last, bias=False, dtype=float16)",
        lambda box, tile: box[:-1] == (1, 1) and tile.rows > 1 and not tile.relayout,
        (lambda n: (2, 64, n, 256), lambda n: (2, 64, 256, n), lambda n: (2, 64, n, n)),
        True,
    ),
    "rows of one phase": (
        "ConvTranspose2d(64, 64, 4, 2, 1, layout=channels_last, bias=False, dtype=float16)",
        lambda box, tile: box[:-1] == (1, 1) and tile.rows == 1,
        (lambda n: (2, 64, n, 256), lambda n: (2, 64, 256, n), lambda n: (2, 64, n, n)),
        True,
    ),
    "rows of several": (
        "ConvTranspose2d(64, 64, 3, layout=channels_last, bias=False, dtype=float16)",
        lambda box, tile: box[1] > 1 and not tile.relayout,
        (lambda n: (2, 64, n, 256), lambda n: (2, 64, 256, n)),
        False,
    ),
    "planes": (
        "ConvTranspose3d(64, 64, 3, 2, 1, layout=channels_last, bias=False, dtype=float16)",
        lambda box, tile: box[:2] == (1, 1) and box[2] > 1,
        (lambda n: (2, 64, n, 32, 64), lambda n: (2, 64, 32, n, 64)),
        True,
    ),
    "images": (
        "ConvTranspose2d(64, 64, 3, layout=channels_last, bias=False, dtype=float16, "
        "input=(8, 64, None, 4))",
        lambda box, tile: box[0] > 1 and tile.rows > 1,
        (lambda n: (8, 64, n, 4),),
        False,
    ),
    "channels apart by a plane": (
        "ConvTranspose2d(64, 64, 3, bias=False, dtype=float16)",
        lambda box, tile: box[:-1] == (1, 1) and tile.rows > 1,
        (lambda n: (2, 64, n, 256), lambda n: (2, 64, 256, n)),
        False,
    ),
}


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


def most(serves: Callable[[int], bool]) -> int:
    """Return the largest number that is served; all numbers up to that are, from 8 on."""
    low, high = 8, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def run_last(module: ModuleType, x: torch.Tensor, y: torch.Tensor, patch: Any) -> list[int]:
    """Run the last programs on tensors of which one element exists; return where they end.

    That is the last element that is loaded of the input, and the last that is stored. There are
    four programs, one of each phase: the phases of a tile are neighbours on axis 0 of the grid.
    """
    from triton.runtime.interpreter import InterpreterBuilder
    from triton.runtime.interpreter import interpreter_builder as builder

    ends = {id(x): 0, id(y): 0}

    def note(tensor: torch.Tensor, pointers: Any, mask: Any) -> None:
        offsets = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        offsets = (offsets.astype(np.int64) - tensor.data_ptr()) // tensor.itemsize
        assert offsets.size == 0 or offsets.min() >= 0
        ends[id(tensor)] = max([ends[id(tensor)], *offsets.flat])

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        if len(pointers.data.shape) > 2:  # the weight is a matrix
            note(x, pointers, mask)
        return other

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> None:
        note(y, pointers, mask)

    class Last:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            first, *others = (*grid, 1, 1)[:3]
            last = [extent - 1 for extent in others]
            patch.setattr(builder, "set_grid_idx", lambda x, *_: at(first - 1 - x, *last))
            patch.setattr(builder, "set_grid_dim", lambda *_: of(first, *others))
            return self.kernel[4,]

    at, of = builder.set_grid_idx, builder.set_grid_dim
    patch.setattr(InterpreterBuilder, "create_masked_load", load)
    patch.setattr(InterpreterBuilder, "create_masked_store", store)
    name = f"conv_transpose{x.dim() - 2}d_kernel"
    patch.setattr(module, name, Last(getattr(module, name)))
    c_in, c_out, *taps = module.WEIGHT_SHAPE
    packed = torch.zeros(1, dtype=x.dtype).expand(math.prod(taps), c_out, c_in)
    module._start(x, packed, None, y)
    return [ends[id(x)], ends[id(y)]]


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU holds these tensors")
@pytest.mark.parametrize("name", BOXED)
def test_the_largest_sizes_of_boxes_reach_the_last_element(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box reads at coordinates and stores from an int64 base: an image is no limit to it.

    Where an offset in the tile spans the image all the same, the file has to refuse it: an int32
    that wraps would store elsewhere. No such tensor exists; addresses are computed all the same.
    """
    text, wanted, shapes, beyond = BOXED[name]
    spec = parse(text)
    tile = next(
        c.tile
        for c in plan(spec, H100).ranking
        if c.tile.family == "window" and wanted(plan(spec, H100, c.tile).sizes.box, c.tile)
    )
    module = load_module(compile_kernel(spec, H100, tile).text, "boxes", tmp_path)
    largest = 0
    for shape_of in shapes:

        def serves(n: int, shape_of: Callable[[int], tuple[int, ...]] = shape_of) -> bool:
            shape = shape_of(n)
            return module._mismatch_of_sizes(shape, module._output_shape(shape, 64)) is None

        shape = shape_of(most(serves))
        largest = max(largest, torch.Size(shape[1:]).numel())
        x, y = (
            torch.zeros(1, dtype=torch.float16).expand(each)
            for each in (shape, module._output_shape(shape, 64))
        )
        with monkeypatch.context() as patch:
            loaded, stored = run_last(module, x, y, patch)
        assert (loaded, stored) == (x.numel() - 1, y.numel() - 1), shape
    assert (largest > 2**31) == beyond


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
