"""`convgen.replace_layers`: a model with emitted layers beside the same model with torch's.

The references are copies of the model made before the call. Specs are in float64, where both agree
closely; a layer that silently left its work to torch would warn, and warnings are errors here.
"""

import copy
import functools
import itertools
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize

import convgen
from convgen import SpecError, parse
from convgen.errors import MachineError
from convgen.execution.local_gpu import local_target
from convgen.network import layers

pytestmark = pytest.mark.interpreter

close = functools.partial(torch.allclose, rtol=1e-10, atol=1e-10)
KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A layer is compiled for the GPU at hand; without one its spec names no target.
TARGET = f", target={local_target().name}" if torch.cuda.is_available() else ""
UP = f"ConvTranspose2d(4, 4, kernel_size=3, stride=2, padding=1, dtype=float64, layout=any{TARGET})"


def up(device, **others):
    given = {"kernel_size": 3, "stride": 2, "padding": 1, "device": device}
    return nn.ConvTranspose2d(4, 4, **given | others)


@pytest.fixture(autouse=True)
def float64():
    """Let layers be in float64 unless they say otherwise."""
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 5, 3, device=device)


def gradients(model, x):
    """Return output, gradients of the input, and those of the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))]


def agree(model, reference, x):
    """Whether both give the same, recording and not."""
    same = close(torch.no_grad()(model)(x), torch.no_grad()(reference)(x))
    return same and all(map(close, gradients(model, x), gradients(reference, x)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_layer_of_a_model_is_replaced(rank, device):
    """An argument that gets lost on the way is another layer."""
    kind = KINDS[rank - 1]
    model = nn.Sequential(
        kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Sequential(kind(6, 4, 2, dilation=2), nn.BatchNorm1d(4) if rank == 1 else nn.Tanh()),
    ).to(device)
    reference = copy.deepcopy(model)
    found = convgen.replace_layers(model)
    assert [*found] == ["0", "2.0"]
    layout = "" if rank == 1 else ", layout=any"
    text = f"(6, 4, kernel_size=2, stride=1, dilation=2, dtype=float64{layout}{TARGET})"
    assert found["2.0"] == f"ConvTranspose{rank}d{text}"
    layers = [layer for layer in model.modules() if isinstance(layer, KINDS)]
    assert [hasattr(layer, "_convgen") for layer in layers] == [True, True]
    assert str(model) == str(reference)
    assert agree(model, reference, torch.randn(2, 4, *(3,) * rank, device=device))


def losses(model, optimizer, x):
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_an_optimizer_of_before_trains_what_it_trained(x, device):
    """New Parameter objects, or a frozen weight that thaws, leave the loss on another course."""
    model = nn.Sequential(up(device), nn.Tanh(), up(device))
    model[2].weight.requires_grad_(False)
    reference = copy.deepcopy(model)
    before = [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, reference)]
    convgen.replace_layers(model)
    assert [(id(p), p.requires_grad) for p in model.parameters()] == before
    want = losses(reference, optimizers[1], x)
    assert losses(model, optimizers[0], x) == pytest.approx(want, rel=1e-9)
    assert want[3] < want[0]


def test_checkpoints_fit_both_ways(x, device):
    """A key of another name, or a packed weight that outlives a checkpoint."""
    model, other = (nn.Sequential(up(device), nn.Tanh(), up(device)) for _ in range(2))
    reference = copy.deepcopy(model)
    convgen.replace_layers(model)
    assert [*model.state_dict()] == [*reference.state_dict()]
    model.eval()
    torch.no_grad()(model)(x)
    model.load_state_dict(other.state_dict())
    assert agree(model, other, x)
    reference.load_state_dict(model.state_dict())
    assert agree(reference, other, x)


def test_what_is_shared_stays_shared(x, device):
    """A layer in two places, or a weight in two layers, would be trained as two."""
    first, second = up(device), up(device)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": nn.Sequential(first, second)})
    reference = copy.deepcopy(model["b"])
    assert [*convgen.replace_layers(model)] == ["a", "b.1"]
    assert model["a"] is model["b"][0] is first
    assert first.weight is second.weight
    assert type(first) is type(second)  # one file for one spec
    assert agree(model["b"], reference, x)


def test_nothing_else_of_a_layer_changes(x, device):
    """Hooks, modes and attributes are the model's own: any that is lost is lost in silence."""
    model = nn.Sequential(up(device), up(device).eval())
    references, seen = [*model], []
    model[0].register_forward_hook(lambda layer, inputs, y: y * 2)
    model[0].register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 1,))
    model[0].weight.register_hook(seen.append)
    model[0].note = "skip"
    model[0].register_buffer("scale", torch.ones(1, device=device))
    reference = copy.deepcopy(model)
    state = torch.get_rng_state()
    convgen.replace_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert references[0] is model[0]
    assert (model[0].training, model[1].training) == (True, False)
    assert (model[0].note, model[0].in_channels, model[0].kernel_size) == ("skip", 4, (3, 3))
    assert [*model.state_dict()] == [*reference.state_dict()]
    assert agree(model, reference, x)
    assert len(seen) == 1


def test_a_model_that_is_a_layer_is_replaced(x, device):
    model = up(device)
    reference = copy.deepcopy(model)
    assert convgen.replace_layers(model) == {"": UP}
    assert hasattr(model, "_convgen")
    assert agree(model, reference, x)
    assert agree(copy.deepcopy(model), reference, x)
    assert agree(pickle.loads(pickle.dumps(model)), reference, x)
    kind = type(model)
    assert convgen.replace_layers(model) == {"": UP}  # which it is by now
    assert type(model) is kind


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.orthogonal],
    ids=["by hooks", "weight_norm", "orthogonal"],
)
def test_parametrized_layers_train_as_before(change, x, device):
    """A weight computed once, and not at every call, follows its parameters no more."""
    model = nn.Sequential(change(up(device)))
    reference = copy.deepcopy(model) if change is not nn.utils.weight_norm else None
    if reference is None:  # torch cannot copy these
        reference = nn.Sequential(change(up(device)))
        reference.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, reference)]
    assert convgen.replace_layers(model) == {"0": UP}
    want = losses(reference, optimizers[1], x)
    assert losses(model, optimizers[0], x) == pytest.approx(want, rel=1e-9)
    reference.load_state_dict(model.state_dict())
    assert agree(model, reference, x)


def test_a_parametrization_can_be_removed_afterwards(x, device):
    """The class it leaves behind must be the emitted one, for this layer alone."""
    model = nn.Sequential(*(parametrizations.weight_norm(up(device)) for _ in range(2)))
    reference = copy.deepcopy(model)
    convgen.replace_layers(model)
    for changed in (model, reference):
        parametrize.remove_parametrizations(changed[0], "weight")
    assert parametrize.is_parametrized(model[1])
    assert hasattr(model[0], "_convgen")
    assert [*model.state_dict()] == [*reference.state_dict()]
    assert agree(model, reference, x)


def test_reading_a_spectral_norm_does_not_count_as_training(device):
    """In training each read of the weight moves its buffers one step on."""
    model = parametrizations.spectral_norm(up(device))
    before = copy.deepcopy(model.state_dict())
    convgen.replace_layers(model)
    assert all(part.training for part in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_spectral_norm_steps_once_a_call(x, device):
    """A module that reads its weight several times in a call trains another network."""
    model = parametrizations.spectral_norm(up(device))
    reference = copy.deepcopy(model)
    convgen.replace_layers(model)
    model(x), reference(x)
    states = model.state_dict(), reference.state_dict()
    assert all(close(states[0][name], states[1][name]) for name in states[0])


class Wider(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) + 1


class Marked(torch.Tensor):
    pass


def own_forward(device):
    layer = up(device)
    layer.forward = functools.partial(nn.ConvTranspose2d.forward, layer)
    return layer


def marked(device):
    layer = up(device)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Marked))
    return layer


def meant_for(padding_mode, device):
    layer = up(device)
    layer.padding_mode = padding_mode
    return layer


LEFT = {
    "subclass": (
        lambda device: Wider(4, 4, 3, device=device),
        "its class Wider overrides forward$",
    ),
    "parametrized subclass": (
        lambda device: parametrizations.weight_norm(Wider(4, 4, 3, device=device)),
        "its class Wider overrides forward$",
    ),
    "forward": (own_forward, "its forward was set on the layer itself"),
    "tensor": (marked, "its weight is a Marked"),
    "complex": (lambda device: up(device, dtype=torch.complex64), "dtype must be one of"),
    "too long": (lambda device: up(device, kernel_size=(1, 5000)), "kernel_size must be"),
    "padding": (functools.partial(meant_for, "circular"), "padding_mode must be zeros"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_layer_that_must_stay_is_named(name, device):
    """Half replaced in silence, a model is not what its owner thinks it is."""
    make, reason = LEFT[name]
    model = nn.ModuleDict({"ok": up(device), "odd": make(device)})
    kind = type(model["odd"])
    with pytest.warns(UserWarning, match=f"^left as they are: odd: {reason}") as caught:
        assert convgen.replace_layers(model) == {"ok": UP}
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(model["odd"]) is kind


def test_layers_on_other_devices_stay(monkeypatch):
    """A kernel for CUDA cannot follow; here the CPU plays such a device."""
    monkeypatch.setattr(layers, "DEVICES", ("cuda", "meta"))
    with pytest.warns(UserWarning, match="the model: it lies on cpu, not on"):
        assert convgen.replace_layers(up("cpu")) == {}
    assert convgen.replace_layers(up("meta")) == {"": UP}


def test_a_warning_that_is_an_error_changes_nothing(device):
    model = nn.ModuleDict({"ok": up(device), "odd": Wider(4, 4, 3, device=device)})
    with pytest.raises(UserWarning, match="odd"):
        convgen.replace_layers(model)
    assert type(model["ok"]) is nn.ConvTranspose2d


def test_a_lazy_layer_must_have_run(x, device):
    """Its channels are not known before; what stands beside it must not change either."""
    model = nn.Sequential(up(device), nn.LazyConvTranspose2d(4, 3, 2, 1, device=device))
    with pytest.raises(SpecError, match=r"^layer '1' is lazy .*: run the model once first$"):
        convgen.replace_layers(model)
    assert type(model[0]) is nn.ConvTranspose2d
    model(x)
    reference = copy.deepcopy(model)
    assert [*convgen.replace_layers(model).values()] == [UP, UP]
    assert agree(model, reference, x)


WRONG = {
    "model": ({"model": "up"}, "model must be a torch.nn.Module, got 'up'"),
    "target": ({"target": "h1000"}, "target must be one of .*, got 'h1000' .did you mean h100"),
    "precision": ({"precision": "tf16"}, "precision must be one of tf32, .*, got 'tf16'"),
    "precision of": ({"precision": "ieee", "dtype": "float16"}, "precision is for dtype float32"),
    "dtype": ({"dtype": "float64"}, "dtype must be None .*, float16 or bfloat16 .*got 'float64'"),
    "folder": ({"folder": 3}, "folder must be a path or None, got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name, device):
    arguments, message = WRONG[name]
    model = up(device)
    with pytest.raises(SpecError, match=message):
        convgen.replace_layers(**{"model": model} | arguments)
    assert type(model) is nn.ConvTranspose2d


def test_layers_in_one_model_have_specs_of_their_own(device):
    """A spec that is taken from the first layer would run the others in its dtype."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    model = nn.Sequential(*(up(device, dtype=dtype) for dtype in dtypes))
    made = convgen.replace_layers(model, target="h100", precision="ieee")
    specs = [parse(text) for text in made.values()]
    names = ["float32", "float16", "bfloat16", "float64"]
    assert [spec.dtype for spec in specs] == names
    assert [spec.precision for spec in specs] == ["ieee", None, None, None]
    assert {spec.target for spec in specs} == {"h100"}
    for layer, dtype in zip(model, dtypes, strict=True):
        assert layer.weight.dtype == dtype
        assert layer(torch.ones(1, 4, 2, 2, dtype=dtype, device=device)).dtype == dtype


@pytest.mark.gpu
def test_the_target_is_the_gpu_at_hand(device):
    for where in ("cpu", device):
        (text,) = convgen.replace_layers(up(where)).values()
        assert parse(text).target == local_target().name


# That the kernel runs under autocast is the emitted file's part, and tested there.
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_dtype_for_autocast_leaves_the_parameters(name, x, device):
    """Parameters in 16 bits lose the small steps of an optimizer."""
    dtype = getattr(torch, name)
    model = nn.Sequential(up(device, dtype=torch.float32), up(device, dtype=torch.float32))
    reference = copy.deepcopy(model)
    made = convgen.replace_layers(model, dtype=name)
    assert [parse(text).dtype for text in made.values()] == [name, name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.autocast(device, dtype):
        got, want = model(x.float()), reference(x.float())
    assert got.dtype == want.dtype == dtype
    assert torch.allclose(got, want, atol=20 * torch.finfo(dtype).eps)


FORMATS = {
    2: (torch.contiguous_format, torch.channels_last),
    3: (torch.contiguous_format, torch.channels_last_3d),
}
SHAPES = {
    "dense": ((4, 6, 3), {}),
    "pointwise": ((4, 6, 1), {}),
    "depthwise": ((4, 4, 3), {"groups": 4}),
    "a column": ((4, 6, (3, 1)), {}),
    "a volume": ((4, 6, 2), {}),
    "a depthwise volume": ((4, 4, 3), {"groups": 4}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_runs_a_kernel(shape, device):
    """Replaced once, a layer takes what arrives; what it gives is laid out as torch's is.

    Weights with an axis of size 1 are dense in both formats; torch looks at their strides.
    """
    arguments, others = SHAPES[shape]
    rank = 3 if "volume" in shape else 2
    layer = KINDS[rank - 1](*arguments, **others, dtype=torch.float32, device=device)
    for parameter in layer.parameters():  # integers, which sum exactly in TF32, too
        nn.init.trunc_normal_(parameter, std=2).data.round_()
    reference = copy.deepcopy(layer)
    assert parse(convgen.replace_layers(layer, strict=True)[""]).layout == "any"
    kind = type(layer)
    x = torch.randint(-2, 3, (2, 4, 5, 3, 2)[: rank + 2], device=device).float()
    for of_weight, of_input in itertools.product(FORMATS[rank], FORMATS[rank]):
        want = reference.to(memory_format=of_weight)(x.to(memory_format=of_input))
        got = layer.to(memory_format=of_weight)(x.to(memory_format=of_input))
        assert got.stride() == want.stride()
        assert torch.equal(got, want)
        last = torch.contiguous_format not in (of_weight, of_input)
        assert not last or want.is_contiguous(memory_format=of_input)
    (row,) = convgen.report(layer).layers
    assert (row.kernel_calls, row.torch_calls) == (4, {})
    convgen.replace_layers(layer, strict=True)  # its weight is in channels_last by now
    assert type(layer) is kind


def test_arguments_may_have_been_edited(x, device):
    """Torch runs a layer whose stride is one integer, or a list, as one with a tuple."""
    layer = up(device)
    layer.stride, layer.dilation = 2, [1, 1]
    reference = copy.deepcopy(layer)
    assert convgen.replace_layers(layer) == {"": UP}
    assert agree(layer, reference, x)


def test_compiled_models_see_the_change(x, device):
    """A graph of before the call would go on with torch's layers, and one of after must be one."""
    torch._dynamo.reset()
    model = nn.Sequential(up(device), nn.Tanh(), up(device))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    assert [*convgen.replace_layers(compiled)] == ["_orig_mod.0", "_orig_mod.2"]
    counter = torch._dynamo.testing.CompileCounter()
    again = torch.compile(model, fullgraph=True, backend=counter)
    for model in (compiled, again):
        assert close(model(x), reference(x))
    assert counter.frame_count == 1


@pytest.mark.interpreter
def test_a_compiled_layer_is_guarded_by_little(device: str) -> None:
    """Each guard is evaluated at every call of a graph; there were twice as many."""
    x = torch.randn(1, 8, 8, 8, device=device)
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2)).to(device).requires_grad_(False)
    guards: list[int] = []

    def noted(entries: Any) -> list[bool]:
        guards.append(len(entries))
        return [True] * len(entries)

    for replaced in (False, True):
        if replaced:
            convgen.replace_layers(model)
        torch.compiler.reset()
        torch.compile(model, backend="eager", options={"guard_filter_fn": noted})(x)
    assert guards[1] <= guards[0] + 40  # torch 2.13: 27, torch 2.11: 38


@pytest.mark.parametrize("call", ["replace_layers", "restore_layers", "report", "freeze"])
def test_without_torch_a_model_is_no_traceback(call, monkeypatch):
    """The compiler alone does not need it."""
    wanted = pytest.raises(MachineError, match="models need torch, of convgen's extra 'torch'")
    with monkeypatch.context() as patch, wanted:
        patch.setitem(sys.modules, "torch", None)
        getattr(convgen, call)("up")
