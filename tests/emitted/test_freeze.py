"""Layers whose packed weight is kept: what ends that, where it does not count, what is left of it.

A frozen layer that goes on with an old weight computes wrong numbers without a word. So each way in
which a freeze ends is tried with a weight that changes, against torch's own layer on float64.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import convgen
from convgen import SpecError, emit
from convgen.execution.loading import load_module

pytestmark = pytest.mark.interpreter

# Of no other test: the first file of a spec that a process loads has its operator.
SPEC = "ConvTranspose2d(4, 10, 3, stride=2, padding=1, dtype=float64)"
RAW = "ConvTranspose2d(4, 4, 3, groups=4, dtype=float64)"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """An emitted file whose kernel reads a packed weight."""
    module = load_module(emit(SPEC), "freezing", tmp_path_factory.mktemp("freezing"))
    sys.modules["freezing"] = module  # where pickle looks the class up
    yield module
    del sys.modules["freezing"]


@pytest.fixture
def packed(file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a weight is packed."""
    calls, pack = [], file._pack
    monkeypatch.setattr(file, "_pack", lambda *given: calls.append(1) or pack(*given))
    return calls


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(2, 4, 5, 3, dtype=torch.float64, device=device)


@pytest.fixture
def layer(file: ModuleType, device: str, packed: list[int]) -> nn.Module:
    """A frozen layer in evaluation; nothing counts as packed yet."""
    made = file.ModelNew(device=device).eval().freeze()
    packed.clear()
    return made


def want(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what torch computes with the layer's weight of now."""
    geometry = {"stride": 2, "padding": 1}
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return torch.nn.functional.conv_transpose2d(x, weight, bias, **geometry)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_frozen_layer_packs_no_more(layer, x, packed):
    for _ in range(3):
        assert close(layer(x), want(layer, x))
    assert not packed
    layer.unfreeze()
    layer(x)
    layer(x)
    assert len(packed) == 2


@torch.no_grad()
def test_a_freeze_that_is_believed_in_sees_no_hidden_edit(layer, x, packed):
    """The promise of who freezes: it shows that the packed weight is what is used."""
    before = layer(x)
    layer.weight.data.mul_(2)
    assert torch.equal(layer(x), before)
    layer.unfreeze()
    assert close(layer(x), want(layer, x))


def double(layer):
    layer.weight.mul_(2)


def train(layer):
    layer.train()
    layer.weight.data.mul_(2)


def move(layer):
    layer._apply(lambda tensor: tensor.data.mul_(2))


def load(layer, **options):
    state = {name: 2 * tensor for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, **options)


def replace(layer):
    layer.weight = nn.Parameter(2 * layer.weight)


def parametrize(layer):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Double())


ENDS = {
    "unfreeze": lambda layer: (layer.unfreeze(), layer.weight.data.mul_(2)),
    "convgen.unfreeze": lambda layer: (convgen.unfreeze(layer), layer.weight.data.mul_(2)),
    "train": train,
    "train of a parent": lambda layer: (
        nn.Sequential(layer).train(),
        layer.weight.data.mul_(2),
    ),
    "move": move,
    "load": load,
    "load by assignment": lambda layer: load(layer, assign=True),
    "new weight": replace,
    "new data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "parametrization": parametrize,
    "weight_norm": lambda layer: (
        nn.utils.parametrizations.weight_norm(layer),
        layer.parametrizations.weight.original0.data.mul_(2),
    ),
    "new data, turned": lambda layer: setattr(
        layer.weight, "data", layer.weight.data.transpose(2, 3)
    ),
    "new data, negated": lambda layer: setattr(layer.weight, "data", layer.weight.data._neg_view()),
    "an edit that torch reports": double,
}


@pytest.mark.parametrize("end", ENDS)
@torch.no_grad()
def test_what_ends_a_freeze(end, layer, x):
    before = layer(x)
    ENDS[end](layer)
    assert close(layer(x), want(layer, x))
    assert not close(layer(x), before)
    layer.eval()
    assert close(layer(x), want(layer, x))


@torch.no_grad()
def test_evaluation_keeps_a_freeze(layer, x, packed):
    nn.Sequential(layer).eval()
    layer(x)
    assert not packed


@torch.no_grad()
def test_it_ends_for_good(layer, x, packed):
    """A weight that comes back may have been edited in the meantime, as EMA does."""
    first = layer.weight
    layer.weight = nn.Parameter(first + 1)
    layer(x)
    first.data.mul_(2)
    layer.weight = first
    assert close(layer(x), want(layer, x))
    assert len(packed) == 2


def test_a_gradient_of_the_weight_ends_it(layer, x, packed):
    """What follows may be a fused optimizer's step, which counts no version."""
    layer(x).sum().backward()
    assert len(packed) == 1
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert close(layer(x), want(layer, x))


RECORDED = {
    "of another size": lambda layer, x: layer(x, output_size=(10, 6)),
    "with a hook of torch.func": lambda layer, x: torch.func.functional_call(layer, {}, x),
    "compiled": lambda layer, x: torch.compile(layer, backend="aot_eager")(x),
    "under autocast": lambda layer, x: _under_autocast(layer, x),
}


def _under_autocast(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return layer(x)


@pytest.mark.parametrize("call", RECORDED)
@pytest.mark.filterwarnings("ignore:computed by torch")
def test_it_ends_whoever_computes_the_call_whose_gradient_is_recorded(call, layer, x):
    """The operator or torch, as well as the layer itself."""
    RECORDED[call](layer, x).double().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert close(layer(x), want(layer, x))


@torch.no_grad()
def test_memory_that_is_given_back_is_not_taken_for_the_weight(layer, x):
    """Another weight may come to lie where the frozen one lay, and torch counts no such change."""
    for _ in range(20):
        layer.unfreeze().freeze()
        layer.weight.data = 2 * layer.weight.data
        layer.weight.data = 2 * layer.weight.data
        assert close(layer(x), want(layer, x))


def test_a_gradient_of_the_input_alone_keeps_it(layer, x, packed):
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert not packed
    grad = torch.ones_like(want(layer, x))
    geometry = ([2, 2], [1, 1], [1, 1], True, [0, 0], 1, [True, False, False])
    back = torch.ops.aten.convolution_backward(grad, x, layer.weight, None, *geometry)
    assert close(x.grad, back[0])


@torch.no_grad()
def test_another_weight_for_a_call_is_computed_with(layer, x):
    other = 3 * layer.weight
    got = torch.func.functional_call(layer, {"weight": other}, x)
    geometry = {"stride": 2, "padding": 1}
    assert close(got, torch.nn.functional.conv_transpose2d(x, other, layer.bias, **geometry))
    assert close(layer(x), want(layer, x))


@torch.no_grad()
def test_copies_are_not_frozen(layer, x):
    assert copy.copy(layer)._frozen is None
    replica = layer._replicate_for_data_parallel()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), replica):
        # A replica's are no parameters of its own.
        kind = torch.Tensor if other is replica else nn.Parameter
        other.weight, other.bias = kind(2 * layer.weight.detach()), kind(layer.bias.detach())
        assert close(other(x), want(other, x))
    assert close(layer(x), want(layer, x))


@torch.no_grad()
def test_a_frozen_layer_stores_its_weight_once(file, device):
    made = file.ModelNew(device=device)
    plain, state = len(pickle.dumps(made)), [*made.state_dict()]
    made.freeze()
    assert len(pickle.dumps(made)) == plain
    assert [*made.state_dict()] == state == ["weight", "bias"]
    assert not list(made.buffers())


@torch.no_grad()
def test_a_halved_layer_is_torch_s(layer, x):
    layer.half()
    with pytest.warns(UserWarning, match="got torch.float16"):
        got = layer(x.half())
    assert torch.allclose(got.double(), want(layer.double(), x), atol=5e-2)


@torch.no_grad()
def test_ddp_s_broadcast_of_the_weights_is_seen(layer, x, tmp_path):
    """DDP copies the first rank's parameters into those of the others when it wraps a model."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(layer)
        before = wrapped(x)
        # What a rank that is not the first gets.
        own = [layer.weight.detach(), layer.bias.detach()]
        firsts = [2 * tensor for tensor in own]
        torch.distributed._broadcast_coalesced(torch.distributed.group.WORLD, firsts, 2**20, 0)
        for tensor, first in zip(own, firsts, strict=True):
            tensor.copy_(first)
        assert close(wrapped(x), want(layer, x))
        assert not close(wrapped(x), before)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_graph_packs_the_weight_itself(layer, x, packed):
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        layer.weight.data.mul_(2)
        assert close(compiled(x), want(layer, x))
    assert len(packed) == 2


@torch.no_grad()
def test_what_fits_no_kernel_is_not_packed(file, device):
    """The kernel has the channels of its file as numbers, and would read beyond others."""
    other = file.ModelNew(2, 6, device=device).freeze()
    x = torch.randn(2, 2, 5, 3, dtype=torch.float64, device=device)
    with pytest.warns(UserWarning, match="computed by torch"):
        assert close(other(x), want(other, x))
    assert other._frozen is None
    assert file.ModelNew(device="meta").freeze()._frozen is None
    for dtype in (torch.float32, torch.float16):
        assert file.ModelNew(device=device).to(dtype).freeze()._frozen is None
    with torch.inference_mode():  # its weight would count no edits
        assert file.ModelNew(device=device).freeze()._frozen is None
    with torch._subclasses.FakeTensorMode():
        assert file.ModelNew().freeze()._frozen is None


@torch.no_grad()
def test_a_kernel_that_packs_nothing_sees_every_edit(tmp_path: Path, device: str):
    layer = load_module(emit(RAW), "raw", tmp_path).ModelNew(device=device).freeze()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, device=device)
    for _ in range(2):
        wanted = torch.nn.functional.conv_transpose2d(x, layer.weight, layer.bias, groups=4)
        assert close(layer(x), wanted)
        layer.weight.data.mul_(2)
    layer.unfreeze()


@torch.no_grad()
def test_a_model_is_frozen_as_a_whole(device):
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 2, 4, 2))
    model = model.double().to(device).eval()
    assert convgen.freeze(model) == []
    convgen.replace_layers(model)
    assert convgen.freeze(model) == ["0", "2"]
    assert all(model[number]._frozen is not None for number in (0, 2))
    assert convgen.unfreeze(model) == ["0", "2"]
    assert all(model[number]._frozen is None for number in (0, 2))
    with pytest.raises(SpecError, match=r"model must be a torch\.nn\.Module, got 3"):
        convgen.freeze(3)


@pytest.mark.gpu
@torch.no_grad()
def test_another_stream_waits_for_a_frozen_weight(file, x, device):
    """It is packed on the stream of the freeze, and read on whichever one a call comes from."""
    layer = file.ModelNew(device=device).eval()
    before, after = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (before, after):  # what is loaded, compiled or takes memory waits for the sleep
        with torch.cuda.stream(stream):
            layer.weight.mul_(1)
            layer.freeze()(x)
            layer.unfreeze()(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(before):
        torch.cuda._sleep(10**9)
        layer.weight.mul_(2)
        layer.freeze()
    with torch.cuda.stream(after):
        got = layer(x)
    torch.cuda.synchronize()
    assert close(got, want(layer, x))
