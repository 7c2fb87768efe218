"""Emitted layers after an edit of the weight, by every road that libraries take.

What would break it: a copy of the weight that is kept from call to call and misses an edit, as most
edits leave no trace in torch; hooks and copies that stay behind. The numbers are small integers,
exact in every precision, and the reference is a scatter in int64; where an edit may be an error,
torch's own layer says whether it is.
"""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import vector_to_parameters
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edited import MODES, every_spec, loading

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def load(tmp_path_factory, device):
    """The function from a name of `SPECS` to its `Emitted`."""
    with loading(tmp_path_factory.mktemp("edited"), device) as load:
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


@pytest.mark.gpu
@every_edit
@every_spec
def test_an_edited_weight_counts_in_a_graph_that_is_replayed(name, edit, load):
    """The edits in place: a graph has the addresses of its capture, of torch's own layer too."""
    if edit in ("data = new", "set_", "swap_tensors", "vector_to_parameters"):
        pytest.skip("the weight lies elsewhere then")
    emitted = load(name)
    layer = emitted.layer()
    captured = torch.no_grad()(layer)
    emitted.check(captured, layer)
    layer.eval().freeze()  # which must not count in it
    gc.collect()  # no graph of an earlier test may be freed during the capture: that ends it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(emitted.x)
    for _ in range(2):
        EDITS[edit](layer)
        graph.replay()
        assert torch.equal(y, emitted.want(layer.weight, layer.bias))


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
@pytest.mark.parametrize("name", ["gather float32", "direct float16"])
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
