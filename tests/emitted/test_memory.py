"""Hostile memory: what lies around, between and in the tensors of an emitted file's functions.

Neighbours are NaN or infinity, which nothing multiplies away: a load that leaves its tensor or a
mask that lets one through shows in the numbers, a store that does in the neighbours' bits. What
the functions compute from arguments that lie in memory as torch lays them is test_wrapper.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convgen import ConvTransposeSpec, parse
from convgen.compiler import compile_kernel
from convgen.execution import oracle
from convgen.execution.loading import load_module
from convgen.planning.caveats import CAVEATS
from drawing import forms

LAYERS = {
    "1d gather float32": ("1d(5, 6, 5, 3, 2, 1, input=(2, 5, 13))", "gather 1"),
    "1d polyphase float32": ("1d(4, 6, 5, 3, 2, 1, 2, input=(2, 4, 13))", "polyphase 1"),
    "1d polyphase bfloat16": ("1d(5, 3, 4, input=(3, 5, 33), dtype=bfloat16)", "polyphase 4"),
    "1d direct float16": (
        "1d(5, 5, 4, 2, 1, groups=5, input=(2, 5, 43), dtype=float16)",
        "direct 1",
    ),
    "2d polyphase float16": (
        "2d(6, 4, 3, (1, 2), 1, (0, 1), 2, input=(2, 6, 5, 7), dtype=float16)",
        "polyphase 2",
    ),
    "2d rows float32": ("2d(3, 5, 3, (1, 2), (1, 0), input=(2, 3, 6, 7))", "gather 1 rows 2"),
    "2d gather last float16": (
        "2d(6, 18, (2, 3), 2, (0, 2), groups=2, input=(3, 6, 4, 5), dtype=float16, "
        "layout=channels_last)",
        "gather 1",
    ),
    "2d gather open": ("2d(None, None, 3, 2, 1, input=(None, None, None, None))", "gather 1"),
    "3d gather last float64": (
        "3d(4, 2, 2, (2, 1, 2), (1, 0, 1), (1, 0, 1), 2, input=(2, 4, 3, 2, 4), dtype=float64, "
        "layout=channels_last)",
        "gather 1",
    ),
    "3d polyphase ieee": (
        "3d(3, 2, (1, 2, 3), (1, 1, 2), (0, 1, 1), input=(2, 3, 2, 3, 5), precision=ieee)",
        "polyphase 1",
    ),
}
OPEN = (2, 5, 4, 6)  # the input of a layer that leaves it to run time
BAND = 512  # elements on either side, as many as a tile has
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
AROUND = {"nan": math.nan, "infinity": math.inf}


class Buffer:
    """A tensor, dense in a layout, inside of memory that is full of one number."""

    def __init__(self, tensor: Tensor, around: float, first: int = BAND) -> None:
        self.room = tensor.new_full((tensor.numel() + BAND + first,), around)
        self.tensor = self.room.as_strided(tensor.shape, tensor.stride(), first)
        self.tensor.copy_(tensor)
        self.before = self.bits(self.room)
        self.outside = torch.ones_like(self.room, dtype=torch.bool)
        self.outside[first : first + tensor.numel()] = False

    @staticmethod
    def bits(tensor: Tensor) -> Tensor:
        return tensor.view(INTEGERS[tensor.element_size()]).clone()

    def is_unchanged(self) -> bool:
        return torch.equal(self.bits(self.room), self.before)

    def is_unchanged_outside(self) -> bool:
        return torch.equal(self.bits(self.room)[self.outside], self.before[self.outside])


class HostileTorch:
    """torch, whose new tensors hold NaN and have neighbours; stands in an emitted file."""

    def __init__(self, around: float, first: int = BAND) -> None:
        self.around, self.first, self.made = around, first, []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: tuple[int, ...], **options: Any) -> Tensor:
        return self.surrounded(torch.empty(shape, **options))

    def empty_strided(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        return self.surrounded(torch.empty_strided(shape, stride, dtype=dtype, device="cuda"))

    def surrounded(self, blank: Tensor) -> Tensor:
        self.made.append(Buffer(blank.fill_(math.nan), self.around, self.first))
        return self.made[-1].tensor


class Layer:
    """An emitted file with tensors of integers for it, and what it should make of them."""

    def __init__(self, spec: ConvTransposeSpec, form: str, file: ModuleType, device: str) -> None:
        self.spec, self.form, self.file, self.device = spec, form, file, device
        self.dtype = getattr(torch, spec.dtype)
        self.function = getattr(file, f"conv_transpose{spec.rank}d")
        self.packed = getattr(file, f"conv_transpose{spec.rank}d_packed")

    def dense(self, tensor: Tensor) -> Tensor:
        """Return `tensor` contiguous in the layer's layout."""
        last = self.spec.layout == "channels_last" and tensor.dim() == self.spec.rank + 2
        format = LAST[self.spec.rank] if last else torch.contiguous_format
        return tensor.contiguous(memory_format=format)

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return input, weight and bias."""
        shape = self.spec.input or OPEN
        c_in, c_out = self.spec.in_channels or shape[1], self.spec.out_channels or 7
        weight = (c_in, c_out // self.spec.groups, *self.spec.kernel_size)
        source = torch.Generator().manual_seed(seed)
        made = [torch.randint(-2, 3, s, generator=source) for s in (shape, weight, (c_out,))]
        x, w, b = (tensor.to(self.device, self.dtype) for tensor in made)
        return self.dense(x), w, b

    def want(self, *tensors: Tensor) -> Tensor:
        """Return the oracle's output, of integers."""
        arrays = [tensor.cpu().double().numpy().astype(np.int64) for tensor in tensors]
        exact = torch.from_numpy(oracle.scatter(self.spec, *arrays))
        return exact.to(self.device, self.dtype)


def load_layer(name: str, folder: Path, device: str) -> Layer:
    """Return a layer of `LAYERS`."""
    text, form = LAYERS[name]
    spec = parse(f"ConvTranspose{text}")
    source = compile_kernel(spec, tile=forms(spec)[form][0])
    return Layer(spec, form, load_module(source.text, "memory", folder), device)


@pytest.fixture(scope="module", params=LAYERS)
def layer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str
) -> Layer:
    """Each layer in turn."""
    return load_layer(request.param, tmp_path_factory.mktemp("emitted"), device)


@pytest.fixture
def hostile(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., HostileTorch]]:
    """The function that gives the layer's file a torch with hostile memory."""

    def enter(around: float, first: int = BAND) -> HostileTorch:
        stand_in, elsewhere = HostileTorch(around, first), Tensor.new_empty

        def new_empty(x: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
            if options:  # Triton's interpreter: the file gives none
                return elsewhere(x, shape, **options)
            return stand_in.empty(shape, dtype=x.dtype, device=x.device)

        monkeypatch.setattr(layer.file, "torch", stand_in)
        monkeypatch.setattr(layer.file, "_empty_strided_cuda", stand_in.empty_strided)
        monkeypatch.setattr(Tensor, "new_empty", new_empty)
        return stand_in

    return enter


@pytest.mark.interpreter
@pytest.mark.parametrize("around", AROUND)
def test_nothing_outside_is_read_or_written(
    around: str, layer: Layer, hostile: Callable[..., HostileTorch]
) -> None:
    """A mask or an extent one too far reads NaN, or writes a neighbour; one too short leaves NaN.

    What the kernel only reads must not change either.
    """
    x, w, b = layer.tensors()
    given = [Buffer(t, AROUND[around]) for t in (x, layer.file.pack_weight(w), b)]
    memory = hostile(AROUND[around])
    got = layer.packed(*(buffer.tensor for buffer in given))
    (output,) = memory.made
    assert got.untyped_storage().data_ptr() == output.room.untyped_storage().data_ptr()
    assert torch.equal(got, layer.want(x, w, b))
    assert output.is_unchanged_outside()
    assert all(buffer.is_unchanged() for buffer in given)


@pytest.mark.interpreter
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("around", AROUND)
def test_packing_reads_and_writes_nothing_outside(
    around: str, last: bool, layer: Layer, hostile: Callable[..., HostileTorch]
) -> None:
    """Padded taps and channels of a tile are masked in the weight and in what it becomes."""
    weight = layer.tensors()[1]
    wanted = layer.file.pack_weight(weight)
    if last and layer.spec.rank in LAST:
        weight = weight.contiguous(memory_format=LAST[layer.spec.rank])
    packs = hasattr(layer.file, f"conv_transpose{layer.spec.rank}d_pack_kernel")
    for first in (BAND, BAND, BAND + 1):  # the first launch, one that repeats it, unaligned ones
        given = Buffer(weight, AROUND[around], first)
        memory = hostile(AROUND[around], BAND)
        got = layer.file.pack_weight(given.tensor)
        assert len(memory.made) == packs
        assert torch.equal(got, wanted)
        assert all(made.is_unchanged_outside() for made in memory.made)
        assert given.is_unchanged()


# Elements from an aligned address of input, packed weight, bias and output.
PLACES = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 1, 0), (3, 3, 3, 1)]


@pytest.mark.gpu
def test_addresses_of_any_alignment(layer: Layer, hostile: Callable[..., HostileTorch]) -> None:
    """Wide loads of what is aligned to 2 or 4 bytes fail on a GPU, or read a neighbour.

    One tensor alone too: the others then say nothing of it. The aligned calls come first and last:
    what is compiled for one must not serve the other. The interpreter loads from anywhere; what it
    can see of this is test_launches.py's.
    """
    x, w, b = layer.tensors()
    packed, want = layer.file.pack_weight(w), layer.want(x, w, b)
    for *moved, output in [*PLACES, PLACES[0]]:
        memory = hostile(math.nan, BAND + output)
        pairs = zip((x, packed, b), moved, strict=True)
        given = [Buffer(tensor, math.nan, BAND + away).tensor for tensor, away in pairs]
        size = x.element_size()
        assert [t.data_ptr() % 16 for t in given] == [away * size % 16 for away in moved]
        assert torch.equal(layer.packed(*given), want)
        assert memory.made[0].is_unchanged_outside()


@pytest.mark.interpreter
def test_nan_stays_in_its_image_group_and_channel(layer: Layer) -> None:
    """What is multiplied by zero instead of masked spreads a NaN; so do tiles that images share."""
    x, w, b = layer.tensors()
    clean, groups = layer.want(x, w, b), layer.spec.groups
    poisoned = x.clone(memory_format=torch.preserve_format)
    poisoned[1] = math.nan
    got = layer.function(poisoned, w, b)
    images = [n for n in range(len(x)) if n != 1]
    assert torch.equal(got[images], clean[images])
    inner, outer = w.shape[0] // groups, w.shape[1]
    poisoned = x.clone(memory_format=torch.preserve_format)
    poisoned[:, :inner] = math.nan
    if groups > 1:
        assert torch.equal(layer.function(poisoned, w, b)[:, outer:], clean[:, outer:])
    weight = w.clone()
    weight[:inner, 0] = math.nan
    got = layer.function(x, weight, b)
    assert got[:, 0].isnan().any()
    assert torch.equal(got[:, 1:], clean[:, 1:])


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity times a padded 0
@pytest.mark.parametrize("value", AROUND.values(), ids=AROUND)
def test_nan_reaches_the_outputs_that_it_has_weights_for(value: float, layer: Layer) -> None:
    """Less would hide an error of the network, more is a caveat that the file has."""
    x, w, b = layer.tensors()
    x, w = torch.ones_like(x), torch.ones_like(w)
    place = (0, x.shape[1] - 1, *(size // 2 for size in x.shape[2:]))
    marked = torch.zeros_like(x)
    marked[place] = 1
    reached = layer.want(marked, w, torch.zeros_like(b)) != 0
    poisoned = x.clone(memory_format=torch.preserve_format)
    poisoned[place] = value
    got = layer.function(poisoned, w, b)
    assert not got[reached].isfinite().any()
    if CAVEATS[0].text not in " ".join(layer.file.__doc__.split()):
        assert torch.equal(got[~reached], layer.want(x, w, b)[~reached])


def gapped(layer: Layer, x: Tensor) -> Tensor:
    """Return every second channel of what has NaN channels between."""
    shape = (x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:])
    return layer.dense(x.new_full(shape, math.nan))[:, 1::2]


def cropped(layer: Layer, x: Tensor) -> Tensor:
    """Return the middle of larger images."""
    room = layer.dense(x.new_full((*x.shape[:2], *(n + 3 for n in x.shape[2:])), math.nan))
    return room[(..., *(slice(1, n + 1) for n in x.shape[2:]))]


def every_second(layer: Layer, x: Tensor) -> Tensor:
    """Return images that others stand between: only the batch's stride is not dense."""
    return layer.dense(x.new_full((2 * len(x), *x.shape[1:]), math.nan))[1::2]


def turned(layer: Layer, x: Tensor) -> Tensor:
    """Return images in memory that has the batch last and the last axis first."""
    return x.new_full(tuple(reversed(x.shape)), math.nan).permute(*reversed(range(x.dim())))


def mixed(layer: Layer, x: Tensor) -> Tensor:
    """Return images whose batch and channels have traded places in memory."""
    return x.new_full((x.shape[1], x.shape[0], *x.shape[2:]), math.nan).transpose(0, 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("lay", [gapped, cropped, every_second, turned, mixed])
def test_views_with_nan_between(lay: Callable[..., Tensor], layer: Layer) -> None:
    """Strides that are taken for dense ones read NaN; a copy written back changes the memory."""
    x, w, b = layer.tensors()
    view = lay(layer, x).copy_(x)
    room = view._base
    assert room is not None
    before = Buffer.bits(room)
    assert torch.equal(layer.function(view, w, b), layer.want(x, w, b))
    assert torch.equal(Buffer.bits(room), before)
    batch = (layer.spec.input or (None,))[0]
    if batch is None:  # an unbatched input, of which the view is not dense either
        assert torch.equal(layer.function(view[1], w, b), layer.want(x, w, b)[1])


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_expanded_axes(axis: int, layer: Layer) -> None:
    """A stride of 0 in the batch, the channels or a row; the weight's channels have one, too."""
    x, w, b = layer.tensors()
    one = x.narrow(axis, 0, 1)
    view, weight = one.expand_as(x), w[:, :1].expand_as(w)
    assert 0 in view.stride()
    want = layer.want(view.contiguous(), weight.contiguous(), b)
    assert torch.equal(layer.function(view, weight, b), want)


@pytest.mark.gpu
def test_a_side_stream(layer: Layer) -> None:
    """Work on another stream would read the input before it is there: this one sleeps first."""
    x, w, b = layer.tensors()
    want, late = layer.want(x, w, b), torch.zeros_like(x)
    layer.function(late, w, b)  # compiles, which would outlast the sleep
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late.copy_(x)
        got = layer.function(late, w, b)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_cuda_graph_follows_its_inputs(packed: bool, layer: Layer) -> None:
    """A number read on the host, or memory that the graph does not own, stays as captured."""
    x, w, b = layer.tensors()

    def call() -> Tensor:
        return layer.packed(x, layer.file.pack_weight(w), b) if packed else layer.function(x, w, b)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for seed in (1, 2):
        fresh = layer.tensors(seed)
        for held, new in zip((x, w, b), fresh, strict=True):
            held.copy_(new)
        output.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, layer.want(*fresh))


WIDE = (
    "ConvTranspose2d(32, 32, 4, 2, 1, input=(8, 32, 64, 64))",
    "ConvTranspose2d(32, 32, 3, padding=1, input=(8, 32, 128, 128), layout=channels_last)",
    "ConvTranspose1d(32, 32, 4, 2, 1, groups=32, input=(8, 32, 16384), dtype=float16)",
)


@pytest.mark.gpu
@pytest.mark.parametrize("text", WIDE)
def test_no_workspace(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Columns of inputs, a padded copy or one in another layout are as large as the output."""
    spec = parse(text)
    file = load_module(compile_kernel(spec).text, "wide", tmp_path_factory.mktemp("emitted"))
    layer = Layer(spec, "planned", file, "cuda")
    x, w, b = layer.tensors()
    packed = file.pack_weight(w)
    most = 16 * packed.nbytes + 2**16  # what packing takes on the way
    calls = ((lambda: layer.packed(x, packed, b), 0), (lambda: layer.function(x, w, b), most))
    for call, room in calls:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = call()
        torch.cuda.synchronize()
        output = -(-y.nbytes // 512) * 512  # the allocator's blocks
        assert torch.cuda.max_memory_allocated() - before <= output + room < 2 * output
        assert torch.cuda.memory_allocated() - before == output
        del y
