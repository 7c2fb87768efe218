"""`convgen.replace_layers(model, example_inputs=...)`: the sizes of a run become rungs.

References are copies of the model made before the call, in float64.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn as nn

import convgen
from convgen import SpecError, parse
from convgen.errors import ModelError
from convgen.network.calls import Call
from convgen.network.examples import rungs_of

pytestmark = pytest.mark.interpreter


class Model(nn.Module):
    """A network with state of every kind, that takes arguments by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        )
        self.up = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)
        self.last = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.unused = nn.ConvTranspose1d(2, 2, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, *, twice=False):
        self.seen += 1
        self.eval() if twice else None
        random.random(), np.random.rand()
        y = self.up(self.first(x))
        return self.last(self.up(y) if twice else y)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Model().double().to(device)


def sized(found, name):
    return parse(found[name]).rungs


def test_the_sizes_of_a_run_are_rungs(model, device):
    found = convgen.replace_layers(
        model, example_inputs=torch.randn(3, 3, 5, 6).double().to(device)
    )
    assert sized(found, "up") == ((3, 4, 5, 6),)
    assert sized(found, "last") == ((3, 4, 10, 12),)
    assert sized(found, "unused") == ()


def test_the_run_leaves_no_trace(model, device):
    """Neither in the model nor in the random numbers that come next."""
    x = torch.randn(3, 3, 5, 6).double().to(device)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(buffer) for name, buffer in model.named_buffers()}

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    want = drawn()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    convgen.replace_layers(model, example_inputs={"x": x, "twice": True})
    assert drawn() == want
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == objects
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_sizes_and_batches_run_kernels_too(model, device):
    """The last batch of an epoch is smaller, and a crop may have any size."""
    reference = copy.deepcopy(model).eval()
    model.eval()
    convgen.replace_layers(model, example_inputs=torch.randn(3, 3, 5, 6).double().to(device))
    for shape in ((3, 3, 5, 6), (1, 3, 5, 6), (2, 3, 4, 7)):
        x = torch.randn(shape).double().to(device)
        with torch.no_grad():
            assert torch.allclose(model(x), reference(x), rtol=1e-10, atol=1e-10)
    layers = {each["name"]: each for each in convgen.report(model).as_dict()["layers"]}
    assert layers["up"]["kernel_calls"] == layers["last"]["kernel_calls"] == 3
    assert not layers["up"]["torch_calls"]
    assert not layers["last"]["torch_calls"]


@pytest.mark.parametrize(
    ("examples", "up"),
    [
        (lambda x: (x,), ((3, 4, 5, 6),)),
        (lambda x: {"x": x}, ((3, 4, 5, 6),)),
        (lambda x: {"x": x, "twice": True}, ((3, 4, 10, 12), (3, 4, 5, 6))),
        (lambda x: [x, (x[:1],), x[:, :, :2]], ((3, 4, 5, 6), (3, 4, 2, 6))),
        (lambda x: lambda model: model(x[:2], twice=False), ((2, 4, 5, 6),)),
        (lambda x: [], ()),
    ],
    ids=["tuple", "dict", "called twice", "several", "function", "none"],
)
def test_examples_may_be_given_in_many_ways(model, device, examples, up):
    x = torch.randn(3, 3, 5, 6).double().to(device)
    assert sized(convgen.replace_layers(model, example_inputs=examples(x)), "up") == up


def test_a_later_call_keeps_them(model, device):
    """As after `half()`; with examples again, or of a layer that was put back, they are new."""
    x = torch.randn(3, 3, 5, 6).double().to(device)
    convgen.replace_layers(model, example_inputs=x)
    found = convgen.replace_layers(model.float())
    assert sized(found, "up") == ((3, 4, 5, 6),)
    assert parse(found["up"]).dtype == "float32"
    found = convgen.replace_layers(model, example_inputs=x[:, :, :3].float())
    assert sized(found, "up") == ((3, 4, 3, 6),)
    convgen.restore_layers(model)
    assert sized(convgen.replace_layers(model), "up") == ()


def test_autocast_decides_on_the_dtype(model, device):
    model = model.float()
    x = torch.randn(3, 3, 5, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = convgen.replace_layers(model, example_inputs=x)
    assert {parse(found[name]).dtype for name in ("up", "last")} == {"bfloat16"}
    assert parse(found["unused"]).dtype == "float32"  # which was not called


@pytest.mark.parametrize("wrong", [5, "x", [5], [torch.zeros(1), None], nn.Identity])
def test_what_is_no_example(model, wrong):
    with pytest.raises(SpecError, match="example_inputs must be a tensor, a tuple"):
        convgen.replace_layers(model, example_inputs=wrong)
    assert type(model.up) is nn.ConvTranspose2d


def test_an_error_of_the_model_leaves_it_as_it_was(model, device):
    x = torch.randn(3, 5, 5, 6).double().to(device)
    with pytest.raises(
        ModelError, match=r"the model's forward failed, at .*in forward(.|\n)*RuntimeError"
    ):
        convgen.replace_layers(model, example_inputs=x)
    assert type(model.up) is nn.ConvTranspose2d
    assert model.seen == 0


@pytest.mark.parametrize("strict", [False, True])
def test_a_second_run_does_not_go_by_the_first_call_s_layers(model, device, strict):
    """Of another dtype they would refuse it, or warn; and nothing of it counts as a call."""
    x = torch.randn(3, 3, 5, 6).double().to(device)
    used = {"include": ["up", "last"], "strict": strict}
    convgen.replace_layers(model, example_inputs=x, **used)
    found = convgen.replace_layers(model.float(), example_inputs=x.float(), **used)
    assert parse(found["up"]).dtype == "float32"
    convgen.replace_layers(model, example_inputs=x.float(), **used)
    layers = {each["name"]: each for each in convgen.report(model).as_dict()["layers"]}
    assert layers["up"]["kernel_calls"] == 0
    assert not layers["up"]["torch_calls"]
    assert model.up._strict is strict


class Buffers(nn.Module):
    """Buffers that cannot be written as they are, or that forward makes larger."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 3, 2, 1)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("expanded", torch.zeros(1, 5).expand(3, 5))
        self.register_buffer("grows", torch.zeros(2))
        self.register_buffer("none", None)

    def forward(self, x):
        self.grows.resize_(4).fill_(1)
        return self.norm(self.up(x))


@pytest.mark.parametrize("inference", [False, True])
def test_buffers_of_every_kind_are_as_before(inference, device):
    with torch.inference_mode(inference):
        model = Buffers().to(device)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.inference_mode(inference):
        found = convgen.replace_layers(
            model, example_inputs=torch.randn(2, 4, 5, 5, device=device), include="up"
        )
    assert sized(found, "up") == ((2, 4, 5, 5),)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_backward_that_is_yet_to_come_is_not_broken(device):
    """It needs buffers that nobody has written since."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2, 1), nn.BatchNorm2d(3)).eval().to(device)
    x = torch.randn(2, 4, 5, 5, device=device)
    y = model(x.clone().requires_grad_())
    convgen.replace_layers(model, example_inputs=x)
    y.sum().backward()


def test_what_is_not_initialised_is_told(device):
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2, 1), nn.LazyBatchNorm2d()).to(device)
    with pytest.raises(SpecError, match="lazy and not initialised: run the model once"):
        convgen.replace_layers(model, example_inputs=torch.randn(2, 4, 5, 5, device=device))


def test_sizes_that_no_grid_holds_cost_their_rung_alone():
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2, 1)).to("meta")
    shapes = ((1, 4, 8, 8), (100000, 4, 2000, 2000))
    examples = [torch.empty(shape, device="meta") for shape in shapes]
    found = convgen.replace_layers(model, example_inputs=examples)
    assert sized(found, "0") == ((1, 4, 8, 8),)


def test_a_precision_does_not_go_with_autocast_s_dtype(model, device):
    with torch.autocast(device, torch.bfloat16):
        found = convgen.replace_layers(
            model.float(),
            precision="ieee",
            example_inputs=torch.randn(3, 3, 5, 6, device=device),
        )
    assert parse(found["up"]).dtype == "bfloat16"
    assert parse(found["unused"]).precision == "ieee"


def test_a_generator_has_run_nothing(model):
    def calls(each):
        yield each(torch.zeros(1))

    with pytest.raises(SpecError, match="a call gave a generator"):
        convgen.replace_layers(model, example_inputs=calls)


def test_of_many_sizes_the_most_called_count():
    calls = [Call("up", (2, 4, size, size)) for size in (5, 6, 6, 7, 7, 7, 8)]
    assert rungs_of(calls) == ((2, 4, 7, 7), (2, 4, 6, 6))
    # Of those called equally often, what is more work.
    assert rungs_of([Call("up", (1, 4, 9)), Call("up", (8, 4, 3)), Call("up", (1, 4, 5))]) == (
        (8, 4, 3),
        (1, 4, 9),
    )
    assert rungs_of([Call("up", (0, 4, 9)), Call("up")]) == ()
