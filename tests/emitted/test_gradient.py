"""The kernel for the gradient of the input: when a file has it, and what it computes.

What would break it: a tap or channel that is not turned round, a kernel that a file has without a
measurement, or that runs where more than numbers is asked for (create_graph, vmap), a graph that
breaks at it, names of the two kernels that meet.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys

import numpy as np
import pytest
import torch

from convgen import emit, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.errors import SpecError
from convgen.execution import oracle
from convgen.execution.cubin import read_launches
from convgen.execution.loading import load_module
from convgen.explain import explain
from convgen.families.registry import FAMILIES
from convgen.geometry.gradient import gradient_refusal, input_gradient
from convgen.geometry.phases import decompose
from convgen.planning.candidates import rank_tiles
from convgen.planning.choices import Choices, key_of, read_choices, text_of
from convgen.planning.plan import Measured, MeasuredGradient
from linting import ruff
from rules import check_rules

H100 = find_target("h100")
LAYER = "ConvTranspose2d(4, 6, 3, padding=1, groups=2, dtype=float64, input=(2, 4, 5, 6))"
OPEN = "ConvTranspose2d(kernel_size=3, padding=1, groups=2, dtype=float64)"


def tiles_of(spec, kinds=("gather", 1, 1)):
    """Return the tiles of a (family, span, rows) that could give the input's gradient of `spec`."""
    back = input_gradient(spec)
    able = {family.name for family in FAMILIES if family.gradient_refusal() is None}
    ranking = rank_tiles(back, decompose(back), H100, FAMILIES)
    tiles = [c.tile for c in ranking if c.tile.family in able and not c.tile.relayout]
    return [t for t in tiles if kinds is None or (t.family, t.span, t.rows) == kinds]


def choices_of(text, kind=None, ms=0.5, torch_ms=0.7):
    """Return choices that have measured the gradient's kernel, of the model's tile or of a kind."""
    spec = parse(text)
    found = MeasuredGradient(tiles_of(spec, kind)[0], ms, torch_ms)
    measured = Measured(plan(spec, H100).tile, 1.0, 3, "a card", found)
    return Choices("h100", {key_of(spec): measured})


def emitted(text, kind=None):
    return compile_kernel(parse(text), H100, choices=choices_of(text, kind)).text


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The function from a spec's text, and the kind of its gradient's tile, to its module.

    One a text: copies of a file share the operators of the first.
    """
    folder, count = tmp_path_factory.mktemp("gradient"), itertools.count()
    return functools.cache(
        lambda *of: load_module(emitted(*of), f"{folder.name}_{next(count)}", folder)
    )


# ---- the layer that leads back ----


def test_the_layer_that_leads_back_has_the_shapes_of_the_gradient():
    spec = parse("ConvTranspose2d(4, 6, (3, 2), padding=(1, 0), dilation=2, input=(2, 4, 5, 7))")
    back = input_gradient(spec)
    assert back.input == (2, 6, *spec.output_spatial)
    assert (2, back.out_channels, *back.output_spatial) == spec.input
    assert (back.padding, back.bias) == ((3, 2), False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ConvTranspose2d(4, 6, 3, stride=(1, 2))", "the stride is not 1"),
        ("ConvTranspose1d(4, 6, 3, dilation=3, output_padding=1)", "with output_padding"),
        ("ConvTranspose1d(4, 6, 3, padding=3)", "would be negative"),
        ("ConvTranspose1d(4, 6, 3) | relu", "the stages around the layer"),
    ],
)
def test_other_layers_keep_torch_s_gradient(text, reason):
    """A wrong formula for them would train wrongly; a row of choices must not bring it about."""
    spec = parse(text)
    assert reason in gradient_refusal(spec)
    tile = plan(spec, H100).tile
    measured = Measured(tile, 1.0, 3, "a card", MeasuredGradient(tile, 0.1, 9.0))
    planned = plan(spec, H100, choices=Choices("h100", {key_of(spec): measured}))
    assert planned.gradient is None
    assert (
        f"torch's: {gradient_refusal(spec)}" in dict(explain(planned, "wrapper")[0].rows).values()
    )


# ---- when a file has it ----


def said(planned):
    return dict(explain(planned, "wrapper")[0].rows)["gradient of the input"]


def test_a_kernel_that_was_measured_to_be_faster_is_used_and_explained():
    planned = plan(parse(LAYER), H100, choices=choices_of(LAYER))
    assert planned.gradient.tile == tiles_of(parse(LAYER), None)[0]
    assert "0.5000 ms, torch's 0.7000 ms on a card" in said(planned)
    assert said(planned).startswith("a kernel in the file")


def test_a_slower_kernel_or_none_leaves_the_file_as_it_was():
    """Else every file would drift when a measurement is added that changes nothing."""
    spec = parse(LAYER)
    without = {key_of(spec): Measured(plan(spec, H100).tile, 1.0, 3, "a card")}
    plain = compile_kernel(spec, H100, choices=Choices("h100", without))
    slower = compile_kernel(spec, H100, choices=choices_of(LAYER, ms=0.7, torch_ms=0.7))
    assert plain.text == slower.text
    assert "input_gradient" not in plain.text
    assert "no kernel was measured" in said(plain.plan)
    assert "torch's, which is faster: a kernel took 0.7000 ms, torch's 0.7000" in said(slower.plan)


def test_a_row_of_a_file_of_choices_brings_the_kernel(tmp_path):
    spec = parse(LAYER)
    tile = dataclasses.asdict(tiles_of(spec, None)[0])
    row = {"spec": key_of(spec), "tile": dataclasses.asdict(plan(spec, H100).tile)}
    row |= {"ms": 1.0, "tried": 3, "input_gradient": {"tile": tile, "ms": 0.5, "torch_ms": 0.7}}
    path = tmp_path / "choices.json"
    path.write_text(text_of("h100", {"device": "a card"}, [row]), "utf-8")
    source = compile_kernel(spec, H100, choices=read_choices(path, FAMILIES))
    assert source.plan.gradient is not None
    assert "# input gradient: " in source.text
    without = {"tile": tile, "ms": 0.5}, {"ms": 0.5, "torch_ms": 0.7}
    for broken, said in zip((*without, 3), ("lacks torch_ms", "lacks tile", "object"), strict=True):
        path.write_text(
            json.dumps(
                {**json.loads(path.read_text()), "choices": [row | {"input_gradient": broken}]}
            )
        )
        with pytest.raises(SpecError, match=f"input_gradient of row 1.*{said}"):
            read_choices(path, FAMILIES)


def test_a_tile_that_no_card_holds_is_refused():
    spec = parse(LAYER)
    wide = dataclasses.replace(tiles_of(spec, None)[0], block_m=1024, block_n=512)
    row = Measured(plan(spec, H100).tile, 1.0, 3, "a card", MeasuredGradient(wide, 0.5, 0.7))
    with pytest.raises(SpecError, match="cannot run on h100"):
        plan(spec, H100, choices=Choices("h100", {key_of(spec): row}))


FILES = [
    "ConvTranspose2d(64, 32, 3, padding=1, input=(8, 64, 128, 128))",
    "ConvTranspose2d(kernel_size=3, groups=2, dtype=bfloat16)",
    "ConvTranspose3d(64, 32, (3, 2, 1), groups=4, input=(2, 64, 16, 16, 16))",
    "ConvTranspose3d(64, 32, 3, dilation=2, padding=1, dtype=float16, layout=channels_last)",
    "ConvTranspose1d(64, 32, 5, dilation=3, padding=2, precision=bf16x3)",
    "ConvTranspose2d(64, 64, 3, groups=64, padding=1, input=(8, 64, None, 32))",
    "ConvTranspose2d(3, 5, 3, dtype=float64, input=(None, 3, 17, 31))",
]


@pytest.mark.parametrize(
    "command", [["check"], ["format", "--check", "--diff"]], ids=lambda c: c[0]
)
def test_files_with_two_kernels_are_clean_and_within_the_rules(command, root, tmp_path):
    """The longer names must not make lines that a linter breaks."""
    (tmp_path / "generated").mkdir()
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    for number, text in enumerate(FILES):
        found = emitted(text)
        assert check_rules(found) == []
        assert [line for line in found.splitlines()[8:] if len(line) > 100] == []
        (tmp_path / "generated" / f"file_{number}.py").write_text(found, "utf-8")
    done = ruff(*command, "--no-cache", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_constant_belongs_to_one_kernel():
    """The layer's C_IN is not its gradient's: a name that both read would be wrong for one."""
    text = emitted(FILES[0])
    layer, _, back = text.partition("def conv_transpose2d_input_gradient_kernel(")
    back = back.partition("\n\n\n")[0]
    names = {line.partition(" = ")[0] for line in text.splitlines() if "tl.constexpr(" in line}
    words = set(back.replace("(", " ").replace(")", " ").replace(",", " ").split())
    assert {name for name in words & names if not name.startswith("GRAD_")} == set()
    assert "GRAD_" not in layer.partition("def conv_transpose2d_kernel(")[2].partition("\n\n\n")[0]


# ---- numbers ----


def exact_gradient(spec, weight, grad):
    """Return the gradient of the input in integers: the transpose of scatter's matrix."""
    inputs = (spec.in_channels, *spec.spatial)
    count = int(np.prod(inputs))
    units = np.eye(count, dtype=np.int64).reshape(count, *inputs)
    one = dataclasses.replace(spec, input=(count, *inputs), bias=False)
    reached = oracle.scatter(one, units, weight, None).reshape(count, -1)
    return (grad.reshape(len(grad), -1) @ reached.T).reshape(len(grad), *inputs)


def drawn(spec, seed=0):
    """Return integers as input, weight and the output's gradient of `spec`."""
    random = np.random.default_rng(seed)
    weight = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    grad = (spec.batch, spec.out_channels, *spec.output_spatial)
    return [random.integers(-2, 3, shape) for shape in (spec.input, weight, grad)]


NUMBERS = [  # a layer with all its sizes, and what is left open of it
    ("ConvTranspose1d(3, 5, 4, input=(2, 3, 9){})", None),
    ("ConvTranspose1d(4, 6, 3, dilation=3, padding=2, groups=2, input=(2, 4, 9){})", None),
    ("ConvTranspose2d(3, 5, 3, padding=1, input=(2, 3, 4, 6){})", None),
    ("ConvTranspose2d(3, 5, 3, padding=1, input=(2, 3, 4, 6){})", ("polyphase", 2, 1)),
    ("ConvTranspose2d(8, 5, 3, padding=1, input=(2, 8, 8, 8){})", ("polyphase", 2, 2)),
    ("ConvTranspose2d(8, 5, 3, input=(2, 8, 8, 8){})", ("gather", 1, 2)),
    ("ConvTranspose2d(4, 6, (3, 2), padding=(0, 1), groups=2, input=(2, 4, 3, 5){})", None),
    ("ConvTranspose2d(3, 3, 3, padding=2, groups=3, input=(2, 3, 4, 6){})", ("direct", 1, 1)),
    ("ConvTranspose2d(3, 3, 3, padding=1, groups=3, input=(2, 3, 4, 6){})", ("gather", 1, 1)),
    ("ConvTranspose2d(4, 6, 3, dilation=(1, 2), input=(2, 4, 3, 4), layout=channels_last{})", None),
    ("ConvTranspose3d(2, 3, (2, 1, 3), padding=(0, 0, 1), input=(2, 2, 2, 3, 4){})", None),
    (
        "ConvTranspose3d(2, 4, 2, groups=2, input=(1, 2, 2, 3, 2), layout=channels_last{})",
        ("gather", 1, 1),
    ),
]


def opened(text):
    """Return the text with every size left to run time."""
    spec = parse(text)
    return str(dataclasses.replace(spec, in_channels=None, out_channels=None, input=None))


def gradients(module, spec, x, weight, grad, device):
    """Return the input's gradient by a call of the emitted function.

    It is the same for a weight in channels_last, whose taps lie elsewhere.
    """
    dtype = getattr(torch, spec.dtype)
    x, weight, grad = (torch.from_numpy(a).to(device, dtype) for a in (x, weight, grad))
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spec.rank)
    if spec.layout == "channels_last":
        x = x.contiguous(memory_format=last)
    bias = torch.zeros(spec.out_channels, device=device, dtype=dtype)
    function = getattr(module, f"conv_transpose{spec.rank}d")
    x.requires_grad_()
    (found,) = torch.autograd.grad(function(x, weight, bias), x, grad)
    if last is not None:
        weight = weight.contiguous(memory_format=last)
        (again,) = torch.autograd.grad(function(x, weight, bias), x, grad)
        assert torch.equal(again, found)
    return found


class Spy:
    """Torch's operator, with a list of the masks that it is asked for."""

    def __init__(self):
        self.operator, self.masks = torch.ops.aten.convolution_backward, []

    def __call__(self, *arguments):
        self.masks.append(tuple(arguments[-1]))
        return self.operator(*arguments)

    def __getattr__(self, name):
        return getattr(self.operator, name)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("text", "kind", "dtype"),
    [
        (*row, dtype)
        for row in NUMBERS
        for dtype in ("float32", "float16", "bfloat16", "float64")
        if dtype != "float64" or row[1] is None or row[1][2] == 1  # rows of those fit no card
    ],
)
def test_gradients_of_integers_are_exact(text, kind, dtype, load, device, monkeypatch):
    """A tap, channel or image in the wrong place shows; the sums are integers of few digits."""
    text = text.format(f", dtype={dtype}")
    spec, module = parse(text), load(text, kind)
    x, weight, grad = drawn(spec)
    spy = Spy()
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    got = gradients(module, spec, x, weight, grad, device)
    want = exact_gradient(spec, weight, grad)
    assert spy.masks == []  # it is not torch's
    assert np.array_equal(got.double().cpu().numpy(), want)
    last = spec.layout == "channels_last"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kept = formats[got.dim()] if last else torch.contiguous_format
    assert got.is_contiguous(memory_format=kept)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("text", "kind"),
    [row for row in NUMBERS if row[1] is None or row[1][1:] == (1, 1)],
)
def test_gradients_of_run_time_sizes_are_exact(text, kind, load, device, monkeypatch):
    text = text.format("")
    spec, module = parse(text), load(opened(text), kind if kind != ("direct", 1, 1) else None)
    x, weight, grad = drawn(spec)
    spy = Spy()
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    got = gradients(module, spec, x, weight, grad, device)
    assert spy.masks == []
    assert np.array_equal(got.double().cpu().numpy(), exact_gradient(spec, weight, grad))


@pytest.mark.interpreter
def test_it_is_the_adjoint(load, device):
    """<layer(x), y> = <x, gradient(y)> for the file's own two kernels."""
    spec, module = parse(LAYER), load(LAYER)
    x, weight, grad = drawn(spec, seed=3)
    back = gradients(module, spec, x, weight, grad, device)
    x, weight, grad = (torch.from_numpy(a).double().to(device) for a in (x, weight, grad))
    y = module.conv_transpose2d(x, weight, torch.zeros_like(grad[0, :, 0, 0]))
    assert float((y * grad).sum()) == float((x * back).sum())


# ---- what asks for it ----

SHAPES = ((2, 4, 5, 6), (4, 3, 3, 3), (6,))


def leaves(device, places=(0, 1, 2)):
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=random, dtype=torch.float64).to(device) for s in SHAPES]
    return [tensor.requires_grad_(n in places) for n, tensor in enumerate(made)]


def reference(x, weight, bias):
    return torch.nn.functional.conv_transpose2d(x, weight, bias, padding=1, groups=2)


@pytest.fixture
def counted(load, monkeypatch):
    """The layer's module, and the masks that torch's operator is asked for."""
    spy = Spy()
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    return load(OPEN), spy.masks


@pytest.mark.interpreter
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(
    "places", [p for n in (1, 2, 3) for p in itertools.combinations(range(3), n)], ids=str
)
def test_torch_gives_the_other_gradients_alone(places, unbatched, counted, device):
    module, masks = counted
    outcomes = []
    for function in (module.conv_transpose2d, reference):
        tensors = leaves(device, places)
        x = tensors[0].detach()[0].requires_grad_(0 in places) if unbatched else tensors[0]
        tensors[0] = x
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        y = function(*tensors)
        outcomes.append(torch.autograd.grad(y.square().sum(), wanted))
    assert masks == ([(False, 1 in places, 2 in places)] if set(places) - {0} else [])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("own", [True, False], ids=["kernel", "torch"])
def test_an_unbatched_input_loses_no_axis_of_one(own, load, tmp_path, device):
    """One channel, one row: only the batch that was put before them is taken off again."""
    text = "ConvTranspose2d(1, 1, 3, padding=(1, 0), bias=False, dtype=float64)"
    module = load(text) if own else load_module(emit(text), "of_one", tmp_path)
    assert hasattr(module, "INPUT_GRADIENT") == own
    x = torch.arange(5.0, dtype=torch.float64, device=device).reshape(1, 1, 5).requires_grad_()
    weight = torch.arange(9.0, dtype=torch.float64, device=device).reshape(1, 1, 3, 3)
    y = module.conv_transpose2d(x, weight)
    assert y.shape == module.conv_transpose2d(x.to("meta"), weight.to("meta")).shape == (1, 1, 7)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # Each input meets the middle row of the weight, 3 + 4 + 5, wherever it lies.
    assert torch.equal(grad.cpu(), torch.full((1, 1, 5), 12.0, dtype=torch.float64))
    # The middle row [3, 4, 5] at each of the inputs 0 to 4.
    assert y.flatten().tolist() == [0, 3, 10, 22, 34, 31, 20]


@pytest.mark.interpreter
def test_what_is_differentiated_in_turn_is_torch_s(counted, device):
    """The kernel records nothing: a second derivative through it would be zero, or an error."""
    module, masks = counted
    x, weight, bias = leaves(device)
    y = module.conv_transpose2d(x, weight, bias)
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    assert masks == [(True, True, True)]
    assert first.requires_grad


@pytest.mark.interpreter
def test_gradcheck_and_gradgradcheck(load, device):
    module = load(LAYER)
    tensors = leaves(device)
    assert torch.autograd.gradcheck(module.conv_transpose2d, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(module.conv_transpose2d, tensors, fast_mode=True)


@pytest.mark.interpreter
def test_many_gradients_at_once_are_right(load, device):
    """Torch calls an operator that has no rule for it in a loop."""
    module = load(LAYER)
    outcomes = []
    for function in (module.conv_transpose2d, reference):
        x, weight, bias = leaves(device)
        y = function(x, weight, bias)
        grads = torch.stack([torch.ones_like(y), y.detach()])
        outcomes.append(torch.autograd.grad(y, x, grads, is_grads_batched=True)[0])
    torch.testing.assert_close(*outcomes)


@pytest.mark.interpreter
@pytest.mark.parametrize("strange", ["expanded", "permuted", "channels_last", "negative"])
def test_gradients_in_any_layout_are_taken(strange, load, device):
    """A sum's is one number, expanded; the kernel reads dense memory."""
    module, (x, weight, bias) = load(LAYER), leaves(device)
    y = module.conv_transpose2d(x, weight, bias)
    grad = torch.randn_like(y)
    grad = {
        "expanded": lambda: grad[:1, :1, :1, :1].expand_as(y),
        "permuted": lambda: grad.mT.contiguous().mT,
        "channels_last": lambda: grad.contiguous(memory_format=torch.channels_last),
        "negative": lambda: torch._neg_view(grad),
    }[strange]()
    (got,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(reference(x, weight, bias), x, grad)
    torch.testing.assert_close(got, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("text", [LAYER, OPEN])
def test_opcheck_of_both_operators(text, load, device):
    """A fake of another shape or stride breaks compilers."""
    module = load(text)
    torch.library.opcheck(module.OPERATOR.default, leaves(device))
    grad, weight = torch.randn(2, 6, 5, 6, dtype=torch.float64), leaves("cpu", ())[1]
    torch.library.opcheck(module.INPUT_GRADIENT.default, (grad.to(device), weight.to(device)))


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_gradient_s_fake_has_its_strides(layout, load, device):
    """Whatever the strides of what it comes from: a compiler plans memory with them."""
    module = load(f"{OPEN[:-1]}, layout={layout})")
    grad, weight = torch.randn(2, 6, 5, 6, dtype=torch.float64), leaves("cpu", ())[1]
    for format in (torch.contiguous_format, torch.channels_last):
        given = grad.contiguous(memory_format=format).to(device), weight.to(device)
        fake = module.INPUT_GRADIENT(*(tensor.to("meta") for tensor in given))
        real = module.INPUT_GRADIENT(*given)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("text", [LAYER, OPEN])
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_a_compiled_step_is_one_graph_and_calls_the_kernel(
    text, backend, load, device, monkeypatch
):
    """Traced into, the launch would break the graph; left out, torch's would run."""
    module = load(text)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where Dynamo looks functions up
    seen = []
    kernel = module.conv_transpose2d_input_gradient_kernel
    monkeypatch.setattr(module, "conv_transpose2d_input_gradient_kernel", Counting(kernel, seen))
    module.LAUNCHED.clear()  # a launch that is repeated is none of Triton's
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: module.conv_transpose2d(*t).sin().sum(), backend=backend, fullgraph=True
    )
    outcomes = []
    for function in (compiled, lambda *t: reference(*t).sin().sum()):
        tensors = leaves(device)
        outcomes.append(torch.autograd.grad(function(*tensors), tensors))
    assert len(seen) == 1
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)


class Counting:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        self.seen.append(grid)
        return self.kernel[grid]


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 3, 3)])
def test_no_images_have_a_gradient_of_their_shape(shape, load, device):
    module = load(OPEN)
    x = torch.ones(shape, dtype=torch.float64, device=device).requires_grad_()
    _, weight, bias = leaves(device, ())
    (found,) = torch.autograd.grad(module.conv_transpose2d(x, weight, bias).sum(), x)
    assert found.shape == shape


@pytest.mark.interpreter
def test_sizes_out_of_the_kernel_s_reach_are_torch_s(load):
    """Offsets beyond int32 would wrap round; the layer's kernel may reach farther than its own.

    Each bound alone: images are an axis of the grid, which has 65535 programs, and an image's last
    element is 16 channels of a block on. By hand, 16 * 2**14 * (2**13 - 8) = 2**31 - 2**21 is
    within, 16 * 2**14 * 2**13 = 2**31 is not.
    """
    module = load("ConvTranspose2d(4, 6, 3, padding=1)", ("gather", 1, 1))
    assert module.GRAD_BLOCK_K.value == module.GRAD_BLOCK_N.value == 16

    def serves(batch, h, w):
        return module._serves_gradient((batch, 6, h, w), (batch, 4, h, w))

    assert serves(2, 5, 6)
    assert serves(65535, 5, 6)
    assert not serves(65536, 5, 6)
    assert serves(1, 2**14, 2**13 - 8)
    assert not serves(1, 2**14, 2**13)
    assert not serves(65536, 2**14, 2**13)


def test_what_compiles_a_file_takes_the_layer_s_own_kernel_first():
    """`aot` would ship the other one under the file's name."""
    kernels = [launch.kernel for launch in read_launches(emitted(LAYER))]
    assert kernels[:2] == ["conv_transpose2d_kernel", "conv_transpose2d_input_gradient_kernel"]
    packing = ["conv_transpose2d_pack_kernel", "conv_transpose2d_pack_for_gradient_kernel"]
    assert kernels[2:] == packing
