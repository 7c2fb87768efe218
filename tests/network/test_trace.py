"""Tracing: the specs of a model's layers at the sizes that they see, and the kernels made of them.

What would break it: a size, layout or dtype other than the one a layer runs with, a layer that is
neither in the document nor named as left out, and a model that is another after it was traced.
Emitted layers are compared with a scatter in float64 and with what the model's own layer returned.
"""

import random
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations

import convgen
from convgen import SpecError, parse
from convgen.errors import MachineError, ModelError
from convgen.execution.loading import load_module
from convgen.execution.oracle import scatter
from convgen.language.parser import parse_document
from convgen.network.trace import trace_layers
from convgen.project.document import document_of
from running import run

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OLD_NORM = "ignore:.*weight_norm.* is deprecated:FutureWarning"


class UNet(nn.Module):
    """Two steps down, two up, with the skips concatenated; `spare` is never called."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)])
        self.decoder = nn.ModuleDict(
            {"up1": nn.ConvTranspose2d(8, 4, 2, 2), "up2": nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)}
        )
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.ConvTranspose2d(4, 2, 3, padding=1, bias=False)
        self.spare = nn.ConvTranspose2d(4, 2, 3)

    def forward(self, x):
        shallow = self.down[0](x).relu()
        x = self.decoder["up1"](self.down[1](shallow).relu())
        return self.head(self.norm(self.decoder["up2"](torch.cat([x, shallow], 1))))


class Vocoder(nn.Module):
    """HiFi-GAN's upsampling: layers with weight_norm, whose kernels are twice their strides."""

    def __init__(self, norm):
        super().__init__()
        layers = [
            nn.ConvTranspose1d(8 >> n, 4 >> n, 2 * s, s, s // 2) for n, s in enumerate((4, 2))
        ]
        self.ups = nn.ModuleList(map(norm, layers))

    def forward(self, mel, scale=None):
        for up in self.ups:
            mel = up(nn.functional.leaky_relu(mel, 0.1))
        return mel if scale is None else mel * scale


def vocoder_of_hooks():
    return Vocoder(nn.utils.weight_norm)


class Twice(nn.Module):
    """One layer at two sizes, and another one like it at the second of them."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 2, 2)
        self.other = nn.ConvTranspose2d(2, 2, 2, 2)

    def forward(self, x):
        return self.other(self.up(x)) + self.up(self.up(x))


class Wider(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) + 1


class Called(nn.Module):
    """A model whose forward is a function of its layer `up` and the input."""

    def __init__(self, up, forward=lambda up, x: up(x)):
        super().__init__()
        self.up, self.function = up, forward

    def forward(self, x):
        return self.function(self.up, x)


def texts(model, *inputs, **options):
    """Return the layers of each spec by its text."""
    return {str(each.spec): each.layers for each in trace_layers(model, inputs, **options).kernels}


def spec_text(model, *inputs, **options):
    (text,) = texts(model, *inputs, **options)
    return text


# ---- from a model to kernels ----

MODELS = {
    "a U-Net": (UNet, (2, 3, 16, 12)),
    "a U-Net in channels_last": (
        lambda: UNet().to(memory_format=torch.channels_last),
        (1, 3, 8, 8),
    ),
    "a vocoder": (lambda: Vocoder(parametrizations.weight_norm), (1, 8, 5)),
    "a vocoder of hooks": (vocoder_of_hooks, (2, 8, 3)),
    "one layer at two sizes": (Twice, (1, 2, 3, 5)),
}


def recorded(model, x):
    """Return (layer, input, output) of each call of a layer, and run the model."""
    calls = []
    for name, layer in model.named_modules():
        if isinstance(layer, KINDS):
            layer.register_forward_hook(lambda _, a, y, name=name: calls.append((name, a[0], y)))
    with torch.no_grad():
        model.eval()(x)
    return calls


@pytest.mark.interpreter
@pytest.mark.filterwarnings(OLD_NORM)
@pytest.mark.parametrize("opened", [None, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_emitted_layers_compute_what_the_model_s_do(name, opened, tmp_path, device):
    """Through the document and `convgen emit`, as a user goes."""
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    trace = trace_layers(model, [x], opened=opened)
    document = document_of(trace, "nets:make", "convgen trace", None)
    (tmp_path / "kernels.convgen").write_text(document.text)
    assert run("emit", tmp_path / "kernels.convgen", "-o", tmp_path / "out").exit_code == 0
    statements = {each.name: each.spec for each in parse_document(document.text).statements}
    assert [*statements] == [*document.names]
    calls, served = recorded(model, x), 0
    for kernel, (stem, spec) in zip(trace.kernels, statements.items(), strict=True):
        assert spec == kernel.spec
        text = (tmp_path / "out" / f"{stem}.py").read_text()
        emitted = load_module(text, stem, tmp_path).ModelNew(device=device)
        for layer, given, output in calls:
            if layer not in kernel.layers or (opened is None and spec.input != given.shape):
                continue
            weights = model.get_submodule(layer)
            bias = None if weights.bias is None else weights.bias.detach()
            with torch.no_grad():
                weight = weights.weight.detach()
                emitted.load_state_dict(
                    {"weight": weight, **({} if bias is None else {"bias": bias})}
                )
                emitted.to(memory_format=_format(spec))
                got = emitted(given.to(device)).cpu()
            arrays = (given.numpy(), weight.numpy(), None if bias is None else bias.numpy())
            assert np.allclose(got, scatter(spec, *arrays), rtol=1e-12, atol=1e-12)
            assert torch.allclose(got, output, rtol=1e-12, atol=1e-12)
            served += 1
    assert served == len(calls) > 0


def _format(spec):
    last = spec.layout == "channels_last"
    return torch.channels_last if last else torch.preserve_format


def test_layers_with_one_spec_share_a_statement():
    trace = trace_layers(Twice(), [torch.ones(1, 2, 3, 5)])
    up = "ConvTranspose2d(2, 2, kernel_size=2, stride=2"
    assert {str(each.spec): each.layers for each in trace.kernels} == {
        f"{up}, input=(1, 2, 3, 5))": ("up",),
        f"{up}, input=(1, 2, 6, 10))": ("other", "up"),  # in the order of calls
    }
    assert texts(Twice(), torch.ones(1, 2, 3, 5), opened="all") == {f"{up})": ("up", "other")}


# ---- what a spec says of a call ----

UP = "ConvTranspose2d(3, 4, kernel_size=2, stride=2"


def up(**others):
    return nn.ConvTranspose2d(3, 4, 2, 2, **others)


@pytest.mark.parametrize(
    ("opened", "sizes"), [(None, "(5, 3, 7, 9)"), ("batch", "(None, 3, 7, 9)"), ("all", None)]
)
def test_open_sizes(opened, sizes):
    want = f"{UP})" if sizes is None else f"{UP}, input={sizes})"
    assert spec_text(up(), torch.ones(5, 3, 7, 9), opened=opened) == want


@pytest.mark.parametrize("last", ["input", "weight"])
def test_channels_last_of_input_or_weight_is_enough(last):
    """So torch has it; a file for the other layout would leave its work to torch."""
    model, x = up(), torch.ones(2, 3, 4, 5)
    if last == "input":
        x = x.to(memory_format=torch.channels_last)
    else:
        model.to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert spec_text(model, x) == f"{UP}, input=(2, 3, 4, 5), layout=channels_last)"


def test_an_input_without_a_batch():
    assert spec_text(up(), torch.ones(3, 4, 5)) == f"{UP}, input=(1, 3, 4, 5))"
    last = up().to(memory_format=torch.channels_last)
    assert "has no batch" in trace_layers(last, [torch.ones(3, 4, 5)]).left[""]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_that_of_autocast_where_it_is_on(dtype):
    def forward(layers, x):
        with torch.autocast("cpu", enabled=False):
            y = layers[1](x)
        return layers[0](x), y

    model = Called(nn.ModuleList([up(), up()]), forward)
    found = trace_layers(model, [torch.ones(1, 3, 4, 4)], dtype=dtype)
    assert {each.layers[0]: each.spec.dtype for each in found.kernels} == {
        "up.0": dtype,
        "up.1": "float32",
    }
    for kind in (torch.float64, getattr(torch, dtype)):
        x = torch.ones(1, 3, 4, 4, dtype=kind)
        assert parse(spec_text(up(dtype=kind), x)).dtype == str(kind).removeprefix("torch.")
    x = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    assert parse(spec_text(up(dtype=torch.float64), x, dtype=dtype)).dtype == "float64"


@pytest.mark.parametrize("call", ["keyword", "position"])
def test_an_output_size_is_an_output_padding(call):
    size = (9, 8)
    model = Called(
        up(),
        (lambda up, x: up(input=x, output_size=size))
        if call == "keyword"
        else lambda up, x: up(x, size),
    )
    (kernel,) = trace_layers(model, [torch.ones(1, 3, 4, 4)]).kernels
    assert (kernel.spec.output_padding, kernel.resized) == ((1, 0), True)
    assert kernel.spec.output_spatial == size


def test_arguments_of_a_layer_arrive():
    layer = nn.ConvTranspose3d(
        4, 6, (3, 2, 1), (2, 1, 3), (1, 0, 0), (1, 0, 2), 2, False, (1, 2, 1)
    )
    assert spec_text(layer, torch.ones(1, 4, 3, 3, 3)) == (
        "ConvTranspose3d(4, 6, kernel_size=(3, 2, 1), stride=(2, 1, 3), padding=(1, 0, 0), "
        "output_padding=(1, 0, 2), groups=2, bias=False, dilation=(1, 2, 1), input=(1, 4, 3, 3, 3))"
    )


def own_forward():
    layer = up()
    layer.forward = nn.ConvTranspose2d.forward.__get__(layer)
    return layer


def emitted():
    model = up()
    convgen.replace_layers(model)
    return model


LEFT = {
    "a subclass": (lambda: Wider(3, 4, 2, 2), "its class Wider overrides forward"),
    "a parametrized subclass": (
        lambda: parametrizations.weight_norm(Wider(3, 4, 2, 2)),
        "its class Wider overrides forward",
    ),
    "a forward of its own": (own_forward, "its forward was set on the layer itself"),
    "complex numbers": (lambda: up(dtype=torch.complex64), "dtype must be one of"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_layer_without_a_spec_is_named_with_the_reason(name):
    make, reason = LEFT[name]
    model = Called(
        nn.ModuleList([up(), make()]), lambda up, x: (up[0](x), up[1](x.to(up[1].weight.dtype)))
    )
    trace = trace_layers(model, [torch.ones(1, 3, 4, 4)])
    assert [each.layers for each in trace.kernels] == [("up.0",)]
    assert [*trace.left] == ["up.1"]
    assert trace.left["up.1"].startswith(reason)
    assert trace.uncalled == ()


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:this file was generated for:UserWarning")
@pytest.mark.filterwarnings("ignore:.*computed by torch")  # on the CPU, where a GPU is
def test_an_emitted_layer_is_no_layer_to_emit():
    trace = trace_layers(emitted(), [torch.ones(1, 3, 4, 4)])
    assert (trace.kernels, trace.left) == ((), {"": "it runs an emitted kernel already"})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` :DeprecationWarning")
def test_a_scripted_layer_is_named():
    """Its calls cannot be seen."""
    model = nn.Sequential(up(), torch.jit.script(nn.Sequential(nn.ConvTranspose2d(4, 4, 2))))
    trace = trace_layers(model, [torch.ones(1, 3, 4, 4)])
    assert [each.layers for each in trace.kernels] == [("0",)]
    assert trace.left == {"1.0": "it is scripted, which hides its calls"}


def test_an_empty_input_has_no_spec():
    model = Called(up(), lambda up, x: (up(x), up(x[:0])))
    trace = trace_layers(model, [torch.ones(1, 3, 4, 4)])
    assert [each.layers for each in trace.kernels] == [("up",)]
    assert trace.left["up"].startswith("input must be an integer from 1")


def test_a_lazy_layer_gets_its_spec_when_it_runs():
    model = nn.LazyConvTranspose2d(4, 2, 2)
    assert spec_text(model, torch.ones(1, 3, 4, 5)) == f"{UP}, input=(1, 3, 4, 5))"
    assert model.has_uninitialized_params()


def test_a_compiled_model_calls_its_layers():
    """A graph calls no hooks."""
    torch._dynamo.reset()
    model, x = nn.Sequential(up()), torch.ones(1, 3, 4, 5)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert texts(compiled, x) == {f"{UP}, input=(1, 3, 4, 5))": ("_orig_mod.0",)}


# ---- the caller's model ----


@pytest.mark.filterwarnings(OLD_NORM)
def test_the_caller_s_model_stays_as_it_is():
    """Modes, buffers, hooks, weights, inputs and random numbers; the model draws and counts."""

    class Noisy(UNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(1)
            random.random(), np.random.rand(), x.add_(torch.rand(()))
            return super().forward(x)

    for model in (Noisy(), parametrizations.spectral_norm(up()), nn.utils.weight_norm(up())):
        model.train()
        x = torch.ones(1, 3, 8, 8)
        model(x.clone())  # leaves a weight that torch cannot copy, of weight_norm
        state = {name: value.clone() for name, value in model.state_dict().items()}
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        counted = len(getattr(model, "seen", ()))
        assert trace_layers(model, [x]).kernels
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(after[0], before[0])
        assert after[1:] == before[1:]
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        assert all(module.training for module in model.modules())
        assert not any(m._forward_hooks for m in model.modules())
        assert torch.equal(x, torch.ones(1, 3, 8, 8))
        assert len(getattr(model, "seen", ())) == counted


def test_a_forward_that_fails_leaves_no_hook():
    model = Called(up(), lambda up, x: up(x) + None)
    with pytest.raises(ModelError) as caught:
        trace_layers(model, [torch.ones(1, 3, 4, 4)], in_place=True)
    assert isinstance(caught.value.__cause__, TypeError)
    assert f"{__file__}:" in str(caught.value)
    assert "up(x) + None" in str(caught.value)
    assert not model.up._forward_hooks


def test_a_model_that_cannot_be_copied_runs_in_place():
    model = up()
    model.lock = threading.Lock()
    x = torch.ones(1, 3, 4, 5)
    with pytest.raises(SpecError, match=r"cannot be copied .*lock.*; in_place=True runs it"):
        trace_layers(model, [x])
    assert texts(model, x, in_place=True) == {f"{UP}, input=(1, 3, 4, 5))": ("",)}


WRONG = {
    "model": ({"model": up}, "model must be a torch.nn.Module"),
    "meta": ({"model": up(device="meta")}, "model lies on the device meta"),
    "inputs": ({"inputs": []}, r"forward\(input.* does not take 0 inputs: missing .*'input'"),
    "dtype": ({"dtype": "float64"}, "dtype must be one of float16, bfloat16"),
    "device": ({"device": "cpuu"}, r"device must be one of cpu, cuda.*did you mean cpu"),
    "opened": ({"opened": "spatial"}, "opened must be one of batch, all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    wrong, message = WRONG[name]
    with pytest.raises(SpecError, match=message):
        trace_layers(**{"model": up(), "inputs": [torch.ones(1, 3, 4, 4)]} | wrong)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="torch sees none"):
        trace_layers(up(), [torch.ones(1, 3, 4, 4)], device="cuda")


@pytest.mark.gpu
def test_a_trace_on_a_gpu_sees_the_same(device):
    x = torch.ones(1, 3, 8, 8)
    for dtype in (None, "float16"):
        on_cpu = texts(UNet(), x, dtype=dtype)
        assert texts(UNet(), x, dtype=dtype, device=device) == on_cpu
        assert texts(UNet().to(device), x.to(device), dtype=dtype) == on_cpu
