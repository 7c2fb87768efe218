"""`convgen.report`: of each layer whether its kernel ran, how often, and why not.

What would break it: a layer left out, calls that are counted for another, a reason that is no
longer true, a table whose columns do not line up.
"""

import copy
import json
import warnings

import pytest
import torch
import torch.nn as nn

import convgen
from convgen import SpecError

pytestmark = pytest.mark.interpreter


class Wider(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) + 1


def up(device):
    return nn.ConvTranspose2d(4, 4, 3, device=device, dtype=torch.float64)


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 5, 3, device=device, dtype=torch.float64)


@pytest.fixture
def model(device):
    return nn.ModuleDict(
        {"up": up(device), "odd": Wider(4, 4, 3, device=device), "act": nn.ReLU(), "no": up(device)}
    )


def rows(model):
    return {layer.name: layer for layer in convgen.report(model).layers}


def test_every_layer_has_a_row_that_says_what_it_ran(model, x):
    convgen.replace_layers(model, include="up", target="h100")
    for _ in range(3):
        model["up"](x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model["up"](x, (7, 5))
        model["up"].float()(x.float())
        model["up"](x[..., 1:].float())
    found = rows(model)
    assert {name: layer.emitted for name, layer in found.items()} == {
        "up": True,
        "odd": False,
        "no": False,
    }
    assert convgen.parse(found["up"].spec).target == "h100"
    assert found["up"].kernel_calls == 3
    assert [*found["up"].torch_calls.values()] == [1, 2]
    sized, cast = found["up"].torch_calls
    assert sized == "this file was generated for no output_size, got (7, 5)"
    assert cast.startswith("this file was generated for torch.float64, got torch.float32")
    assert found["odd"].reason == "its class Wider overrides forward"
    assert found["no"].reason == "not replaced: convgen.replace_layers(model) does"
    assert found["no"].spec == str(model["no"])


def test_a_copy_is_reported_from_its_own_calls(model, x):
    convgen.replace_layers(model, exclude="odd")
    model["up"](x)
    other = copy.deepcopy(model)
    other["no"](x)
    assert [rows(model)[name].kernel_calls for name in ("up", "no")] == [1, 0]
    assert [rows(other)[name].kernel_calls for name in ("up", "no")] == [0, 1]
    convgen.replace_layers(model, exclude="odd", target="a100")
    assert rows(model)["up"].kernel_calls == 0


def test_a_compiled_model_says_that_its_calls_are_not_counted(x, device):
    torch._dynamo.reset()
    model = nn.Sequential(up(device))
    convgen.replace_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    (layer,) = convgen.report(compiled).layers
    assert (layer.name, layer.kernel_calls, layer.compiled) == ("_orig_mod.0", 0, True)
    assert "compiled: not counted" in str(convgen.report(compiled))
    assert not rows(model)["0"].compiled
    model[0].compile(backend="eager")
    assert rows(model)["0"].compiled


def test_the_table_lines_up_and_the_values_are_json_s(model, x):
    with pytest.warns(UserWarning, match="odd"):
        convgen.replace_layers(model)
    with pytest.warns(UserWarning, match="^layer 'up'"):
        model["up"](x, (7, 5))
    report = convgen.report(model)
    lines = str(report).splitlines()
    spec = convgen.replace_layers(model, exclude="odd")["up"]
    assert lines == [
        "layer  runs    kernel calls  torch calls  spec",
        f"up     kernel             0            1  {spec}",
        "       - 1 by torch: this file was generated for no output_size, got (7, 5)",
        f"odd    torch              -            -  {model['odd']}",
        "       - its class Wider overrides forward",
        f"no     kernel             0            0  {spec}",
        "Calls in compiled or captured graphs are not counted.",
    ]
    values = report.as_dict()
    assert json.loads(json.dumps(values)) == values | {"layers": [*values["layers"]]}
    assert values["layers"][0]["torch_calls"] == report.layers[0].torch_calls


def test_a_model_without_layers_and_what_is_no_model():
    assert str(convgen.report(nn.ReLU())) == "The model has no transposed convolutions."
    lazy = nn.LazyConvTranspose2d(4, 3)
    assert rows(lazy)[""].reason == "it is lazy and not initialised"
    assert str(convgen.report(lazy)).splitlines()[1].startswith("(model)  torch")
    with pytest.raises(SpecError, match="model must be a torch"):
        convgen.report("model")
