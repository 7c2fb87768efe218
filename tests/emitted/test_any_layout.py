"""`layout=any`: a file with a kernel for channels_first and one for channels_last.

What would break it: the wrong one of the two, a format that torch's output would not have, a fake
of other strides, a weight packed for the other kernel, a copy where formats agree. Numbers are
compared with a scatter in float64, strides with torch's own rule, which an H200 follows for every
dtype but float64 (torch 2.11).
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

from convgen import ConvTransposeSpec, find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution import oracle
from convgen.execution.loading import load_module
from convgen.kernels.packing import packed_form
from convgen.rendering.render import KernelSource
from edited import integers
from launching import Card

pytestmark = pytest.mark.interpreter

FIRST = torch.contiguous_format
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
SPECS = {
    "gather": "ConvTranspose2d(4, 6, 3, padding=1, groups=2, layout=any)",
    "open channels": "ConvTranspose2d(kernel_size=3, stride=2, padding=1, layout=any)",
    "polyphase": "ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False, layout=any)",
    "depthwise": "ConvTranspose2d(6, 6, 3, stride=2, groups=6, layout=any)",
    "depthwise, sized": "ConvTranspose2d(8, 8, 3, groups=8, input=(2, 8, 4, 8), layout=any)",
    "stencil": "ConvTranspose2d(8, 8, 3, padding=1, groups=8, input=(2, 8, 4, 16), layout=any)",
    "window": "ConvTranspose2d(16, 16, 3, padding=1, input=(2, 16, 16, 16), layout=any)",
    "volume": "ConvTranspose3d(4, 6, 2, stride=2, layout=any)",
    "volume, sized": "ConvTranspose3d(4, 2, 3, bias=False, input=(2, 4, 3, 4, 2), layout=any)",
    "staged": "relu | ConvTranspose2d(4, 6, 2, stride=2, layout=any) | leaky_relu(0.5)",
    "float16": "ConvTranspose2d(4, 6, 3, stride=2, dtype=float16, layout=any)",
    "bfloat16": "ConvTranspose2d(4, 8, 2, stride=2, dtype=bfloat16, layout=any)",
}
# Of the two kernels: that of channels_first, and that of channels_last.
FAMILIES = {
    "gather": ("gather", "gather"),
    "polyphase": ("polyphase", "window"),
    "depthwise": ("direct", "direct"),
    "depthwise, sized": ("polyphase", "direct"),
    "stencil": ("stencil", "direct"),
    "window": ("polyphase", "window"),
}
TWO_FORMS, ONE_FORM = ("polyphase", "window", "depthwise, sized", "volume"), ("gather",)


@functools.cache
def source_of(name: str) -> KernelSource:
    return compile_kernel(parse(SPECS[name]), find_target("h200"))


class Layer:
    """An emitted file, its layer and what calls of it need; numbers are small integers."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        self.spec: ConvTransposeSpec = parse(SPECS[name])
        self.device, self.rank, self.op = device, self.spec.rank, f"conv_transpose{self.spec.rank}d"
        self.dtype = getattr(torch, self.spec.dtype)
        stem = f"any_layout_{re.sub(r'[^a-z0-9]', '_', name)}"
        self.file: ModuleType = load_module(source_of(name).text, stem, folder)
        sys.modules[stem] = self.file  # where pickle looks the class up
        self.last = LAST[self.rank]
        self.formats = FIRST, self.last

    def made(self, format: torch.memory_format = FIRST) -> nn.Module:
        """Return a new layer, in evaluation."""
        given = (4, 6) if self.spec.in_channels is None else ()
        layer = self.file.ModelNew(*given, device=self.device).eval()
        for seed, parameter in enumerate(layer.parameters()):
            numbers = integers(*parameter.shape, seed=seed, dtype=self.dtype, device=self.device)
            parameter.data.copy_(numbers)
        return layer.to(memory_format=format)

    def shape(self) -> tuple[int, ...]:
        """Return the input's, as known."""
        if self.spec.input is not None:
            return self.spec.input
        return (2, self.spec.in_channels or 4, *(5, 3, 2)[: self.rank])

    def numbers(self, *shape: int) -> Tensor:
        return integers(*shape, seed=7, dtype=self.dtype, device=self.device)

    def x(self, format: torch.memory_format = FIRST) -> Tensor:
        return self.numbers(*self.shape()).to(memory_format=format)

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
        """Return the output by its definition."""
        batched = x if x.dim() == self.rank + 2 else x[None]
        given = [
            None if t is None else t.detach().cpu().double().numpy()
            for t in (batched, weight, bias)
        ]
        if self.spec.before:
            given[0] = np.maximum(given[0], 0)
        none = given[0].size == 0
        given[0] = given[0] if not none else np.zeros((1, *given[0].shape[1:]))
        output = oracle.scatter(self.spec, *given)[: 0 if none else None]
        output = np.where(output < 0, 0.5 * output, output) if self.spec.after else output
        return output if batched is x else output[0]

    def strides(self, x: Tensor, weight: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the strides of torch's output, of that shape, by torch's own rule."""
        batched = x if x.dim() == self.rank + 2 else x[None]
        last = self.last in (suggest_memory_format(batched), suggest_memory_format(weight))
        format = self.last if last and batched.numel() else FIRST
        whole = torch.empty(shape if batched is x else (1, *shape), memory_format=format)
        return (whole if batched is x else whole[0]).stride()

    def check(self, got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Compare numbers and strides of an output."""
        exact = self.exact(x, weight, bias)
        assert np.array_equal(got.detach().cpu().double().numpy(), exact)
        assert got.stride() == self.strides(x, weight, exact.shape)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Callable[[str], Layer]]:
    """The function from a name of `SPECS` to its layer."""
    folder, found = tmp_path_factory.mktemp("any"), {}

    def loaded(name: str) -> Layer:
        if name not in found:
            found[name] = Layer(name, folder, device)
        return found[name]

    yield loaded
    for each in found.values():
        sys.modules.pop(each.file.__name__, None)


every = pytest.mark.parametrize("name", SPECS)


# ---- what is computed ----


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernels_are_of_the_families_that_these_tests_mean(name: str) -> None:
    kernels = [each for each in source_of(name).plan.kernels if each.is_for_any]
    assert tuple(kernel.family.name for kernel in kernels) == FAMILIES[name]


@pytest.mark.parametrize("name", [*TWO_FORMS, *ONE_FORM])
def test_the_packed_weights_are_those_that_these_tests_mean(name: str) -> None:
    forms = set(map(packed_form, source_of(name).plan.kernels))
    assert len(forms) == (2 if name in TWO_FORMS else 1)


@every
def test_each_pair_of_layouts(name: str, load: Callable[[str], Layer]) -> None:
    """By the layer, recorded and not, frozen and not, by the function and by the operator."""
    of = load(name)
    for of_weight, of_input in itertools.product(of.formats, of.formats):
        layer, x = of.made(of_weight), of.x(of_input)
        weight, bias = (
            layer.weight.detach(),
            layer.bias if layer.bias is None else layer.bias.detach(),
        )
        outputs = [layer(x), getattr(of.file, of.op)(x, weight, bias)]
        outputs.append(of.file.OPERATOR(x, weight, bias))
        with torch.no_grad():
            outputs += [layer(x), layer.freeze()(x), layer(x)]
        for output in outputs:
            of.check(output, x, weight, bias)
        assert layer._calls.torch == {}
        for fake in fakes(of, x, weight, bias):
            assert (fake.shape, fake.stride()) == (outputs[0].shape, outputs[0].stride())


def fakes(of: Layer, *tensors: Tensor | None) -> list[Tensor]:
    """Return what the operator gives for fake tensors, and for ones without storage."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [t if t is None else mode.from_tensor(t) for t in tensors]
        found = [of.file.OPERATOR(*given)]
    given = [
        t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        for t in tensors
    ]
    return [*found, of.file.OPERATOR(*given)]


def odd_inputs(of: Layer) -> Iterator[tuple[str, Tensor]]:
    """Yield inputs that are dense in no format, or in both."""
    n, c, *sizes = of.shape()
    rank, ones = of.rank, (1,) * of.rank
    inner = (slice(None), slice(None), *[slice(1, -1)] * rank)
    for format in of.formats:
        yield (
            f"cut {format}",
            of.numbers(n, c, *(s + 2 for s in sizes)).to(memory_format=format)[inner],
        )
        wide = of.numbers(n, c, *sizes[:-1], 2 * sizes[-1]).to(memory_format=format)
        yield f"every other {format}", wide[..., ::2]
        yield f"expanded {format}", of.x(format)[:1].expand(n, c, *sizes)
        for shape in [
            (2, c, *ones),
            (1, c, *ones),
            (2, c, *sizes[:-1], 1),
            (1, c, *sizes),
            (0, c, *sizes),
        ]:
            given = torch.empty(shape, dtype=of.dtype, device=of.device, memory_format=format)
            yield f"{shape} {format}", given.copy_(of.numbers(*shape))
        yield f"unbatched {format}", of.x(format)[0]
    yield "permuted", of.numbers(*sizes, n, c).permute(rank, rank + 1, *range(rank))
    yield "one channel, expanded", of.x()[:, :1].expand(n, c, *sizes)
    yield "one element, expanded", of.numbers(1, 1, *ones).expand(n, c, *sizes)
    yield "unbatched, of one position", of.numbers(*ones, c).permute(rank, *range(rank))


@pytest.mark.parametrize("name", ["gather", "polyphase", "depthwise", "volume", "float16"])
def test_odd_inputs(name: str, load: Callable[[str], Layer]) -> None:
    """Strides decide, as in torch; what is dense in no format is copied."""
    of = load(name)
    for of_weight in of.formats:
        layer = of.made(of_weight)
        bias = layer.bias if layer.bias is None else layer.bias.detach()
        for case, x in odd_inputs(of):
            with torch.no_grad():
                got = layer(x)
            of.check(got, x, layer.weight, bias)
            for each in (
                of.file.OPERATOR(x, layer.weight.detach(), bias),
                *fakes(of, x, layer.weight.detach(), bias),
            ):
                assert (each.shape, each.stride()) == (got.shape, got.stride()), (case, of_weight)
        assert layer._calls.torch == {}


@pytest.mark.parametrize(("c_in", "c_out", "kernel"), [(1, 6, 3), (4, 1, 1), (1, 1, 2)])
def test_one_channel(c_in: int, c_out: int, kernel: int, tmp_path: Path, device: str) -> None:
    """A tensor of one channel is dense in both formats, and has the strides of one."""
    name = f"of {c_in}, {c_out}, {kernel}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            SPECS, name, f"ConvTranspose2d({c_in}, {c_out}, {kernel}, stride=2, layout=any)"
        )
        of = Layer(name, tmp_path, device)
    for of_weight, of_input in itertools.product(of.formats, of.formats):
        layer, x = of.made(of_weight), of.numbers(2, c_in, 5, 3)
        x = torch.empty(x.shape, device=device, memory_format=of_input).copy_(x)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        of.check(layer(x), x, weight, bias)
        for fake in fakes(of, x, weight, bias):
            assert fake.stride() == layer(x).stride()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["gather", "polyphase", "depthwise", "volume", "float16", "bfloat16"]
)
def test_strides_are_those_of_torch_on_a_gpu(name: str, load: Callable[[str], Layer]) -> None:
    of = load(name)
    for of_weight in of.formats:
        layer = of.made(of_weight)
        bias = layer.bias if layer.bias is None else layer.bias.detach()
        for case, x in [*odd_inputs(of), *((str(f), of.x(f)) for f in of.formats)]:
            want = of.file._torch(x, layer.weight.detach(), bias)
            assert torch.no_grad()(layer)(x).stride() == want.stride(), (case, of_weight)


@every
def test_gradients(name: str, load: Callable[[str], Layer]) -> None:
    """Those of torch's layer in float64, whose kernels are torch's own."""
    of = load(name)
    for of_weight, of_input in itertools.product(of.formats, of.formats):
        layer = of.made(of_weight)
        x = of.x(of_input).requires_grad_()
        output = layer(x)
        grad = of.numbers(*output.shape)
        output.backward(grad)
        wide = [x.detach().cpu().double(), *(p.detach().cpu().double() for p in layer.parameters())]
        wide = [each.contiguous().requires_grad_() for each in wide]
        bias = wide[2] if of.spec.bias else None
        of.file._torch(wide[0], wide[1], bias).backward(grad.cpu().double())
        for got, want in zip((x, *layer.parameters()), wide, strict=True):
            assert torch.equal(got.grad.cpu().double(), want.grad.to(of.dtype).double())


# ---- what a frozen layer keeps ----


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Layer], list[Any]]:
    """The function from a layer to what it packed for, from now on."""

    def watched(of: Layer) -> list[Any]:
        found, pack = [], of.file._pack
        monkeypatch.setattr(
            of.file, "_pack", lambda plan, weight: found.append(plan) or pack(plan, weight)
        )
        return found

    return watched


@torch.no_grad()
@pytest.mark.parametrize("name", [*TWO_FORMS, *ONE_FORM])
def test_a_frozen_layer_packs_each_form_once(
    name: str, load: Callable[[str], Layer], packs: Callable[[Layer], list[Any]]
) -> None:
    of = load(name)
    layer, found = of.made(), packs(of)
    layer.freeze()
    for _ in range(2):
        for format in of.formats:
            layer(of.x(format))
    assert len(found) == (2 if name in TWO_FORMS else 1)


ENDS = {
    "unfreeze": lambda layer: (layer.unfreeze(), layer.weight.data.mul_(2)),
    "edit": lambda layer: layer.weight.mul_(2),
    "train": lambda layer: (layer.train(), layer.weight.data.mul_(2)),
    "load": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "new weight": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
    "turned": lambda layer: (layer.to(memory_format=LAST[2]), layer.weight.data.mul_(2)),
}


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
def test_a_freeze_ends_for_every_form(end: str, load: Callable[[str], Layer]) -> None:
    of = load("polyphase")
    layer = of.made().freeze()
    for format in of.formats:
        layer(of.x(format))
    ENDS[end](layer)
    for format in of.formats:
        x = of.x(format)
        of.check(layer(x), x, layer.weight, None)


def test_a_call_that_records_ends_a_freeze_but_uses_it_for_inputs(
    load: Callable[[str], Layer],
) -> None:
    of = load("polyphase")
    layer, x = of.made().freeze(), of.x(of.last)
    of.check(layer(x), x, layer.weight, None)
    assert layer._frozen is None
    layer.requires_grad_(False).freeze()
    for format in of.formats:
        x = of.x(format).requires_grad_()
        of.check(layer(x), x, layer.weight, None)
    assert layer._frozen is not None


@torch.no_grad()
@every
def test_a_weight_packed_for_an_input(name: str, load: Callable[[str], Layer]) -> None:
    of = load(name)
    for of_weight, of_input in itertools.product(of.formats, of.formats):
        layer, x = of.made(of_weight), of.x(of_input)
        packed = of.file.pack_weight(layer.weight, x)
        assert packed.data_ptr() != layer.weight.data_ptr()
        got = getattr(of.file, f"{of.op}_packed")(x, packed, layer.bias)
        of.check(got, x, layer.weight.clone(memory_format=FIRST), layer.bias)


@torch.no_grad()
def test_copies_hold_no_packed_weight(load: Callable[[str], Layer]) -> None:
    of = load("polyphase")
    layer = of.made(of.last)
    size = len(pickle.dumps(layer))
    layer.freeze()
    for format in of.formats:
        layer(of.x(format))
    assert len(pickle.dumps(layer)) == size
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again.weight.data.mul_(2)
        for format in of.formats:
            x = of.x(format)
            of.check(again(x), x, again.weight, None)


# ---- what is launched ----


@pytest.mark.parametrize("name", ["open channels", "polyphase", "depthwise", "window", "volume"])
def test_a_call_packs_at_most_once_and_launches_the_kernel_of_its_format(
    name: str, load: Callable[[str], Layer], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    of, card = load(name), Card(real=device == "cuda")
    card.take(of.file, monkeypatch)
    for of_weight, of_input in itertools.product(of.formats, of.formats):
        layer, x = of.made(of_weight).requires_grad_(False), of.x(of_input)
        last = of.last in (of_input, of_weight)
        raw = source_of(name).plan.kernels[last].reads_raw_weight
        of.file.LAUNCHED.clear()
        card.launched.clear()
        layer(x)
        kernels = [f"{of.op}_last_kernel" if last else f"{of.op}_kernel"]
        own = f"{of.op}_"  # a kernel that copies the input is named after the copy
        layers_own = {
            k: n for k, n in card.launched.items() if k.startswith(own) and "pack" not in k
        }
        others = {k: n for k, n in card.launched.items() if k not in layers_own}
        assert list(layers_own.items()) == [(kernels[0], 1)]
        assert sum(n for k, n in others.items() if "pack" in k) == (not raw)
        launches = card.counts()[0]
        layer(x)
        assert card.counts() == (0, launches)


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes operators that copy a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.found += [function._opname] * (function._opname == "clone")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["open channels", "depthwise", "volume"])
def test_nothing_is_copied_where_formats_agree(name: str, load: Callable[[str], Layer]) -> None:
    """And an input in the other format once."""
    of = load(name)
    for of_weight, of_input in itertools.product(of.formats, of.formats):
        layer, x = of.made(of_weight).requires_grad_(False), of.x(of_input)
        plan = of.file._plan_of(x, layer.weight)
        with Copies() as copies:
            weight = of.file._pack(plan, layer.weight)
            of.file._launch(plan, x, weight, layer.bias)
        turned = of_input is FIRST and of_weight is not FIRST
        assert copies.found == ["clone"] * turned, (of_weight, of_input)


# ---- how long the file is ----


def test_a_second_kernel_adds_a_third_of_a_file() -> None:
    """Constants, packing and all glue are shared; a kernel of row blocks is longer than most."""
    added = []
    for name in ("gather", "polyphase", "window", "volume"):
        one = max(
            len(compile_kernel(each, find_target("h200")).text.splitlines())
            for each in parse(SPECS[name]).each_layout
        )
        added.append(len(source_of(name).text.splitlines()) / one - 1)
    assert max(added) <= 0.36
    assert statistics.mean(added) <= 0.3


# ---- in a compiled network ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_network_hands_over_its_own_format(
    dynamic: bool, load: Callable[[str], Layer], device: str
) -> None:
    """Forward and backward, in one graph, between two convolutions."""
    of = load("polyphase")
    for format in of.formats:
        layer = of.made(format)
        parts = [nn.Conv2d(3, 4, 3, padding=1), layer, nn.Conv2d(6, 2, 3, padding=1)]
        model = nn.Sequential(*parts).to(device, memory_format=format)
        x = torch.randn(2, 3, 5, 6, device=device).to(memory_format=format)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        outcomes = []
        for each in (model, compiled):
            y = each(x.requires_grad_())
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
        for want, got in zip(*outcomes, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert outcomes[1][0].stride() == outcomes[0][0].stride()
        assert outcomes[1][0].is_contiguous(memory_format=format)


def test_inductor_hands_over_the_layout_that_it_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The operator takes either, so that a graph keeps its layout; an untagged one got copies.

    In a channels_first model Inductor may run convolutions in channels_last. Also of one position
    and one image, whose strides say little: what the fake promised is what arrives, else
    Inductor's own check of strides fails.
    """
    text = "ConvTranspose2d(4, 7, 2, stride=2, layout=any)"  # no other test's: they share operators
    file = load_module(compile_kernel(parse(text)).text, "any_inductor", tmp_path)
    monkeypatch.setitem(sys.modules, "any_inductor", file)
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    plan_of = file._plan_of

    def noted(input: torch.Tensor, weight: torch.Tensor) -> Any:
        seen.append((tuple(input.shape), input.stride()))
        return plan_of(input, weight)

    monkeypatch.setattr(file, "_plan_of", noted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, padding=1), file.ModelNew(), nn.Conv2d(7, 2, 3, padding=1)]
    model = nn.Sequential(*parts).to(device).requires_grad_(False)
    for format in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        compiled = torch.compile(model.to(memory_format=format), fullgraph=True)
        for shape in ((2, 3, 5, 6), (2, 3, 1, 1), (1, 3, 5, 6)):
            x = torch.randn(shape, device=device).to(memory_format=format)
            want = model(x)
            seen.clear()
            got = compiled(x)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
            assert got.is_contiguous(memory_format=format)
            ((sizes, strides),) = seen
            formats = {torch.channels_last, format}
            given = [torch.empty(sizes).to(memory_format=each).stride() for each in formats]
            assert strides in given or sizes[2:] == (1, 1)
    torch._dynamo.reset()
