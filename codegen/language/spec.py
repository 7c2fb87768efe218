"""The specification of one transposed convolution, checked and in canonical form.

Stage 1, parse. Input: the arguments of `nn.ConvTransposeNd` and convgen's own, from the language,
the command line, pyproject.toml or Python; output: a `ConvTransposeSpec`. Its text (`str(spec)`)
parses to an equal spec and is the key of headers and manifests.

Along one axis the layer has `(input - 1)*stride - 2*padding + dilation*(kernel_size - 1) +
output_padding + 1` outputs (torch.nn.ConvTranspose2d, "Shape").
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpecError as SpecError  # re-exported
from ..errors import nearest as nearest
from ..errors import shown as shown
from ..errors import text_of
from ..tables.dtypes import DTYPES, PRECISIONS, DType, Precision, find_dtype, find_precision
from ..tables.pointwise import POINTWISE, Stage, find_pointwise
from ..tables.targets import TARGETS
from ..values import check_choice, check_integer, entries_of, number_of
from .canonical import format_spec
from .torch_module import read_module

LAYOUTS = ("channels_first", "channels_last")
ANY = "any"  # either of them: a kernel for each
MEMORY_FORMATS = {2: "channels_last", 3: "channels_last_3d"}  # torch's memory formats by rank
NO_CHOICES = "none"  # instead of a choices file: the cost model chooses the tile (choices.py)
AUTOTUNES = ("none", "blocks", "launch")
CONV_ARGUMENTS = (  # the positional order of nn.ConvTransposeNd
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "output_padding",
    "groups",
    "bias",
    "dilation",
    "padding_mode",
)
OWN_ARGUMENTS = ("input", "rungs", "dtype", "precision", "layout", "grid", "target", "autotune")
MOST_RUNGS = 3  # beside the one for any size

# Defaults of the arguments with one integer per axis; the rank turns them into tuples.
_ONE: Any = 1
_ZERO: Any = 0
MAX_EXTENT = 4096  # kernel extent and stride along an axis
MAX_TAPS = 65536
MAX_CHANNELS = 2**20
MAX_OFFSET = 2**20  # padding, output_padding, dilation
MAX_REACH = 2**30  # dilation * (kernel_size - 1): shifts of an index stay far inside int32
MAX_STAGES = 64  # stages of a pipeline; each is a line of the kernel
MAX_SIZE = 2**40 - 1
MAX_ELEMENTS = 2**62  # elements of a tensor: byte offsets stay inside int64


def _per_axis(argument: str, value: object, rank: int, low: int, high: int) -> tuple[int, ...]:
    entries = entries_of(value)
    if entries is None:
        return (check_integer(argument, value, low, high),) * rank
    if len(entries) != rank:
        raise SpecError(
            f"{argument} must be one integer or {rank} of them, got {shown(entries)}", argument
        )
    return tuple(check_integer(argument, entry, low, high) for entry in entries)


def check_target(value: object) -> str:
    """Return `value` as an exact str; raises SpecError if it names no GPU of the table."""
    return check_choice("target", value, tuple(target.name for target in TARGETS))


def make_stage(name: str, values: tuple[object, ...], named: dict[str, object]) -> Stage:
    """Return a pipeline stage, its numbers checked; raises SpecError naming the stage."""
    known = tuple(row.name for row in POINTWISE)
    given_name, name = name, text_of(name) or ""
    if name not in known:
        raise SpecError(
            f"unknown stage {shown(given_name)}{nearest(name, known)}; "
            f"the stages are {', '.join(known)}",
            name,
        )
    parameters = find_pointwise(name).parameters
    signature = f"{name}({', '.join(parameter.name for parameter in parameters)})"
    if len(values) > len(parameters):
        raise SpecError(f"{signature} got {len(values)} arguments", name)
    given = dict(zip((p.name for p in parameters), values, strict=False))
    for keyword, value in named.items():
        if keyword in given or keyword not in {p.name for p in parameters}:
            raise SpecError(f"{signature} takes no further argument {shown(keyword)}", name)
        given[keyword] = value
    numbers = []
    for parameter in parameters:
        value = given.get(parameter.name, parameter.default)
        if value is None:
            raise SpecError(f"{signature} needs {parameter.name}", name)
        number = number_of(value)
        if number is None or abs(number) > 3.4e38:
            raise SpecError(
                f"{parameter.name} of {name} must be a finite float32 number, got {shown(value)}",
                name,
            )
        numbers.append(number)
    if name == "clamp" and numbers[0] > numbers[1]:
        raise SpecError(f"clamp needs min <= max, got {numbers[0]} and {numbers[1]}", name)
    return Stage(name, tuple(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvTransposeSpec:
    """One transposed convolution with the pointwise stages around it.

    Where torch accepts one integer for all axes, so does this class; it stores tuples of length
    `rank`.

    Attributes:
        rank: number of spatial axes: 1, 2 or 3.
        kernel_size: taps along each axis.
        stride, padding, output_padding, dilation: torch's arguments, one integer per axis.
        in_channels, out_channels: number of channels, None if known only at run time.
        groups: number of groups; divides the channels that are known.
        bias: whether the layer adds a number to each output channel.
        input: (batch, channels, spatial…), each an int, or None if known only at run time; None
            means that all are None.
        rungs: up to `MOST_RUNGS` inputs, each like `input` with every size known, that a kernel of
            their own computes: planned for that batch, it serves any. All other sizes have the
            kernel of `input`.
        dtype: a name in `DTYPES`.
        precision: a name in `PRECISIONS` for float32, None for the other dtypes.
        layout: memory layout of input and output, a name in `LAYOUTS`, or `ANY` for both.
        grid: number of launch grid dimensions; None leaves the choice to the planner.
        target: a name in `TARGETS`; None leaves the choice to the caller.
        autotune: what the emitted file tunes on its first call, a name in `AUTOTUNES`.
        before: stages applied to the input as it is loaded.
        after: stages applied to the sum before it is stored.

    Raises:
        SpecError: an argument is of the wrong type or out of range; it names the argument.
    """

    rank: int
    kernel_size: tuple[int, ...]
    in_channels: int | None = None
    out_channels: int | None = None
    stride: tuple[int, ...] = _ONE
    padding: tuple[int, ...] = _ZERO
    output_padding: tuple[int, ...] = _ZERO
    groups: int = 1
    bias: bool = True
    dilation: tuple[int, ...] = _ONE
    input: tuple[int | None, ...] | None = None
    rungs: tuple[tuple[int | None, ...], ...] = ()
    dtype: str = "float32"
    precision: str | None = None
    layout: str = "channels_first"
    grid: int | None = None
    target: str | None = None
    autotune: str = "none"
    before: tuple[Stage, ...] = field(default=())
    after: tuple[Stage, ...] = field(default=())

    def __post_init__(self) -> None:
        self._set("rank", check_integer("rank", self.rank, 1, 3))
        self._check_geometry()
        self._check_channels()
        self._check_input()
        self._check_own()
        self._check_rungs()

    def _set(self, argument: str, value: object) -> None:
        object.__setattr__(self, argument, value)

    def _choose(self, argument: str, allowed: tuple[str, ...]) -> None:
        self._set(argument, check_choice(argument, getattr(self, argument), allowed))

    def _check_geometry(self) -> None:
        limits = {
            "kernel_size": (1, MAX_EXTENT),
            "stride": (1, MAX_EXTENT),
            "padding": (0, MAX_OFFSET),
            "output_padding": (0, MAX_OFFSET),
            "dilation": (1, MAX_OFFSET),
        }
        for argument, (low, high) in limits.items():
            value = getattr(self, argument)
            self._set(argument, _per_axis(argument, value, self.rank, low, high))
        taps = math.prod(self.kernel_size)
        if taps > MAX_TAPS:
            raise SpecError(
                f"kernel_size {self.kernel_size} has {taps} taps, at most {MAX_TAPS} are allowed",
                "kernel_size",
            )
        for k, s, op, d in zip(
            self.kernel_size, self.stride, self.output_padding, self.dilation, strict=True
        ):
            if d * (k - 1) >= MAX_REACH:
                raise SpecError(
                    f"dilation * (kernel_size - 1) must be below {MAX_REACH}, got {d * (k - 1)}",
                    "dilation",
                )
            if op >= max(s, d):
                raise SpecError(
                    "output_padding must be smaller than either stride or dilation, "
                    f"got {op} with stride {s} and dilation {d}",
                    "output_padding",
                )

    def _check_channels(self) -> None:
        self._set("groups", check_integer("groups", self.groups, 1, MAX_CHANNELS))
        for argument in ("in_channels", "out_channels"):
            channels = getattr(self, argument)
            if channels is None:
                continue
            channels = check_integer(argument, channels, 1, MAX_CHANNELS)
            self._set(argument, channels)
            if channels % self.groups:
                raise SpecError(
                    f"{argument} must be divisible by groups, got {channels} and {self.groups}",
                    "groups",
                )
        if type(self.bias) is not bool:
            raise SpecError(f"bias must be True or False, got {shown(self.bias)}", "bias")

    def _check_input(self) -> None:
        if self.input is None:
            return
        entries = entries_of(self.input)
        if entries is None or len(entries) != self.rank + 2:
            raise SpecError(
                f"input must be (batch, channels, {self.rank} spatial sizes), "
                f"got {shown(self.input)}",
                "input",
            )
        sizes = tuple(e if e is None else check_integer("input", e, 1, MAX_SIZE) for e in entries)
        channels = sizes[1]
        if channels is not None and self.in_channels is None:
            self._set("in_channels", channels)
            self._check_channels()
        if channels not in (None, self.in_channels):
            raise SpecError(
                f"input has {channels} channels, in_channels is {self.in_channels}", "input"
            )
        known = any(size is not None for size in (sizes[0], *sizes[2:]))
        self._set("input", (sizes[0], self.in_channels, *sizes[2:]) if known else None)
        self._check_output()

    def _check_output(self) -> None:
        for axis, (size, output) in enumerate(zip(self.spatial, self.output_spatial, strict=True)):
            if output is not None and not 1 <= output <= MAX_SIZE:
                raise SpecError(
                    f"input size {size} on spatial axis {axis} gives output size {output}, "
                    f"it must be from 1 to {MAX_SIZE}",
                    "input",
                )
        for channels, spatial in (
            (self.in_channels, self.spatial),
            (self.out_channels, self.output_spatial),
        ):
            elements = math.prod(size or 1 for size in (self.batch, channels, *spatial))
            if elements > MAX_ELEMENTS:
                said = f"input asks for a tensor of {elements} elements, more than {MAX_ELEMENTS}"
                raise SpecError(said, "input")

    def _check_rungs(self) -> None:
        rungs = entries_of(self.rungs)
        if rungs is None or len(rungs) > MOST_RUNGS:
            raise SpecError(
                f"rungs must be up to {MOST_RUNGS} inputs (batch, channels, sizes), "
                f"got {shown(self.rungs)}",
                "rungs",
            )
        if rungs and self.autotune != "none":
            raise SpecError(f"autotune {self.autotune} goes with no rungs", "autotune")
        self._set("rungs", tuple(map(self._rung, rungs)))
        spatial = [rung[2:] for rung in self.rungs]
        if len(set(spatial)) < len(spatial):
            raise SpecError(f"rungs must differ in their spatial sizes, got {self.rungs}", "rungs")

    def _rung(self, rung: Any) -> tuple[int | None, ...]:
        """Return a checked rung; one is an input of the layer, and more of it is known."""
        try:
            sized = dataclasses.replace(self, input=rung, rungs=())
        except SpecError as error:
            if error.argument != "input":
                raise
            raise SpecError(f"rungs: {error}", "rungs") from None
        found: tuple[int | None, ...] = sized.input or ()
        own = self.input or (None,) * len(found)
        if not found or None in (found[0], *found[2:]):
            raise SpecError(f"rungs: every size must be known, got {shown(rung)}", "rungs")
        if None not in own[2:]:
            raise SpecError("rungs need an input whose spatial sizes are open", "rungs")
        if any(size not in (None, other) for size, other in zip(own, found, strict=True)):
            raise SpecError(f"rungs: {shown(rung)} is no input {self.input}", "rungs")
        return found

    def _check_own(self) -> None:
        self._choose("dtype", tuple(row.name for row in DTYPES))
        if self.precision is None:
            self._set("precision", "tf32" if self.dtype == "float32" else None)
        else:
            self._choose("precision", tuple(row.name for row in PRECISIONS))
            if self.dtype != "float32":
                raise SpecError(
                    f"precision is for dtype float32 only, dtype is {self.dtype}", "precision"
                )
        self._choose("layout", (*LAYOUTS, ANY))
        if self.layout != "channels_first" and self.rank == 1:
            raise SpecError(f"layout {self.layout} needs rank 2 or 3, rank is 1", "layout")
        if self.grid is not None:
            self._set("grid", check_integer("grid", self.grid, 1, 3))
        if self.target is not None:
            self._set("target", check_target(self.target))
        self._choose("autotune", AUTOTUNES)
        if self.layout == ANY and self.autotune != "none":
            raise SpecError(
                f"autotune {self.autotune} needs one layout, layout is {ANY}", "autotune"
            )
        for place in ("before", "after"):
            stages = entries_of(getattr(self, place))
            if stages is None or not all(issubclass(type(each), Stage) for each in stages):
                got = shown(getattr(self, place))
                raise SpecError(f"{place} must be a tuple of Stage, got {got}", place)
            checked = (make_stage(each.name, tuple(each.values), {}) for each in stages)
            self._set(place, tuple(checked))
        if len(self.before) + len(self.after) > MAX_STAGES:
            raise SpecError(
                f"a pipeline has at most {MAX_STAGES} stages, "
                f"got {len(self.before)} before the layer and {len(self.after)} after it",
                "after" if self.after else "before",
            )

    @property
    def each_layout(self) -> tuple[ConvTransposeSpec, ...]:
        """The spec in each of its layouts, without rungs."""
        layouts = LAYOUTS if self.layout == ANY else (self.layout,)
        return tuple(dataclasses.replace(self, layout=each, rungs=()) for each in layouts)

    @property
    def parts(self) -> tuple[ConvTransposeSpec, ...]:
        """What a kernel of its own computes: each layout, then that of each rung."""
        rungs = (dataclasses.replace(self, input=rung, rungs=()) for rung in self.rungs)
        return *self.each_layout, *(each for rung in rungs for each in rung.each_layout)

    @property
    def batch(self) -> int | None:
        """Images per call, None if known only at run time."""
        return self.input[0] if self.input else None

    @property
    def spatial(self) -> tuple[int | None, ...]:
        """Input extent of each axis, None if known only at run time."""
        return self.input[2:] if self.input else (None,) * self.rank

    @property
    def output_spatial(self) -> tuple[int | None, ...]:
        """Output extent of each axis, None if the input extent is known only at run time."""
        growth = self.output_growth
        return tuple(
            None if size is None else (size - 1) * stride + extra
            for size, stride, extra in zip(self.spatial, self.stride, growth, strict=True)
        )

    @property
    def output_growth(self) -> tuple[int, ...]:
        """`output - (input - 1)*stride` of each axis: a constant, whatever the input extent."""
        axes = zip(self.kernel_size, self.padding, self.output_padding, self.dilation, strict=True)
        return tuple(d * (k - 1) - 2 * p + op + 1 for k, p, op, d in axes)

    @property
    def element(self) -> DType:
        """The row of the dtype."""
        return find_dtype(self.dtype)

    @property
    def product(self) -> Precision | None:
        """The row of the precision; None for the dtypes without a choice of precision."""
        return find_precision(self.precision) if self.precision else None

    @classmethod
    def from_module(cls, module: Any, input_size: tuple[int | None, ...] | None = None) -> Any:
        """Return the spec of a `torch.nn.ConvTransposeNd` instance.

        Args:
            module: an `nn.ConvTranspose1d`, `2d` or `3d`, read through its attributes.
            input_size: the spec's `input`; None leaves every size to run time.

        Raises:
            SpecError: `module` is none of these, or uses a feature that convgen does not support.
        """
        return cls(**read_module(module), input=input_size)

    def __str__(self) -> str:
        return format_spec(self)
