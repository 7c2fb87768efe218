"""Files with a kernel for large inputs, which reads a copy, beside that for any size.

The oracle is torch in float64; `verify` compares with the scatter. The interpreter computes small
inputs only, so the files' records are told that they are large; which kernel a call launches is
noted where these say what starts it. What would break it: a call that has the kernel of other sizes
or of another layout, a packed weight in another form, a kernel that gains less than it costs.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import test_rungs
from convgen import find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import laid_out, load_module
from convgen.execution.verify import verify
from convgen.explain import explain
from convgen.geometry.problem import problem_of
from convgen.planning.candidates import rank_tiles
from running import worked

H100 = find_target("h100")
# The layer, an input that is large enough for the kernel of large ones, and one that is not.
CASES = {
    "one layout": (
        "ConvTranspose2d(16, 8, 3, dtype=float16)",
        (2, 16, 6, 7),
        (2, 16, 6, 6),
    ),
    "two layouts": (
        "relu | ConvTranspose2d(32, 16, 5, dilation=2, layout=any)",
        (2, 32, 5, 5),
        (1, 32, 6, 7),
    ),
    "rungs": (
        "ConvTranspose2d(16, 8, 3, rungs=((9, 16, 4, 4),), layout=any, dtype=bfloat16)",
        (2, 16, 7, 5),
        (2, 16, 5, 5),
    ),
    "one axis": ("ConvTranspose1d(64, 32, 7, dtype=float16)", (2, 64, 9), (2, 64, 8)),
    "three axes": ("ConvTranspose3d(16, 16, 3, layout=any)", (1, 16, 3, 2, 4), (1, 16, 2, 3, 3)),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path, device):
    """A file's spec, the file, an input that is large and one that is not, a layer of the file."""
    text, *shapes = CASES[request.param]
    spec, name = parse(text), f"large_{list(CASES).index(request.param)}"
    file = load_module(compile_kernel(spec, H100).text, name, tmp_path)
    file.PLAN.least = torch.Size(shapes[0]).numel()
    torch.manual_seed(1)
    layer = file.ModelNew(device=device)
    inputs = [torch.randn(shape, device=device, dtype=layer.weight.dtype) for shape in shapes]
    return spec, file, *inputs, layer


def is_close(got, want, share):
    """Whether numbers differ by at most a share of the largest."""
    return torch.allclose(got.double(), want, atol=share * float(want.detach().abs().max()))


@pytest.mark.interpreter
def test_a_call_has_the_kernel_of_its_size_and_layout(case):
    spec, file, large, small, layer = case
    calls = [(large, "_large"), (small, ""), (large[0], "_large" if len(large) == 1 else "")]
    if spec.layout == "any":
        calls += [(laid_out(large, "channels_last"), "_last")]
    for x, end in calls:
        with test_rungs.started(file) as seen, torch.no_grad():
            y = layer(x)
        assert seen == [f"_start{end}"]
        assert is_close(y, test_rungs.reference(file, layer, x), 1e-2)
    assert not layer._calls.torch
    # Elsewhere Inductor would hand over a layout that the file has no kernel for.
    flexible = torch.Tag.flexible_layout in file.OPERATOR.default.tags
    assert flexible == (spec.layout == "any")


@pytest.mark.interpreter
def test_the_size_of_a_rung_has_its_kernel_however_many_elements(case):
    spec, file, large, _, layer = case
    for rung in spec.rungs:
        file.PLAN.least = 1
        x = torch.randn(rung, device=large.device, dtype=large.dtype)
        with test_rungs.started(file) as seen, torch.no_grad():
            layer(x)
        assert seen == ["_start_rung1"]


@pytest.mark.interpreter
def test_operator_gradients_and_packed_weights(case):
    """By every road the numbers are those of the layer."""
    spec, file, large, small, layer = case
    packed_call = getattr(file, f"conv_transpose{spec.rank}d_packed")
    for x in (large, small):
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(file.OPERATOR(x, layer.weight, layer.bias), y)
            assert torch.equal(packed_call(x, file.pack_weight(layer.weight, x), layer.bias), y)
        grad = torch.randn_like(y)
        x = x.clone().requires_grad_()
        mine = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
        twins = [each.detach().double().requires_grad_() for each in (x, *layer.parameters())]
        want = torch.autograd.grad(file._torch(*twins), twins, grad.double())
        assert all(is_close(*pair, 2e-2) for pair in zip(mine, want, strict=True))


@pytest.mark.interpreter
def test_a_frozen_layer_keeps_each_form(case):
    _, _, large, small, layer = case
    with torch.no_grad():
        want = [layer(x) for x in (large, small)]
        layer.freeze()
        for _ in range(2):
            assert all(map(torch.equal, map(layer, (large, small)), want))
        layer.weight.mul_(2)  # an edit that torch reports ends it
        assert not torch.equal(layer(large), want[0])


@pytest.mark.interpreter
def test_a_graph_of_dynamic_sizes_has_both_kernels(case):
    """One graph: the number of elements is compared in the operator, not while tracing."""
    _, file, large, small, layer = case
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for x, end in ((large, "_large"), (small, ""), (large, "_large")):
            with test_rungs.started(file) as seen:
                y = compiled(x)
            assert seen == [f"_start{end}"]
            assert torch.equal(y, layer(x))
    assert graphs.frame_count <= 2  # a size that is the same in the first two calls may be static


def test_sizes_that_a_kernel_cannot_index_are_left_to_torch(case):
    """Both kernels are asked, as a fake of any size tells."""
    _, file, large, _, layer = case
    wide = (*large.shape[:-1], 2**31)
    call = file._call(large, layer.weight, layer.weight.shape, layer.bias, False)
    shapes = [wide if each is call[0] else each for each in call]
    mismatch = file._mismatch.__wrapped__(*shapes)
    assert mismatch is not None
    assert "2**31" in mismatch


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["one layout", "two layouts"])
def test_each_kernel_is_verified(name, monkeypatch):
    spec = parse(CASES[name][0])
    report = verify(spec, H100)
    assert report.passed
    assert report.spec == str(spec)


# ---- plans ----


@pytest.mark.parametrize("name", CASES)
def test_it_saves_the_launch_of_its_copy(name):
    """The bound is where predicted times differ by a launch, up to the next power of two."""
    made = plan(parse(CASES[name][0]), H100)
    (large,) = (kernel for kernel in made.kernels if kernel.least)
    first = next(each for each in rank_tiles(*layer_of(made)) if each.tile.relayout)
    assert large.tile == first.tile
    problem = problem_of(made.spec, made.phases)
    share = large.least / (problem.batch * problem.in_channels * problem.inputs)
    saved = 1e3 * share * (made.cost.model_ms - large.cost.model_ms)
    assert 7 <= saved <= 14  # microseconds
    assert large.least.bit_count() == 1
    assert made.cost.model_ms >= 1.1 * large.cost.model_ms


def layer_of(made):
    return made.spec, made.phases, made.target, made.families


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ConvTranspose2d(16, 8, 3, dtype=float16, input=(2, 16, 64, 64))", "h100"),  # known sizes
        ("ConvTranspose2d(16, 8, 3, dtype=float16, autotune=blocks)", "h100"),  # tuned by the user
        ("ConvTranspose2d(16, 8, 3, dtype=float16)", "rtx4090"),  # copies were not fitted there
        ("ConvTranspose2d(64, 64, 3, layout=channels_last)", "h100"),  # gains too little
        ("ConvTranspose2d(16, 16, 4, 2, 1, groups=16)", "h100"),  # no kernel of a copy
    ],
)
def test_what_has_one_kernel_for_all(text, target):
    made = plan(parse(text), find_target(target))
    assert made.others == ()


def test_a_given_tile_is_the_only_one():
    spec = parse(CASES["one layout"][0])
    made = plan(spec, H100)
    assert plan(spec, H100, made.others[0].tile).kernels[0].tile == made.others[0].tile
    assert plan(spec, H100, made.tile).others == ()


def test_explain_and_the_header_name_it():
    made = plan(parse(CASES["two layouts"][0]), H100)
    (large,) = (kernel for kernel in made.kernels if kernel.least)
    stages = [section.stage for section in explain(made)]
    assert "plan, large inputs, channels_first" in stages
    exponent = large.least.bit_length() - 1
    line = f"# for inputs of 2**{exponent} elements or more, in channels_first: "
    assert line in compile_kernel(made.file_spec, H100).text


@pytest.mark.compile
def test_kernels_for_large_inputs_do_not_spill():
    texts = [text for text, *_ in CASES.values()]
    texts += ["ConvTranspose2d(64, 64, 3, dtype=float16)", "ConvTranspose3d(48, 24, 3)"]
    rows = worked("compile_worker.py", [(text, "h100") for text in texts])
    assert [row["spills"] for row in rows] == [0] * len(texts)
