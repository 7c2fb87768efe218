"""Torch's own suites over emitted files: OpInfo, ModuleInfo, gradcheck and opcheck.

Forward results are compared with scatter, gradients with torch's in float64, each within the bound
of the sums they are: n terms of magnitudes that sum to S differ by less than 2*n*u*S.
"""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
import torch.nn as nn

from building import once
from convgen import ConvTransposeSpec
from convgen.compiler import plan
from convgen.execution import oracle
from torch_samples import COUNTS, DTYPES, Emitter, Sample, collect, read

pytestmark = pytest.mark.interpreter

BIG = {(2, 2), (2, 3), (3, 2), (3, 3)}  # 20 and 120 taps, up to 18392 outputs
SAMPLES = [(rank, number) for rank, count in COUNTS.items() for number in range(count)]
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
LEAST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133, "float64": 2.0**-1074}
MODULES = [f"{lazy}ConvTranspose{rank}d" for lazy in ("", "Lazy") for rank in (1, 2, 3)]


def shared_out(parity):
    """Return the samples; the interpreter has time for one of each pair of a geometry.

    Torch gives each geometry batched, even, and unbatched, odd. A GPU runs all of them.
    """
    return [
        pytest.param(
            rank,
            number,
            marks=() if number % 2 == parity and (rank, number) not in BIG else pytest.mark.gpu,
        )
        for rank, number in SAMPLES
    ]


@pytest.fixture(autouse=True)
def exact_float32(device):
    """Keep torch's gradients exact in float32, as their bound has it, and the same every time.

    On a GPU cuDNN rounds to TF32, and sums in any order, unless it is told.
    """
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def torchs(shared):
    """Torch's samples, as `read` returns them."""
    return read(once(shared, "torch_samples", collect))


@pytest.fixture(scope="module")
def emitter(tmp_path_factory, device):
    return Emitter(tmp_path_factory.mktemp("emitted"), device)


def wide(tensor):
    """Return numbers in the widest type that numpy has."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def within(got, want, bound):
    """Assert that all of `got` is within `bound` of `want`, of the same shape."""
    assert tuple(got.shape) == tuple(want.shape)
    excess = np.abs(wide(got) - want) - bound
    assert (excess <= 0).all(), f"an error exceeds its bound of {bound.max():.2e} at most"


def rounding(dtype, want):
    """Return how far the nearest number of `dtype` may lie from `want`."""
    return HALF_ULP[dtype] * np.abs(want) * 1.01 + LEAST[dtype]


def scattered(sample, precision):
    """Return the result by scatter and the bound of a faithful kernel's error."""
    batched = sample.input.dim() == sample.rank + 2
    x = wide(sample.input if batched else sample.input[None])
    weight = wide(sample.weight)
    if precision == "tf32":
        x, weight = (oracle.rounded(array, "tf32").astype(np.longdouble) for array in (x, weight))
    bias = None if sample.bias is None else wide(sample.bias)
    spec = sample.spec()
    want = oracle.scatter(spec, x, weight, bias)
    magnitudes = [None if array is None else np.abs(array) for array in (x, weight, bias)]
    terms = weight.shape[0] // spec.groups * prod(spec.kernel_size) + 1
    accumulator = HALF_ULP["float64" if spec.dtype == "float64" else "float32"]
    bound = 2 * terms * accumulator * oracle.scatter(spec, *magnitudes)
    bound += rounding(spec.dtype, want)
    return (want, bound) if batched else (want[0], bound[0])


def differentiated(sample, grad, change):
    """Return torch's float64 gradients of the sample, its tensors changed by `change`."""
    leaves = [t if t is None else change(t.double()).requires_grad_() for t in sample.tensors]
    wanted = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(sample.torch(*leaves), wanted, change(grad.double()))


def images(sample):
    return 1 if sample.input.dim() == sample.rank + 1 else len(sample.input)


def terms(sample, grad):
    """Return the number of products in a sum of each gradient."""
    spatial, outputs = (prod(t.shape[-sample.rank :]) for t in (sample.input, grad))
    count = images(sample)
    return prod(sample.weight.shape[1:]), count * spatial, count * outputs


def test_torch_has_the_samples_that_are_tried(torchs):
    """A release of torch that adds samples, or renames an operator, would go untested."""
    counts = {key: len(samples) for key, samples in torchs["op"].items()}
    assert counts == {(rank, dtype): n for rank, n in COUNTS.items() for dtype in DTYPES}
    assert sum(COUNTS.values()) == 32
    assert {name: len(inputs) for name, inputs in torchs["module"].items()} == dict.fromkeys(
        MODULES, 2
    )


def check(call, leaves, sample, precision):
    """Assert that results and gradients of `call` are the sample's, for a random grad."""
    y = call(*leaves)
    assert y.dtype == sample.input.dtype
    within(y, *scattered(sample, precision))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(y, wanted, grad.to(y.device))
    wants, sizes = (differentiated(sample, grad, change) for change in (torch.clone, torch.abs))
    dtype = str(y.dtype).removeprefix("torch.")
    unit = HALF_ULP["float64" if dtype == "float64" else "float32"]
    for got, want, size, count in zip(found, wants, sizes, terms(sample, grad), strict=False):
        assert got.dtype == y.dtype
        bound = 2 * count * unit * wide(size) + rounding(dtype, wide(want))
        bound += 2 * (images(sample) - 1) * HALF_ULP[dtype] * wide(size)  # torch rounds after each
        within(got, wide(want), bound)


def in_turn():
    """Return samples with dtypes: a geometry has each dtype once, batched or unbatched in turn."""
    return [
        (dtype, rank, number)
        for turn, dtype in enumerate(DTYPES)
        for rank, number in SAMPLES
        if (number // 2 + number + turn) % 2
    ]


@pytest.mark.parametrize(("dtype", "rank", "number"), in_turn())
def test_opinfo_results_and_gradients(rank, number, dtype, torchs, emitter, device):
    """A wrong tap, cast or gradient in an unbatched, grouped or dilated call shows."""
    sample = torchs["op"][rank, dtype][number]
    # The direct family needs no matrix unit, so its float32 is not rounded to TF32.
    precision = None if plan(sample.spec()).tile.family == "direct" else sample.spec().precision
    check(emitter.function(sample), sample.leaves(device), sample, precision)


@pytest.mark.parametrize(("rank", "number"), shared_out(1))
def test_gradcheck_and_gradgradcheck(rank, number, torchs, emitter, device):
    """Finite differences know nothing of torch's formulas: a gradient that is none shows."""
    sample = torchs["op"][rank, "float64"][number]
    function, leaves = emitter.function(sample), sample.leaves(device)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def passes_opcheck(sample, emitter, device):
    """Schema, autograd registration, fake tensors and ahead-of-time dispatch, with gradients."""
    torch.library.opcheck(emitter.load(sample.spec()).OPERATOR.default, sample.leaves(device))


@pytest.mark.parametrize(("rank", "number"), shared_out(0))
def test_opcheck_in_float64(rank, number, torchs, emitter, device):
    """A fake result of another shape or stride, or a schema that lies, breaks compilers."""
    passes_opcheck(torchs["op"][rank, "float64"][number], emitter, device)


@pytest.mark.parametrize(("rank", "number"), shared_out(1))
def test_opcheck_in_float32(rank, number, torchs, emitter, device):
    """As in float64, where rounding to TF32 runs too."""
    passes_opcheck(torchs["op"][rank, "float32"][number], emitter, device)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", MODULES)
def test_moduleinfo(name, number, dtype, torchs, emitter, device):
    """A parameter, default or gradient that is not torch's shows in a twin with its state."""
    arguments, keywords, x = torchs["module"][name][number]
    x = x.to(getattr(torch, dtype))
    layer = getattr(nn, name)(*arguments, **keywords, dtype=x.dtype)
    layer(x)  # a lazy layer takes its channels from the input
    made = emitter.load(ConvTransposeSpec.from_module(layer)).ModelNew
    model = made(device=device) if "Lazy" in name else made(*arguments, **keywords, device=device)
    model.load_state_dict(layer.state_dict())
    sample = Sample(int(name[-2]), x, layer.weight.detach(), layer.bias.detach(), {})
    leaves = [x.to(device, copy=True).requires_grad_(), model.weight, model.bias]
    precision = "tf32" if dtype == "float32" else None
    check(lambda x, weight, bias: model(x), leaves, sample, precision)
    other = getattr(nn, name)(*arguments, **keywords, dtype=x.dtype)
    other.load_state_dict(model.state_dict())
    assert [*other.state_dict()] == [*layer.state_dict()]
    assert torch.equal(other(x), layer(x))
