"""What a layer counts of its calls, and whom it tells: `convgen.report` reads it.

What would break it: a call counted twice or not, a copy that goes on with the numbers of the first,
a graph that breaks or is made anew because a number changed, a warning for every call.
"""

import copy
import itertools
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import convgen
from convgen.execution.loading import load_module

pytestmark = pytest.mark.interpreter

SPECS = {
    "packed": "ConvTranspose1d(4, 4, 3, stride=2, dtype=float64)",
    "raw": "ConvTranspose1d(4, 4, 3, stride=2, groups=4, dtype=float64)",
}
KINDS = ("torch.float64", "no output_size")


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counting")
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for name, text in SPECS.items():
            found[name] = load_module(convgen.emit(text), f"counting_{name}", folder)
            patch.setitem(sys.modules, found[name].__name__, found[name])
        yield found


@pytest.fixture(params=SPECS)
def layer(request, modules, device):
    return modules[request.param].ModelNew(device=device)


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 5, dtype=torch.float64, device=device)


def counts(layer):
    """Return the calls that the kernel computed, and those that torch did for its reasons."""
    calls = layer._calls
    return calls and (calls.kernel, [calls for _, calls in calls.torch.values()])


def test_every_way_to_call_counts_once(layer, x):
    """With a gradient and without, under a mode that sees operators, frozen, and an empty one."""
    assert counts(layer) is None
    layer(x)
    with torch.no_grad():
        layer(x)
        layer.freeze()(x)
        layer(x[:0])
        with FlopCounterMode(display=False):
            layer(x)
    assert counts(layer) == (5, [])
    with pytest.raises(RuntimeError):
        layer(x[:, 1:])  # torch's error: nobody computed
    assert counts(layer) == (5, [])


def test_what_torch_computes_warns_once_for_each_kind_of_reason(layer, x):
    """Inputs of many lengths, or dtypes in turn, are not a warning each."""
    layer.float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length, sized in itertools.product((3, 4, 5), (False, True)):
            layer(x[..., :length].float(), (2 * length + 1,) if sized else None)
    assert counts(layer) == (0, [3, 3])
    assert [str(each.message).partition(", got")[0] for each in caught] == [
        f"computed by torch: this file was generated for {kind}" for kind in KINDS
    ]
    assert {each.filename for each in caught} == {__file__}


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_starts_anew(way, layer, x):
    layer(x)
    other = COPIES[way](layer)
    assert counts(other) is None
    other(x), other(x)
    assert counts(other) == (2, [])
    assert counts(layer) == (1, [])
    assert [*layer.state_dict()] == ["weight", "bias"]


def test_a_copy_of_a_parametrized_layer_starts_anew(layer, x):
    """Torch copies these with all of their attributes."""
    parametrizations.weight_norm(layer)
    layer(x)
    other = copy.deepcopy(layer)
    other(x)
    assert counts(other) == counts(layer) == (1, [])


def test_a_graph_does_not_count_and_is_made_once(layer, x):
    """Numbers that a graph reads are numbers that it is made anew for."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(3):
        want = layer(x)
        assert torch.allclose(compiled(x), want)
    assert len(graphs) == 1
    assert counts(layer) == (3, [])
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), want)
    assert counts(layer) == (3, [])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_strict_layer_raises_what_it_would_warn_of(compiled, layer, x):
    torch._dynamo.reset()
    layer._strict, layer._notice = True, "layer 'up' needs torch: {}"
    run = torch.compile(layer, backend="eager") if compiled else layer
    run(x)
    message = r"^layer 'up' needs torch: this file was generated for no output_size, got \(12,\)$"
    with pytest.raises(ValueError, match=message):
        run(x, (12,))
    assert isinstance(layer, nn.ConvTranspose1d)
