"""What every emitted file has in common: launches, checks of a call, gradients, operator, layer.

A module like any other, that is linted, typed and tested. `rendering/fold.py` puts the constants of
a file in, drops what that file has no use for, and gives the text of each section below, in which a
standalone file has nothing of this module left. Where a package shares one `_runtime.py`, the same
sections are what its `bind` does for each kernel. Names in capitals are those of a kernel's file:
the first section has what such a file states, the second what follows from that. Here they are of
one sample layer, so that this module can be imported.

What differs between the kernels of a file is read from `plan`, which functions get as their first
argument. In a file of one kernel nothing is left of it: `plan.start` is `_start` there.
"""

import functools
import hashlib
import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
from torch.utils.flop_counter import conv_flop_count, register_flop_formula
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

# ---- sample ----
INPUT_SHAPE = (None, 16, None, None)
WEIGHT_SHAPE = (16, 8, 4, 4)
STRIDE = (2, 2)
PADDING = (1, 1)
OUTPUT_PADDING = (0, 0)
GROUPS = 1
DILATION = (1, 1)
GEOMETRY = (STRIDE, PADDING, OUTPUT_PADDING, GROUPS, DILATION)
DTYPE = torch.float32
LAYOUT = "channels_first"
HAS_BIAS = True
NAMESPACE = "convgen_sample"  # of the operator
# The packed weight: number of matrices, outputs and inputs of a group (rows and columns of each).
PACKED_TAPS, LANES, PLACES = 16, 1, 1
CONFIGS = None  # configs for Triton's autotuner; None if the tile is fixed
PLANS: "tuple[Plan, ...]" = ()  # what the kernels are, if there are several
_torch = None  # the layer with its pointwise stages in torch; None without stages


def _start(x, packed_weight, bias, y):
    """Launch the kernel; the sample has none."""
    raise NotImplementedError


def _start_pack(weight, *flags):
    """Launch the kernel that packs a weight."""
    raise NotImplementedError


def _start_gradient(x, packed_weight, y):
    """Launch the kernel of the input's gradient."""
    raise NotImplementedError


def _start_pack_for_gradient(weight, *flags):
    """Launch the kernel that packs a weight for the input's gradient."""
    raise NotImplementedError


def _start_copy(x):
    """Launch the kernel that copies an input."""
    raise NotImplementedError


def _descriptors(x, packed_weight):
    """Return the tensor descriptors of the kernel's operands."""
    raise NotImplementedError


def _mismatch_of_sizes(shape, output):
    """Return which size exceeds the range of the kernel's indices, None if all fit."""
    return None


def _serves_gradient(shape, output):
    """Whether the kernel of the input's gradient supports these shapes."""
    return True


# Flags that have a value in every emitted text.
REPEATS = True  # repeated launches bypass Triton's own launch code
UNPIPELINED = True  # planned for another GPU than a Hopper
PRECOMPILED = True  # machine code may ship beside the file
HAS_PACKING = True  # a kernel packs the weight, for the layer or for the input's gradient

# ---- derived ----
SEVERAL = bool(PLANS)  # kernels for layouts or sizes
ANY_LAYOUT = SEVERAL and len(PLANS) > 1
HAS_RUNGS = SEVERAL and any(hasattr(each, "rungs") for each in PLANS)
HAS_SMALL = SEVERAL and any(hasattr(each, "small") for each in PLANS)
HAS_LARGE = SEVERAL and any(hasattr(each, "large") for each in PLANS)
HAS_LADDER = HAS_RUNGS or HAS_SMALL or HAS_LARGE  # kernels that the input's sizes choose
RANK = len(STRIDE)
BATCHED = RANK + 2  # dimensions of an input with its batch axis
UNBATCHED = RANK + 1  # and without it
OP = f"conv_transpose{RANK}d"
LAYER = f"ConvTranspose{RANK}d"
HALF = {torch.float32, torch.float16, torch.bfloat16}  # autocast converts between these
PACKED_DTYPES = {DTYPE} if DTYPE.itemsize > 2 else HALF
CHANNELS_LAST = LAYOUT == "channels_last"
HAS_LAST = LAYOUT != "channels_first"
OTHER_LAYOUT = "channels_last" if LAYOUT == "channels_first" else "channels_first"
FORMAT = torch.channels_last_3d if RANK == 3 else torch.channels_last
FIRST_AXES = (*range(RANK + 1, -1, -1),)  # of a tensor in channels_first, the innermost first
LAST_AXES = (1, *range(RANK + 1, 1, -1), 0)  # and in channels_last
OWN_AXES = FIRST_AXES
OTHER_AXES = LAST_AXES
if CHANNELS_LAST:
    OWN_AXES = LAST_AXES
    OTHER_AXES = FIRST_AXES
RAW_WEIGHT = _start_pack is None  # the kernel reads torch's weight without packing
RAW_GRADIENT = _start_pack_for_gradient is None  # so does the kernel of the input's gradient
PACKS_BOTH_LAYOUTS = RANK > 1 and math.prod(WEIGHT_SHAPE[2:]) > 1
HAS_LANES = LANES > 1
HAS_PLACES = PLACES > 1
HAS_STAGES = _torch is not None
HAS_COPY = _start_copy is not None
HAS_BOXES = _descriptors is not None
HAS_GRADIENT = _start_gradient is not None
CHECKS_PLANS = False  # of a file's several kernels some check sizes
if SEVERAL:  # what is stated of each kernel counts
    SIZES = [vars(each).get(name) for each in PLANS for name in ("small", "large")]
    RUNGS = [each for of in PLANS for each in vars(of).get("rungs", {}).values()]
    EVERY = [each for each in (*PLANS, *SIZES, *RUNGS) if each is not None]
    RAW_WEIGHT = all(each.RAW_WEIGHT for each in EVERY)
    HAS_LANES = any(each.LANES > 1 for each in EVERY)
    HAS_PLACES = any(each.PLACES > 1 for each in EVERY)
    HAS_COPY = any(each.HAS_COPY for each in EVERY)
    HAS_BOXES = any(each.HAS_BOXES for each in EVERY)
    HAS_GRADIENT = any(each.HAS_GRADIENT for each in EVERY)
    CHECKS_PLANS = any(each.CHECKS_SIZES for each in EVERY)
IS_TUNED = CONFIGS is not None
CHECKS_SIZES = _mismatch_of_sizes is not None
CHECKS_GRADIENT = _serves_gradient is not None


def _default(values):
    """Return one value for all axes if they are equal, as torch's layers accept it."""
    return values[0] if len(set(values)) == 1 else values


IN_CHANNELS, OUT_CHANNELS = WEIGHT_SHAPE[0], WEIGHT_SHAPE[1] and GROUPS * WEIGHT_SHAPE[1]
DEFAULT_KERNEL, DEFAULT_STRIDE = _default(WEIGHT_SHAPE[2:]), _default(STRIDE)
DEFAULT_PADDING, DEFAULT_OUTPUT_PADDING = _default(PADDING), _default(OUTPUT_PADDING)
DEFAULT_GROUPS, DEFAULT_DILATION = GROUPS, _default(DILATION)
OPEN_CHANNELS = OUT_CHANNELS is None
OPEN_BATCH = INPUT_SHAPE[0] is None
GEOMETRY_ITSELF = GEOMETRY


# ---- record ----
class Plan:
    """A kernel of this file: what it reads, and what launches it."""

    def __init__(self, **given):
        self.__dict__.update(given)


# ---- devices ----
# Device types that the kernel runs on; the CPU only in Triton's interpreter.
DEVICES = ("cuda", "meta", "cpu") if triton.knobs.runtime.interpret else ("cuda", "meta")
# Tensor types of the fast path: subclasses may override torch's functions.
EAGER = {torch.Tensor, nn.Parameter}
if REPEATS:
    # Earlier launches by kind of call: what `_launched` needs to repeat them.
    LAUNCHED = {}
    MOST_LAUNCHED = 1024  # entries; further kinds of call are always launched by Triton
    if HAS_BOXES:
        BOXES = {}  # by kind of call: classes with the fields of its descriptors but the tensors


# ---- functions ----
if SEVERAL:

    def pack_weight(weight, input):
        """Pack a weight [C_in, C_out / groups, {KERNEL_AXES}] for `conv_transpose2d_packed`.

        `input` is one like that of the call: its sizes and its layout decide what a kernel reads.
        """
        _refuse(_mismatch_of_weight(weight.shape, [weight.dtype], [weight.device]))
        if RAW_WEIGHT:
            return weight.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        else:
            plan = _plan_of(input, input)
            if plan.RAW_WEIGHT:
                return weight.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
            return _pack(plan, weight.detach())

else:

    def pack_weight(weight):
        """Pack a weight [C_in, C_out / groups, {KERNEL_AXES}] for `conv_transpose2d_packed`.

        {PACKED_WEIGHT}
        """
        _refuse(_mismatch_of_weight(weight.shape, [weight.dtype], [weight.device]))
        if RAW_WEIGHT:
            return weight.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        else:
            plan = PLANS[0]
            return _pack(plan, weight.detach())


def conv_transpose2d(input, weight, bias=None):
    """`torch.nn.functional.conv_transpose2d` with the geometry of this file's spec.

    Args:
        input: {INPUT_AXES} or, without the batch, unbatched.
        weight: [C_in, C_out / groups, {KERNEL_AXES}].
        bias: {BIAS_AXES}.

    Raises:
        RuntimeError: torch's own; the arguments fit no transposed convolution.
        ValueError: they fit one that this file was not generated for.
    """
    tensors = (input, weight, bias)
    if _is_transformed():
        return _torch(*tensors)
    watched = _is_watched(*tensors)
    # The operator's error names arguments that are no tensors; a trace would record the checks.
    given = all(each is None or isinstance(each, torch.Tensor) for each in tensors)
    if watched and (torch.jit.is_tracing() or not given):
        return OPERATOR(*tensors)
    cast = _is_autocast(input)
    call = _call(input, weight, weight.shape, bias, cast)
    _refuse(_mismatch.__wrapped__(*call) if watched else _mismatch(*call))
    if watched or cast or _is_recorded(*tensors):
        return OPERATOR(*tensors)
    plan = _plan_of(input, weight)
    return _launch(plan, input, _pack(plan, weight), bias)


def conv_transpose2d_packed(input, packed_weight, bias=None):
    """`conv_transpose2d` with a weight that `pack_weight` packed; it has no gradient."""
    plan = _plan_of(input, input)
    if plan.RAW_WEIGHT:
        weight_shape = tuple(packed_weight.shape)
        if not _fits(weight_shape, WEIGHT_SHAPE):
            _refuse(f"weight {WEIGHT_SHAPE}, got {weight_shape}")
    else:
        if HAS_LANES:
            taps, rows = plan.PACKED_TAPS, GROUPS * plan.LANES
        else:
            taps, rows = plan.PACKED_TAPS, GROUPS
        shape = tuple(packed_weight.shape)
        if HAS_PLACES:
            if not _fits(shape, (taps, None, None)) or shape[1] % rows or shape[2] % plan.PLACES:
                _refuse(f"{taps} packed taps, got {shape}")
            weight_shape = GROUPS * (shape[2] // plan.PLACES), shape[1] // rows, *WEIGHT_SHAPE[2:]
        else:
            if not _fits(shape, (taps, None, None)) or shape[1] % rows:
                _refuse(f"{taps} packed taps, got {shape}")
            weight_shape = GROUPS * shape[2], shape[1] // rows, *WEIGHT_SHAPE[2:]
    _refuse(_mismatch(*_call(input, packed_weight, weight_shape, bias, cast=False)))
    tensors = (input, packed_weight, bias)
    if _is_watched(*tensors) or _is_recorded(*tensors) or _is_transformed():
        raise RuntimeError(f"{OP}_packed is for no gradient, compiler or transform")
    return _launch(plan, input, packed_weight.resolve_neg().contiguous(), bias)


# ---- stages ----
if UNPIPELINED:

    def _num_stages(planned):
        """Return the stages of a launch on the current device.

        Before Triton 3.9 loads of a pipelined loop may overwrite registers that a tl.dot still reads on
        a Hopper, which gets one stage; files that are generated for Hopper wait for it instead.
        """
        overtakes = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
        return 1 if overtakes and hopper else planned


# ---- launch ----
def _launch(plan, input, packed_weight, bias):
    """Return the output; the arguments were checked."""
    if RAW_WEIGHT:
        c_out = GROUPS * packed_weight.shape[1]
    else:
        if HAS_LANES:  # noqa: SIM108
            c_out = packed_weight.shape[1] // plan.LANES
        else:
            c_out = packed_weight.shape[1]
        if plan.RAW_WEIGHT:
            c_out *= GROUPS
    if input.numel() == 0:
        return input.new_empty(_output_shape(input.shape, c_out))
    batched = input.dim() == BATCHED
    x = input if batched else input.unsqueeze(0)
    # Copies only an input that is not dense in this layout or is lazily negated.
    if plan.CHANNELS_LAST:
        x = x.resolve_neg().contiguous(memory_format=FORMAT)
    else:
        x = x.resolve_neg().contiguous()
    if plan.HAS_COPY:
        x = _copied(plan, x)
    if HAS_BIAS:
        bias = bias.resolve_neg().contiguous()
    if plan.HAS_BOXES:
        x, packed_weight = _aligned(x, packed_weight)
    if IS_TUNED:
        y = _first(plan, x, packed_weight, bias, c_out)
    else:
        x_ptr, w_ptr = x.data_ptr(), packed_weight.data_ptr()
        call = x.get_device(), _first, plan, x.shape, c_out, x_ptr % 16, w_ptr % 16
        if HAS_BIAS:
            b_ptr = bias.data_ptr()
            call = *call, b_ptr % 16
            if plan.HAS_BOXES:
                operands = *_boxed(plan, call, x, packed_weight), b_ptr
            else:
                operands = x_ptr, w_ptr, b_ptr
        else:
            if plan.HAS_BOXES:  # noqa: SIM108
                operands = _boxed(plan, call, x, packed_weight)
            else:
                operands = x_ptr, w_ptr
        y = _launched(call, operands, (plan, x, packed_weight, bias, c_out))
    return y if batched else y.squeeze_(0)


if HAS_BOXES:

    def _aligned(x, packed_weight):
        """Return both; copies, if one does not start at a multiple of 16 bytes as boxes need it."""
        if (x.data_ptr() | packed_weight.data_ptr()) % 16:
            return x.clone(), packed_weight.clone()
        return x, packed_weight

    def _boxed(plan, call, x, packed_weight):
        """Return the tensor descriptors of a call; Triton checks them only at its first."""
        if call not in BOXES:
            described = plan.descriptors(x, packed_weight)
            if len(BOXES) < MOST_LAUNCHED:
                fields = [vars(each) | {"base": None} for each in described]
                BOXES[call] = [type("Box", (TensorDescriptor,), each) for each in fields]
            return described
        x_desc, w_desc = map(object.__new__, BOXES[call])
        x_desc.base, w_desc.base = x, packed_weight
        return x_desc, w_desc


if HAS_LAST:

    def _empty_last(shape, x):
        """Return an uninitialised tensor in channels_last; one without elements as torch has it."""
        nothing = type(shape[0]) is int and shape[0] == 0  # a symbol of a graph is at least 1
        format = torch.contiguous_format if nothing else FORMAT
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)


def _first(plan, x, packed_weight, bias, c_out):
    """Launch the kernel by Triton; return the output and what `_start` returns."""
    shape = _output_shape(x.shape, c_out)
    if plan.CHANNELS_LAST:  # noqa: SIM108
        y = _empty_last(shape, x)
    else:
        y = x.new_empty(shape)
    if IS_TUNED:
        plan.start(x, packed_weight, bias, y)
        return y
    else:
        return y, *plan.start(x, packed_weight, bias, y)


if RAW_WEIGHT:

    def _pack(plan, weight):
        """Return a weight as the kernel reads it: contiguous, in the dtype of this file."""
        return weight.detach().resolve_neg().to(DTYPE).contiguous()

else:

    def _pack(plan, weight):
        """Return the packed weight; a kernel packs it at every call."""
        if plan.RAW_WEIGHT:
            return weight.detach().resolve_neg().to(DTYPE).contiguous()
        return _packed(weight, plan.start_pack)


if HAS_PACKING:

    def _packed(weight, start):
        """Return a weight packed by the kernel that `start` launches."""
        weight = weight.resolve_neg()
        # Copies only a weight that is dense in neither layout or is lazily negated.
        if PACKS_BOTH_LAYOUTS:
            last = not weight.is_contiguous() and weight.is_contiguous(memory_format=FORMAT)
            weight = weight if last else weight.contiguous()
            w_ptr = weight.data_ptr()
            call = weight.get_device(), start, weight.shape, weight.dtype, last, w_ptr % 16
            return _launched(call, (w_ptr,), (weight, last))
        else:
            weight = weight.contiguous()
            w_ptr = weight.data_ptr()
            call = weight.get_device(), start, weight.shape, weight.dtype, w_ptr % 16
            return _launched(call, (w_ptr,), (weight,))


if HAS_COPY:

    def _copied(plan, x):
        """Return a copy of the input{COPIED}, for the kernel to read."""
        x_ptr = x.data_ptr()
        call = x.get_device(), plan.start_copy, x.shape, x_ptr % 16
        return _launched(call, (x_ptr,), (x,))


if REPEATS:

    def _launched(call, operands, arguments):
        """Return the result of a kernel; repeat the earlier launch of such a call, if there was one.

        A repeated launch skips Triton's launch code, which `start(*arguments)` uses. `call` has the
        device, `start`, and all that decides which code is compiled and which numbers it gets:
        shapes and the alignment of pointers.
        """
        device, start = call[:2]
        again = LAUNCHED.get(call)
        if again is None or torch._C._cuda_getDevice() != device:
            if PRECOMPILED:
                if device >= 0:
                    _use_precompiled(device)
            y, compiled, grid, others = start(*arguments)
            if device >= 0 and len(LAUNCHED) < MOST_LAUNCHED:  # not in Triton's interpreter
                # The last three are for launch hooks, which see Triton's own launches only.
                kernel = (compiled.function, compiled.packed_metadata, None, None, None)
                launch = compiled.run, (*grid, 1, 1)[:3], kernel, others
                LAUNCHED[call] = tuple(y.shape), y.stride(), *launch, compiled  # kept loaded
            return y
        shape, stride, run, programs, kernel, others, _ = again
        y = _empty_strided_cuda(shape, stride, DTYPE)
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*programs, stream, *kernel, *operands, y.data_ptr(), *others)
        return y


if PRECOMPILED:

    @functools.cache
    def _use_precompiled(device):
        """Put machine code that ships beside this file into Triton's cache, if it suits the device.

        Its keys are hashes of a kernel's source, signature and options, the architecture and the
        version of Triton. If any of these differ, Triton compiles as usual.
        """
        major, minor = torch.cuda.get_device_capability(device)
        path = Path(__file__).with_suffix(f".sm_{major}{minor}.cubin")
        try:
            manifest = json.loads(path.with_name("manifest.json").read_text())
            stated = manifest.pop("sha256")
            intact = hashlib.sha256(json.dumps(manifest).encode()).hexdigest() == stated
            row, content = manifest["precompiled"][path.name], path.read_bytes()
            found = triton.__version__, hashlib.sha256(content).hexdigest()
            if not intact or found != (row["triton"], row["sha256"]):
                return
            for kernel in row["kernels"]:
                code, content = content[: kernel["size"]], content[kernel["size"] :]
                _offer(kernel["kernel"], kernel["key"], kernel["metadata"], code)
        except Exception:
            return  # nothing ships for this device, or it is unusable: Triton compiles

    def _offer(kernel, key, metadata, code):
        """Put the machine code of a kernel into Triton's cache, where it is not there yet."""
        cache, name = get_cache_manager(key), f"{kernel}.json"
        if not kernel.isidentifier():  # files in the cache have this name
            raise ValueError(kernel)
        if cache.get_group(name) is None:
            files = {name: json.dumps(metadata), f"{kernel}.cubin": code}
            # The group last: Triton expects the files that a group names to be complete.
            cache.put_group(name, {file: cache.put(data, file) for file, data in files.items()})


# ---- plans ----
if not SEVERAL:
    PLANS = (
        Plan(
            CHANNELS_LAST=CHANNELS_LAST,
            RAW_WEIGHT=RAW_WEIGHT,
            PACKED_TAPS=PACKED_TAPS,
            LANES=LANES,
            PLACES=PLACES,
            HAS_COPY=HAS_COPY,
            HAS_BOXES=HAS_BOXES,
            HAS_GRADIENT=HAS_GRADIENT,
            RAW_GRADIENT=RAW_GRADIENT,
            CHECKS_SIZES=CHECKS_SIZES,
            CHECKS_GRADIENT=CHECKS_GRADIENT,
            start=_start,
            start_pack=_start_pack,
            start_copy=_start_copy,
            descriptors=_descriptors,
            start_gradient=_start_gradient,
            start_pack_for_gradient=_start_pack_for_gradient,
            mismatch_of_sizes=_mismatch_of_sizes,
            serves_gradient=_serves_gradient,
        ),
    )


def _plan_of(input, weight):
    """Return what computes a call: the kernel for its sizes and for the format of its output."""
    if HAS_LADDER:
        if ANY_LAYOUT:
            plan = _plan_at(input.shape, input.stride(), weight.shape, weight.stride())
        else:
            plan = PLANS[0]
        if HAS_RUNGS:
            rung = plan.rungs.get(input.shape[-RANK:])
            if rung is not None:
                return rung
        if HAS_SMALL:
            if plan.small and input.numel() <= plan.most:
                return plan.small
        if HAS_LARGE:
            if plan.large and input.numel() >= plan.least:
                return plan.large
        return plan
    else:
        if ANY_LAYOUT:
            return _plan_at(input.shape, input.stride(), weight.shape, weight.stride())
        else:
            return PLANS[0]


if HAS_GRADIENT:

    def _plan_of_gradient(grad, weight):
        """Return what computes the input's gradient from that of the output."""
        if HAS_RUNGS:
            if ANY_LAYOUT:
                plan = _plan_at(grad.shape, grad.stride(), weight.shape, weight.stride())
            else:
                plan = PLANS[0]
            return plan.rungs.get(_input_shape(grad.shape, 1)[-RANK:], plan)
        else:
            if ANY_LAYOUT:
                return _plan_at(grad.shape, grad.stride(), weight.shape, weight.stride())
            else:
                return PLANS[0]


if ANY_LAYOUT:

    def _plan_at(input_shape, stride, weight_shape, weight_stride):
        """Return the plan for channels_last if input or weight is in it, as torch's output is."""
        first, last = PLANS
        is_last = _is_channels_last(input_shape, stride)
        is_last = is_last or _is_channels_last(weight_shape, weight_stride)
        return last if is_last else first


# ---- checks ----
def _call(input, weight, weight_shape, bias, cast):
    """Return the arguments of `_mismatch` for a call: shapes, strides, dtypes, devices."""
    if bias is None:
        bias_shape, tensors = None, (input, weight)
        dtypes, devices = (input.dtype, weight.dtype), (input.device, weight.device)
    else:
        bias_shape, tensors = bias.shape, (input, weight, bias)
        dtypes = input.dtype, weight.dtype, bias.dtype
        devices = input.device, weight.device, bias.device
    if cast:  # autocast changes them
        dtypes = tuple(map(_autocast_dtype, tensors))
    if RANK == 1:
        return input.shape, weight_shape, bias_shape, dtypes, devices
    else:
        if ANY_LAYOUT:
            stride, weight_stride = input.stride(), weight.stride()
            return input.shape, stride, weight_shape, bias_shape, dtypes, devices, weight_stride
        else:
            return input.shape, input.stride(), weight_shape, bias_shape, dtypes, devices


def _fits(shape, expected):
    return len(shape) == len(expected) and all(
        want is None or want == got for want, got in zip(expected, shape, strict=True)
    )


def _output_shape(input_shape, c_out):
    """Return the shape of the output of a batched input."""
    axes = zip(
        input_shape[2:], WEIGHT_SHAPE[2:], STRIDE, PADDING, OUTPUT_PADDING, DILATION, strict=True
    )
    spatial = [(i - 1) * s - 2 * p + d * (k - 1) + op + 1 for i, k, s, p, op, d in axes]
    return (input_shape[0], c_out, *spatial)


if not ANY_LAYOUT:
    if RANK > 1:

        def _is_dense(shape, stride, axes):
            """Whether a tensor is dense with `axes` as the order of its axes, the innermost first."""
            step = 1
            for axis in axes:
                if stride[axis] != step and shape[axis] != 1:
                    return False
                step *= shape[axis]
            return True


if RANK > 1:

    def _is_channels_last(shape, stride):
        """Whether torch's convolutions treat a tensor with these strides as channels_last."""
        if len(stride) == UNBATCHED:  # torch puts the batch in front
            shape, stride = (1, *shape), (shape[0] * stride[0], *stride)
        if len(stride) != BATCHED or stride[1] == 0:
            return False
        least = 0
        for axis in LAST_AXES:
            if stride[axis] < least or (axis == 0 and least == stride[1]):
                return False
            least = stride[axis] * shape[axis]
        return True


def _refuse(mismatch):
    """Raise ValueError if there is a mismatch with what this file was generated for."""
    if mismatch is not None:
        raise ValueError(f"this file was generated for {mismatch}")


def _check_as_torch(input_shape, weight_shape, bias_shape):
    """Raise torch's own error, on any device, for shapes that torch's layer would not accept."""
    shape = input_shape if len(input_shape) == BATCHED else (1, *input_shape)
    if (
        len(shape) == BATCHED
        and len(weight_shape) >= 3
        and weight_shape[0] > 0
        and weight_shape[0] % GROUPS == 0
        and shape[1] == weight_shape[0]
        and (bias_shape is None or tuple(bias_shape) == (weight_shape[1] * GROUPS,))
        and all(size > 0 for size in (*shape[2:], *_output_shape(shape, 1)[2:]))
    ):
        return
    with torch.utils._python_dispatch._disable_current_modes():
        one = torch.zeros((), dtype=torch.float64, device="cpu")  # stands for every element
        bias = None if bias_shape is None else one.expand(bias_shape)
        getattr(F, OP)(one.expand(input_shape), one.expand(weight_shape), bias, *GEOMETRY)


def _mismatch_but_layout(plan, input_shape, weight_shape, bias_shape, dtypes, devices):
    """Return what this file was generated for and what a call has instead, None if they agree.

    The layout is not compared. `bias_shape` is None without a bias. Raises torch's own errors.
    """
    _check_as_torch(input_shape, weight_shape, bias_shape)
    shape = tuple(input_shape) if len(input_shape) == BATCHED else (1, *input_shape)
    if not _fits(shape, INPUT_SHAPE):
        return f"input {INPUT_SHAPE}, got {shape}"
    if HAS_BIAS:
        if bias_shape is None:
            return "bias=True, got bias=None"
    else:
        if bias_shape is not None:
            return "bias=False, got a bias"
    if CHECKS_PLANS:
        mismatch = _mismatch_of_weight(weight_shape, dtypes, devices)
        if HAS_LARGE:
            # What is beyond the limits of the kernel for large inputs is one of those.
            if mismatch is None and plan.large:
                mismatch = _mismatch_of_plan(plan.large, shape, weight_shape)
        return mismatch or _mismatch_of_plan(plan, shape, weight_shape)
    else:
        if plan.CHECKS_SIZES:
            output = _output_shape(shape, GROUPS * weight_shape[1])
            mismatch = _mismatch_of_weight(weight_shape, dtypes, devices)
            return mismatch or plan.mismatch_of_sizes(shape, output)
        else:
            return _mismatch_of_weight(weight_shape, dtypes, devices)


if CHECKS_PLANS:

    def _mismatch_of_plan(plan, shape, weight_shape):
        """Return which sizes are too large for a kernel, None if all fit."""
        check = plan.mismatch_of_sizes
        return check and check(shape, _output_shape(shape, GROUPS * weight_shape[1]))


# Cached, as calls repeat. Symbolic sizes cannot be cached: `__wrapped__` is for those.
if RANK == 1:

    @functools.lru_cache(maxsize=1024)
    def _mismatch(input_shape, weight_shape, bias_shape, dtypes, devices):
        """Return the mismatch of a call; with one axis there is only one layout."""
        plan = PLANS[0]
        return _mismatch_but_layout(plan, input_shape, weight_shape, bias_shape, dtypes, devices)

else:
    if ANY_LAYOUT:

        @functools.lru_cache(maxsize=1024)
        def _mismatch(input_shape, stride, weight_shape, bias_shape, dtypes, devices, weight_stride):  # fmt: skip
            """Return the mismatch of a call; there is a kernel for every layout."""
            plan = _plan_at(input_shape, stride, weight_shape, weight_stride)
            return _mismatch_but_layout(plan, input_shape, weight_shape, bias_shape, dtypes, devices)  # fmt: skip

    else:

        @functools.lru_cache(maxsize=1024)
        def _mismatch(input_shape, stride, weight_shape, bias_shape, dtypes, devices, weight_stride=None):  # fmt: skip
            """Return the mismatch of a call; layers give the weight's strides, which count in torch too."""  # fmt: skip
            plan = PLANS[0]
            mismatch = _mismatch_but_layout(plan, input_shape, weight_shape, bias_shape, dtypes, devices)  # fmt: skip
            if mismatch is not None:
                return mismatch
            batched = len(input_shape) == BATCHED
            if weight_stride is not None:  # torch's rule looks at both strides
                other = _is_channels_last(input_shape, stride)
                other = other or _is_channels_last(weight_shape, weight_stride)
                if CHANNELS_LAST:
                    other = not other
            else:  # an input that is dense in neither layout is copied
                other = batched and not _is_dense(input_shape, stride, OWN_AXES)
                other = other and 0 not in input_shape
                other = other and _is_dense(input_shape, stride, OTHER_AXES)
            if not other:
                return None
            if CHANNELS_LAST:
                if not batched:
                    return f"layout {LAYOUT}, got an unbatched input"
            return f"layout {LAYOUT}, got {OTHER_LAYOUT}"


def _mismatch_of_weight(shape, dtypes, devices):
    if not _fits(shape, WEIGHT_SHAPE):
        return f"weight {WEIGHT_SHAPE}, got {tuple(shape)}"
    if any(dtype != DTYPE for dtype in dtypes):
        return f"{DTYPE}, got " + " and ".join(map(str, dtypes))
    if len(set(devices)) > 1 or devices[0].type not in DEVICES:
        return "one CUDA device, got " + " and ".join(dict.fromkeys(map(str, devices)))
    return None


# ---- modes ----
def _is_autocast(tensor):
    """Whether autocast is on for the device type of a tensor; meta tensors have none."""
    kind = "cuda" if tensor.is_cuda else "cpu"
    return torch.is_autocast_enabled(kind) and not tensor.is_meta


def _autocast_dtype(tensor):
    """Return the dtype to which autocast converts an argument of a convolution."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def _is_transformed():
    """Whether torch.func or forward-mode differentiation is active: torch computes then."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


def _is_watched(input, weight, bias):
    """Whether a compiler, tracer, dispatch mode or tensor subclass must see the operator."""
    if input is None or weight is None:  # the operator would accept None; torch raises
        getattr(F, OP)(input, weight)
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or not (type(input) in EAGER and type(weight) in EAGER)
        or not (bias is None or type(bias) in EAGER)
        or input.is_meta
    )


def _depends_on_data(input):
    """Whether only the data decide a size of the input that is checked."""
    symbols = getattr(torch.fx.experimental, "symbolic_shapes", None)
    if symbols is None:  # it is imported when a size first becomes a symbol
        return False
    sizes = input.shape
    if OPEN_BATCH:
        sizes = sizes[-RANK:]
    return any(symbols.guard_or_true(n > 1) != symbols.guard_or_false(n > 1) for n in sizes)


def _is_recorded(input, weight, bias):
    """Whether autograd records the call."""
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


if not RAW_WEIGHT:

    def _mark(weight):
        """Return what changes with every edit of a weight that torch reports."""
        return weight.data_ptr(), weight._version, weight.stride(), weight.is_neg()

    def _can_freeze(weight):
        """Whether the kernel can pack a weight, and torch reports its edits."""
        return (
            not _is_watched(weight, weight, None)
            and _fits(weight.shape, WEIGHT_SHAPE)
            and weight.dtype in PACKED_DTYPES
            and weight.layout == torch.strided
            and weight.device.type in DEVICES
            and not weight.is_inference()
            and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        )


# ---- gradients ----
def _input_shape(output_shape, c_in):
    """Return the shape of the input for the shape of an output."""
    axes = zip(output_shape[2:], WEIGHT_SHAPE[2:], PADDING, DILATION, strict=True)
    return (output_shape[0], c_in, *(o + 2 * p - d * (k - 1) for o, k, p, d in axes))


# ---- backward ----
if HAS_GRADIENT:

    def _input_gradient(grad, weight):
        """Return the gradient of the input, from that of the output."""
        plan = _plan_of_gradient(grad, weight)
        c_in = weight.shape[0]
        if grad.numel() == 0:
            return grad.new_zeros(_input_shape(grad.shape, c_in))
        # Copies only a gradient that is not dense in this layout or is lazily negated.
        if plan.CHANNELS_LAST:
            x = grad.resolve_neg().contiguous(memory_format=FORMAT)
        else:
            x = grad.resolve_neg().contiguous()
        if plan.RAW_GRADIENT:
            packed_weight = weight.resolve_neg().contiguous()
        else:
            packed_weight = _packed(weight, plan.start_pack_for_gradient)
        x_ptr, w_ptr = x.data_ptr(), packed_weight.data_ptr()
        call = x.get_device(), _first_gradient, plan, x.shape, c_in, x_ptr % 16, w_ptr % 16
        return _launched(call, (x_ptr, w_ptr), (plan, x, packed_weight, c_in))

    def _first_gradient(plan, x, packed_weight, c_in):
        """Launch the kernel of the input's gradient by Triton; return as `_first` does."""
        shape = _input_shape(x.shape, c_in)
        if plan.CHANNELS_LAST:  # noqa: SIM108
            y = _empty_last(shape, x)
        else:
            y = x.new_empty(shape)
        return y, *plan.start_gradient(x, packed_weight, y)

    def _fake_input_gradient(grad, weight):
        """Return an uninitialised gradient of the input, for tracing."""
        shape = _input_shape(grad.shape, weight.shape[0])
        if ANY_LAYOUT:
            plan = _plan_at(grad.shape, grad.stride(), weight.shape, weight.stride())
            return _empty_last(shape, grad) if plan.CHANNELS_LAST else grad.new_empty(shape)
        else:
            if CHANNELS_LAST:
                return _empty_last(shape, grad)
            else:
                return grad.new_empty(shape)

    def _input_gradient_flops(grad_shape, weight_shape, *, out_shape=None, **_):
        """Return the operations that torch's FlopCounterMode counts for its own operator."""
        return conv_flop_count(out_shape, weight_shape, grad_shape, transposed=True)


if HAS_STAGES:

    def _save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    def _backward(ctx, grad):
        """Return the gradients, by torch's differentiable operators."""
        again = torch.is_grad_enabled()  # True with create_graph=True
        kind = "cuda" if grad.is_cuda else "cpu"
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            # Views, as one input may depend on another, through which no gradient must flow.
            views = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]  # fmt: skip
            needed = ctx.needs_input_grad[:3]
            wanted = [view for view, need in zip(views, needed, strict=True) if need]
            grads = iter(torch.autograd.grad(_torch(*views), wanted, grad, create_graph=again))
        found = (next(grads) if need else None for need in needed)
        if RAW_WEIGHT:
            return tuple(found)
        else:
            return *found, None  # for the packed weight

else:

    def _save(ctx, inputs, output):
        """Save the weight for the input's gradient, the input for the weight's."""
        input, weight = inputs[:2]
        for_input, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if for_weight else None, weight if for_input else None)
        ctx.shapes = input.shape, weight.shape

    def _backward(ctx, grad):
        """Return the gradients; torch computes all of them if they are differentiated again."""
        # Of a tensor that was not saved only the shape is read: one element is enough.
        input, weight = (
            grad.new_empty(1).expand(shape) if tensor is None else tensor
            for tensor, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        )
        batched = input.dim() == BATCHED
        if not batched:
            grad, input = grad.unsqueeze(0), input.unsqueeze(0)
        geometry = STRIDE, PADDING, DILATION, True, OUTPUT_PADDING, GROUPS  # True: transposed
        of_bias = [GROUPS * weight.shape[1]]  # read if its gradient is needed
        if HAS_GRADIENT:
            for_input, *others = ctx.needs_input_grad[:3]
            # torch.func and double backward know only torch's operator.
            own = for_input and not (torch.is_grad_enabled() or _is_transformed())
            # If torch computed the output, it computes this too.
            own = own and _fits(input.shape, INPUT_SHAPE) and _fits(weight.shape, WEIGHT_SHAPE)
            own = own and grad.dtype == DTYPE and grad.device.type in DEVICES
            plan = _plan_of_gradient(grad, weight)
            if not plan.HAS_GRADIENT:
                own = False
            if plan.CHECKS_GRADIENT:
                own = own and plan.serves_gradient(grad.shape, (grad.shape[0], *input.shape[-UNBATCHED:]))  # fmt: skip
            grads = None, None, None
            if any(others) or (for_input and not own):
                needed = for_input and not own, *others
                grads = torch.ops.aten.convolution_backward(grad, input, weight, of_bias, *geometry, needed)  # fmt: skip
            for_input = INPUT_GRADIENT(grad, weight) if own else grads[0]
            for_input = for_input if batched or for_input is None else for_input.squeeze(0)
        else:
            needed = ctx.needs_input_grad[:3]
            grads = torch.ops.aten.convolution_backward(grad, input, weight, of_bias, *geometry, needed)  # fmt: skip
            for_input = grads[0] if batched or grads[0] is None else grads[0].squeeze(0)
        if RAW_WEIGHT:
            return for_input, *grads[1:]
        else:
            return for_input, *grads[1:], None  # for the packed weight


# ---- operator ----
if not HAS_STAGES:

    def _torch(input, weight, bias, geometry=GEOMETRY):
        """Compute the same with torch's operators."""
        return getattr(F, OP)(input, weight, bias, *geometry)


def _forward(input, weight, bias):
    """Compute in a graph; torch computes calls that this file was not generated for."""
    call = _call(input, weight, weight.shape, bias, _is_autocast(input))
    if _mismatch(*call) is not None:
        return _torch(input, weight, bias)
    plan = _plan_of(input, weight)
    return _launch(plan, input, _pack(plan, weight), bias)


def _fake(input, weight, bias):
    """Return an uninitialised output, for tracing."""
    call = _call(input, weight, weight.shape, bias, _is_autocast(input))
    if _mismatch.__wrapped__(*call) is not None:
        return _torch(input, weight, bias)
    shape = input.shape if input.dim() == BATCHED else (1, *input.shape)
    shape = _output_shape(shape, GROUPS * weight.shape[1])
    if ANY_LAYOUT:
        plan = _plan_at(input.shape, input.stride(), weight.shape, weight.stride())
        y = _empty_last(shape, input) if plan.CHANNELS_LAST else input.new_empty(shape)
    else:
        if CHANNELS_LAST:  # noqa: SIM108
            y = _empty_last(shape, input)
        else:
            y = input.new_empty(shape)
    return y if input.dim() == BATCHED else y.squeeze(0)


def _flops(input_shape, weight_shape, *_, out_shape=None, **_others):
    """Return the operations that torch's FlopCounterMode counts for its own operator."""
    shape = input_shape if len(input_shape) == BATCHED else [1, *input_shape]
    return conv_flop_count(shape, weight_shape, out_shape, transposed=True)


def _autocast(input, weight, bias):
    """Convert to autocast's dtype, then compute, as torch's convolutions do."""
    tensors = (input, weight, bias)
    cast = [t if t is None else t.to(_autocast_dtype(t)) for t in tensors]
    with torch.autocast(input.device.type, enabled=False):
        return OPERATOR(*cast)


# ---- registration ----
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
if not hasattr(getattr(torch.ops, NAMESPACE), OP):
    if ANY_LAYOUT:
        tags = torch.Tag.flexible_layout  # Inductor may keep the layout that it wants
        schema = f"{OP}(Tensor input, Tensor weight, Tensor? bias) -> Tensor"
        LIBRARY.define(schema, tags=tags)
    else:
        LIBRARY.define(f"{OP}(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
    LIBRARY.impl(OP, _forward, "CPU")
    LIBRARY.impl(OP, _forward, "CUDA")
    LIBRARY.impl(OP, _autocast, "AutocastCPU")
    LIBRARY.impl(OP, _autocast, "AutocastCUDA")
    torch.library.register_fake(f"{NAMESPACE}::{OP}", _fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::{OP}", _backward, setup_context=_save, lib=LIBRARY
    )
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), OP))(_flops)
    if HAS_GRADIENT:
        if ANY_LAYOUT:
            schema = f"{OP}_input_gradient(Tensor grad, Tensor weight) -> Tensor"
            LIBRARY.define(schema, tags=tags)
        else:
            LIBRARY.define(f"{OP}_input_gradient(Tensor grad, Tensor weight) -> Tensor")
        LIBRARY.impl(f"{OP}_input_gradient", _input_gradient, "CPU")
        LIBRARY.impl(f"{OP}_input_gradient", _input_gradient, "CUDA")
        torch.library.register_fake(
            f"{NAMESPACE}::{OP}_input_gradient", _fake_input_gradient, lib=LIBRARY
        )
        packet = getattr(getattr(torch.ops, NAMESPACE), f"{OP}_input_gradient")
        register_flop_formula(packet)(_input_gradient_flops)

OPERATOR = getattr(getattr(torch.ops, NAMESPACE), OP)
if HAS_GRADIENT:
    INPUT_GRADIENT = getattr(getattr(torch.ops, NAMESPACE), f"{OP}_input_gradient")


class Recorded(torch.autograd.Function):
    """The call while only autograd records it; `OPERATOR` takes longer."""

    @staticmethod
    def forward(ctx, *inputs):
        """Compute and save; a separate setup_context would take longer."""
        if RAW_WEIGHT:
            input, weight, bias = inputs
            plan = _plan_of(input, weight)
            output = _launch(plan, input, _pack(plan, weight), bias)
        else:
            input, weight, bias, packed_weight = inputs
            plan = _plan_of(input, weight)
            if packed_weight is None:
                packed_weight = _pack(plan, weight)
            output = _launch(plan, input, packed_weight, bias)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


# torch's apply in C++: the one in Python only handles torch.func, which `_is_transformed` excludes.
RECORDED = super(torch.autograd.Function, Recorded).apply


# ---- layer ----
class ModelNew(getattr(nn, LAYER)):
    """`torch.nn.ConvTranspose2d` with this file's spec as its defaults.

    It computes {STAGES}.
    What this file was not generated for is computed by torch, with a warning that says why.
    """

    _convgen = True  # convgen.freeze looks for it
    _stacklevel = 4  # from a warning to the line that calls the layer
    if not RAW_WEIGHT:
        _frozen = None  # (weight, alias of it, its mark, packed weight)
    _replaced = None  # what convgen.replace_layers noted of it
    _calls = None  # for convgen.report
    _notice = "computed by torch: {}"  # in a model the layer's name too, and what to do
    _strict = False  # what torch would have to compute is an error

    class _Calls:
        """How many calls the kernel computed, and torch for each kind of reason."""

        def __init__(self):
            self.kernel, self.torch = 0, {}  # kind: [its first reason, calls]

        def __deepcopy__(self, memo):
            return type(self)()  # a copy of the layer starts anew

    def __init__(
        self,
        in_channels=IN_CHANNELS,
        out_channels=OUT_CHANNELS,
        kernel_size=DEFAULT_KERNEL,
        stride=DEFAULT_STRIDE,
        padding=DEFAULT_PADDING,
        output_padding=DEFAULT_OUTPUT_PADDING,
        groups=DEFAULT_GROUPS,
        bias=HAS_BIAS,
        dilation=DEFAULT_DILATION,
        padding_mode="zeros",
        device=None,
        dtype=None,
    ):
        if OPEN_CHANNELS:
            if in_channels is None or out_channels is None:
                raise TypeError(
                    f"{LAYER} needs in_channels and out_channels: this file has neither"
                )
        given = in_channels, out_channels, kernel_size, stride, padding, output_padding, groups
        dtype = DTYPE if dtype is None else dtype
        super().__init__(*given, bias, dilation, padding_mode, device, dtype)

    def _get_name(self):
        return LAYER  # what is printed is torch's layer, or a spec

    if not HAS_STAGES:

        def __prepare_scriptable__(self):
            """Return torch's own layer with the same parameters, for `torch.jit.script`."""
            layer = getattr(nn, LAYER).__new__(getattr(nn, LAYER))
            # Without what the class declares: counts, for example, are this layer's alone.
            own = vars(ModelNew)
            layer.__dict__.update((k, v) for k, v in self.__dict__.items() if k not in own)
            return layer

    def forward(self, input, output_size=None):
        """Return the layer's output; `output_size` as in torch."""
        # With a parametrization, pruning or DataParallel they are not in _parameters.
        own = self._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None:
            weight = self.weight
        if "bias" not in own:
            bias = self.bias
        if not RAW_WEIGHT:
            if self._frozen is not None and torch.is_grad_enabled() and weight.requires_grad:
                self._frozen = None  # an optimizer may change the weight next
        if ANY_LAYOUT:
            if torch.compiler.is_compiling() and not self._strict:
                return self._in_graph(input, weight, bias, output_size)
        watched = _is_watched(input, weight, bias)
        if watched and torch.onnx.is_in_onnx_export():  # it translates torch's operators only
            return self._forward_torch(input, weight, bias, output_size)
        if watched and not isinstance(input, torch.Tensor):
            return OPERATOR(input, weight, bias)  # its error names what is no tensor
        cast = _is_autocast(input)
        reason = self._reason_for_torch(input, weight, bias, output_size, watched, cast)
        if reason is not None:
            if self._strict:
                raise ValueError(self._notice.format(reason))
            output = self._forward_torch(input, weight, bias, output_size)  # or torch's error
            if not torch.compiler.is_compiling() and self._is_first(reason):
                warnings.warn(self._notice.format(reason), stacklevel=self._stacklevel)
            return output
        if not (watched and torch.compiler.is_compiling()):  # a graph cannot count
            (self._calls or self._new_calls()).kernel += 1
        recorded = _is_recorded(input, weight, bias)
        if watched or (cast and recorded):
            return OPERATOR(input, weight, bias)
        if RAW_WEIGHT:
            if recorded:
                return RECORDED(input, weight, bias)
        else:
            plan = _plan_of(input, weight)
            packed = None if self._frozen is None else self._frozen_weight(plan, weight)
            if recorded:
                return RECORDED(input, weight, bias, packed)
        if cast:  # the weight is converted while it is packed
            input = input.to(DTYPE)
            if HAS_BIAS:
                bias = bias.to(DTYPE)
        if RAW_WEIGHT:
            plan = _plan_of(input, weight)
            return _launch(plan, input, _pack(plan, weight), bias)
        else:
            return _launch(plan, input, _pack(plan, weight) if packed is None else packed, bias)

    if ANY_LAYOUT:

        def _in_graph(self, input, weight, bias, output_size):
            """Return the output in a graph; the operator checks what is not asked here.

            Whatever is read here is checked again at each call of the graph: each number of a named
            tuple, too, but none of one that is written out.
            """
            geometry = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            if (
                geometry == GEOMETRY_ITSELF
                and output_size is None
                and isinstance(input, torch.Tensor)
                and weight is not None
                and not _is_transformed()
                and not torch.onnx.is_in_onnx_export()
                and not _depends_on_data(input)
            ):
                return OPERATOR(input, weight, bias)
            return self._forward_torch(input, weight, bias, output_size)

    def __getstate__(self):
        if RAW_WEIGHT:
            return self.__dict__ | {"_calls": None}
        else:
            return self.__dict__ | {"_calls": None, "_frozen": None}

    def _new_calls(self):
        """Start to count; not as torch's modules set an attribute, which takes longer."""
        self.__dict__["_calls"] = self._Calls()
        return self._calls

    def _is_first(self, reason):
        """Count a call that torch computes; return whether its reason is the first of its kind."""
        kind = reason.partition(", got ")[0]
        counted = (self._calls or self._new_calls()).torch.setdefault(kind, [reason, 0])
        counted[1] += 1
        return counted[1] == 1

    if RAW_WEIGHT:

        def freeze(self):
            """Return the layer; its kernel reads the weight unpacked, so nothing is kept."""
            return self

        def unfreeze(self):
            """Return the layer; nothing was kept."""
            return self

    else:

        def freeze(self):
            """Pack the weight now, so that later calls need not.

            An edit that torch does not report, through `weight.data` or by a fused optimizer, is not
            seen while it lasts. It ends with `unfreeze()`, `train()`, a move to another device or
            dtype, a load, another weight, and a call that records a gradient of the weight. Graphs
            that are captured or compiled pack all the same.
            """
            self._frozen = None
            weight = self._parameters.get("weight")
            if weight is not None and _can_freeze(weight):
                plan = _plan_of(weight, weight)  # of an input in its layout, to begin with
                packed = _pack(plan, weight.detach())
                if weight.is_cuda:  # the next call may be on another stream
                    torch.cuda.current_stream(weight.device).synchronize()
                if SEVERAL:
                    packed = {plan.start_pack: packed}  # another form once a call needs it
                # The alias keeps the memory: no other weight can get the same address.
                self._frozen = weight, weight.detach(), _mark(weight), packed
            return self

        def unfreeze(self):
            """End `freeze()`: the weight is packed at every call again."""
            self._frozen = None
            return self

        def train(self, mode=True):
            """Set the mode as torch does; training ends `freeze()`."""
            if mode:
                self._frozen = None
            return super().train(mode)

        def _apply(self, fn, recurse=True):
            self._frozen = None
            return super()._apply(fn, recurse)

        def _frozen_weight(self, plan, weight):
            """Return what `freeze` packed if it serves a call, None if not; another weight ends it."""  # fmt: skip
            of, _, mark, packed = self._frozen
            if of is not weight or mark != _mark(weight):
                self._frozen = None
                return None
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # the graph may outlive the packed weight
            if SEVERAL:
                if plan.start_pack not in packed:
                    packed[plan.start_pack] = _pack(plan, weight.detach())
                    if weight.is_cuda:
                        torch.cuda.current_stream(weight.device).synchronize()
                return packed[plan.start_pack]
            else:
                return packed

    def _reason_for_torch(self, input, weight, bias, output_size, watched, cast):
        """Return why torch must compute a call, None if the kernel can."""
        if _is_transformed():
            return "torch.func and forward-mode differentiation transform torch's operators alone"
        wanted = "this file was generated for"
        geometry = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        if geometry != GEOMETRY:
            names = "stride, padding, output_padding, groups, dilation"
            return f"{wanted} {names} {GEOMETRY}, got {geometry}"
        if output_size is not None:
            return f"{wanted} no output_size, got {output_size}"
        if watched and torch.jit.is_tracing():  # a trace would record what is asked of sizes
            return None
        if watched and _depends_on_data(input):  # which no graph can check
            return f"{wanted} sizes that a graph knows, got ones that only the data decide"
        call = _call(input, weight, weight.shape, bias, cast)
        if not ANY_LAYOUT:
            if RANK > 1:
                call = *call, weight.stride()
        mismatch = _mismatch.__wrapped__(*call) if watched else _mismatch(*call)
        cast = " under autocast" if cast else ""
        return None if mismatch is None else f"{wanted} {mismatch}{cast}"

    def _forward_torch(self, input, weight, bias, output_size):
        geometry = self.stride, self.padding, self.kernel_size, RANK, self.dilation
        padding = self._output_padding(input, output_size, *geometry)
        geometry = self.stride, self.padding, padding, self.groups, self.dilation
        return _torch(input, weight, bias, geometry)
