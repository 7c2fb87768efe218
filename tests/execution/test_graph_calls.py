"""Calls of an operator in Inductor's graphs: what is launched again is what the file would launch.

What would break it: launches made again for a call of another kind, on the tensors of an earlier
call, or where the file would not launch at all. The reference is torch on the CPU in float64, of
integers; the card is a GPU or its stand-in, whose kernels are as narrow as Triton's.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from convgen.execution import graph_calls
from convgen.execution.graph_calls import GraphCalls
from launching import Card
from test_launches import FILES, KINDS, Layer, card, load, misplaced, take

pytestmark = pytest.mark.interpreter
__all__ = ["card", "load", "take"]  # fixtures

ANY = "ConvTranspose2d(4, None, 2, stride=2, layout=any)"
BOTH = "ConvTranspose2d(16, 16, 3, dtype=float16, layout=any, input=(None, 16, 3, 4), target=h100)"

RUNGS = "ConvTranspose2d(4, 6, 2, stride=2, layout=any, rungs=((2, 4, 3, 3), (2, 4, 8, 8)))"


@pytest.fixture(autouse=True)
def more_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "any", ANY)
    monkeypatch.setitem(FILES, "both", BOTH)
    monkeypatch.setitem(FILES, "rungs", RUNGS)


def of(layer: Layer) -> GraphCalls:
    return GraphCalls(vars(layer.file))


def refused(*_: object) -> Any:
    raise AssertionError("the file's own way")


@pytest.mark.parametrize("name", [*FILES, "any", "both", "rungs"])
def test_the_third_call_of_a_kind_launches_again(
    name: str, take: Callable[[str], Layer], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own tensors, on the stream that is current then; the output as the file makes it."""
    layer = take(name)
    calls = of(layer)
    first = layer.check(*layer.tensors(), call=calls)
    launches, _ = card.counts()
    layer.check(*layer.tensors(seed=1), call=calls)
    assert card.counts() == (0, launches)
    monkeypatch.setitem(vars(layer.file), "_forward", refused)
    for seed in (2, 3):
        card.stream += 1
        again = layer.check(*layer.tensors(seed=seed), call=calls)
        assert (again.dtype, again.stride()) == (first.dtype, first.stride())
        assert card.counts() == (0, launches)


@pytest.mark.parametrize("name", [*FILES, "any"])
def test_launches_serve_calls_of_their_own_kind_alone(
    name: str, take: Callable[[str], Layer]
) -> None:
    """Sizes, and the formats of input and weight, which decide the kernel or what packs for it."""
    layer = take(name)
    calls = of(layer)
    formats = [torch.contiguous_format]
    if layer.spec.rank == 2:
        formats.append(torch.channels_last)
    for seed in (0, 3, 6, 9):
        for kind in KINDS:
            x, weight, bias = layer.tensors(**kind, seed=seed)
            for of_x in formats:
                for of_weight in formats:
                    given = x.contiguous(memory_format=of_x), weight.to(memory_format=of_weight)
                    layer.check(*given, bias, call=calls)


@pytest.mark.parametrize("name", ["open", "boxes", "raw weight", "any"])
def test_tensors_that_differ_in_what_no_size_tells(
    name: str, take: Callable[[str], Layer], card: Card
) -> None:
    """Where they lie, a sign that is applied later, no batch: the file's own way serves all."""
    layer = take(name)
    calls = of(layer)
    x, weight, bias = layer.tensors()
    assert x is not None
    for _ in range(3):
        layer.check(x, weight, bias, call=calls)
    others: list[list[Tensor | None]] = [
        [misplaced(x), weight, bias],
        [x, misplaced(weight), bias],
        [x, weight, None if bias is None else misplaced(bias)],
        [torch._neg_view(x), weight, bias],
        [x, torch._neg_view(weight), bias],
        [x[:0], weight, bias],
    ]
    for given in others * 3:
        layer.check(*given, call=calls)
        layer.check(x, weight, bias, call=calls)
        got = calls(x[0], weight, bias)
        assert torch.equal(got.cpu().double(), layer.want(x, weight, bias)[0])


def test_tensors_that_were_one_may_be_two_later(
    load: Callable[[str], Layer], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them a kernel reads cannot be told from their address."""
    monkeypatch.setitem(FILES, "square", "ConvTranspose2d(4, 4, 3, bias=False)")
    layer = load("square")
    card.take(layer.file, monkeypatch)
    calls = of(layer)
    x, weight, _ = layer.tensors(batch=4)
    for _ in range(3):
        layer.check(x, x, None, call=calls)
    layer.check(x, weight, None, call=calls)
    layer.check(weight, x, None, call=calls)


def test_what_torch_computes_is_computed_again(take: Callable[[str], Layer]) -> None:
    """Another dtype than the file's: nothing was launched that could be made again."""
    layer = take("open")
    calls = of(layer)
    for seed in range(4):
        tensors = [None if t is None else t.double() for t in layer.tensors(seed=seed)]
        assert layer.check(*tensors, call=calls).dtype == torch.float64


@pytest.mark.parametrize("name", ["open", "any"])
def test_autocast_decides_too(name: str, take: Callable[[str], Layer]) -> None:
    """No guard checks it where autograd computes a graph again."""
    layer = take(name)
    calls, tensors = of(layer), layer.tensors()
    for _ in range(3):
        layer.check(*tensors, call=calls)
    with torch.autocast(torch.device(layer.device).type, dtype=torch.bfloat16):
        got, want = calls(*tensors), layer.file._forward(*tensors)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)
    layer.check(*tensors, call=calls)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel would read the CPU's memory there")
def test_tensors_of_two_devices_take_the_file_s_own_way(
    number: int, take: Callable[[str], Layer], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which says so."""
    layer = take("open")
    calls, tensors = of(layer), layer.tensors()
    for _ in range(3):
        layer.check(*tensors, call=calls)
    other = tensors[number]
    monkeypatch.setattr(Tensor, "get_device", lambda tensor: -1 if tensor is other else 0)
    monkeypatch.setitem(vars(layer.file), "_forward", refused)
    with pytest.raises(AssertionError, match="own way"):
        calls(*tensors)


@pytest.mark.parametrize("name", [*FILES, "any", "both", "rungs"])
def test_functions_that_are_taken_into_another_scope_are_code_alone(
    name: str, load: Callable[[str], Layer]
) -> None:
    """Defaults and closures would be lost on the way."""
    file = vars(load(name).file)
    taken = [file[each] for each in graph_calls._FUNCTIONS if each in file]
    assert len(taken) >= 2
    for each in taken:
        assert (each.__defaults__, each.__kwdefaults__, each.__closure__) == (None, None, None)


@pytest.mark.parametrize("name", FILES)
def test_what_is_noted_is_kept_by_nothing(name: str, take: Callable[[str], Layer]) -> None:
    """A server that has switched Python's collector off gets its memory back all the same."""
    layer = take(name)
    calls, tensors = of(layer), layer.tensors()
    calls(*tensors)  # the stand-in keeps the tensors that it compiled for
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            kept = weakref.ref(calls(*tensors))
            assert kept() is None
    finally:
        gc.enable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="another device is chosen on a stand-in")
def test_another_device_has_kernels_of_its_own(take: Callable[[str], Layer], card: Card) -> None:
    layer = take("open")
    calls = of(layer)
    for seed in range(3):
        layer.check(*layer.tensors(seed=seed), call=calls)
    card.current = 1
    layer.check(*layer.tensors(seed=3), call=calls)
    card.current = card.tensors = 1
    for seed in range(4, 8):
        layer.check(*layer.tensors(seed=seed), call=calls)


def test_kinds_that_are_kept_are_limited(
    take: Callable[[str], Layer], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose lengths are all new would fill its memory with them."""
    monkeypatch.setattr(graph_calls, "MOST_KINDS", 2)
    layer = take("open")
    calls = of(layer)
    for _ in range(3):
        for batch in (1, 2, 3):
            layer.check(*layer.tensors(batch=batch), call=calls)
    assert len(calls._kinds) == 2
