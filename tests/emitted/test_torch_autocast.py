"""Autocast over emitted files: the result's dtype is what torch's own layer gives.

A file of autocast's dtype casts and runs its kernel; any other is left to torch, with a warning.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from torch_twins import LAYER, REFUSAL, close, loader, reference, tensors, twin

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The function from a spec's text to its module."""
    return loader(tmp_path_factory.mktemp("autocast"))


@pytest.fixture
def file(load):
    """The emitted file of the plain layer, in float64."""
    return load(LAYER.format(rank=2, dtype="float64"))


def under(dtype, device):
    return torch.autocast(device, dtype)


def bounded(got, want, model, x):
    """Whether `got`, of 16 bits, is the float64 result `want` of operands rounded to its dtype."""
    layer = twin(model).double().cpu()
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(want).double()
    exact = layer(x.cpu().to(want).double())
    size = twin_of_magnitudes(layer)(x.cpu().double().abs())
    unit = torch.finfo(want).eps / 2
    return ((got.cpu().double() - exact).abs() <= 1.1 * unit * exact.abs() + 2.0**-16 * size).all()


def twin_of_magnitudes(layer):
    made = twin(layer)
    for parameter in made.parameters():
        parameter.data.abs_()
    return made


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("held", [None, torch.float32])
@pytest.mark.parametrize("half", HALVES)
def test_autocast_to_the_files_dtype_runs_its_kernel(half, held, recording, load, device):
    """A warning would mean torch's operator; float32 weights are what autocast is used with."""
    dtype = str(half).removeprefix("torch.")
    model = load(LAYER.format(rank=2, dtype=dtype)).ModelNew(dtype=held, device=device)
    x = tensors(dtype=torch.float32, device=device)[0].requires_grad_(recording)
    layer = twin(model)
    with torch.set_grad_enabled(recording), under(half, device):
        got, want = model(x), layer(x)
    assert got.dtype == want.dtype == half
    assert bounded(got, half, model, x)
    if recording:
        gradients = []
        for one, y in ((model, got), (layer, want)):
            leaves = (x, *one.parameters())
            gradients.append(torch.autograd.grad(y.square().sum(), leaves))
        for one, other in zip(*gradients, strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one, other, rtol=2.0**-5, atol=float(other.abs().max()) / 32)


OTHERS = [("float32", torch.bfloat16), ("float32", torch.float16), ("bfloat16", torch.float16)]


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize(("dtype", "half"), OTHERS)
def test_autocast_to_another_dtype_is_left_to_torch(dtype, half, recording, load, device):
    """The result would have another dtype than with torch's layer; the warning names it once."""
    model = load(LAYER.format(rank=2, dtype=dtype)).ModelNew(device=device)
    x = tensors(dtype=torch.float32, device=device)[0]
    with torch.set_grad_enabled(recording), under(half, device):
        want = twin(model)(x)
        with pytest.warns(UserWarning, match=f"{REFUSAL}.*{half}") as caught:
            results = [model(x), model(x)]
    assert len(caught) == 1
    for result in results:
        assert result.dtype == want.dtype == half
        assert torch.equal(result, want)


def test_autocast_leaves_float64_alone(file, device):
    """Autocast converts no float64 tensor: the result is float64, here as in torch."""
    model, x = file.ModelNew(device=device), tensors(device=device)[0]
    with under(torch.bfloat16, device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether a warning comes, torch does not say
        got, want = model(x), twin(model)(x)
    assert got.dtype == want.dtype == torch.float64
    assert close(got, want)


def test_autocast_ends_where_it_is_disabled(load, device):
    """The enclosed region computes in float32, in this file's own kernel and with no warning."""
    model = load(LAYER.format(rank=2, dtype="float32")).ModelNew(device=device)
    x = tensors(dtype=torch.float32, device=device)[0]
    want = model(x)
    with under(torch.bfloat16, device), torch.autocast(device, enabled=False):
        got = model(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("half", HALVES)
def test_the_function_under_autocast(half, load, device):
    """Cast by its own kernel to autocast's dtype; a file of another dtype may only refuse."""
    dtype = str(half).removeprefix("torch.")
    given = tensors(dtype=torch.float32, device=device)
    function = load(LAYER.format(rank=2, dtype=dtype)).conv_transpose2d
    want = function(*(tensor.to(half) for tensor in given))
    with under(half, device):
        got = function(*given)
        assert reference(*given).dtype == half
    assert got.dtype == half
    assert torch.equal(got, want)


@pytest.mark.parametrize("half", HALVES)
def test_the_function_of_another_dtype_refuses_autocasts(half, load, device):
    """It has no kernel for autocast's dtype; a float32 result is not what torch gives."""
    function = load(LAYER.format(rank=2, dtype="float32")).conv_transpose2d
    with under(half, device), pytest.raises(ValueError, match=f"^{REFUSAL}.*{half}"):
        function(*tensors(dtype=torch.float32, device=device))


def test_gradients_inside_autocast_keep_the_files_dtype(load, device):
    """What backward computes again must not be cast by an autocast that is on by then."""
    file = load("relu | ConvTranspose2d(4, 6, 3, groups=2, dtype=float64) | tanh")
    x, w, b = (tensor.requires_grad_() for tensor in tensors(device=device))
    y = file.conv_transpose2d(x, w, b)
    want = torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        got = torch.autograd.grad(y.sum(), (x, w, b))
    assert all(map(torch.equal, got, want))


def test_a_packed_call_is_cast_by_no_autocast(load, device):
    """It launches at once: an input of another dtype would be read as what it is not."""
    file = load("ConvTranspose2d(4, 6, 3, groups=2, dtype=float16)")
    x, w, b = (tensor.half() for tensor in tensors(device=device))
    packed = file.pack_weight(w)
    with torch.autocast(device, torch.float16):
        assert file.conv_transpose2d_packed(x, packed, b).dtype == torch.float16
        with pytest.raises(ValueError, match=r"torch.float16, got torch.float32"):
            file.conv_transpose2d_packed(x.float(), packed, b)
