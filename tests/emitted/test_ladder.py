"""Files with kernels for small and for large inputs, beside that for any size.

The oracle is torch in float64; `verify` compares with the scatter. The interpreter computes small
inputs only, so the files' records are told which are small and large; the kernel that a call
launches is noted where these say what starts it. What would break it: a call that has the kernel of
other sizes or of another layout, a packed weight in another form, an input beyond what the kernel
can index, a kernel that gains less than it costs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from convgen import find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import laid_out, load_module
from convgen.execution.verify import verify
from convgen.explain import explain
from convgen.geometry.phases import decompose
from convgen.geometry.problem import NOMINAL, SMALL_INPUTS, problem_of
from convgen.language.spec import LAYOUTS
from convgen.planning.candidates import rank_tiles
from running import worked
from test_rungs import reference, started

H100 = find_target("h100")
# The layer, and its inputs with the end of the name of the kernel that each has.
CASES = {
    "large, one layout": (
        "ConvTranspose2d(16, 8, 3, dtype=float16)",
        {(2, 16, 6, 7): "_large", (2, 16, 6, 6): "", (1, 16, 6, 7): ""},
    ),
    "both, two layouts": (
        "relu | ConvTranspose2d(32, 16, 5, dilation=2, layout=any)",
        {(2, 32, 4, 5): "_large", (1, 32, 5, 7): "", (2, 32, 3, 5): "_small"},
    ),
    "rungs": (
        "ConvTranspose2d(16, 8, 3, rungs=((9, 16, 4, 4),), layout=any, dtype=bfloat16)",
        {(2, 16, 7, 5): "_large", (9, 16, 4, 4): "_rung1", (2, 16, 5, 5): ""},
    ),
    "one axis, folded": (
        "ConvTranspose1d(64, 32, 7, dtype=float16)",
        {(2, 64, 9): "_large", (2, 64, 8): "", (5, 64, 3): "_small", (3, 64, 1): "_small"},
    ),
    "three axes": (
        "ConvTranspose3d(16, 16, 3, layout=any)",
        {(1, 16, 3, 2, 4): "_large", (1, 16, 2, 3, 3): ""},
    ),
    "boxes of images": (
        "ConvTranspose2d(100, 64, 4, layout=channels_last)",
        {(3, 100, 2, 3): "", (2, 100, 1, 2): "_small", (1, 100, 2, 2): "_small"},
    ),
    "groups": (
        "ConvTranspose2d(256, 32, 4, 2, 1, groups=2, bias=False)",
        {(1, 256, 3, 2): "", (2, 256, 1, 1): "_small"},
    ),
}
LARGE = [name for name, (_, inputs) in CASES.items() if "_large" in inputs.values()]
SMALL = [name for name, (_, inputs) in CASES.items() if "_small" in inputs.values()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of each case: an operator is that of the first module with a text."""
    folder = tmp_path_factory.mktemp("ladder")
    return {
        name: load_module(compile_kernel(parse(text), H100).text, f"ladder_{number}", folder)
        for number, (name, (text, _)) in enumerate(CASES.items())
    }


@pytest.fixture(params=CASES)
def case(request, files, device):
    """A file, its layout, its calls with the kernel of each, and a layer of it."""
    text, inputs = CASES[request.param]
    spec, file = parse(text), files[request.param]
    elements = {
        which: [math.prod(shape) for shape, end in inputs.items() if end == which]
        for which in ("_small", "_large")
    }
    for record in file.PLANS:
        if elements["_small"] and record.small:
            record.most = max(elements["_small"])
        if elements["_large"] and record.large:
            record.least = min(elements["_large"])
    torch.manual_seed(1)
    layer = file.ModelNew(device=device)
    calls = {}
    for shape, layout in itertools.product(inputs, LAYOUTS):
        if spec.layout in ("any", layout):
            x = torch.randn(shape, device=device, dtype=layer.weight.dtype)
            last = spec.layout == "any" and layout == "channels_last"
            calls[laid_out(x, layout)] = kernel_of(file, inputs[shape], last=last)
    return file, spec.layout, calls, layer


def kernel_of(file, end, *, last):
    """Return the name of what starts the kernel; a layout may have none for such sizes."""
    has = end in ("", "_rung1") or getattr(file.PLANS[last], end.removeprefix("_")) is not None
    return f"_start{end * has}{'_last' * last}"


def is_close(got, want, share):
    """Whether numbers differ by at most a share of the largest."""
    return torch.allclose(got.double(), want, atol=share * float(want.detach().abs().max()))


@pytest.mark.interpreter
def test_a_call_has_the_kernel_of_its_size_and_layout(case):
    file, layout, calls, layer = case
    for x, start in calls.items():
        with started(file) as seen, torch.no_grad():
            y = layer(x)
        assert seen == [start]
        assert is_close(y, reference(file, layer, x), 1e-2)
    assert not layer._calls.torch
    # Elsewhere Inductor would hand over a layout that the file has no kernel for.
    flexible = torch.Tag.flexible_layout in file.OPERATOR.default.tags
    assert flexible == (layout == "any")


@pytest.mark.interpreter
def test_operator_gradients_and_packed_weights(case):
    """By every road the numbers are those of the layer."""
    file, _, calls, layer = case
    packed_call = getattr(file, f"conv_transpose{len(layer.stride)}d_packed")
    for x in calls:
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(file.OPERATOR(x, layer.weight, layer.bias), y)
            assert torch.equal(packed_call(x, file.pack_weight(layer.weight, x), layer.bias), y)
        grad = torch.randn_like(y)
        x = x.clone().requires_grad_()
        mine = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
        twins = [each.detach().double().requires_grad_() for each in (x, *layer.parameters())]
        given = twins if layer.bias is not None else [*twins, None]
        want = torch.autograd.grad(file._torch(*given), twins, grad.double())
        assert all(is_close(*pair, 2e-2) for pair in zip(mine, want, strict=True))


@pytest.mark.interpreter
def test_a_frozen_layer_keeps_each_form(case):
    _, _, calls, layer = case
    with torch.no_grad():
        want = [layer(x) for x in calls]
        layer.freeze()
        for _ in range(2):
            assert all(map(torch.equal, map(layer, calls), want))
        layer.weight.mul_(2)  # an edit that torch reports ends it
        assert not torch.equal(layer(next(iter(calls))), want[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["both, two layouts", "one axis, folded"], indirect=True)
def test_a_graph_of_dynamic_sizes_has_each_kernel(case):
    """The number of elements is compared in the operator, not while tracing: no graph for each."""
    file, _, calls, layer = case
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, dynamic=True, fullgraph=True)
    of_first = {x: start for x, start in calls.items() if not start.endswith("_last")}
    with torch.no_grad():
        for x, start in of_first.items():
            with started(file) as seen:
                y = compiled(x)
            assert seen == [start]
            assert torch.equal(y, layer(x))
    # Extents that are 1 or the same as others have graphs of their own, whatever the layer.
    assert graphs.frame_count <= len(of_first)


@pytest.mark.parametrize("case", LARGE, indirect=True)
def test_the_kernel_for_large_inputs_is_asked_for_its_limits(case, monkeypatch):
    """It may have lower ones than that for any size, and no call is beyond them that is small."""
    file, _, calls, layer = case
    x = next(iter(calls))
    call = file._call(x, layer.weight, layer.weight.shape, layer.bias, False)
    assert file._mismatch.__wrapped__(*call) is None
    monkeypatch.setattr(file.PLAN.large, "mismatch_of_sizes", lambda shape, output: "few sizes")
    assert file._mismatch.__wrapped__(*call) == "few sizes"


def test_sizes_that_a_kernel_cannot_index_are_left_to_torch(case):
    """A fake's sizes may be of any number."""
    file, _, calls, layer = case
    x = next(iter(calls))
    wide = (*x.shape[:-1], 2**31)
    call = file._call(x, layer.weight, layer.weight.shape, layer.bias, False)
    shapes = [wide if each is call[0] else each for each in call]
    mismatch = file._mismatch.__wrapped__(*shapes)
    assert mismatch is not None
    assert "2**31" in mismatch


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["large, one layout", "boxes of images"])
def test_each_kernel_is_verified(name):
    spec = parse(CASES[name][0])
    report = verify(spec, H100)
    assert report.passed
    assert report.spec == str(spec)


# ---- plans ----


def ladder_of(name):
    """Return the plan of the first kernel for any size, and those beside it in its layout."""
    made = plan(parse(CASES[name][0]), H100)
    mine = [each for each in made.kernels if each.spec.layout == made.spec.layout]
    return made, *([each for each in mine if getattr(each, of)] for of in ("most", "least"))


@pytest.mark.parametrize("name", LARGE)
def test_a_kernel_for_large_inputs_saves_the_launch_of_its_copy(name):
    """The bound is where predicted times differ by a launch, up to the next power of two."""
    made, _, (large,) = ladder_of(name)
    layer = made.spec, made.phases, made.target, made.families
    assert large.tile == next(each.tile for each in rank_tiles(*layer) if each.tile.relayout)
    problem = problem_of(made.spec, made.phases)
    share = large.least / (problem.batch * problem.in_channels * problem.inputs)
    saved = 1e3 * share * (made.cost.model_ms - large.cost.model_ms)
    assert 7 <= saved <= 14  # microseconds
    assert large.least.bit_count() == 1
    assert made.cost.model_ms >= 1.1 * large.cost.model_ms


@pytest.mark.parametrize("name", SMALL)
def test_a_kernel_for_small_inputs_is_planned_for_such(name):
    made, (small,), _ = ladder_of(name)
    layer = made.spec, made.phases, made.target, made.families
    ranking = rank_tiles(*layer, SMALL_INPUTS)
    assert small.tile == next(each.tile for each in ranking if not each.tile.relayout)
    assert small.ranking == ranking
    assert (small.assumed, made.assumed) == (SMALL_INPUTS, NOMINAL)
    inputs = small.most // made.spec.in_channels
    assert 2**10 <= inputs <= 2**14
    assert not (inputs & (inputs - 1))


@pytest.mark.parametrize("name", SMALL)
def test_a_kernel_for_small_inputs_can_index_all_of_them(name):
    """It checks no sizes: the widest and the tallest input, and one of single positions, fit."""
    made, (small,), _ = ladder_of(name)
    spec, inputs = made.spec, small.most // made.spec.in_channels
    shapes = [[1] * (spec.rank + 1) for _ in range(spec.rank + 1)]
    for axis, shape in enumerate(shapes):
        shape[axis] = inputs
        outputs = shape[0] * spec.out_channels
        for size, phases in zip(shape[1:], decompose(spec), strict=True):
            outputs *= 4 * ((size - 1) * phases.stride + phases.growth)  # 4: rows of a block
        assert max(2 * outputs, small.most) < 2**31


def test_small_inputs_whose_outputs_grow_too_much_have_no_kernel():
    """An input of few elements may be a row of them, which gains a plane of outputs an axis."""
    near, far = (plan(parse(f"ConvTranspose3d(256, 16, 3, dilation={n})"), H100) for n in (1, 6))
    assert [each.most is not None for each in near.others].count(True) == 1
    assert [each.most is not None for each in far.others].count(True) == 0


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ConvTranspose2d(16, 8, 3, dtype=float16, input=(2, 16, 64, 64))", "h100"),  # known sizes
        ("ConvTranspose2d(16, 8, 3, dtype=float16, autotune=blocks)", "h100"),  # tuned by the user
        ("ConvTranspose2d(16, 8, 3, dtype=float16)", "rtx4090"),  # copies were not fitted there
        ("ConvTranspose2d(16, 8, 3, layout=channels_last)", "h100"),  # gains too little
        ("ConvTranspose2d(16, 16, 4, 2, 1, groups=16)", "h100"),  # no kernel of a copy
        ("ConvTranspose2d(kernel_size=4, stride=2)", "h100"),  # open channels
    ],
)
def test_what_has_one_kernel_for_all(text, target):
    assert plan(parse(text), find_target(target)).others == ()


def test_a_given_tile_is_the_only_one():
    spec = parse(CASES["large, one layout"][0])
    made = plan(spec, H100)
    (large,) = made.others
    assert [each.tile for each in plan(spec, H100, large.tile).kernels] == [large.tile]
    assert plan(spec, H100, made.tile).others == ()


def test_explain_and_the_header_name_them():
    made = plan(parse(CASES["both, two layouts"][0]), H100)
    stages = [section.stage for section in explain(made)]
    text = compile_kernel(made.file_spec, H100).text
    for kernel in made.others:
        if kernel.least is not None:
            assert f"plan, large inputs, {kernel.spec.layout}" in stages
            bound = f"2**{kernel.least.bit_length() - 1} elements or more"
        elif kernel.most is not None:
            assert f"plan, small inputs, {kernel.spec.layout}" in stages
            bound = f"at most 2**{kernel.most.bit_length() - 1} elements"
        else:
            continue
        assert sum(bound in line and kernel.spec.layout in line for line in text.split("\n")) == 1


@pytest.mark.compile
def test_kernels_of_a_ladder_do_not_spill():
    texts = [text for text, _ in CASES.values()]
    texts += [
        "ConvTranspose2d(64, 64, 3, dtype=float16)",
        "ConvTranspose3d(48, 24, 3)",
        "ConvTranspose2d(512, 256, 4, 2, 1, layout=any)",
        "ConvTranspose1d(512, 256, 16, 8, 4)",
    ]
    rows = worked("compile_worker.py", [(text, "h100") for text in texts])
    assert [row["spills"] for row in rows] == [0] * len(texts)
