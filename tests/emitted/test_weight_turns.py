"""Emitted layers whose weights are made of others, or take turns: what is computed, what stays.

What would break it: a copy of the weight that is kept for one and used for another; hooks and
objects that stay behind with each turn. The numbers are small integers, exact in every precision,
and the reference is a scatter in int64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from convgen.execution import oracle
from edited import MODES, every_spec, loading

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def load(tmp_path_factory, device):
    """The function from a name of `SPECS` to its `Emitted`."""
    with loading(tmp_path_factory.mktemp("edited"), device) as load:
        yield load


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
