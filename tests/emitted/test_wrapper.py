"""The functions of emitted files: torch's results and errors for every kind of argument.

Results are compared on integers in -2..2, where every dtype sums exactly, with torch on the CPU in
float64; errors with what torch itself raises. On a machine with a GPU the same tests run there.
"""

import functools
import importlib
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import convgen
from convgen.execution.loading import load_module
from drawing import each_form

pytestmark = pytest.mark.interpreter

PLAIN = "ConvTranspose2d(4, 6, 3, stride=2, padding=1)"
LAYERS = (
    "ConvTranspose1d(4, 6, 5, stride=3, padding=2, output_padding=1, groups=2)",
    "ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False)",
    "ConvTranspose3d(4, 6, 2, stride=2, dilation=(1, 2, 1), groups=2)",
)
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
REFUSAL = "^this file was generated for "


class Layer:
    """An emitted file with its spec."""

    def __init__(self, text, name, folder, device):
        self.spec = convgen.parse(text)
        self.file = load_module(convgen.emit(text), name, folder)
        self.op = f"conv_transpose{self.spec.rank}d"
        self.function = getattr(self.file, self.op)
        self.packed = getattr(self.file, f"{self.op}_packed")
        self.dtype, self.device = getattr(torch, self.spec.dtype), device

    def tensors(self, batch=2, *spatial, channels=4):
        """Return input, weight and bias (None without one) of small integers."""
        spec = self.spec
        c_in, c_out = spec.in_channels or channels, spec.out_channels or 6
        weight = (c_in, c_out // spec.groups, *spec.kernel_size)
        shapes = [(batch, c_in, *(spatial or (5, 4, 3)[: spec.rank])), weight, (c_out,)]
        random = torch.Generator().manual_seed(3)
        made = [torch.randint(-2, 3, shape, generator=random) for shape in shapes]
        x, w, b = (tensor.to(self.device, self.dtype) for tensor in made)
        return x, w, b if spec.bias else None

    def apply(self, x, w, b):
        """Call torch's function: differentiable, and raising torch's errors."""
        s = self.spec
        geometry = (s.stride, s.padding, s.output_padding, s.groups, s.dilation)
        return getattr(F, self.op)(x, w, b, *geometry)

    def torch(self, *tensors):
        """Return torch's exact result."""
        exact = (tensor if tensor is None else tensor.cpu().double() for tensor in tensors)
        return self.apply(*exact).to(self.device, self.dtype)


@pytest.fixture(scope="module")
def load(tmp_path_factory, device):
    """The function from a spec's text to its `Layer`."""
    folder, count = tmp_path_factory.mktemp("emitted"), itertools.count()
    return functools.cache(lambda text: Layer(text, f"wrapper_{next(count)}", folder, device))


@pytest.mark.parametrize("text", LAYERS)
def test_equals_torch_batched_unbatched_and_empty(text, load):
    """A batch axis that is lost, or left on, changes the shape; an empty batch launches nothing."""
    layer = load(text)
    x, w, b = layer.tensors()
    want = layer.torch(x, w, b)
    assert torch.equal(layer.function(x, w, b), want)
    assert torch.equal(layer.function(x[1], w, b), want[1])
    assert torch.equal(layer.function(x[:0], w, b), want[:0])
    assert torch.equal(layer.packed(x, layer.file.pack_weight(w), b), want)
    assert torch.equal(layer.packed(x[1], layer.file.pack_weight(w), b), want[1])


def strided(tensor):
    """Return equal numbers that lie with gaps, at an offset, in reversed order of axes."""
    room = tensor.new_full([2 * size + 1 for size in reversed(tensor.shape)], 99)
    view = room[(slice(1, None, 2),) * tensor.dim()].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


def expanded(tensor):
    """Return the first slice along axis 0 again and again, with stride 0."""
    return tensor[:1].expand_as(tensor)


def shifted(tensor):
    """Return equal numbers one element into their storage: aligned to nothing but an element."""
    return tensor.new_full((tensor.numel() + 1,), 99)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("text", [*LAYERS, PLAIN])
@pytest.mark.parametrize("lay", [strided, expanded, shifted])
def test_no_argument_must_be_contiguous(lay, text, load):
    """A kernel that trusts a pointer to be dense reads 99, or beyond a bias with stride 0."""
    layer = load(text)
    tensors = [None if tensor is None else lay(tensor) for tensor in layer.tensors()]
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    want = layer.torch(*tensors)
    assert torch.equal(layer.function(*tensors), want)
    if lay is not expanded:
        packed = lay(layer.file.pack_weight(tensors[1]))
        assert torch.equal(layer.packed(tensors[0], packed, tensors[2]), want)
    kept = zip(tensors, before, strict=True)
    assert all(now is None or torch.equal(now, then) for now, then in kept), "an argument changed"


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_in_channels_last_out(rank, load):
    """Strides in the wrong order show in the values, an output in the other format in itself."""
    layer = load(f"ConvTranspose{rank}d(4, 6, 3, stride=2, groups=2, layout=channels_last)")
    x, w, b = layer.tensors()
    got = layer.function(x.contiguous(memory_format=LAST[rank]), w, b)
    assert got.is_contiguous(memory_format=LAST[rank])
    assert torch.equal(got, layer.torch(x, w, b))
    assert layer.function(x[:0].contiguous(memory_format=LAST[rank]), w, b).shape[0] == 0
    assert torch.equal(layer.function(x[0], w, b), layer.torch(x[0], w, b))


KNOWN = "ConvTranspose2d(4, 6, 3, stride=2, padding=1, input=(2, 4, 5, None))"
MISMATCHES = {
    "height": (KNOWN, lambda x, w, b: (x[:, :, 1:], w, b), "(2, 4, 4, 4)"),
    "batch": (KNOWN, lambda x, w, b: (x[:1], w, b), "(1, 4, 5, 4)"),
    "unbatched": (KNOWN, lambda x, w, b: (x[0], w, b), "(1, 4, 5, 4)"),
    "channels": (KNOWN, lambda x, w, b: (x[:, 1:], w[1:], b), "(2, 3, 5, 4)"),
    "out channels": (KNOWN, lambda x, w, b: (x, w[:, 1:], b[1:]), "(4, 5, 3, 3)"),
    "kernel": (KNOWN, lambda x, w, b: (x, w[..., 1:], b), "(4, 6, 3, 2)"),
    "weight rank": (KNOWN, lambda x, w, b: (x, w[..., 0], b), "(4, 6, 3)"),
    "dtype": (KNOWN, lambda x, w, b: (x.half(), w.half(), b.half()), "torch.float16"),
    "weight dtype": (KNOWN, lambda x, w, b: (x, w.double(), b), "torch.float64"),
    "bias dtype": (KNOWN, lambda x, w, b: (x, w, b.double()), "torch.float64"),
    "no bias": (KNOWN, lambda x, w, b: (x, w, None), "bias=None"),
    "a bias": (LAYERS[1], lambda x, w, b: (x, w, x.new_zeros(4)), "a bias"),
    "layout": (KNOWN, lambda x, w, b: (x.contiguous(memory_format=LAST[2]), w, b), "channels_last"),
    "other layout": (f"{PLAIN[:-1]}, layout=channels_last)", lambda *t: t, "channels_first"),
    "device": (KNOWN, lambda x, w, b: (x, w.to("meta"), b), "meta"),
    "bias device": (KNOWN, lambda x, w, b: (x, w, b.to("meta")), "meta"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_the_file_is_not_for_is_refused_by_name(name, load):
    """Without its check each of these would compute something else, or read beyond a tensor."""
    text, change, got = MISMATCHES[name]
    layer = load(text)
    with pytest.raises(ValueError, match=REFUSAL) as error:
        layer.function(*change(*layer.tensors()))
    assert got in str(error.value).partition("got ")[2]


def test_packed_weights_are_checked(load):
    """A packed weight with too few taps would be read beyond its end."""
    layer = load(LAYERS[0])
    x, w, b = layer.tensors()
    packed = layer.file.pack_weight(w)
    for wrong in (packed[1:], packed[:, 1:], packed[0], packed.half()):
        with pytest.raises(ValueError, match=f"{REFUSAL}.*got"):
            layer.packed(x, wrong, b)
    with pytest.raises(ValueError, match=f"{REFUSAL}weight .*got"):
        layer.file.pack_weight(w[1:])
    # Read as another dtype its bits would be other numbers, in silence.
    for dtype in {torch.int32, torch.float32, torch.float16, torch.float64} - {layer.dtype}:
        with pytest.raises(ValueError, match=f"{REFUSAL}{layer.dtype}, got {dtype}"):
            layer.file.pack_weight(w.to(dtype))


def test_packed_weights_of_grouped_inputs_have_whole_groups(tmp_path, device):
    """A column or a row too many would be read as the start of the next one."""
    spec = convgen.parse("ConvTranspose1d(4, 6, 3, padding=1, input=(2, 4, 12), bias=False)")
    file = load_module(each_form(spec)["polyphase 2"].text, "grouped", tmp_path)
    x = torch.ones(2, 4, 12, device=device)
    packed = file.pack_weight(torch.ones(4, 6, 3, device=device))
    assert packed.shape[1:] == (6 * 2, 4 * 2)
    for axis in (1, 2):
        longer = torch.cat([packed, packed.narrow(axis, 0, 1)], axis)
        with pytest.raises(ValueError, match=f"{REFUSAL}{len(packed)} packed taps, got"):
            file.conv_transpose1d_packed(x, longer)


# An extent of 2 becomes 0. In float64: of float32 oneDNN makes empty outputs and errors of its own.
SMALL = "ConvTranspose{rank}d(4, 6, 1, padding=1, groups=2, dtype=float64)"
ERRORS = {
    "rank too low": lambda x, w, b: (x[0, 0], w, b),
    "rank too high": lambda x, w, b: (x[None], w, b),
    "channels": lambda x, w, b: (x[:, 1:], w, b),
    "channels, unbatched": lambda x, w, b: (x[0, 1:], w, b),
    "channels of the weight": lambda x, w, b: (x, w[2:], b),
    "bias size": lambda x, w, b: (x, w, b[1:]),
    "bias rank": lambda x, w, b: (x, w, b[None]),
    "no extent": lambda x, w, b: (x[..., :0], w, b),
    "no extent, unbatched": lambda x, w, b: (x[0, ..., :0], w, b),
    "output too small": lambda x, w, b: (x[..., :2], w, b),
    "weight rank": lambda x, w, b: (x, w.flatten(), b),
    "groups": lambda x, w, b: (x[:, 1:], w[1:], b),
}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ERRORS)
def test_torchs_errors_have_torchs_text(name, rank, load):
    """The same mistake must read the same after a layer was swapped for an emitted one."""
    layer = load(SMALL.format(rank=rank))
    arguments = ERRORS[name](*layer.tensors(2, *(4, 4, 4)[:rank]))
    with pytest.raises(RuntimeError) as want:
        layer.apply(*(tensor.cpu() for tensor in arguments))
    with pytest.raises(RuntimeError) as got:
        layer.function(*arguments)
    assert str(got.value) == str(want.value)


@pytest.mark.parametrize("text", ["ConvTranspose2d(kernel_size=3, stride=2)", PLAIN])
def test_one_file_serves_many_sizes(text, load):
    """A size taken from the first call, or one that must divide a tile, shows here."""
    layer = load(text)
    for batch, h, w, channels in [(1, 1, 1, 1), (3, 2, 17, 19), (1, 23, 9, 40), (2, 1, 300, 3)]:
        tensors = layer.tensors(batch, h, w, channels=channels)
        assert torch.equal(layer.function(*tensors), layer.torch(*tensors))


ROUNDED = {  # float32 bits before and after rounding to 10 bits of mantissa
    0x3F800FFF: 0x3F800000,
    0x3F801000: 0x3F802000,  # a tie goes away from zero
    0xBF801000: 0xBF802000,
    0x3FFFF000: 0x40000000,  # into the next power of two
    0x80000000: 0x80000000,
    0x00001000: 0x00002000,  # a subnormal
    0x7F7FFFFF: 0x7F800000,  # FLT_MAX lies nearer to 2**128 than to the largest TF32
    0x7F800000: 0x7F800000,
    0xFF800000: 0xFF800000,
    0x7FFFFFFF: 0x7FFFFFFF,  # NaNs, whose bits a carry would turn into -0.0 and infinity
    0x7F800001: 0x7F800001,
    0xFFFFFFFF: 0xFFFFFFFF,
}


def test_pack_weight_rounds_to_tf32_and_only_for_tf32(load, device):
    """Truncation, ties to even, and NaNs that overflow differ in these bits."""
    one = "ConvTranspose1d(kernel_size=1, bias=False{})"
    before = torch.tensor(list(ROUNDED), device=device).to(torch.int32).view(torch.float32)
    after = load(one.format("")).file.pack_weight(before.view(-1, 1, 1)).flatten()
    assert [bits & 0xFFFFFFFF for bits in after.view(torch.int32).tolist()] == [*ROUNDED.values()]
    exact = load(one.format(", precision=ieee")).file.pack_weight(before.view(-1, 1, 1)).flatten()
    assert torch.equal(exact.view(torch.int32), before.view(torch.int32))


def test_inputs_half_way_between_two_tf32_numbers_go_away_from_zero(load, device):
    """As cuDNN rounds them, in the kernel's loop: of one channel and a weight of 1."""
    layer = load("ConvTranspose1d(kernel_size=1, bias=False)")
    assert "x = round_to_tf32(x)" in Path(layer.file.__file__).read_text("utf-8")
    near_one = {k: v for k, v in ROUNDED.items() if 0x3F800000 <= k & 0x7FFFFFFF < 0x40000000}
    assert len(near_one) == 4
    bits = torch.tensor(list(near_one), device=device).to(torch.int32)
    got = layer.function(bits.view(torch.float32)[None, None], torch.ones(1, 1, 1, device=device))
    found = [number & 0xFFFFFFFF for number in got.flatten().view(torch.int32).tolist()]
    assert found == [*near_one.values()]


def test_the_same_file_can_be_loaded_twice_and_again(tmp_path, load, monkeypatch):
    """Copies share one operator: a second registration of it would raise."""
    monkeypatch.syspath_prepend(tmp_path)
    layer, text = load(PLAIN), convgen.emit(PLAIN)
    for name in ("twin_first", "twin_second"):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    copies = [importlib.import_module(name) for name in ("twin_first", "twin_second")]
    copies += [importlib.reload(copy) for copy in copies]
    tensors = layer.tensors()
    want = layer.torch(*tensors)
    assert all(torch.equal(copy.conv_transpose2d(*tensors), want) for copy in copies)


@pytest.mark.parametrize("text", [*LAYERS, "relu | ConvTranspose2d(4, 6, 3, layout=channels_last)"])
@pytest.mark.parametrize("batched", [True, False])
def test_the_operator_passes_torchs_own_check(text, batched, load):
    """Schema, autograd registration, shapes and strides on fake tensors, ahead-of-time dispatch."""
    layer = load(text)
    x, w, b = layer.tensors()
    if layer.spec.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = [
        t if t is None else t.detach().requires_grad_() for t in (x if batched else x[0], w, b)
    ]
    torch.library.opcheck(layer.file.OPERATOR.default, tensors)


def test_compilers_see_one_operator_for_every_size(load):
    """A check that Dynamo cannot trace, or that fixes a size, breaks the graph or recompiles."""
    layer = load(PLAIN)
    torch._dynamo.reset()
    compiled = torch.compile(layer.function, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in [(5, 7, 11), (2, 9, 4), (3, 8, 8)]:
            tensors = layer.tensors(*sizes)
            assert torch.equal(compiled(*tensors), layer.torch(*tensors))


def half_of_complex(tensor):
    """Return equal numbers, every second of what lies there, negated when they are read."""
    return torch.complex(tensor, -tensor).conj().imag


def dense_negative(tensor):
    """Return equal numbers that lie there with the other sign, and no copy turns."""
    return torch._neg_view(-tensor)


@pytest.mark.parametrize("negated", [half_of_complex, dense_negative])
def test_negated_views_are_read_with_their_sign(negated, load):
    """Such views are negated lazily: their memory still holds the other sign. One alone, too."""
    layer = load(LAYERS[0])
    x, w, b = layer.tensors()
    want = layer.torch(x, w, b)
    assert all(negated(tensor).is_neg() for tensor in (x, w, b))
    for tensors in [(negated(x), w, b), (x, negated(w), b), (x, w, negated(b))]:
        assert torch.equal(layer.function(*tensors), want)
    assert torch.equal(layer.function(*map(negated, (x, w, b))), want)
    assert torch.equal(layer.packed(x, torch._neg_view(-layer.file.pack_weight(w)), b), want)


@pytest.mark.parametrize("wrong", [None, "x", 3, [1.0]], ids=str)
def test_what_is_no_tensor_is_named(wrong, load):
    """An attribute that it lacks would tell nobody which argument it is."""
    layer = load(LAYERS[0])
    x, w, b = layer.tensors()
    module = layer.file.ModelNew(device=layer.device)
    calls = {
        "input": (lambda: layer.function(wrong, w, b), lambda: module(wrong)),
        "weight": (lambda: layer.function(x, wrong, b),),
    }
    for name, made in calls.items():
        for call in made:
            with pytest.raises(
                (RuntimeError, TypeError), match=f"'{name}'.*{type(wrong).__name__}"
            ):
                call()


TUNED = (
    "ConvTranspose2d(4, 6, 3, stride=2, padding=1, autotune=blocks)",
    "ConvTranspose2d(4, 6, 3, input=(2, 4, 5, 4), autotune=launch)",
)


@pytest.mark.parametrize("text", TUNED)
def test_a_capture_that_would_have_to_tune_says_so_before_it_is_lost(text, load, monkeypatch):
    """CUDA would only say that an operation failed due to a previous error."""
    layer = load(text)
    x, w, b = layer.tensors()
    file, launched = layer.file, []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(file, "CONFIGS", [*file.CONFIGS, *file.CONFIGS])  # as on a GPU
    monkeypatch.setattr(file, "TUNED", set())
    kernel = getattr(file, f"{layer.op}_kernel")
    monkeypatch.setattr(kernel, "run", lambda *args, **_: launched.append(args))
    for call in (layer.function, file.ModelNew(device=layer.device)):
        with pytest.raises(RuntimeError, match=r"call it once with an input \(2, 4, 5, 4\) before"):
            call(x, w, b) if call is layer.function else call(x)
    assert not launched
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer.function(x, w, b)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer.function(x[:1] if layer.spec.spatial[0] is None else x, w, b)
    assert len(launched) == 2  # the batch is nothing that is tuned for


@pytest.mark.gpu
@pytest.mark.parametrize("text", TUNED)
def test_a_tuned_file_is_captured_once_it_was_called(text, load):
    """The refusal leaves CUDA and the capture's stream as they were."""
    layer = load(text)
    x, w, b = layer.tensors()
    with (
        pytest.raises(RuntimeError, match="before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer.function(x, w, b)
    torch.cuda.synchronize()
    assert torch.equal(layer.function(x, w, b), layer.torch(x, w, b))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.function(x, w, b)
    x.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, layer.torch(x, w, b))
