"""Torch's rules for emitted files: errors without data, transforms, gradients, tied weights.

The reference is torch's own layer, eager on the CPU, with the same arguments and weights.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from torch_twins import (
    GEOMETRY,
    LAYER,
    close,
    loader,
    numbers,
    outcome,
    raised,
    reference,
    tensors,
    twin,
)

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The function from a spec's text to its module."""
    return loader(tmp_path_factory.mktemp("semantics"))


@pytest.fixture
def file(load):
    """The emitted file of the plain layer, in float64."""
    return load(LAYER.format(rank=2, dtype="float64"))


def as_fake(call, tensors):
    with FakeTensorMode() as mode:
        return call(*(t if t is None else mode.from_tensor(t) for t in tensors))


def as_meta(call, tensors):
    return call(*(t if t is None else t.to("meta") for t in tensors))


# An extent of 2 becomes 0.
SMALL = "ConvTranspose{rank}d(4, 6, 1, padding=1, groups=2, dtype=float64)"
CALLS = {  # the eager ones are in test_wrapper.py
    "rank too low": lambda x, w, b: (x[0, 0], w, b),
    "rank too high": lambda x, w, b: (x[None], w, b),
    "channels": lambda x, w, b: (x[:, 1:], w, b),
    "channels, unbatched": lambda x, w, b: (x[0, 1:], w, b),
    "bias size": lambda x, w, b: (x, w, b[1:]),
    "no extent": lambda x, w, b: (x[..., :0], w, b),
    "output too small": lambda x, w, b: (x[..., :2], w, b),
    "weight rank": lambda x, w, b: (x, w.flatten(), b),
    "groups": lambda x, w, b: (x[:, 1:], w[1:], b),
}


@pytest.mark.parametrize("place", [as_fake, as_meta])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_calls_without_data_raise_torchs_eager_errors(name, rank, place, load):
    """Torch's own shape functions accept most of these; a graph would be traced of no layer."""
    file = load(SMALL.format(rank=rank))
    x, w, b = numbers(2, 4, *(4,) * rank), numbers(4, 3, *(1,) * rank), numbers(6)
    arguments, op = CALLS[name](x, w, b), f"conv_transpose{rank}d"
    want = raised(lambda: getattr(F, op)(*arguments, padding=1, groups=2))
    assert raised(lambda: place(getattr(file, op), arguments)) == want
    assert raised(lambda: place(file.OPERATOR, arguments)) == want


LAYERS = {  # the constructor's arguments, the forward's
    "rank": ({}, lambda x: (x[0, 0],)),
    "channels": ({}, lambda x: (x[:, 1:],)),
    "no extent": ({}, lambda x: (x[..., :0],)),
    "output too small": ({"padding": 4}, lambda x: (x,)),
    "stride 0": ({"stride": 0}, lambda x: (x,)),
    "negative padding": ({"padding": -1}, lambda x: (x,)),
    "negative output_padding": ({"output_padding": -1}, lambda x: (x,)),
    "output_padding": ({"output_padding": 2}, lambda x: (x,)),
    "dilation 0": ({"dilation": 0}, lambda x: (x,)),
    "groups 0": ({"groups": 0}, lambda x: (x,)),
    "groups of in_channels": ({"groups": 3}, lambda x: (x,)),
    "groups of out_channels": ({"groups": 4}, lambda x: (x,)),
    "padding_mode": ({"padding_mode": "reflect"}, lambda x: (x,)),
    "output_size": ({}, lambda x: (x, (11,) * (x.dim() - 2))),
    "length of output_size": ({}, lambda x: (x, (11,) * 7)),
    "dtype of the input": ({}, lambda x: (x.float(),)),
}


# What the file itself refuses; the rest is for torch to compute, and to refuse.
OWN = ("rank", "channels", "no extent")


def use(made, arguments, change, device):
    """Construct a layer of rank 2 and call it."""
    layer = made(4, 6, 3, **{**GEOMETRY, **arguments}, dtype=torch.float64, device=device)
    x = torch.ones(2, 4, 3, 4, dtype=torch.float64, device=device)
    return layer(*change(x))


@pytest.mark.filterwarnings("ignore:computed by torch")
@pytest.mark.parametrize("place", ["eager", "fake", "meta"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_raise_torchs_errors(name, place, file, device):
    """Eager errors, without data too, but where torch computes: its layer may accept more there."""
    arguments, change = LAYERS[name]
    # The file's own words are those of torch on the CPU.
    eager_device = "cpu" if name in OWN else device
    eager = raised(lambda: use(nn.ConvTranspose2d, arguments, change, eager_device))
    with FakeTensorMode() if place == "fake" else contextlib.nullcontext():
        where = "meta" if place == "meta" else device
        got, of_torch = (
            outcome(lambda made=made: use(made, arguments, change, where))
            for made in (file.ModelNew, nn.ConvTranspose2d)
        )
    if name == "padding_mode":  # torch names the class
        got = got[0], got[1].replace("ModelNew", "ConvTranspose2d")
    assert got == (eager if place == "eager" or name in OWN else of_torch)


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("place", ["fake", "meta"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_without_data_give_torchs_shapes(rank, place, recording, load, device):
    """Models are sized and planned so, before there is any memory for them."""
    text = LAYER.format(rank=rank, dtype="float64")
    with FakeTensorMode() if place == "fake" else contextlib.nullcontext():
        model = load(text).ModelNew(device="meta" if place == "meta" else device)
        x = torch.ones(2, 4, *(3, 4, 2)[:rank]).to(model.weight)
        with torch.set_grad_enabled(recording):
            got, want = model(x), twin(model, rank)(x)
    assert got.device == want.device == x.device
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def per_weight(f, x, w, b):
    return vmap(f, in_dims=(None, 0, None))(x, torch.stack([w, 2 * w, -w]), b)


MAPPED = {
    "input": lambda f, x, w, b: vmap(f, (0, None, None))(torch.stack([x, x + 1]), w, b),
    "unbatched": lambda f, x, w, b: vmap(f, (0, None, None))(x, w, b),
    "weight": per_weight,
    "both": lambda f, x, w, b: vmap(f, (0, 0, None))(x, torch.stack([w, w + 1]), b),
    "bias": lambda f, x, w, b: vmap(f, (None, None, 0))(x, w, torch.stack([b, b + 1])),
    "inner axis": lambda f, x, w, b: vmap(f, (2, None, None))(torch.stack([x, x + 1], 2), w, b),
    "nested": lambda f, x, w, b: vmap(lambda w: vmap(lambda x: f(x, w, b))(x))(
        torch.stack([w, -w])
    ),
}
DERIVED = {
    "grad": lambda f, *t: grad(lambda *u: f(*u).square().sum(), (0, 1, 2))(*t),
    "vjp": lambda f, *t: vjp(f, *t)[1](f(*t)),
    "jacrev": lambda f, *t: jacrev(f, 2)(*t),
    "jvp": lambda f, *t: jvp(f, tuple(t), tuple(t)),
    "jacfwd": lambda f, *t: jacfwd(f, 2)(*t),
    "hessian": lambda f, x, w, b: hessian(lambda b: f(x, w, b).square().sum())(b),
    "per sample": lambda f, x, w, b: vmap(grad(lambda w, x: f(x, w, b).sum()), (None, 0))(w, x),
}


def flat(results):
    return [results] if torch.is_tensor(results) else [t for r in results for t in flat(r)]


def same(got, want):
    return len(got) == len(want) and all(map(close, got, want))


# torch's own forward mode still scripts its decompositions.
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@SCRIPTED
@pytest.mark.parametrize("name", MAPPED | DERIVED)
def test_transforms_are_torchs(name, file, device):
    """A transform that sees through the operator as if it were constant gives zero tangents."""
    transform = (MAPPED | DERIVED)[name]
    want = flat(transform(reference, *tensors()))
    got = flat(transform(file.conv_transpose2d, *tensors(device=device)))
    assert same([t.cpu() for t in got], want)


@SCRIPTED
def test_forward_mode_is_torchs_or_refused(file, device):
    """Tangents that are dropped in silence make a derivative of zero."""
    assert tangent_or_refusal(reference, device="cpu") is not None
    got = tangent_or_refusal(file.conv_transpose2d, device)
    assert got is None or close(got.cpu(), tangent_or_refusal(reference, device="cpu"))


def tangent_or_refusal(call, device):
    """Return the tangent of a dual result, None where torch says that there is no jvp."""
    primals = tensors(device=device)
    with torch.autograd.forward_ad.dual_level(), contextlib.suppress(NotImplementedError):
        duals = [torch.autograd.forward_ad.make_dual(tensor, tensor + 1) for tensor in primals]
        tangent = torch.autograd.forward_ad.unpack_dual(call(*duals)).tangent
        return primals[0].new_zeros(()) if tangent is None else tangent
    return None


@pytest.mark.parametrize("recording", [True, False])
def test_functional_call_uses_the_given_weights(recording, file, device):
    """A packed copy of the module's own weight would give the module's own results."""
    model, x = file.ModelNew(device=device), tensors(device=device)[0]
    layer = twin(model)
    with torch.set_grad_enabled(recording):
        assert close(model(x), layer(x))
        for factor in (2, 3):
            given = {name: factor * p.detach() for name, p in model.named_parameters()}
            assert close(functional_call(model, given, (x,)), functional_call(layer, given, (x,)))
        assert close(model(x), layer(x))


@pytest.mark.filterwarnings("ignore:computed by torch. torch.func:UserWarning")
@pytest.mark.parametrize("recording", [True, False])
def test_an_ensemble_of_modules_is_mapped(recording, file, device):
    """As torch.func.stack_module_state has it: one call, many weights, in a packed copy or not."""
    models, x = [file.ModelNew(device=device) for _ in range(2)], tensors(device=device)[0]
    parameters, buffers = torch.func.stack_module_state(models)

    def call(given, others):
        return functional_call(models[0], (given, others), (x,))

    with torch.set_grad_enabled(recording):
        got = vmap(call)(parameters, buffers)
        assert close(got, torch.stack([twin(model)(x) for model in models]))


OPEN = "ConvTranspose2d(kernel_size=3, stride=2, padding=1, bias={bias}, dtype=float64)"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (0, 0, 3, 3)])
def test_no_images_and_no_channels_are_as_in_torch(shape, bias, load, device):
    """No channels leave the bias alone, or an error of torch's; gradients have their shapes."""
    c_in = shape[1]
    made = torch.ones(shape), torch.ones(c_in, 6, 3, 3), torch.arange(6.0) if bias else None
    function = load(OPEN.format(bias=bias)).conv_transpose2d
    outcomes = []
    for call in (function, lambda *t: F.conv_transpose2d(*t, stride=2, padding=1)):
        leaves = [t if t is None else t.double().to(device).requires_grad_() for t in made]
        try:
            y = call(*leaves)
            wanted = [leaf for leaf in leaves if leaf is not None]
            outcomes.append([y, *torch.autograd.grad(y.sum(), wanted)])
        except RuntimeError as error:
            outcomes.append(str(error))
    got, want = outcomes
    if isinstance(want, str):
        assert got == want
    else:
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


WANTED = [places for n in (1, 2, 3) for places in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("places", WANTED, ids=str)
@pytest.mark.parametrize("unbatched", [False, True])
def test_gradients_come_for_what_wants_them(places, unbatched, file, device):
    """A gradient that nobody wants costs a convolution; one in the wrong place trains nothing."""
    outcomes = []
    for call in (file.conv_transpose2d, reference):
        x, w, b = tensors(device=device)
        leaves = [x[0] if unbatched else x, w, b]
        leaves = [t.clone().requires_grad_(n in places) for n, t in enumerate(leaves)]
        call(*leaves).square().sum().backward()
        outcomes.append([leaf.grad for leaf in leaves])
    for n, (got, want) in enumerate(zip(*outcomes, strict=True)):
        assert (got is None) == (want is None) == (n not in places)
        assert got is None or close(got, want)


def test_expanded_weights_have_their_own_gradients(file, device):
    """One kernel for all channels: its gradient is the sum over them."""
    outcomes = []
    for call in (file.conv_transpose2d, reference):
        x, w, b = tensors(device=device)
        row, bias = w[:1].clone().requires_grad_(), b[:1].clone().requires_grad_()
        y = call(x[:1].expand_as(x), row.expand_as(w), bias.expand_as(b))
        y.square().sum().backward()
        outcomes.append([y, row.grad, bias.grad])
    assert same(*outcomes)


def tied(make, device):
    """Train two layers that share a weight, which a linear layer has too; return what results."""
    torch.manual_seed(3)
    first, second = make(), make()
    second.weight = first.weight
    linear = nn.Linear(3 * 9, 4, bias=False, dtype=torch.float64, device=device)
    linear.weight = nn.Parameter(first.weight.detach().flatten(1))
    linear.weight.data = first.weight.data.view(4, 27)  # other Parameter, same memory
    model = nn.ModuleList([first, second])
    assert len([*model.parameters()]) == 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, found = tensors(device=device)[0], []
    for _ in range(3):
        (first(x) * second(x).sin()).sum().backward()
        found.append(first.weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found += [first(x), second(x), linear(torch.ones_like(linear.weight[0]))]
    return found


def test_tied_weights_train_together(file, device):
    """Each module packs the weight for itself: one that misses the other's step lags behind."""
    ours = tied(lambda: file.ModelNew(device=device), device)
    make = functools.partial(nn.ConvTranspose2d, 4, 6, 3, **GEOMETRY)
    assert same(ours, tied(lambda: make(dtype=torch.float64, device=device), device))


@pytest.mark.filterwarnings("ignore:computed by torch")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("unbatched", [False, True])
def test_output_size_is_torchs_in_every_rank(rank, unbatched, load, device):
    """Full shapes and spatial ones serve; out of range the message is torch's."""
    model = load(LAYER.format(rank=rank, dtype="float64")).ModelNew(device=device)
    layer, x = twin(model, rank), tensors(rank, device=device)[0]
    x = x[0] if unbatched else x
    spatial = [2 * size for size in x.shape[-rank:]]
    for size in (spatial, [*x.shape[:-rank], *spatial]):
        assert close(model(x, size), layer(x, size))
    for wrong in ([99] * rank, [1] * (rank + 5)):
        want = raised(lambda wrong=wrong: layer(x, wrong))
        assert raised(lambda wrong=wrong: model(x, wrong)) == want


@pytest.mark.parametrize("call", ["layer", "function"])
@pytest.mark.parametrize("unbatched", [False, True])
def test_an_output_may_be_changed_in_place(unbatched, call, file, device):
    """As by `nn.ReLU(inplace=True)`; torch forbids it for a view made in a custom function."""
    x, w, b = tensors(device=device)
    x = (x[0] if unbatched else x).requires_grad_()
    model = file.ModelNew(device=device)
    model.load_state_dict({"weight": w, "bias": b})
    ours = model(x) if call == "layer" else file.conv_transpose2d(x, *model.parameters())
    theirs = reference(x, w, b)
    for output in (ours, theirs):
        output.relu_()
    assert ours.shape == theirs.shape
    assert close(ours, theirs)
    assert close(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(theirs.sum(), x)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_forward_mode_is_right_in_a_compiled_graph_too(file, device, monkeypatch):
    """A custom operator has no tangents, and would give zeros without a word."""
    monkeypatch.setitem(sys.modules, file.__name__, file)  # where Dynamo looks functions up
    x, w, b = tensors(device=device)

    def tangent(function):
        return torch.func.jvp(lambda x: function(x, w, b), (x,), (torch.ones_like(x),))[1]

    torch._dynamo.reset()
    compiled = torch.compile(lambda: tangent(file.conv_transpose2d), backend="eager")
    assert close(compiled(), tangent(reference))
