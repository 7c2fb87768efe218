"""Replacing again, a part of a model, or strictly: `convgen.replace_layers` beyond its first call.

What would break it: a layer that stays with a kernel for what it no longer is, one that is planned
again for nothing, a pattern that matches nothing in silence, a fallback that strict lets through.
"""

import copy

import pytest
import torch
import torch.nn as nn

import convgen
from convgen import SpecError, parse

pytestmark = pytest.mark.interpreter


def up(device, dtype=torch.float64):
    return nn.ConvTranspose2d(4, 4, 3, 2, 1, device=device, dtype=dtype)


@pytest.fixture
def x(device):
    torch.manual_seed(2)
    return torch.randn(2, 4, 5, 3, device=device, dtype=torch.float64)


@pytest.fixture
def model(device):
    """Four layers: of the encoder, of the decoder (two), and a head, which is tied to `again`."""
    torch.manual_seed(3)
    names = {"enc": up(device), "dec": nn.ModuleList([up(device), up(device)]), "head": up(device)}
    model = nn.ModuleDict(names)
    model["again"] = model["head"]
    return model


# ---- again ----


def test_a_second_call_plans_what_has_changed(model, x, device):
    """Of four layers one gets another dtype; another layout changes nothing."""
    first = convgen.replace_layers(model)
    kinds = {name: type(layer) for name, layer in model.named_modules()}
    model["enc"].half()
    model["dec"][1].to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model)
    convgen.restore_layers(reference)
    found = {name: parse(text) for name, text in convgen.replace_layers(model).items()}
    assert [*found] == [*first] == ["enc", "dec.0", "dec.1", "head"]
    assert found["enc"].dtype == "float16"
    same = {name for name, layer in model.named_modules() if type(layer) is kinds[name]}
    assert {"dec.0", "dec.1", "head"} == same & set(found)
    for name in found:
        got, want = model.get_submodule(name), reference.get_submodule(name)
        given = x.to(got.weight.dtype)
        if name == "dec.1":
            given = given.to(memory_format=torch.channels_last)
        assert torch.allclose(got(given), want(given), rtol=1e-3, atol=1e-2)


def test_arguments_that_differ_plan_again(model):
    first = convgen.replace_layers(model.float(), target="h100")
    for arguments in ({"precision": "ieee"}, {"target": "a100"}, {"dtype": "bfloat16"}, {}):
        kind = type(model["enc"])
        found = convgen.replace_layers(model, **arguments)
        assert type(model["enc"]) is not kind
        assert found != first
        assert convgen.replace_layers(model, **arguments) == found


def test_a_folder_gets_the_files_of_layers_that_have_theirs_elsewhere(model, tmp_path):
    """Whoever asks for a folder wants to pickle the model."""
    convgen.replace_layers(model)
    convgen.replace_layers(model, folder=tmp_path)
    kind = type(model["enc"])
    assert [path.stem for path in tmp_path.glob("*.py")] == [kind.__module__]
    convgen.freeze(model)
    frozen = model["enc"]._frozen
    assert frozen is not None
    convgen.replace_layers(model, folder=tmp_path)
    assert type(model["enc"]) is kind
    assert model["enc"]._frozen is frozen


def test_a_packed_weight_of_before_is_not_the_next_kernel_s(x, device):
    """Two kernels of a layer may pack it in other ways."""
    model = up(device).eval()
    with torch.no_grad():
        convgen.replace_layers(model, target="rtx4090")
        convgen.freeze(model)
        want = model(x)
        convgen.replace_layers(model, target="h100")
        assert model._frozen is None
        assert torch.allclose(model(x), want)


def test_a_layer_that_no_spec_expresses_any_more_is_torch_s(model, device):
    convgen.replace_layers(model)
    for name in ("weight", "bias"):
        parameter = getattr(model["enc"], name)
        setattr(model["enc"], name, nn.Parameter(parameter.detach().to(torch.complex64)))
    with pytest.warns(UserWarning, match="^left as they are: enc: dtype must be one of"):
        assert [*convgen.replace_layers(model)] == ["dec.0", "dec.1", "head"]
    assert type(model["enc"]) is nn.ConvTranspose2d


# ---- precision ----


@pytest.mark.parametrize("allowed", [True, False])
def test_torch_s_setting_for_tf32_is_the_default(allowed, device, monkeypatch):
    """Who has forbidden TF32 for torch does not expect it of a replaced layer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    model = nn.Sequential(up(device, torch.float32), up(device), up(device, torch.float16))
    specs = [parse(text) for text in convgen.replace_layers(model).values()]
    assert [spec.precision for spec in specs] == ["tf32" if allowed else "ieee", None, None]
    notes = [layer.note for layer in convgen.report(model).layers]
    said = "" if allowed else "ieee: torch.backends.cudnn.allow_tf32 was False"
    assert notes == [said, "", ""]
    given = convgen.replace_layers(model, precision="tf32x3")
    assert parse(given["0"]).precision == "tf32x3"
    half = convgen.replace_layers(model, dtype="float16")
    assert (parse(half["0"]).dtype, parse(half["0"]).precision) == ("float16", None)
    assert [layer.note for layer in convgen.report(model).layers] == ["", "", ""]


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_setting_for_convolutions_alone_counts(setting, device, monkeypatch):
    """Torch refuses to say what holds for both where recurrent layers have another."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", cudnn.allow_tf32)  # which is set back for both
    cudnn.conv.fp32_precision = setting
    found = convgen.replace_layers(up(device, torch.float32))
    assert parse(found[""]).precision == setting


# ---- a part ----

SELECTIONS = {
    "a name": ({"include": "dec.0"}, ["dec.0"]),
    "another name of the same layer": ({"include": "again"}, ["head"]),
    "a pattern": ({"include": "dec.*"}, ["dec.0", "dec.1"]),
    "a list": ({"include": ["enc", "dec.?"]}, ["enc", "dec.0", "dec.1"]),
    "a function": ({"include": lambda name, layer: layer.stride == (2, 2)}, None),
    "without": ({"exclude": ("enc", "h*")}, ["dec.0", "dec.1"]),
    "both": ({"include": "dec.*", "exclude": lambda name, layer: name == "dec.1"}, ["dec.0"]),
    "none": ({"include": []}, []),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_part_of_a_model_is_replaced(name, model):
    arguments, wanted = SELECTIONS[name]
    wanted = ["enc", "dec.0", "dec.1", "head"] if wanted is None else wanted
    assert [*convgen.replace_layers(model, **arguments)] == wanted
    layers = {n: each for n, each in model.named_modules() if isinstance(each, nn.ConvTranspose2d)}
    assert [n for n, layer in layers.items() if hasattr(layer, "_convgen")] == wanted


def test_layers_that_are_not_meant_keep_what_they_have(model):
    """Those that run a file already are named all the same."""
    first = convgen.replace_layers(model, include="enc", target="h100")
    found = convgen.replace_layers(model, exclude="enc", target="a100")
    assert [*found] == ["enc", "dec.0", "dec.1", "head"]
    assert found["enc"] == first["enc"]


WRONG = {
    "near": (
        {"include": "dec.2"},
        "include must name transposed convolutions of the model, got 'dec.2' "
        "(did you mean dec.1 or dec.0?); it has enc, dec.0, dec.1, head, again",
    ),
    "a module of layers": ({"exclude": ["enc", "dec"]}, "got 'dec' (did you mean dec.*?); it"),
    "far": ({"include": "*.up"}, "got '*.up'; it has enc"),
    "no name": ({"exclude": 3}, "exclude must be a name, a list of names or a function"),
    "no names": ({"include": ["enc", 3]}, "include must be a name, a list of names or a function"),
    "strict": ({"strict": "yes"}, "strict must be True or False, got 'yes'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_selection_says_what_there_is(name, model):
    arguments, message = WRONG[name]
    with pytest.raises(SpecError) as caught:
        convgen.replace_layers(model, **arguments)
    assert message in str(caught.value)
    assert caught.value.argument == next(iter(arguments))
    assert not any(hasattr(layer, "_convgen") for layer in model.modules())


def test_a_name_that_has_the_signs_of_a_pattern_is_a_name(device):
    model = nn.ModuleDict({"up[0]": up(device), "up0": up(device)})
    assert [*convgen.replace_layers(model, include="up[0]")] == ["up[0]", "up0"]
    convgen.restore_layers(model)
    del model["up0"]
    assert [*convgen.replace_layers(model, include="up[0]")] == ["up[0]"]


# ---- strict ----


class Wider(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_strict_replaces_all_or_nothing(model, device):
    model["odd"] = Wider(4, 4, 3, device=device)
    message = "^strict=True, and layers would stay torch's: odd: its class Wider overrides forward$"
    with pytest.raises(SpecError, match=message):
        convgen.replace_layers(model, strict=True)
    assert not any(hasattr(layer, "_convgen") for layer in model.modules())
    assert len(convgen.replace_layers(model, strict=True, exclude="odd")) == 4


def test_a_strict_layer_computes_by_its_kernel_or_not_at_all(x, device):
    model = nn.ModuleDict({"{up}": up(device)})
    convgen.replace_layers(model, strict=True)
    layer = model["{up}"]
    want = layer(x)
    needs = (
        r"^layer '\{up\}': strict=True, and this call needs torch: this file was generated for "
        r"torch\.float64, got torch\.float32 .*\. If the layer has changed, convgen\.replace_layers"
    )
    layer.float()
    with pytest.raises(ValueError, match=needs):
        layer(x.float())
    layer.double()
    convgen.replace_layers(model)  # the same spec, no longer strict
    layer.float()
    with pytest.warns(UserWarning, match=r"^layer '\{up\}': computed by torch: .*convgen\.report"):
        got = layer(x.float())
    assert torch.allclose(got, want.float(), atol=1e-5)


def test_a_warning_names_the_layer_and_what_to_do_once_for_each_kind(model, x, device):
    convgen.replace_layers(model)
    model.float()
    layer = model["dec"][1]
    with pytest.warns(UserWarning, match=r"^layer 'dec\.1': computed by torch: this ") as caught:
        layer(x.float())
    assert [warning.filename for warning in caught] == [__file__]
    layer(x.float())  # warnings are errors here
