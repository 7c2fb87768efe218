"""Files with rungs: sizes that have a kernel of their own, beside that for any size.

The oracle is torch in float64; `verify` compares with the scatter. Which kernel a call launches is
noted where the file's records say what starts it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from convgen import SpecError, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import laid_out, load_module
from convgen.execution.verify import verify
from convgen.language.spec import LAYOUTS

pytestmark = pytest.mark.interpreter

H200 = find_target("h200")
# The layer, its inputs, and the end of the name of the kernel that each has.
CASES = {
    "two layouts": (
        "ConvTranspose2d(6, 4, 4, stride=2, rungs=((3, 6, 4, 5), (2, 6, 7, 3)), layout=any)",
        {(3, 6, 4, 5): "_rung1", (1, 6, 4, 5): "_rung1", (2, 6, 7, 3): "_rung2", (2, 6, 5, 4): ""},
    ),
    "one image position": (
        "ConvTranspose2d(20, 16, 4, bias=False, rungs=((6, 20, 1, 1),), layout=any)",
        {(6, 20, 1, 1): "_rung1", (64, 20, 1, 1): "_rung1", (6, 20, 2, 1): ""},
    ),
    "one layout": (
        "ConvTranspose2d(6, 4, 3, rungs=((3, 6, 4, 5),), layout=channels_last)",
        {(3, 6, 4, 5): "_rung1", (2, 6, 4, 5): "_rung1", (3, 6, 5, 4): ""},
    ),
    "one axis": (
        "ConvTranspose1d(6, 4, 16, stride=8, padding=4, rungs=((2, 6, 9),))",
        {(2, 6, 9): "_rung1", (5, 6, 9): "_rung1", (2, 6, 8): "", (6, 9): "_rung1"},
    ),
    "three axes": (
        "ConvTranspose3d(4, 4, 2, stride=2, rungs=((2, 4, 3, 2, 3),), layout=any)",
        {(2, 4, 3, 2, 3): "_rung1", (1, 4, 3, 3, 3): ""},
    ),
    "depthwise": (
        "ConvTranspose2d(8, 8, 3, groups=8, rungs=((2, 8, 5, 4),), layout=any)",
        {(2, 8, 5, 4): "_rung1", (1, 8, 4, 5): ""},
    ),
    "open channels, stages": (
        "relu | ConvTranspose2d(kernel_size=2, stride=2, rungs=((2, 8, 5, 4),), layout=any) | tanh",
        {(2, 8, 5, 4): "_rung1", (2, 8, 4, 4): ""},
    ),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path, device):
    """A file, its inputs, and a layer of it."""
    text, inputs = CASES[request.param]
    name = f"rungs_{list(CASES).index(request.param)}"
    file = load_module(compile_kernel(parse(text), H200).text, name, tmp_path)
    torch.manual_seed(1)
    channels = () if "kernel_size" not in text else (8, 6)
    file.LAYOUT = parse(text).layout
    return file, inputs, file.ModelNew(*channels, device=device)


@contextlib.contextmanager
def started(file) -> Iterator[list[str]]:
    """Yield a list that gets the name of the function that starts the kernel of each call.

    A launch that was made before would be repeated without it: none is remembered.
    """
    file.LAUNCHED.clear()
    seen: list[str] = []
    records = [
        value for name, value in vars(file).items() if name.startswith("PLAN") and name != "PLANS"
    ]
    before = {record: record.start for record in records}
    for record, start in before.items():

        def noting(*given, start=start):
            seen.append(start.__name__)
            return start(*given)

        record.start = noting
    try:
        yield seen
    finally:
        for record, start in before.items():
            record.start = start


def reference(file, layer, x):
    """Return torch's result in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    return file._torch(x.double(), layer.weight.double(), bias)


def test_a_call_has_the_kernel_of_its_sizes(case, device):
    file, inputs, layer = case
    for shape, layout in itertools.product(inputs, LAYOUTS):
        batched = len(shape) == len(layer.kernel_size) + 2
        if file.LAYOUT not in ("any", layout) or (layout == LAYOUTS[1] and not batched):
            continue
        x = torch.randn(shape, device=device)
        x = laid_out(x, layout) if batched else x
        with started(file) as seen, torch.no_grad():
            y = layer(x)
        last = file.LAYOUT == "any" and file._is_channels_last(x.shape, x.stride())
        assert seen == [f"_start{inputs[shape]}{'_last' * last}"]
        want = reference(file, layer, x)
        assert torch.allclose(y.double(), want, atol=2e-3 * float(want.detach().abs().max()))
        assert not layer._calls.torch


def test_operator_gradients_and_packed_weights(case, device):
    """By every road the numbers are those of the layer."""
    file, inputs, layer = case
    op = f"conv_transpose{len(layer.kernel_size)}d"
    for shape in inputs:
        if len(shape) != len(layer.kernel_size) + 2:
            continue
        x = laid_out(torch.randn(shape, device=device), LAYOUTS[file.LAYOUT == "channels_last"])
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(file.OPERATOR(x, layer.weight, layer.bias), y)
            packed = file.pack_weight(layer.weight, x)
            assert torch.equal(getattr(file, f"{op}_packed")(x, packed, layer.bias), y)
        x.requires_grad_()
        grad = torch.randn_like(y)
        mine = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
        twin = x.detach().double().requires_grad_()
        weights = [each.detach().double().requires_grad_() for each in layer.parameters()]
        want = torch.autograd.grad(
            file._torch(twin, weights[0], weights[1] if len(weights) > 1 else None),
            [twin, *weights],
            grad.double(),
        )
        for got, right in zip(mine, want, strict=True):
            assert torch.allclose(got.double(), right, atol=4e-3 * float(right.abs().max()))


def test_a_frozen_layer_keeps_each_form(case, device):
    file, inputs, layer = case
    with torch.no_grad():
        batched = [shape for shape in inputs if len(shape) == len(layer.kernel_size) + 2]
        calls = [
            laid_out(torch.randn(shape, device=device), LAYOUTS[file.LAYOUT == "channels_last"])
            for shape in batched
        ]
        want = [layer(x) for x in calls]
        layer.freeze()
        for x, y in [*zip(calls, want, strict=True)] * 2:
            assert torch.equal(layer(x), y)
        layer.weight.mul_(2)  # an edit that torch reports ends it
        assert not torch.equal(layer(calls[0]), want[0])


def test_a_compiled_layer_of_dynamic_sizes_has_them_too(tmp_path, device):
    """The format is decided while tracing, the kernel by the sizes of a call."""
    text, inputs = CASES["two layouts"]
    text = text.replace("(6, 4, 4", "(6, 7, 4")  # equal files share the operator of the first
    file = load_module(compile_kernel(parse(text), H200).text, "rungs_compiled", tmp_path)
    layer = file.ModelNew(device=device)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for shape, end in inputs.items():
            x = torch.randn(shape, device=device)
            with started(file) as seen:
                y = compiled(x)
            assert seen == [f"_start{end}"]
            assert torch.equal(y, layer(x))


def test_the_plan_of_a_rung_is_that_of_its_sizes():
    """Its tile is the known size's, for any batch; other sizes have the open plan."""
    text = "ConvTranspose2d(100, 512, 4, bias=False{})"
    made = plan(parse(text.format(", rungs=((64, 100, 1, 1),)")), H200)
    known = plan(parse(text.format(", input=(64, 100, 1, 1)")), H200)
    opened = plan(parse(text.format("")), H200)
    (rung,) = (each for each in made.others if each.rung)
    assert (rung.tile, rung.fold_batch, rung.cost) == (known.tile, known.fold_batch, known.cost)
    assert rung.tile != opened.tile == made.tile
    assert rung.spec.input == (None, 100, 1, 1)


def test_a_spec_s_parts():
    spec = parse("ConvTranspose2d(6, 4, 3, rungs=((3, 6, 4, 5), (2, 6, 7, 3)), layout=any)")
    assert [(part.layout, part.input, part.rungs) for part in spec.parts] == [
        (layout, sizes, ()) for sizes, layout in itertools.product((None, *spec.rungs), LAYOUTS)
    ]
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("rungs=((2, 6, 5, 5),), input=(2, 6, 5, 5)", "an input whose spatial sizes are open"),
        ("rungs=((2, 6, 5, 5),), input=(3, 6, None, None)", "is no input"),
        ("rungs=((2, 6, 5, 5),), autotune=blocks", "autotune blocks goes with no rungs"),
        ("layout=any, autotune=launch", "autotune launch needs one layout"),
    ],
)
def test_what_goes_with_no_rungs(more, says):
    with pytest.raises(SpecError, match=says):
        parse(f"ConvTranspose2d(6, 4, 3, {more})")


def test_each_rung_is_verified():
    report = verify(parse(CASES["two layouts"][0]), H200)
    assert report.passed
    assert report.exact
    assert report.spec == str(parse(CASES["two layouts"][0]))


def test_the_length_of_a_file():
    """Each further kernel adds less than a third of the file of one."""
    one = "ConvTranspose2d(64, 32, 4, stride=2, padding=1{})"
    lines = [
        compile_kernel(parse(one.format(more)), H200).text.count("\n")
        for more in ("", ", rungs=((8, 64, 16, 16),)", ", rungs=((8, 64, 16, 16),), layout=any")
    ]
    assert lines[1] <= 1.3 * lines[0]
    assert lines[2] <= 1.9 * lines[0]
