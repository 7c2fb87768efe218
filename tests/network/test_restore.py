"""`convgen.restore_layers`: what replacing changed is as it was, whatever happened in between.

What would break it: an attribute that stays behind, a class that is another than before, a layer
that goes on with a kernel's packed weight. References are copies of the model made before.
"""

import copy
import functools
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm

import convgen
from convgen import SpecError
from convgen.execution.loading import load_module
from convgen.network.layers import RELIED
from convgen.network.restore import OWN

pytestmark = pytest.mark.interpreter

close = functools.partial(torch.allclose, rtol=1e-10, atol=1e-10)


class Mine(nn.ConvTranspose2d):
    """A subclass that overrides nothing that matters; `factor` is its own."""

    def __init__(self, channels, factor):
        super().__init__(channels, channels, 3, factor, 1, dtype=torch.float64)
        self.factor = factor

    def scaled(self):
        return self.factor * 2

    def extra_repr(self):
        return "mine"


def torchs():
    return nn.ConvTranspose2d(4, 4, 3, 2, 1, dtype=torch.float64)


def mine():
    return Mine(4, 2)


@pytest.fixture(params=[torchs, mine])
def make(request, device):
    torch.manual_seed(2)
    return lambda: request.param().to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 5, 3, device=device, dtype=torch.float64)


def held(layer):
    """Return what a layer holds, by identity."""
    nested = {name: {k: id(v) for k, v in vars(layer)[name].items()} for name in NESTED}
    return {name: id(value) for name, value in vars(layer).items()} | nested


NESTED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def computes(model, reference, x, emitted):
    """Check that a model computes what the reference does, with kernels or without."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [hasattr(layer, "_convgen") for layer in layers] == [emitted] * len(layers)
    assert close(model(x), reference(x))


def test_a_layer_is_what_it_was(make, x):
    """Used and frozen in between, too."""
    layer = make()
    layer.register_forward_hook(lambda layer, inputs, y: y * 2)
    layer.note = "skip"
    model, reference = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
    before, kind = held(layer), type(layer)
    convgen.replace_layers(model)
    convgen.freeze(model)
    with torch.no_grad():
        computes(model, reference, x, emitted=True)
    assert convgen.restore_layers(model) == ["0"]
    assert model[0] is layer
    assert type(layer) is kind
    assert held(layer) == before
    computes(model, reference, x, emitted=False)
    assert convgen.restore_layers(model) == []
    assert [*convgen.replace_layers(model)] == ["0"]
    computes(model, reference, x, emitted=True)


def by_hooks(layer):
    with pytest.warns(FutureWarning, match=r"weight_norm. is deprecated"):
        return nn.utils.weight_norm(layer)


NORMS = {
    "weight_norm by hooks": (by_hooks, remove_weight_norm),
    "weight_norm": (parametrizations.weight_norm, None),
    "spectral_norm": (parametrizations.spectral_norm, None),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_normed_layer_goes_all_the_way(norm, make, x):
    """Replaced, restored, replaced, frozen, and its norm removed, by turns."""
    change, remove = NORMS[norm]
    remove = remove or functools.partial(parametrize.remove_parametrizations, tensor_name="weight")
    model = nn.Sequential(change(make())).eval()
    reference = nn.Sequential(change(make())).eval()
    reference.load_state_dict(model.state_dict())
    kind, before = type(model[0]).__name__, held(model[0])
    assert [*convgen.replace_layers(model)] == ["0"]
    computes(model, reference, x, emitted=True)
    assert convgen.restore_layers(model) == ["0"]
    assert type(model[0]).__name__ == kind
    assert held(model[0]).keys() == before.keys()
    computes(model, reference, x, emitted=False)
    convgen.replace_layers(model)
    convgen.freeze(model)
    computes(model, reference, x, emitted=True)
    for each in (model, reference):
        remove(each[0])
    with torch.no_grad():
        convgen.freeze(model)
        computes(model, reference, x, emitted=True)
    assert convgen.restore_layers(model) == ["0"]
    assert type(model[0]) is type(make())
    computes(model, reference, x, emitted=False)


def test_a_norm_of_a_replaced_layer_is_restored(make, x):
    """Its class is torch's mixture with the emitted one."""
    model = nn.Sequential(make())
    convgen.replace_layers(model)
    parametrizations.weight_norm(model[0])
    reference = copy.deepcopy(model)
    assert convgen.restore_layers(model) == ["0"]
    computes(model, reference, x, emitted=False)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is type(make())


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_restored_by_itself(way, make, x):
    model = nn.Sequential(make())
    reference = copy.deepcopy(model)
    convgen.replace_layers(model)
    other = COPIES[way](model)
    computes(other, reference, x, emitted=True)
    assert isinstance(other[0], type(make()))
    assert convgen.restore_layers(other) == ["0"]
    computes(other, reference, x, emitted=False)
    computes(model, reference, x, emitted=True)


def test_what_stands_around_a_layer_does_not_matter(make, x, tmp_path, device):
    """A model that is compiled, or spread over processes, has its layers under other names."""
    torch._dynamo.reset()
    model = nn.Sequential(make())
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        spread = nn.parallel.DistributedDataParallel(model)
        for whole, prefix in ((spread, "module."), (compiled, "_orig_mod.")):
            assert [*convgen.replace_layers(whole)] == [f"{prefix}0"]
            computes(whole, reference, x, emitted=True)
            assert convgen.restore_layers(whole) == [f"{prefix}0"]
            computes(whole, reference, x, emitted=False)
    finally:
        dist.destroy_process_group()


def test_layers_of_somebody_s_own_file_stay(tmp_path, x, device):
    """Torch's layer in their place would leave their stages out."""
    text = "relu | ConvTranspose2d(4, 4, 3, dtype=float64)"
    layer = load_module(convgen.emit(text), "of_a_file", tmp_path).ModelNew(device=device)
    model = nn.Sequential(layer, torchs().to(device))
    found = convgen.replace_layers(model)
    spec = convgen.parse(text)
    assert (convgen.parse(found["0"]).before, [*found]) == (spec.before, ["0", "1"])
    assert convgen.restore_layers(model) == ["1"]
    assert hasattr(model[0], "_convgen")


def test_a_class_that_changed_since_is_an_error(make, device):
    """To what FSDP2 makes of a layer, for example, its former class is no way back."""
    model = nn.Sequential(make(), make())
    convgen.replace_layers(model)
    kind = type(model[1])
    model[1].__class__ = type("Sharded", (kind,), {})
    with pytest.raises(SpecError, match=r"^layer '1' cannot be restored: its class became Sharded"):
        convgen.restore_layers(model)
    assert all(hasattr(layer, "_convgen") for layer in model)
    with pytest.warns(UserWarning, match="1: its class became Sharded after it was replaced"):
        convgen.replace_layers(model, target="h100")
    with pytest.raises(SpecError, match="model must be a torch"):
        convgen.restore_layers([model])


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_a_script_has_torch_s_layers_alone(make, x):
    """Torch puts what it scripts into the model, too: what was noted would be no longer true."""
    model = nn.Sequential(make())
    reference = copy.deepcopy(model)
    convgen.replace_layers(model)
    model(x)
    scripted = torch.jit.script(model)
    assert close(scripted(x), reference(x))
    assert not hasattr(scripted[0], "_replaced")
    assert type(model[0]) is type(make())
    assert {*vars(model[0])}.isdisjoint(OWN)
    assert convgen.restore_layers(model) == []


# ---- subclasses ----


def test_a_subclass_that_overrides_nothing_stays_one(x, device):
    """What `isinstance`, its methods and print say of it is the owner's."""
    model = nn.Sequential(mine().to(device))
    reference = copy.deepcopy(model)
    convgen.replace_layers(model)
    layer = model[0]
    assert isinstance(layer, Mine)
    assert (layer.scaled(), str(model)) == (4, str(reference))
    computes(model, reference, x, emitted=True)
    other = type(layer)(4, 1)  # as code that rebuilds layers does
    assert (other.factor, other.stride) == (1, (1, 1))


def test_attributes_that_an_emitted_class_has_are_watched(tmp_path):
    """A name that a user's class has too, and nobody compares, is one of two methods' end."""
    made = load_module(convgen.emit("ConvTranspose2d(4, 4, 3)"), "for_names", tmp_path).ModelNew
    shared = {"train", "_apply"}  # which call the user's
    own = {"__module__", "__doc__", "__init__", "_get_name", "__qualname__"}
    assert set(vars(made)) - shared - own - set(RELIED) == set()


class Noisy(Mine):
    """It overrides what the emitted class does, too, and hands on."""

    def train(self, mode=True):
        self.mode = mode
        return super().train(mode)


def test_a_subclass_may_override_what_hands_on(x, device):
    layer = Noisy(4, 2).to(device)
    reference = copy.deepcopy(layer)
    convgen.replace_layers(layer)
    with torch.no_grad():
        convgen.freeze(layer.eval())
        assert (layer.mode, layer._frozen is None) == (False, False)
        assert close(layer(x), reference(x))
        layer.train()
        assert (layer.mode, layer._frozen) == (True, None)


OVERRIDES = {
    "forward": lambda self, x, output_size=None: x,
    "_output_padding": lambda self, *arguments: (1, 1),
    "freeze": lambda self: None,
    "__reduce__": lambda self: (Mine, (4, 2)),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_subclass_that_overrides_what_matters_stays_torch_s(name, device):
    kind = type("Other", (Mine,), {name: OVERRIDES[name]})
    layer = kind(4, 2).to(device)
    with pytest.warns(UserWarning, match=f": its class Other overrides {name}$"):
        assert convgen.replace_layers(layer) == {}
    assert type(layer) is kind


def test_a_pickle_of_a_subclass_is_loaded_where_both_classes_are(tmp_path, x, monkeypatch, device):
    """The mixed class has no name of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(mine().to(device))
    convgen.replace_layers(model, folder=tmp_path)
    want = model(x)
    text = pickle.dumps(model)
    for name in [name for name in sys.modules if name.startswith("conv_transpose2d_4_4_k3")]:
        monkeypatch.delitem(sys.modules, name)
    other = pickle.loads(text)
    assert isinstance(other[0], Mine)
    computes(other, model, x, emitted=True)
    assert torch.equal(other(x), want)
