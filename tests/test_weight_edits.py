"""Emitted layers after an edit of the weight, by every road that libraries take.

What would break it: a copy of the weight that is kept from call to call and misses an edit, as most
edits leave no trace in torch; hooks and copies that stay behind. The numbers are small integers,
exact in every precision, and the reference is a scatter in int64; where an edit may be an error,
torch's own layer says whether it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, vector_to_parameters
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import convgen
from convgen import oracle
from convgen.loading import load_module

pytestmark = pytest.mark.interpreter

# By their families. The sizes of the second are such that it has zeros beside the weights.
LAYERS = {
    "gather": "ConvTranspose1d(4, 6, 3, padding=1)",
    "polyphase": "ConvTranspose1d(4, 6, 4, stride=2, padding=1, input=(1, 4, 5))",
    "direct": "ConvTranspose1d(4, 4, 4, stride=2, padding=1, groups=4)",
}
SPECS = {
    f"{family} {dtype}": f"{text[:-1]}, dtype={dtype})"
    for family, text in LAYERS.items()
    for dtype in ("float32", "float16")
}
SPECS["polyphase of rank 2"] = "ConvTranspose2d(4, 6, 4, stride=2, padding=1, input=(1, 4, 3, 4))"
every_spec = pytest.mark.parametrize("name", SPECS)


def integers(*shape, seed, dtype, device):
    """Return numbers from -2 to 2 without 0, which no edit may leave as it is."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([-2, -1, 1, 2])[torch.randint(4, shape, generator=random)]
    return numbers.to(device, dtype)


class Emitted:
    """The file of a spec, the layers made of it, and what they have to compute."""

    def __init__(self, text, name, folder, device):
        self.spec, self.device = convgen.parse(text), device
        source = convgen.emit(text)
        self.family = source.partition("# family: ")[2].partition(",")[0]
        self.file = load_module(source, name, folder)
        self.integers = functools.partial(
            integers, dtype=getattr(torch, self.spec.dtype), device=device
        )
        self.x = self.integers(1, 4, *((5,), (3, 4))[self.spec.rank - 1], seed=1)

    def layer(self, dtype=None):
        """Return a layer whose parameters have gradients, of small integers too."""
        layer = self.file.ModelNew(device=self.device, dtype=dtype)
        for seed, parameter in enumerate(layer.parameters(), 2):
            parameter.data = self.integers(*parameter.shape, seed=seed).to(dtype)
            parameter.grad = self.integers(*parameter.shape, seed=seed + 7).to(dtype)
        return layer

    def want(self, weight, bias):
        """Return the exact output, as the file's dtype holds it."""
        arrays = [t.detach().cpu().double().numpy() for t in (self.x, weight, bias)]
        assert all(np.array_equal(array, np.rint(array)) for array in arrays)
        exact = oracle.scatter(self.spec, *(array.astype(np.int64) for array in arrays))
        return torch.from_numpy(exact).to(self.x)

    def check(self, run, layer):
        """Compare a run of `layer` with what its present weight has to give."""
        want = self.want(layer.weight, layer.bias)
        assert torch.equal(run(self.x), want)
        return want


@pytest.fixture(scope="module")
def load(tmp_path_factory, device):
    """The function from a name of `SPECS` to its `Emitted`, importable as pickle needs it."""
    folder, count = tmp_path_factory.mktemp("edited"), itertools.count()
    with pytest.MonkeyPatch.context() as patch:

        @functools.cache
        def load(name):
            emitted = Emitted(SPECS[name], f"edited_{next(count)}", folder, device)
            patch.setitem(sys.modules, emitted.file.__name__, emitted.file)
            return emitted

        yield load


# ---- one edit ----


def through_numpy(layer):
    if layer.weight.is_cuda:
        pytest.skip("numpy sees the CPU's memory alone")
    layer.weight.detach().numpy()[...] = 3


def through_a_state(layer):
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})


def through_a_vector(layer):
    parameters = [layer.weight, layer.bias]
    vector_to_parameters(torch.cat([p.detach().flatten() + 1 for p in parameters]), parameters)


def through_merging(layer):
    """Merge the product of two thin matrices into the weight, as LoRA does."""
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    up, down = (torch.ones(shape).to(layer.weight) for shape in ((rows, 1), (1, columns)))
    layer.weight.data += (up @ down).view_as(layer.weight)


def stepping(optimizer, **options):
    """Return the edit by a step with the gradients that are there; each is of whole numbers."""
    return lambda layer: optimizer(layer.parameters(), lr=1.0, **options).step()


def plainly(edit):
    """Return an edit of the weight while no gradient is recorded."""
    return lambda layer: torch.no_grad()(edit)(layer.weight)


# With these, a step of Adam is the sign of the gradient.
SIGNS = {"betas": (0.0, 0.0), "eps": 0.0}
EDITS = {
    "data.zero_": lambda layer: layer.weight.data.zero_(),
    "data.copy_": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "data.sub_": lambda layer: layer.weight.data.sub_(layer.weight.grad),
    "data +=": through_merging,
    "data[...] =": lambda layer: layer.weight.data[0].fill_(1),
    "data = new": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "init of data": lambda layer: nn.init.constant_(layer.weight.data, 2),
    "detach().mul_": lambda layer: layer.weight.detach().mul_(2),
    "numpy": through_numpy,
    "untyped_storage": lambda layer: layer.weight.untyped_storage().fill_(0),
    "mul_": plainly(lambda weight: weight.mul_(2)),
    "set_": plainly(lambda weight: weight.set_(weight + 1)),
    "swap_tensors": lambda layer: torch.utils.swap_tensors(
        layer.weight, nn.Parameter(layer.weight.detach() + 1)
    ),
    "inference_mode": lambda layer: torch.inference_mode()(lambda: layer.weight.mul_(2))(),
    "load_state_dict": through_a_state,
    "vector_to_parameters": through_a_vector,
    "_foreach_mul_": lambda layer: torch._foreach_mul_([layer.weight.data], 2),
    "_foreach_copy_": lambda layer: torch._foreach_copy_(
        [p.data for p in layer.parameters()], [p.data + 1 for p in layer.parameters()]
    ),
    "SGD": stepping(SGD, foreach=False),
    "SGD foreach": stepping(SGD, foreach=True),
    "SGD fused": stepping(SGD, fused=True),
    "Adam": stepping(Adam, foreach=False, **SIGNS),
    "Adam foreach": stepping(Adam, foreach=True, **SIGNS),
    "Adam fused": stepping(Adam, fused=True, **SIGNS),
}
every_edit = pytest.mark.parametrize("edit", EDITS)
MODES = (torch.no_grad(), torch.enable_grad(), torch.inference_mode())


@every_edit
@every_spec
def test_an_edited_weight_is_the_one_that_counts(name, edit, load):
    """In each mode first, which the others must not have seen to: they come after another edit."""
    emitted = load(name)
    assert emitted.family == name.partition(" ")[0]
    layer = emitted.layer()
    before, *_ = (emitted.check(mode(layer), layer) for mode in MODES)
    for mode in MODES:
        EDITS[edit](layer)
        after = emitted.check(mode(layer), layer)
        assert mode is not MODES[0] or not torch.equal(after, before)


@every_edit
def test_an_edited_weight_counts_under_autocast(edit, load, device):
    """The file is for autocast's dtype, and what it packs is no longer the weight itself."""
    emitted = load("polyphase float16")
    layer = emitted.layer(torch.float32)
    with torch.autocast(device, torch.float16):
        before = emitted.check(torch.no_grad()(layer), layer)
        EDITS[edit](layer)
        assert not torch.equal(emitted.check(torch.no_grad()(layer), layer), before)
        emitted.check(layer, layer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@every_edit
def test_an_edited_weight_counts_in_a_compiled_layer(edit, backend, load):
    """Also where it alternates with the layer as it is."""
    emitted = load("gather float32")
    layer = emitted.layer()
    torch._dynamo.reset()
    compiled = torch.no_grad()(torch.compile(layer, backend=backend, fullgraph=True))
    emitted.check(compiled, layer)
    emitted.check(torch.no_grad()(layer), layer)
    EDITS[edit](layer)
    emitted.check(compiled, layer)
    emitted.check(torch.no_grad()(layer), layer)


# ---- an edit between forward and backward ----


def outcome(layer, x, edit):
    """Return the gradients after an edit between forward and backward, or what torch says of it."""
    x = x.clone().requires_grad_()
    y = layer(x)
    EDITS[edit](layer)
    layer.zero_grad()
    try:
        y.backward(torch.ones_like(y))
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return torch.cat([t.grad.flatten() for t in (x, *layer.parameters())])


# Torch swaps no weight that a graph waits for.
@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit != "swap_tensors"])
@every_spec
def test_gradients_after_an_edit_are_those_of_torch(name, edit, load):
    """Or an error is, where torch's own layer has one: of a weight that it knows was edited."""
    emitted = load(name)
    layer, spec = emitted.layer(), emitted.spec
    geometry = {"groups": spec.groups, "stride": spec.stride, "padding": spec.padding}
    torch_class = getattr(nn, f"ConvTranspose{spec.rank}d")
    reference = torch_class(4, spec.out_channels, spec.kernel_size, **geometry)
    reference.to(emitted.x)
    for mine, its in zip(layer.parameters(), reference.parameters(), strict=True):
        its.data, its.grad = mine.data.clone(), mine.grad.clone()
    got, want = (outcome(each, emitted.x, edit) for each in (layer, reference))
    if isinstance(want, str):
        assert want.endswith("has been modified by an inplace operation")
        assert got == want
    else:
        assert torch.equal(got, want)
    emitted.check(layer, layer)


# ---- several edits ----


@pytest.mark.parametrize("foreach", [True, False])
@every_spec
def test_an_average_that_is_swapped_in_and_out(name, foreach, load):
    """As diffusers' `EMAModel` does it: store, copy_to, validate, restore, train on."""
    emitted = load(name)
    layer = emitted.layer()
    parameters = [*layer.parameters()]
    shadow = [parameter.detach().flip(0).clone() for parameter in parameters]

    def copy_into_data(sources):
        if foreach:
            own = [parameter.data for parameter in parameters]
            torch._foreach_copy_(
                own, [t.to(p.device).data for t, p in zip(sources, own, strict=True)]
            )
        else:
            for parameter, source in zip(parameters, sources, strict=True):
                parameter.data.copy_(source.to(parameter.device).data)

    for _ in range(2):
        trained = emitted.check(layer, layer)
        layer.eval()
        stored = [parameter.detach().cpu().clone() for parameter in parameters]
        copy_into_data(shadow)
        assert not torch.equal(emitted.check(torch.no_grad()(layer), layer), trained)
        copy_into_data(stored)
        layer.train()
        assert torch.equal(emitted.check(layer, layer), trained)
        stepping(SGD, fused=True)(layer)


@every_spec
def test_an_averaged_model_follows(name, load):
    """Torch's own average of a model is a copy of it whose weights are edited at every step."""
    emitted = load(name)
    layer = emitted.layer()
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    for _ in range(3):
        averaged.update_parameters(layer)
        assert torch.equal(averaged.module.weight, layer.weight)
        emitted.check(torch.no_grad()(averaged), averaged.module)
        stepping(SGD)(layer)
        emitted.check(layer, layer)


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "copy": copy.copy,
}
SOME = ("data.sub_", "data = new", "numpy", "SGD fused")


@pytest.mark.parametrize("edit", SOME)
@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("name", ["polyphase float32", "direct float16"])
def test_a_duplicate_and_its_origin_each_have_their_weight(name, duplicate, edit, load):
    """A shallow copy has the same one, and an edit of it reaches both."""
    emitted = load(name)
    layer = emitted.layer()
    emitted.check(layer, layer)
    other = DUPLICATES[duplicate](layer)
    for parameter, its in zip(layer.parameters(), other.parameters(), strict=True):
        its.grad = parameter.grad.clone()
    for edited in (other, layer):
        EDITS[edit](edited)
        for each in (layer, other):
            emitted.check(each, each)
            emitted.check(torch.no_grad()(each), each)


# ---- weights that are made of others ----

with_weight_norm = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def plain_weight_norm(layer):
    torch.nn.utils.weight_norm(layer)


NORMS = {
    "weight_norm of old": (plain_weight_norm, lambda layer: layer.weight_g),
    "weight_norm": (
        parametrizations.weight_norm,
        lambda layer: layer.parametrizations.weight.original0,
    ),
    "spectral_norm": (
        functools.partial(parametrizations.spectral_norm, dim=1),
        lambda layer: layer.parametrizations.weight.original,
    ),
}


@with_weight_norm
@pytest.mark.parametrize("norm", NORMS)
@every_spec
def test_a_weight_that_is_made_of_others_follows_them(name, norm, load):
    """Its numbers are no integers; an edit changes them by far more than any rounding."""
    emitted = load(name)
    layer = emitted.layer().eval()  # spectral_norm iterates at every training call
    emitted.check(layer, layer)
    register, source = NORMS[norm]
    register(layer)
    for _ in range(2):
        for mode in MODES:
            got = mode(layer)(emitted.x).detach().double().cpu()
            # Only now: the older norms make the weight in the call.
            tensors = (t.detach().double().cpu() for t in (emitted.x, layer.weight, layer.bias))
            want = oracle.scatter(emitted.spec, *(t.numpy() for t in tensors))
            assert np.abs(got.numpy() - want).max() < 5e-3 * np.abs(want).max()
        own = source(layer).data
        own.copy_(own.flip(-1) + 3 * own)


# ---- weights that take turns ----


@contextlib.contextmanager
def nothing_left_behind(*weights):
    """Hold that what runs inside adds neither hooks nor objects, however often it runs."""
    gc.collect()
    before = len(gc.get_objects())
    yield
    gc.collect()
    assert len(gc.get_objects()) - before < 20
    for weight in weights:
        assert not weight._post_accumulate_grad_hooks
        assert not weight._backward_hooks


def by_call(layer, weight, x):
    return torch.func.functional_call(layer, {"weight": weight}, x)


def by_attribute(layer, weight, x):
    layer.weight = weight
    return layer(x)


def by_a_copy(layer, weight, x):
    other = copy.copy(layer)
    other._parameters = layer._parameters | {"weight": weight}
    return other(x)


@pytest.mark.parametrize("turn", [by_call, by_attribute, by_a_copy])
def test_weights_that_take_turns_leave_nothing_behind(turn, load):
    """A hook for each turn makes every backward slower than the one before, and never goes."""
    emitted = load("gather float32")
    layer = emitted.layer()
    weights = layer.weight, nn.Parameter(layer.weight.detach() + 1)
    wanted = [emitted.want(weight, layer.bias) for weight in weights]

    def alternate(times):
        for _ in range(times):
            for weight, want in zip(weights, wanted, strict=True):
                assert torch.equal(turn(layer, weight, emitted.x), want)

    alternate(2)  # what is remembered by sizes
    with nothing_left_behind(*weights):
        alternate(50)


def test_a_weight_that_is_replaced_is_given_back(load):
    """What a layer had for its memory must not live on in it."""
    emitted = load("gather float32")
    layer = emitted.layer()
    for mode in MODES:
        emitted.check(mode(layer), layer)
    gone = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(layer.weight.detach() + 1)
    assert gone() is None
    emitted.check(layer, layer)


def test_edits_count_in_training_as_in_torch(load):
    """Forward, backward, step, validation on swapped weights: the weights of each step agree."""
    emitted = load("gather float32")
    layer = emitted.layer()
    layer.zero_grad()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    for _ in range(3):
        y, want = layer(emitted.x), F.conv_transpose1d(emitted.x, weight, bias, padding=1)
        assert torch.equal(y, want)
        for each, parameters in ((y, [*layer.parameters()]), (want, [weight, bias])):
            each.backward(torch.ones_like(each))
            for parameter in parameters:
                parameter.data.sub_(parameter.grad.sign())
                parameter.grad = None
        emitted.check(torch.no_grad()(layer), layer)
    assert torch.equal(layer.weight, weight)
