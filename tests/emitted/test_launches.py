"""Launches that an emitted file makes again: of which calls, on what device and stream.

What would break it: a launch that is repeated for a call of other sizes, another dtype, another
device, or for a tensor that lies where the compiled kernel may not load; one that goes to the
stream of the first call; an output that is made in other shape or strides. All of these compute
something, now and then wrong. The reference is torch on the CPU in float64, of integers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convgen import emit, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import laid_out, load_module
from edited import integers
from launching import ALIGNED, Card
from test_gradient import emitted as with_gradient

pytestmark = pytest.mark.interpreter

H100 = find_target("h100")
SIZES = "input=(None, 16, 3, 4)"
FILES = {
    "open": "ConvTranspose2d(kernel_size=2, stride=2)",
    "rank 1, groups": "ConvTranspose1d(4, None, 4, stride=2, groups=2, dtype=float16)",
    "last": "ConvTranspose2d(kernel_size=2, layout=channels_last)",
    "raw weight": "ConvTranspose1d(4, 4, 2, groups=4)",
    "copy": f"ConvTranspose2d(16, 16, 3, padding=1, {SIZES})",
    "boxes": f"ConvTranspose2d(16, 16, 3, padding=1, {SIZES}, layout=channels_last)",
    "boxes of a copy": f"ConvTranspose2d(16, 16, 3, padding=1, {SIZES}, bias=False)",
}


def source_of(name: str) -> str:
    """Return the file, of an H100's tile with boxes or a copy where it is to have those."""
    spec = parse(FILES[name])
    if "boxes" not in name and "copy" not in name:
        return emit(spec)
    wanted = "boxes" in name, "copy" in name
    ranking = [c.tile for c in plan(spec, H100).ranking]
    tiles = [tile for tile in ranking if (tile.family == "window", tile.relayout) == wanted]
    return compile_kernel(spec, H100, tiles[0]).text


class Layer:
    """An emitted file on a card."""

    def __init__(self, name: str, text: str, source: str, folder: Path, device: str) -> None:
        self.spec, self.device = parse(text), device
        self.file = load_module(source, name, folder)
        self.op = f"conv_transpose{self.spec.rank}d"
        self.dtype = getattr(torch, self.spec.dtype)

    def tensors(
        self, batch: int = 2, c_in: int = 4, c_out: int = 6, extent: int = 3, seed: int = 0
    ) -> list[Tensor | None]:
        """Return input, weight and bias (None without one) of small integers."""
        spec, made = self.spec, functools.partial(integers, dtype=self.dtype, device=self.device)
        c_in, c_out = spec.in_channels or c_in, spec.out_channels or c_out
        spatial = [extent if size is None else size for size in spec.spatial]
        x = laid_out(made(batch, c_in, *spatial, seed=seed), spec.layout)
        weight = made(c_in, c_out // spec.groups, *spec.kernel_size, seed=seed + 1)
        return [x, weight, made(c_out, seed=seed + 2) if spec.bias else None]

    def want(self, *tensors: Tensor | None) -> Tensor:
        s = self.spec
        geometry = s.stride, s.padding, s.output_padding, s.groups, s.dilation
        exact = (None if t is None else t.detach().cpu().double() for t in tensors)
        return getattr(torch.nn.functional, self.op)(*exact, *geometry)

    def check(self, *tensors: Tensor | None, call: Callable[..., Tensor] | None = None) -> Tensor:
        """Call, compare with what torch computes, and return the output."""
        got = (call or getattr(self.file, self.op))(*tensors)
        assert torch.equal(got.cpu().double(), self.want(*tensors))
        return got


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, device: str) -> Callable[[str], Layer]:
    """The function from a name of `FILES` to its layer."""
    folder, count = tmp_path_factory.mktemp("launches"), itertools.count()

    @functools.cache
    def loaded(name: str) -> Layer:
        return Layer(f"launches_{next(count)}", FILES[name], source_of(name), folder, device)

    return loaded


@pytest.fixture
def card(device: str) -> Card:
    return Card(real=device == "cuda")


@pytest.fixture
def take(
    load: Callable[[str], Layer], card: Card, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Layer]:
    """The function from a name of `FILES` to its layer on the card, which launched nothing yet."""

    def taken(name: str) -> Layer:
        layer = load(name)
        card.take(layer.file, monkeypatch)
        return layer

    return taken


def misplaced(tensor: Tensor) -> Tensor:
    """Return equal numbers, an element behind where a kernel may load many at once."""
    room = torch.empty(tensor.numel() + ALIGNED + 1, dtype=tensor.dtype, device=tensor.device)
    away = -room.data_ptr() % ALIGNED // tensor.element_size() + 1
    return room.as_strided(tensor.shape, tensor.stride(), away).copy_(tensor)


@pytest.mark.parametrize("name", FILES)
def test_a_call_is_repeated_without_triton_and_with_its_own_numbers(
    name: str, take: Callable[[str], Layer], card: Card
) -> None:
    """The output's shape and strides are remembered with it."""
    layer = take(name)
    first = layer.check(*layer.tensors())
    launches, repeats = card.counts()
    assert (launches >= 1, repeats) == (True, 0)
    again = layer.check(*layer.tensors(seed=1))
    assert again.stride() == first.stride()
    assert card.counts() == (0, launches)
    x, weight, bias = layer.tensors(batch=1)
    layer.check(x, weight, bias)
    card.counts()
    got = getattr(layer.file, layer.op)(x[0], weight, bias)
    assert card.counts() == (0, launches)
    assert torch.equal(got.cpu().double(), layer.want(x, weight, bias)[0])


KINDS: list[dict[str, int]] = [{}, {"c_out": 8}, {"c_in": 8}, {"batch": 3}, {"extent": 4}]


@pytest.mark.parametrize("name", FILES)
def test_a_launch_serves_calls_of_its_own_sizes_alone(
    name: str, take: Callable[[str], Layer]
) -> None:
    """One of other sizes has another grid, output and packed weight. Each kind comes twice."""
    layer = take(name)
    for seed in (0, 3):
        kinds = [layer.tensors(**kind, seed=seed) for kind in KINDS]
        shapes = [[None if t is None else t.shape for t in kind] for kind in kinds]
        for n, kind in enumerate(kinds):
            if shapes[n] not in shapes[:n]:  # a size that the file fixes
                layer.check(*kind)


@pytest.mark.parametrize("name", FILES)
def test_one_tensor_that_lies_elsewhere_is_not_loaded_as_if_it_lay_there(
    name: str, take: Callable[[str], Layer], card: Card
) -> None:
    """Triton compiled for multiples of 16 bytes: other addresses fault, or read a neighbour.

    The other tensors lie where they may, and after each such call all do.
    """
    layer = take(name)
    x, weight, bias = layer.tensors()
    want, packed = layer.want(x, weight, bias), layer.file.pack_weight(weight)
    function, of_packed = (getattr(layer.file, f"{layer.op}{end}") for end in ("", "_packed"))

    def run(call: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[int, int]:
        assert torch.equal(call(*tensors).cpu().double(), want)
        return card.counts()

    run(function, x, weight, bias)
    elsewhere = [misplaced(x), misplaced(weight), None if bias is None else misplaced(bias)]
    for place, tensor in enumerate(elsewhere):
        given = [x, weight, bias]
        given[place] = tensor
        first, (launched, repeated) = run(function, *given), run(function, x, weight, bias)
        assert sum(first) == repeated, place
        assert launched == 0, place
    run(of_packed, x, misplaced(packed), bias)
    assert run(of_packed, x, packed, bias)[0] == 0


@pytest.mark.parametrize("name", ["open", "last"])
def test_a_first_call_that_lies_anywhere_serves_no_other(
    name: str, take: Callable[[str], Layer], card: Card
) -> None:
    """What was compiled for any address loads element by element: slow for those that follow."""
    layer = take(name)
    x, weight, bias = layer.tensors()
    layer.check(misplaced(x), misplaced(weight), bias)
    launches, _ = card.counts()
    layer.check(x, weight, bias)
    assert card.counts() == (launches, 0)
    layer.check(x, weight, bias)
    assert card.counts() == (0, launches)


def test_a_weight_in_another_format_or_dtype_is_packed_as_what_it_is(
    load: Callable[[str], Layer], card: Card, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one shape: a kernel is compiled for each format and dtype."""
    text = "ConvTranspose2d(4, 6, 2, stride=2, dtype=float16)"
    monkeypatch.setitem(FILES, "half", text)
    layer = load("half")
    card.take(layer.file, monkeypatch)
    x, weight, bias = layer.tensors()
    assert weight is not None
    for dtype in (torch.float16, torch.float32) * 2:
        own = layer.file.ModelNew(device=device, dtype=dtype).requires_grad_(False)
        own.weight.copy_(weight)
        own.bias.copy_(bias)
        with torch.autocast(device, torch.float16):
            layer.check(x, weight, bias, call=lambda x, *_, own=own: own(x))
    for format in (torch.contiguous_format, torch.channels_last) * 2:
        layer.check(x, weight.contiguous(memory_format=format), bias)
    packed = [call for call in layer.file.LAUNCHED if call[1] is layer.file._start_pack]
    assert len(packed) == 3


@pytest.mark.parametrize("name", ["open", "copy", "boxes"])
def test_launches_that_are_kept_are_limited(
    name: str, take: Callable[[str], Layer], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose lengths are all new would fill its memory with them."""
    layer = take(name)
    monkeypatch.setattr(layer.file, "MOST_LAUNCHED", 2)
    for batch in (1, 2, 3, 4):
        layer.check(*layer.tensors(batch=batch, c_out=batch + 4))
    assert len(layer.file.LAUNCHED) == 2
    card.counts()
    layer.check(*layer.tensors(batch=4, c_out=8))
    assert card.launched.total() > 0


def on_cpu(card: Card) -> None:
    if card.real:
        pytest.skip("with a GPU, test_memory.py's side stream shows it")


@pytest.mark.parametrize("name", ["open", "raw weight", "copy", "boxes"])
def test_each_launch_goes_to_the_current_stream(
    name: str, take: Callable[[str], Layer], card: Card
) -> None:
    """Else it would read what another stream has not written yet; the stand-in tells them apart."""
    on_cpu(card)
    layer = take(name)
    for card.stream in (5, 6):
        layer.check(*layer.tensors(seed=card.stream))
    assert card.counts()[1] > 0


@pytest.mark.parametrize("name", ["open", "raw weight", "copy", "boxes"])
def test_each_device_has_launches_of_its_own(
    name: str, take: Callable[[str], Layer], card: Card
) -> None:
    """A compiled kernel is loaded on one device; the stand-in has two, of which one is current."""
    if card.real:
        pytest.skip("another test needs two GPUs")
    layer = take(name)
    for card.current, card.tensors in [(0, 0), (1, 1), (0, 1), (1, 1)]:
        before = card.current
        layer.check(*layer.tensors(seed=card.tensors))
        assert card.current == before
    assert card.counts()[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILES)
def test_two_gpus_have_launches_of_their_own(name: str, load: Callable[[str], Layer]) -> None:
    """The same call on each, with either of them current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = load(name)
    for current, place in [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (1, 1)]:
        with torch.cuda.device(current):
            tensors = layer.tensors(seed=place)
            there = [None if t is None else t.to(f"cuda:{place}") for t in tensors]
            assert layer.check(*there).get_device() == place


def test_the_gradient_packs_for_its_own_kernel(
    tmp_path: Path, device: str, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packed weight is another one than the layer's, and of other sizes another one again."""
    text = "ConvTranspose1d(kernel_size=2, groups=2)"
    layer = Layer("launches_back", text, with_gradient(text), tmp_path, device)
    card.take(layer.file, monkeypatch)

    def check(grad: Tensor, weight: Tensor) -> None:
        got = layer.file.INPUT_GRADIENT(grad, weight)
        want = torch.nn.functional.conv1d(grad.cpu().double(), weight.cpu().double(), groups=2)
        assert torch.equal(got.cpu().double(), want)

    for seed, (c_in, c_out) in enumerate([(4, 8), (8, 4), (4, 8), (8, 4)]):
        x, weight, bias = layer.tensors(c_in=c_in, c_out=c_out, seed=seed)
        check(layer.check(x, weight, bias), weight)
    assert card.counts()[1] == 2 * 4  # the layer's two, and the gradient's
    check(torch.ones(2, 4, 4, device=device), misplaced(weight))
