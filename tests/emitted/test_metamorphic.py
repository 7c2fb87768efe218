"""Relations between results of emitted kernels that need no oracle, in exact integers.

Inputs and weights are integers in -2..2, so that every sum is exact in every dtype and the sides of
a relation are equal to the last bit. What would break one is an error that depends on where an
element lies, which phase or tile it falls into, or which other elements there are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convgen import ConvTransposeSpec, parse
from convgen.compiler import compile_kernel
from convgen.execution.loading import load_module
from drawing import forms

pytestmark = pytest.mark.interpreter

# With the form of kernel that runs them, where it serves; each has an idea that others have not.
LAYERS = {
    "1d gather float32": ("1d(4, 6, 5, 3, 2, 1, 2, input=(3, 4, 13))", "gather 1"),
    "1d polyphase float32": ("1d(4, 6, 5, 3, 2, 1, 2, input=(3, 4, 13))", "polyphase 1"),
    "1d polyphase ieee": (
        "1d(5, 3, 4, dilation=2, input=(3, 5, 33), precision=ieee)",
        "polyphase 4",
    ),
    "1d direct float16": (
        "1d(5, 5, 4, 2, 1, 1, groups=5, input=(3, 5, 40), dtype=float16)",
        "direct 1",
    ),
    "2d polyphase float16": (
        "2d(6, 4, 3, (1, 2), 1, (0, 1), 2, input=(3, 6, 5, 8), dtype=float16)",
        "polyphase 2",
    ),
    "2d direct float32": ("2d(4, 4, (3, 2), 2, 1, groups=4, input=(3, 4, 5, 6))", "direct 1"),
    "2d rows bfloat16": (
        "2d(3, 5, 3, (1, 2), (1, 0), dilation=(1, 3), input=(3, 3, 6, 7), dtype=bfloat16)",
        "gather 1 rows 2",
    ),
    "2d gather last ieee": (
        "2d(6, 18, (2, 3), (3, 1), (1, 2), (2, 0), 2, dilation=(2, 1), input=(3, 6, 4, 7), "
        "precision=ieee, layout=channels_last)",
        "gather 1",
    ),
    "3d gather last bfloat16": (
        "3d(4, 2, 2, (2, 1, 2), (1, 0, 1), (1, 0, 1), 2, input=(3, 4, 2, 2, 3), dtype=bfloat16, "
        "layout=channels_last)",
        "gather 1",
    ),
    "3d polyphase float64": (
        "3d(3, 2, (1, 2, 3), (1, 1, 2), (0, 1, 1), (0, 0, 1), input=(3, 3, 2, 3, 5), "
        "dtype=float64)",
        "polyphase 1",
    ),
}
LARGEST = {"float32": 2**24, "float64": 2**53, "float16": 2**11, "bfloat16": 2**8}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FORMS = {"gather 1", "gather 1 rows 2", "polyphase 1", "polyphase 2", "polyphase 4", "direct 1"}


class Layer:
    """A spec with a kernel of a form, the nearest that serves the spec, and numbers for it."""

    def __init__(self, spec: ConvTransposeSpec, form: str, place: Callable[[], Path], device: str):
        self.spec, self.form, self.place, self.device = spec, form, place, device
        served = forms(spec)
        self.served = form if form in served else next(iter(served))
        small = min(served[self.served], key=lambda tile: tile.block_m * tile.block_n)
        source = compile_kernel(spec, tile=small)  # so that there are several of them
        path = place()
        self.file = load_module(source.text, path.name, path.parent)
        self.dtype = getattr(torch, spec.dtype)

    def but(self, **changes: object) -> Layer:
        """Return the layer of a changed spec, with a kernel of the same form."""
        return Layer(dataclasses.replace(self.spec, **changes), self.form, self.place, self.device)

    def call(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return the kernel's output for tensors of its dtype."""
        x = x.to(self.device, self.dtype)
        if self.spec.layout == "channels_last":
            x = x.contiguous(memory_format=LAST[self.spec.rank])
        rest = [t if t is None else t.to(self.device, self.dtype) for t in (w, b)]
        return getattr(self.file, f"conv_transpose{self.spec.rank}d")(x, *rest).cpu()

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the kernel's output for integers, as float64."""
        b = torch.zeros(w.shape[1] * self.spec.groups) if b is None and self.spec.bias else b
        y = self.call(x, w, b).double()
        assert y.abs().max() <= LARGEST[self.spec.dtype], "too many terms to be exact"
        return y

    def numbers(self, seed: int = 0, most: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Return input, weight and bias of integers in -most..most, as float64."""
        spec, source = self.spec, torch.Generator().manual_seed(seed)
        weight = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
        shapes = (spec.input, weight, (spec.out_channels,))
        made = [torch.randint(-most, most + 1, shape, generator=source) for shape in shapes]
        x, w, b = (tensor.double() for tensor in made)
        return x, w, b


@pytest.fixture(scope="module")
def layer_of(tmp_path_factory: pytest.TempPathFactory, device: str) -> Callable[[str], Layer]:
    """The function from a name of `LAYERS` to its layer."""
    folder, count = tmp_path_factory.mktemp("emitted"), itertools.count()

    def place() -> Path:
        return folder / f"layer_{next(count)}"

    @functools.cache
    def made(name: str) -> Layer:
        text, form = LAYERS[name]
        layer = Layer(parse(f"ConvTranspose{text}"), form, place, device)
        assert layer.served == form, f"{name} is served by {sorted(forms(layer.spec))}"
        return layer

    return made


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, layer_of: Callable[[str], Layer]) -> Layer:
    """Each layer in turn."""
    return layer_of(request.param)


def zeros_of(spec: ConvTransposeSpec) -> tuple[int, ...]:
    return (0,) * spec.rank


def pads(low: tuple[int, ...], high: tuple[int, ...]) -> list[int]:
    """Return the argument of F.pad, which starts with the last axis; negative numbers crop."""
    return [n for pair in reversed(list(zip(low, high, strict=True))) for n in pair]


def test_the_layers_are_of_every_form() -> None:
    """A family that no relation meets would go untested."""
    assert {form for _, form in LAYERS.values()} == FORMS


def test_linear_in_input_and_weight(layer: Layer) -> None:
    """A term that is added twice, or not for zeros, or a bias that is scaled, is not linear."""
    (x, w, b), (dx, dw, db) = layer.numbers(1, most=1), layer.numbers(2, most=1)
    y = layer(x, w, b)
    assert torch.equal(layer(x + dx, w, b + db), y + layer(dx, w, db))
    assert torch.equal(layer(x, w + dw, b + db), y + layer(x, dw, db))
    assert torch.equal(layer(-x, w, -b), -y)


def test_adjoint_of_the_convolution(layer: Layer) -> None:
    """<convT(x), y> = <x, conv(y)>: any product that goes to a wrong place unbalances it."""
    spec = layer.spec
    x, w, _ = layer.numbers()
    z = layer(x, w)
    y = torch.randint(-2, 3, z.shape, generator=torch.Generator().manual_seed(9)).double()
    convolve = getattr(F, f"conv{spec.rank}d")
    back = convolve(y, w, None, spec.stride, spec.padding, spec.dilation, spec.groups)
    back = back[(..., *(slice(size) for size in x.shape[2:]))]  # output_padding may add some
    assert (z * y).sum() == (x * back).sum()


def test_convolution_of_the_input_with_the_flipped_kernel(layer: Layer) -> None:
    """With stride - 1 zeros between inputs, padding d*(k - 1) - p; of stride 1 just that."""
    spec = layer.spec
    x, w, b = layer.numbers()
    axes = zip(x.shape[2:], spec.stride, strict=True)
    spread = x.new_zeros(*x.shape[:2], *((size - 1) * stride + 1 for size, stride in axes))
    spread[(..., *(slice(None, None, s) for s in spec.stride))] = x
    reach = zip(spec.dilation, spec.kernel_size, spec.padding, strict=True)
    low = tuple(d * (k - 1) - p for d, k, p in reach)
    high = tuple(n + more for n, more in zip(low, spec.output_padding, strict=True))
    kernel = w.view(spec.groups, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
    kernel = kernel.flip(tuple(range(2, w.dim())))
    convolve = getattr(F, f"conv{spec.rank}d")
    padded = F.pad(spread, pads(low, high))
    want = convolve(padded, kernel, b, dilation=spec.dilation, groups=spec.groups)
    assert torch.equal(layer(x, w, b), want)


def test_padding_crops(layer: Layer) -> None:
    """A padding that shifts the wrong way, or cuts one end only, keeps other outputs."""
    x, w, b = layer.numbers()
    spec = layer.spec
    more = (*spec.padding[:-1], spec.padding[-1] + 1)
    none = zeros_of(spec)
    whole = layer.but(padding=none, output_padding=none)(x, w, b)
    for padding in (spec.padding, more):
        cut = tuple(-n for n in padding)
        want = F.pad(whole, pads(cut, cut))
        assert torch.equal(layer.but(padding=padding, output_padding=none)(x, w, b), want)


def test_output_padding_goes_on_where_the_output_ended(layer: Layer) -> None:
    """Its outputs are those that the padding had cut off, then nothing but bias."""
    x, w, b = layer.numbers()
    spec, none = layer.spec, zeros_of(layer.spec)
    extra = tuple(max(s, d) - 1 for s, d in zip(spec.stride, spec.dilation, strict=True))
    whole = layer.but(padding=none, output_padding=none)(x, w)
    low = tuple(-n for n in spec.padding)
    high = tuple(e - p for e, p in zip(extra, spec.padding, strict=True))
    want = F.pad(whole, pads(low, high)) + b.view(-1, *[1] * spec.rank)
    assert torch.equal(layer.but(output_padding=extra)(x, w, b), want)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("3d")])
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_axis_of_one_changes_nothing(
    name: str, place: str, layer_of: Callable[[str], Layer]
) -> None:
    """1-D = 2-D = 3-D: an axis that decodes wrongly, or trades places with another, shows."""
    layer = layer_of(name)
    x, w, b = layer.numbers()
    want, at = layer(x, w, b), 2 if place == "before" else -1
    spec = layer.spec
    while spec.rank < 3:

        def grown(values: tuple[int, ...], one: int) -> tuple[int, ...]:
            return (one, *values) if place == "before" else (*values, one)

        x, w, want = (tensor.unsqueeze(at) for tensor in (x, w, want))
        spec = dataclasses.replace(
            spec,
            rank=spec.rank + 1,
            kernel_size=grown(spec.kernel_size, 1),
            stride=grown(spec.stride, 1),
            padding=grown(spec.padding, 0),
            output_padding=grown(spec.output_padding, 0),
            dilation=grown(spec.dilation, 1),
            input=tuple(x.shape),
        )
        assert torch.equal(Layer(spec, layer.form, layer.place, layer.device)(x, w, b), want)


def test_permuted_images_and_groups_permute_the_output(layer: Layer) -> None:
    """Nothing goes from one image, or one group of channels, to another."""
    x, w, b = layer.numbers()
    y, images = layer(x, w, b), [2, 0, 1]
    assert torch.equal(layer(x[images], w, b), y[images])
    groups = layer.spec.groups
    order = [*range(1, groups), 0]

    def moved(tensor: Tensor, axis: int) -> Tensor:
        parts = tensor.tensor_split(groups, axis)
        return torch.cat([parts[n] for n in order], axis)

    assert torch.equal(layer(moved(x, 1), moved(w, 0), moved(b, 0)), moved(y, 1))


def test_permuted_channels(layer: Layer) -> None:
    """Of the input they are summed, of the output they move along."""
    x, w, b = layer.numbers()
    y, spec = layer(x, w, b), layer.spec
    inner, outer = spec.in_channels // spec.groups, w.shape[1]
    order = [g * inner + n for g in range(spec.groups) for n in reversed(range(inner))]
    assert torch.equal(layer(x[:, order], w[order], b), y)
    out = [g * outer + n for g in range(spec.groups) for n in reversed(range(outer))]
    assert torch.equal(layer(x, w.flip(1), b[out]), y[:, out])


def test_flipped_input_and_kernel_flip_the_output(layer: Layer) -> None:
    """Without output padding the layer has no direction."""
    x, w, b = layer.numbers()
    even = layer.but(output_padding=zeros_of(layer.spec))
    y = even(x, w, b)
    axes = [[axis] for axis in range(2, x.dim())] + [list(range(2, x.dim()))]
    for flipped in axes:
        assert torch.equal(even(x.flip(flipped), w.flip(flipped), b), y.flip(flipped))


def test_groups_are_a_dense_weight_of_blocks(layer: Layer) -> None:
    """A group that reads another's inputs or weights differs from zeros there."""
    x, w, b = layer.numbers()
    groups = layer.spec.groups
    dense = w.new_zeros(w.shape[0], w.shape[1] * groups, *w.shape[2:])
    for number, part in enumerate(w.tensor_split(groups)):
        inner = slice(number * part.shape[0], (number + 1) * part.shape[0])
        dense[inner, number * part.shape[1] : (number + 1) * part.shape[1]] = part
    assert torch.equal(layer.but(groups=1)(x, dense, b), layer(x, w, b))


def test_dilation_is_a_kernel_with_zeros_between(layer: Layer) -> None:
    """A tap that lands one output off, or in another phase, shows."""
    spec, none = layer.spec, zeros_of(layer.spec)
    x, w, b = layer.numbers()
    dilation = tuple(d + 1 for d in spec.dilation)
    extents = tuple(d * (k - 1) + 1 for d, k in zip(dilation, spec.kernel_size, strict=True))
    wide = w.new_zeros(*w.shape[:2], *extents)
    wide[(..., *(slice(None, None, d) for d in dilation))] = w
    dilated = layer.but(dilation=dilation, output_padding=none)
    want = layer.but(kernel_size=extents, dilation=1, output_padding=none)(x, wide, b)
    assert torch.equal(dilated(x, w, b), want)


def reals(layer: Layer) -> list[Tensor]:
    source = torch.Generator().manual_seed(4)
    return [torch.randn(t.shape, generator=source) for t in layer.numbers()]


@pytest.fixture
def ordered_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter add up each element of a dot from the first product to the last.

    It calls numpy's matmul, whose BLAS adds up a row in another order at another place of a tile;
    a tensor core does not. Nothing else is changed, and nothing at all where there is a GPU.
    """

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.add.reduce(a[..., :, :, None] * b[..., None, :, :], axis=-2, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("ordered_dots")
def test_a_sample_alone_is_the_sample_in_a_batch(layer: Layer) -> None:
    """To the last bit: the order of a sum must not depend on what else is computed."""
    x, w, b = reals(layer)
    opened = layer.but(input=(None, *layer.spec.input[1:]))
    y = opened.call(x, w, b)
    for number in range(3):
        assert torch.equal(opened.call(x[number : number + 1], w, b), y[number : number + 1])


@pytest.mark.parametrize("name", ["1d gather float32", "1d polyphase float32", "1d direct float16"])
def test_a_hundred_runs_are_one(name: str, layer_of: Callable[[str], Layer]) -> None:
    """A race, or a number that is read before it is written, differs now and then."""
    base = layer_of(name)
    layer = base.but(input=(1, base.spec.in_channels, 5))
    tensors = reals(layer)
    y = layer.call(*tensors)
    assert all(torch.equal(layer.call(*tensors), y) for _ in range(99))
