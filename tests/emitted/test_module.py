"""`ModelNew` of emitted files beside torch's own layer: the same weights, results and training.

The references are torch's modules, never the emitted fallback; float64 specs compare closely.
"""

import copy
import functools
import inspect
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize, prune

import convgen
from convgen.execution.loading import load_module

pytestmark = pytest.mark.interpreter

DOUBLE = "ConvTranspose2d(4, 6, 3, stride=2, padding=1, dtype=float64)"
STAGED = f"relu | {DOUBLE} | tanh"
KNOWN = f"relu | {DOUBLE[:-1]}, input=(2, 4, 5, None)) | tanh"
close = functools.partial(torch.allclose, rtol=1e-10, atol=1e-10)
WARNING = "^computed by torch: this file was generated for .*got "


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The function from a spec's text to its module, importable by its name as pickle needs it."""
    folder, count = tmp_path_factory.mktemp("emitted"), itertools.count()
    with pytest.MonkeyPatch.context() as patch:

        @functools.cache
        def load(text):
            module = load_module(convgen.emit(text), f"emitted_layer_{next(count)}", folder)
            patch.setitem(sys.modules, module.__name__, module)
            return module

        yield load


@pytest.fixture
def x(device):
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 5, 6, generator=random, dtype=torch.float64).to(device)


def twin(model, **others):
    """Return torch's layer with copies of the model's weights."""
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1}
    layer = nn.ConvTranspose2d(**given | others)
    layer.weight = nn.Parameter(model.weight.detach().clone())
    layer.bias = copy.deepcopy(model.bias)
    return layer


def agree(model, x, **others):
    """Whether the model gives what torch's layer gives, without recording and with."""
    want = twin(model, **others)(x)
    return close(torch.no_grad()(model)(x), want) and close(model(x), want)


def state(layer):
    return [(name, tensor.tolist()) for name, tensor in layer.state_dict().items()]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_arguments_state_and_initialisation_are_torchs(rank, load):
    """A parameter drawn in another order breaks seeds, a key of another name checkpoints."""
    model_class = load(f"ConvTranspose{rank}d(4, 6, 3, stride=2, groups=2)").ModelNew
    torch_class = getattr(nn, f"ConvTranspose{rank}d")
    parameters = [inspect.signature(made).parameters for made in (model_class, torch_class)]
    assert list(parameters[0]) == list(parameters[1])
    models, layers = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        models.append(model_class())
        torch.manual_seed(seed)
        layers.append(torch_class(4, 6, 3, stride=2, groups=2))
    assert state(models[0]) == state(layers[0])
    models[0].load_state_dict(layers[1].state_dict())
    layers[0].load_state_dict(models[1].state_dict())
    assert state(models[0]) == state(layers[1]) == state(layers[0])
    assert isinstance(models[0], torch_class)
    assert str(nn.Sequential(models[0])) == str(nn.Sequential(layers[0]))
    assert convgen.parse(str(models[0])) == convgen.parse(str(layers[0]))


def test_what_looks_for_torchs_layers_finds_it(load):
    """`spectral_norm` takes another axis of a transposed convolution's weight."""
    found = []
    for layer in (model := load(DOUBLE).ModelNew()), twin(model):
        torch.manual_seed(5)
        norm = nn.utils.parametrizations.spectral_norm(layer).parametrizations.weight[0]
        found.append((norm.dim, norm._u.shape))
    assert found[0] == found[1] == (1, (6,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_torchscript_gets_torchs_layer(frozen, load, x, device):
    """A script has no place for a kernel: left to itself it would fail on a line of the file."""
    model = load(DOUBLE).ModelNew(device=device)
    if frozen:
        model.freeze()
    layer = twin(model)
    for scripted in (torch.jit.script(model), torch.jit.script(nn.Sequential(model))):
        assert close(scripted(x), layer(x))
    assert torch.equal(scripted.state_dict()["0.weight"], model.weight)


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_a_pipeline_is_not_scripted_as_the_layer_alone(load):
    """Torch's layer would leave the stages out, in silence."""
    with pytest.raises(RuntimeError, match="ModelNew"):
        torch.jit.script(load(STAGED).ModelNew())


def test_channels_that_the_spec_leaves_open_are_required(load, x, device):
    """A default for them would be somebody else's layer."""
    open_both = load("ConvTranspose2d(kernel_size=3, dtype=float64)").ModelNew
    open_out = load("ConvTranspose2d(4, None, 3, bias=False, dtype=float64)").ModelNew
    for make in (open_both, lambda: open_both(4), open_out, lambda: open_out(4)):
        with pytest.raises(TypeError, match="required positional argument"):
            make()
    geometry = {"stride": 1, "padding": 0}
    assert agree(open_both(4, 7, device=device), x, **geometry)
    assert agree(open_out(4, 3, device=device), x, **geometry)


@pytest.mark.parametrize("wrong", [{"padding_mode": "reflect"}, {"groups": 3}, {"groups": 0}])
def test_wrong_arguments_raise_what_torch_raises(wrong, load):
    """What torch refuses to build cannot fall back to it."""
    with pytest.raises(ValueError, match=r"\w") as want:
        nn.ConvTranspose2d(4, 6, 3, **wrong)
    with pytest.raises(ValueError, match=r"\w") as got:
        load(DOUBLE).ModelNew(**wrong)
    assert str(got.value).replace("ModelNew", "ConvTranspose2d") == str(want.value)


same = nn.Identity()
OTHERS = {  # arguments of the module, the input, and what the warning must name
    "stride": ({"stride": 1}, same, "(1, 1)"),
    "padding": ({"padding": (0, 1)}, same, "(0, 1)"),
    "output_padding": ({"output_padding": 1}, same, "(1, 1)"),
    "dilation": ({"dilation": (1, 2)}, same, "(1, 2)"),
    "groups": ({"groups": 2}, same, "2)"),
    "kernel_size": ({"kernel_size": (3, 4)}, same, "(4, 6, 3, 4)"),
    "out_channels": ({"out_channels": 5}, same, "(4, 5, 3, 3)"),
    "bias": ({"bias": False}, same, "bias=None"),
    "dtype": ({"dtype": torch.float32}, torch.Tensor.float, "torch.float32"),
    "height": ({}, lambda x: x[:, :, 1:], "(2, 4, 4, 6)"),
    "unbatched": ({}, lambda x: x[1], "(1, 4, 5, 6)"),
    "layout": ({}, lambda x: x.to(memory_format=torch.channels_last), "channels_last"),
}


def warned(model, x, *more):
    """Return the results of two calls, without recording and with, and the only warning."""
    with pytest.warns(UserWarning, match=WARNING) as caught:
        results = [torch.no_grad()(model)(x, *more), model(x, *more)]
    assert len(caught) == 1
    return *results, str(caught[0].message).partition("got ")[2]


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_file_is_not_for_is_left_to_torch(name, load, x, device):
    """A fallback that forgets the stages, or an argument, gives another network's numbers."""
    arguments, change, named = OTHERS[name]
    model = load(KNOWN).ModelNew(**arguments, device=device)
    want = torch.tanh(twin(model, **arguments)(F.relu(change(x))))
    first, second, got = warned(model, change(x))
    assert named in got
    for result in (first, second):
        assert torch.allclose(result, want)
        assert result.stride() == want.stride()


def test_an_unbatched_input_is_not_told_to_be_in_another_layout(load, x, device):
    """Torch gives it an output in channels_first, whatever its strides."""
    layer = "ConvTranspose2d(4, 6, 3, dtype=float64, layout=channels_last)"
    last = x.to(memory_format=torch.channels_last)
    assert warned(load(layer).ModelNew(device=device), last[1])[2] == "an unbatched input"
    assert warned(load(layer).ModelNew(device=device), x)[2] == "channels_first"


def test_output_size_is_torchs(load, x, device):
    """It moves output_padding; sizes that no output_padding reaches raise as in torch."""
    model = load(STAGED).ModelNew(device=device)
    first, _, got = warned(model, x, (10, 12))
    assert close(first, torch.tanh(twin(model)(F.relu(x), (10, 12))))
    assert got == "(10, 12)"
    with pytest.raises(ValueError, match="requested an output size"):
        model(x, (11, 11))


def drawn(model):
    return type(model)(device=model.weight.device).state_dict()


EDITS = {  # those that keep parameter and layout are in test_weight_edits.py
    "init": lambda model: nn.init.normal_(model.weight),
    "assign": lambda model: model.load_state_dict(drawn(model), assign=True),
    "replace": lambda model: setattr(model, "weight", nn.Parameter(model.weight.detach() + 1)),
    "data transposed": lambda model: setattr(model.weight, "data", model.weight.data.mT),
    # As .to() does: the new numbers may lie where the old ones lay before.
    "move": lambda model: model._apply(lambda tensor: tensor.data.mul_(2)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_changed_weight_is_packed_again(name, load, x, device):
    model = load(DOUBLE).ModelNew(device=device)
    assert agree(model, x)
    before = torch.no_grad()(model)(x)
    EDITS[name](model)
    assert agree(model, x)
    assert not close(model(x), before)


def test_fewer_channels_of_the_same_weight_are_packed_again(load, x, device):
    """They lie where all of them lay, and nothing counts such a change of `data`."""
    model = load("ConvTranspose2d(kernel_size=3, dtype=float64)").ModelNew(4, 6, device=device)
    geometry = {"stride": 1, "padding": 0}
    assert agree(model, x, **geometry)
    model.weight.data = model.weight.data[:2]
    assert agree(model, x[:, :2], **geometry)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_a_look_at_the_output_before_the_step_packs_nothing_for_good(optimizer, load, x, device):
    """A sample for the log, between loss and step: the step may leave no trace on the weight."""
    model = load(DOUBLE).ModelNew(device=device)
    fused = (optimizer, device) != (torch.optim.Adagrad, "cuda")  # which torch has not
    steps = optimizer(model.parameters(), lr=0.1, fused=fused)
    loss = model(x).square().sum()
    with torch.no_grad():
        model(x)
    loss.backward()
    steps.step()
    with torch.no_grad():
        assert close(model(x), twin(model)(x))


def test_a_look_at_the_output_between_gradient_and_step_is_no_longer_true_after_it(load, x, device):
    """A generator runs without recording while its gradients wait: its weight is packed again."""
    model = load(DOUBLE).ModelNew(device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(x).square().sum().backward()
        torch.no_grad()(model)(x)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert close(model(x), twin(model)(x))


def test_memory_that_was_left_is_not_taken_for_the_weight_s(load, x, device):
    """Of a weight that is replaced twice the second may lie where the first one lay."""
    model = load(DOUBLE).ModelNew(device=device)
    for _ in range(20):
        for _ in range(2):
            model.weight.data = torch.randn_like(model.weight)
        with torch.no_grad():
            assert close(model(x), twin(model)(x))


BIASES = {
    "pruned": lambda model: prune.l1_unstructured(model, "bias", 0.5),
    "parametrized": lambda model: parametrize.register_parametrization(model, "bias", nn.Tanh()),
    "a tensor": lambda model: (
        model._parameters.pop("bias"),
        setattr(model, "bias", torch.ones_like(model.weight[0, :, 0, 0])),
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_the_bias_need_not_be_a_parameter(name, load, x, device):
    """A replica for data parallelism has plain tensors, for one."""
    model = load(DOUBLE).ModelNew(device=device)
    reference = twin(model)
    for each in (model, reference):
        BIASES[name](each)
    with torch.no_grad():
        assert close(model(x), reference(x))


@pytest.mark.parametrize("recording", [True, False])
def test_a_weight_that_others_train_is_packed_again(recording, load, x, device):
    """A tied weight has its gradients elsewhere, and a fused optimizer leaves no trace on it."""
    model = load(DOUBLE).ModelNew(device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.set_grad_enabled(recording):
            assert close(model(x), twin(model)(x))
        (model.weight.sum() + model.bias.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert close(model(x), twin(model)(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(duplicate, load, x, device):
    """A packed copy that two modules share follows the weight of one of them."""
    model = load(STAGED).ModelNew(device=device)
    with torch.no_grad():
        want = model(x)
        other = duplicate(model)
        assert torch.equal(other(x), want)
        nn.init.zeros_(other.weight)
        assert torch.equal(model(x), want)
        assert not close(other(x), want)


def losses(model, x, optimizer):
    """Return the losses of some steps, evaluating without recording between them."""
    optimizer = optimizer(model.parameters(), lr=0.01, fused=True)
    found = []
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(torch.no_grad()(model)(x).square().sum().item())
    return found


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_as_with_torchs_layer(optimizer, load, x, device):
    """A wrong gradient, or a packed weight that lags a step behind, changes the next loss."""
    model = load(STAGED).ModelNew(device=device)
    reference = nn.Sequential(nn.ReLU(), twin(model), nn.Tanh())
    assert losses(model, x, optimizer) == pytest.approx(losses(reference, x, optimizer), rel=1e-9)


STAGES = {
    DOUBLE: (same, same),
    STAGED: (F.relu, torch.tanh),
    f"sigmoid | {DOUBLE} | leaky_relu(0.2)": (torch.sigmoid, lambda y: F.leaky_relu(y, 0.2)),
}


@pytest.mark.parametrize("text", STAGES)
def test_gradients_and_their_gradients_are_torchs(text, load, x, device):
    """The weight depends on the input here: no gradient may count that dependence by itself."""
    before, after = STAGES[text]
    model = load(text).ModelNew(device=device)
    x, w, b = (tensor.detach().requires_grad_() for tensor in (x, model.weight, model.bias))
    found = []
    for y in (
        load(text).conv_transpose2d(x, w * x.mean(), b),
        after(F.conv_transpose2d(before(x), w * x.mean(), b, 2, 1)),
    ):
        first = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))
        found.append([*first, *second])
    assert all(map(close, *found))


@pytest.mark.parametrize("recording", [True, False])
def test_the_module_compiles_and_exports(recording, load, x, device):
    """The packed weight's address must not be asked for where tensors have none."""
    model = load(STAGED).ModelNew(device=device)
    torch._dynamo.reset()
    with torch.set_grad_enabled(recording):
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)
        free = torch.export.Dim.DYNAMIC
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: free, 2: free, 3: free},))
        assert torch.equal(exported.module()(x[:1, :, 1:]), model(x[:1, :, 1:]))


def test_cpu_tensors_need_the_interpreter(tmp_path):
    """Without it the function refuses them, and the module leaves them to torch."""
    (tmp_path / "layer.py").write_text(convgen.emit(DOUBLE), encoding="utf-8")
    code = """if True:
        import layer, torch
        model, x = layer.ModelNew(), torch.ones(2, 4, 5, 5, dtype=torch.float64)
        print(tuple(model(x).shape))
        layer.conv_transpose2d(x, model.weight, model.bias)"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert ran.stdout.split() == [b"(2,", b"6,", b"9,", b"9)"]
    assert b"for one CUDA device, got cpu" in ran.stderr.splitlines()[-1]


def test_a_layer_that_torch_computes_compiles_too(load, x, device):
    """Dynamo traces no warning, and the whole model must not lose its graph for one."""
    model = load(DOUBLE).ModelNew(stride=1, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert close(compiled(x), twin(model, stride=1)(x))
