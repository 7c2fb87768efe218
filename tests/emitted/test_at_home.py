"""`ModelNew` at home in PyTorch: formats, compilers, tracers, copies and processes.

What would break it: a format that another layer does not expect, a graph that is compiled for
every length, a tracer that does not see the operator, a process group that cannot copy the layer.
The references are torch's own layers.
"""

from __future__ import annotations

import itertools
import pickle
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import convgen
from convgen.execution.loading import load_module
from group_worker import sample, step

pytestmark = pytest.mark.interpreter

GEOMETRY = "4, 6, 3, stride=2, padding=1"
FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def on_device(device: str):
    """New tensors and layers lie where kernels run."""
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def emitted(folder: Path, text: str):
    """Load the file of a spec under a name of its own."""
    return load_module(convgen.emit(text), f"at_home_{abs(hash(text)):x}", folder)


def pair(module, **arguments):
    """Return an emitted layer and torch's with the same weights."""
    made = module.ModelNew(**arguments)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dtype=made.weight.dtype)
    layer.load_state_dict(made.state_dict())
    return made, layer


# ---- formats ----

SHAPES = [(2, 4, 5, 3), (2, 4, 1, 1), (1, 4, 1, 7), (2, 1, 1, 1), (1, 1, 1, 1), (2, 1, 3, 1)]


@pytest.mark.parametrize("own", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_has_the_format_that_torch_gives_it(tmp_path, own, shape, device):
    """Strides decide in torch, of the input or of the weight; the next layer may depend on it.

    Where torch's output has the file's own format, and no other input than that is copied, the
    kernel computes it, without a warning. Tensors are on the CPU, whose formats are torch's rule;
    with a GPU, no kernel is.
    """
    c_in = shape[1]
    text = f"ConvTranspose2d({c_in}, {GEOMETRY.partition(', ')[2]}, dtype=float64, layout={own})"
    module = emitted(tmp_path, text)
    x, computed = torch.randn(shape, dtype=torch.float64), []
    for of_weight, of_input, batched in itertools.product(FORMATS, FORMATS, (True, False)):
        made, layer = module.ModelNew(), nn.ConvTranspose2d(c_in, 6, 3, 2, 1, dtype=torch.float64)
        layer.load_state_dict(made.state_dict())
        for each in (made, layer):
            each.to(memory_format=FORMATS[of_weight])
        given = x.contiguous(memory_format=FORMATS[of_input])
        given = given if batched else given[0]
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got, want = made(given), layer(given)
        case = of_weight, of_input, batched
        assert torch.allclose(got, want)
        assert got.stride() == want.stride(), case
        assert all("computed by torch" in str(each.message) for each in caught), case
        format = FORMATS[own]
        mine = want.is_contiguous(memory_format=format) if batched else own == "channels_first"
        if mine and of_weight == of_input == own and device == "cpu":
            assert caught == [], case
        computed.append(not caught)
    assert any(computed) == (device == "cpu")
    assert not all(computed) or 1 in shape


@pytest.mark.usefixtures("on_device")
def test_a_slice_of_a_channels_last_tensor_is_one(tmp_path):
    """It is dense in no format, and torch goes by its strides all the same."""
    module = emitted(tmp_path, f"ConvTranspose2d({GEOMETRY}, dtype=float64)")
    _, layer = pair(module)
    whole = torch.randn(2, 4, 5, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="layout channels_first, got channels_last"):
        got = pair(module)[0](whole[:, :, 1:, :4])
    assert got.stride() == layer(whole[:, :, 1:, :4]).stride()
    sparse = whole[..., ::2]  # but not where its strides are no longer in that order
    assert pair(module)[0](sparse).stride() == layer(sparse).stride()


@pytest.mark.parametrize("own", FORMATS)
def test_a_fake_has_the_strides_of_the_output(tmp_path, own, device):
    """Of an image without a batch, of one position, and of none at all, in one channel or several.

    Tensors of one position or channel are dense in both formats, but have the strides of one.
    """
    for c_out, kernel in ((1, 2), (6, 1), (6, 2)):
        text = f"ConvTranspose2d(4, {c_out}, {kernel}, stride=2, dtype=float64, layout={own})"
        module, layer = emitted(tmp_path, text), nn.ConvTranspose2d(4, c_out, kernel, 2)
        layer = layer.double().to(device, memory_format=FORMATS[own])
        tensors = layer.weight.detach(), layer.bias.detach()
        for shape in [(2, 4, 3, 5), (2, 4, 1, 1), (1, 4, 1, 1), (0, 4, 3, 5)]:
            x = torch.empty(shape, dtype=torch.float64, device=device, memory_format=FORMATS[own])
            for given in (x.zero_(), *x[:1].unbind()):
                want = layer(given.cpu()) if device == "cpu" else module.OPERATOR(given, *tensors)
                got = module.OPERATOR(given, *tensors)
                with FakeTensorMode() as mode:
                    fake = module.OPERATOR(*map(mode.from_tensor, (given, *tensors)))
                assert got.stride() == want.stride() == fake.stride(), (c_out, kernel, shape)


# ---- compilers and tracers ----


@pytest.mark.usefixtures("on_device")
def test_one_graph_serves_a_hundred_lengths(tmp_path):
    """A codec's lengths are new at each call; each must not cost a compilation."""
    module = emitted(tmp_path, "ConvTranspose1d(4, 2, 4, stride=2, padding=1, dtype=float64)")
    made = module.ModelNew()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(2, 4, 7, dtype=torch.float64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in range(10, 110):
            x = torch.randn(2, 4, length, dtype=torch.float64)
            assert compiled(x).shape == (2, 2, 2 * length)
        assert torch.equal(compiled(x), made(x))


@pytest.mark.usefixtures("on_device")
def test_an_exported_program_takes_any_batch_and_length(tmp_path):
    module = emitted(tmp_path, "relu | ConvTranspose1d(4, 2, 4, stride=2, dtype=float64)")
    made, free = module.ModelNew(), torch.export.Dim.DYNAMIC
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    program = torch.export.export(made, (x,), dynamic_shapes=({0: free, 2: free},))
    for batch, length in ((1, 5), (3, 40)):
        x = torch.randn(batch, 4, length, dtype=torch.float64)
        assert torch.equal(program.module()(x), made(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
@pytest.mark.usefixtures("on_device")
def test_modes_and_tracers_see_the_operator(tmp_path):
    """A launch that goes past them has no fake output, and stands in no traced graph."""
    module = emitted(tmp_path, f"ConvTranspose2d({GEOMETRY}, dtype=float64)")
    made = module.ModelNew().requires_grad_(False)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert made(mode.from_tensor(x)).shape == (2, 6, 9, 5)
    assert made.to("meta")(x.to("meta")).is_meta
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    traced = torch.jit.trace(module.conv_transpose2d, (x, weight, bias))
    other = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    want = module.conv_transpose2d(other, weight, bias)
    assert torch.equal(traced(other, weight, bias), want)


# ---- what it is made of ----


def test_it_shows_and_offers_what_torch_s_layer_does(tmp_path):
    """Printed models are read by people, attributes by initialisers and by other tools."""
    module = emitted(tmp_path, f"ConvTranspose2d({GEOMETRY})")
    made, layer = pair(module)
    assert repr(made) == repr(layer)
    for name in ("in_channels", "out_channels", "kernel_size", "padding_mode", "output_padding"):
        assert getattr(made, name) == getattr(layer, name)
    for each in (made, layer):
        torch.manual_seed(3)
        each.reset_parameters()
    assert torch.equal(made.weight, layer.weight)


@pytest.mark.usefixtures("on_device")
def test_a_copy_that_is_stored_holds_no_packed_weight(tmp_path, monkeypatch):
    """A checkpoint of a whole model would have every weight twice."""
    module = emitted(tmp_path, f"ConvTranspose2d({GEOMETRY}, dtype=float64)")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = module.ModelNew()
    before = len(pickle.dumps(made))
    with torch.no_grad():
        made(torch.randn(1, 4, 3, 3, dtype=torch.float64))
    assert len(pickle.dumps(made)) == before


@pytest.mark.usefixtures("on_device")
def test_the_gradients_keep_only_what_they_need(tmp_path):
    """The gradient of the bias needs neither input nor weight; what is kept takes memory."""
    module = emitted(tmp_path, f"ConvTranspose2d({GEOMETRY}, dtype=float64)")
    tensors = {
        "input": torch.randn(2, 4, 5, 3, dtype=torch.float64),
        "weight": torch.randn(4, 6, 3, 3, dtype=torch.float64),
        "bias": torch.randn(6, dtype=torch.float64),
    }
    kept = {"input": ["weight"], "weight": ["input"], "bias": []}
    for wanted, others in kept.items():
        given = {k: v.clone().requires_grad_(k == wanted) for k, v in tensors.items()}
        addresses = {tensor.data_ptr(): name for name, tensor in given.items()}
        packed = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, packed=packed: packed.append(tensor) or tensor, lambda tensor: tensor
        )
        with hooks:
            y = module.conv_transpose2d(*given.values())
        assert [addresses[tensor.data_ptr()] for tensor in packed] == others
        y.square().sum().backward()
        assert given[wanted].grad is not None


# ---- several processes ----


def test_a_distributed_step_is_torch_s(tmp_path):
    """A layer whose gradients DDP does not see would drift apart between the processes."""
    path = tmp_path / "layer.py"
    path.write_text(convgen.emit(f"ConvTranspose2d({GEOMETRY}, dtype=float64)"), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(tmp_path / "state")
    mp.spawn(step, (port, str(path), results), nprocs=2)
    states = [torch.load(f"{results}.{rank}") for rank in range(2)]

    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = sum(layer(sample(rank)).square().sum() for rank in range(2)) / 2
    loss.backward()
    optimizer.step()
    for name, want in layer.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        assert torch.allclose(states[0][name], want)
