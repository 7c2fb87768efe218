"""The gather family: implicit GEMM, output-stationary, for every transposed convolution.

Stages 3 and 5 of the family. Input: a `KernelPlan` and its `Sizes`; output: the `GatherContext` of
the template. A program computes BLOCK_M outputs of one phase times BLOCK_N channels; one flat loop
over (channel block, tap) gathers the inputs that reach them (phases.py has the algebra):

    y[n, co, s*m + residue] = sum over taps j and channels ci of
                              x[n, ci, m + shift - j*step] * w[first_tap + j*tap_step, co, ci]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy
from sympy import Expr, Integer, Symbol

from .index import Access, AtLeast, Coordinate, FloorDiv, access, symbol, unflatten
from .phases import AxisPhases
from .plan import KernelPlan
from .printer import Scribe, assignment, bare
from .sizes import AXES, Sizes

# A step function with more steps than this prints as a division.
MAX_COMPARISONS = 8


@dataclass(frozen=True, slots=True)
class AccessText:
    """A tile's place in a tensor, as lines of the kernel.

    Attributes:
        base: the line of `<name>_tile`, the pointer outside the loop; None if it is the tensor's.
        lanes: the lines of `<name>_lanes`, the offsets inside the tile.
        step_lines: the lines of `<name>_step` and `<name>_mask`, where the access has them.
        stepped: a step of the loop adds `<name>_step`.
        masked: `<name>_mask` says which elements exist; else all do.
    """

    base: str | None
    lanes: tuple[str, ...]
    step_lines: tuple[str, ...]
    stepped: bool
    masked: bool


@dataclass(frozen=True, slots=True)
class Loop:
    """The loop over (channel block, tap): its variable and its trip count, as text."""

    variable: str
    trips: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherContext:
    """The names of `kernels/gather.py.jinja`: text, flags and tuples of text only.

    Attributes:
        program_lines: the program's coordinates, from its ids.
        phase_lines: what the phase fixes: taps, shifts and residues.
        position_lines: the outputs of the tile, along the image.
        step_lines: tap and channel block of a step; empty if there is but one step.
        loop: the loop over the steps, None for one step, which needs no loop.
        x, w, y, bias: the accesses.
        x_transposed: the x tile is loaded as [channels, positions], else [positions, channels].
    """

    program_lines: tuple[str, ...]
    phase_lines: tuple[str, ...]
    position_lines: tuple[str, ...]
    step_lines: tuple[str, ...]
    loop: Loop | None
    x: AccessText
    w: AccessText
    y: AccessText
    bias: AccessText
    x_transposed: bool


@dataclass(slots=True)
class _Kernel:
    """The kernel as it is being written: what its earlier lines have defined."""

    plan: KernelPlan
    sizes: Sizes
    scribe: Scribe
    program: dict[str, Expr] = field(default_factory=dict)
    loop: set[Symbol] = field(default_factory=set)

    @property
    def axes(self) -> list[tuple[int, str, AxisPhases]]:
        letters = AXES[self.plan.spec.rank]
        return list(zip(range(3), letters, self.plan.phases, strict=False))

    def coordinate(self, name: str) -> Expr:
        """Return a coordinate of the program; one that is on no grid axis has one value, 0."""
        return self.program.get(name, Integer(0))

    def access(
        self, name: str, coordinates: list[Coordinate], order: tuple[str, ...]
    ) -> AccessText:
        """Print the access at `coordinates`, its scalar part split at the loop."""
        scribe = self.scribe
        tensor: Access = access(scribe.space, coordinates, frozenset(scribe.kinds))
        scalar = scribe.space.reduce(tensor.scalar)
        terms = sympy.Add.make_args(scalar)
        in_loop = sympy.Add(*(term for term in terms if term.free_symbols & self.loop))
        base, step = scribe.scalar(scalar - in_loop), scribe.scalar(in_loop)
        lines = [assignment(f"{name}_step", bare(step), 8)] if step else []
        mask = scribe.mask_lines(f"{name}_mask", tensor.masks, order)
        return AccessText(
            base=assignment(f"{name}_tile", f"{name}_ptr + {base}", 4) if base else None,
            lanes=tuple(scribe.lane_lines(name, tensor.lanes, order)),
            step_lines=(*lines, *mask),
            stepped=step is not None,
            masked=bool(mask),
        )


def gather_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GatherContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    kernel = _Kernel(plan, sizes, scribe)
    lines: dict[str, list[str]] = {"program": [], "phase": [], "position": [], "step": []}
    _program(kernel, lines["program"])
    co = _output_channels(kernel, lines["program"])
    firsts, residues, taps, reached = _phase(kernel, lines["phase"])
    image, positions = _positions(kernel, lines["position"])
    loop, indices, ci = _steps(kernel, lines["step"], taps, reached)
    shifts, kernel_index = _taps(kernel, lines["step"], firsts, indices)

    last = plan.spec.layout == "channels_last"
    group = kernel.coordinate("group")
    inputs = [position + shift for position, shift in zip(positions, shifts, strict=True)]
    outputs = [
        axis.stride * position + residue
        for (_, _, axis), position, residue in zip(kernel.axes, positions, residues, strict=True)
    ]
    x_extents = [sizes.input(axis) for axis, _, _ in kernel.axes]
    y_extents = [sizes.output(axis) for axis, _, _ in kernel.axes]
    x = _tensor(kernel, image, (sizes.named("C_IN"), group, sizes.group_in, ci), inputs, x_extents)
    y = _tensor(
        kernel, image, (sizes.named("C_OUT"), group, sizes.group_out, co), outputs, y_extents
    )
    w = _weight(kernel, kernel_index, group, ci, co)
    x_transposed = not last and not _triton_sees_rows(kernel)
    bias = [
        Coordinate(group, Integer(plan.spec.groups), sizes.group_out),
        Coordinate(co, sizes.group_out, Integer(1)),
    ]
    return GatherContext(
        program_lines=tuple(lines["program"]),
        phase_lines=tuple(lines["phase"]),
        position_lines=tuple(lines["position"]),
        step_lines=tuple(lines["step"]),
        loop=loop,
        x=kernel.access("x", x, ("ci", "position") if x_transposed else ("position", "ci")),
        w=kernel.access("w", w, ("ci", "co")),
        y=kernel.access("y", y, ("position", "co") if last else ("co", "position")),
        bias=kernel.access("bias", bias, ("co",)),
        x_transposed=x_transposed,
    )


def _triton_sees_rows(kernel: _Kernel) -> bool:
    """Whether Triton can tell that neighbouring positions are neighbours in memory.

    Its axis analysis loses a run through `//` and `%` by an odd or unknown extent. It then takes
    the last dimension of a tile to be the contiguous one, so that positions must be that one. A
    [positions, channels] tile is the faster one where it is seen through: it is the left operand
    of the product as it is (H100, Triton 3.6, 2026-11: case 57 of KernelBench 4.4 against 5.8 ms).
    """
    spec, sizes = kernel.plan.spec, kernel.sizes
    if spec.rank == 1 and not kernel.plan.fold_batch:
        return True
    extent = kernel.scribe.space.number(sizes.phase(spec.rank - 1))
    return extent is not None and extent % 2 == 0


def _program(kernel: _Kernel, lines: list[str]) -> None:
    """Define the program's coordinates; one that takes a single value is 0 and needs no line."""
    scribe = kernel.scribe
    for number, coordinates in enumerate(kernel.plan.grid):
        if len(coordinates) == 1:
            only = coordinates[0]
            lines.append(f"{only.name} = tl.program_id({number})")
            kernel.program[only.name] = scribe.name(only.name, 0, only.extent - 1)
            continue
        flat = f"program_{number}" if len(kernel.plan.grid) > 1 else "program"
        lines.append(f"{flat} = tl.program_id({number})")
        extents = [coordinate.extent for coordinate in coordinates]
        count = math.prod(extents, start=Integer(1))
        digits = unflatten(scribe.name(flat, 0, count - 1), extents)
        for coordinate, digit in zip(coordinates, digits, strict=True):
            bounds = (0, coordinate.extent - 1)
            kernel.program[coordinate.name] = scribe.define(lines, coordinate.name, digit, bounds)


def _output_channels(kernel: _Kernel, lines: list[str]) -> Expr:
    """Define the tile's output channels in their group."""
    sizes = kernel.sizes
    whole = sizes.is_multiple(sizes.group_out, "BLOCK_N")
    high = sizes.group_out - (sizes.named("BLOCK_N") if whole else 1)
    start = kernel.coordinate("co_tile") * sizes.named("BLOCK_N")
    start = kernel.scribe.define(lines, "co_start", start, (0, high))
    return start + _lane(kernel, "co", "BLOCK_N")


def _lane(kernel: _Kernel, name: str, block: str) -> Symbol:
    """Return a lane that runs over a block."""
    kernel.scribe.used.add(kernel.sizes.named(block))
    return kernel.scribe.name(name, 0, kernel.sizes.named(block) - 1, name)


def _phase(kernel: _Kernel, lines: list[str]) -> tuple[list[Expr], list[Expr], list[Expr], Expr]:
    """Define what the program's phase fixes.

    Returns first shift, residue and number of taps of each axis, and 1 or 0: whether any tap
    reaches the phase. The numbers of taps divide steps, so that no gap may make one of them 0.
    """
    firsts, residues, taps, reached = [], [], [], Integer(1)
    define = kernel.scribe.define
    for number, letter, axis in kernel.axes:
        tap, gap = kernel.coordinate(f"phase_{letter}"), kernel.coordinate(f"gap_{letter}")
        offset = axis.dilation * tap + gap
        bounds = (axis.first(axis.last_offset), axis.first(0))
        start = kernel.scribe.space.reduce(_first(axis, offset))
        first = define(lines, f"first_{letter}", start, bounds)
        affine = not start.atoms(AtLeast, FloorDiv)
        residue = axis.stride * (start if affine else first) + offset - axis.padding
        firsts.append(first)
        residues.append(define(lines, f"residue_{letter}", residue, (0, axis.stride - 1)))
        count = kernel.sizes.taps(number)
        if count is None:
            count = axis.most_taps - AtLeast(tap, Integer(axis.full_phases))
            count = define(lines, f"taps_{letter}", count, (axis.least_taps, axis.most_taps))
        taps.append(count)
        if axis.gaps > 1:
            hit = 1 - AtLeast(gap, Integer(1))
            reached = reached * define(lines, f"reached_{letter}", hit, (0, 1))
    return firsts, residues, taps, reached


def _first(axis: AxisPhases, offset: Expr) -> Expr:
    """`first` of phases.py: ceil((padding - offset) / stride), as a sum of comparisons."""
    highest, lowest = axis.first(0), axis.first(axis.last_offset)
    if highest - lowest > MAX_COMPARISONS:  # far-spread taps: one scalar division a program
        lift = max(0, -lowest)
        top = axis.padding + axis.stride * (1 + lift) - 1 - offset
        return FloorDiv(top, Integer(axis.stride)) - lift
    thresholds = [axis.padding - axis.stride * (value - 1) for value in range(highest, lowest, -1)]
    return highest - sum((AtLeast(offset, Integer(t)) for t in thresholds), start=Integer(0))


def _positions(kernel: _Kernel, lines: list[str]) -> tuple[Expr, list[Expr]]:
    """Define the image and the position along each axis of the tile's outputs."""
    scribe, sizes, folded = kernel.scribe, kernel.sizes, kernel.plan.fold_batch
    block, total, batch = sizes.named("BLOCK_M"), sizes.positions, sizes.named("BATCH")
    start, image = kernel.coordinate("tile") * block, kernel.coordinate("image")
    extents = [sizes.phase(axis) for axis, _, _ in kernel.axes]
    names = [f"q_{letter}" for letter in AXES[kernel.plan.spec.rank]]
    if folded:
        start = scribe.define(lines, "start", start, (0, batch * total - 1))
        image = scribe.define(lines, "image", FloorDiv(start, total), (0, batch - 1))
        start = start - image * total
        extents.insert(0, batch)
        names.insert(0, "next_image")
    exact = not folded and sizes.is_multiple(total, "BLOCK_M")
    overflow = Integer(0) if exact else block
    scribe.used.add(block)
    lines.append(f"position = {_start_text(scribe, start, total + overflow)}tl.arange(0, BLOCK_M)")
    position = scribe.name("position", 0, total - 1 + overflow, "position")
    digits: list[Expr] = []
    for place, digit in enumerate(unflatten(position, extents[::-1])):
        slot = len(extents) - 1 - place
        high = extents[slot] - 1 + (overflow if slot == 0 else 0)
        digits.insert(0, scribe.define(lines, names[slot], digit, (0, high)))
    return (image + digits[0], digits[1:]) if folded else (image, digits)


def _start_text(scribe: Scribe, start: Expr, extent: Expr) -> str:
    """Print the scalar a tile's positions start from, int64 if a known extent needs it."""
    if start == 0:
        return ""
    known = scribe.space.number(extent) is not None
    wide = (
        start.free_symbols - set(scribe.base.sizes)
        if known and not scribe.space.fits_int32(extent)
        else ()
    )
    return f"{scribe.text(start, frozenset(wide))} + "


def _steps(
    kernel: _Kernel, lines: list[str], taps: list[Expr], reached: Expr
) -> tuple[Loop | None, list[Expr], Expr]:
    """Define tap indices and input channels of a step of the flat loop, taps fastest."""
    scribe, sizes = kernel.scribe, kernel.sizes
    blocks = sizes.named("channel_blocks")
    names, radices, lasts = [], [], []
    for (_, letter, axis), count in list(zip(kernel.axes, taps, strict=True))[::-1]:
        if axis.most_taps > 1:
            names.append(f"k{letter}" if axis.tap_step == 1 else f"tap_{letter}")
            # As a number: the interpreter's loop variable is an int, which knows no `% constexpr`.
            known = scribe.space.number(count)
            radices.append(count if known is None else Integer(known))
            lasts.append(Integer(axis.most_taps - 1))
    if scribe.space.number(blocks) != 1:
        names.append("block")
        radices.append(blocks)
        lasts.append(blocks - 1)
    else:
        blocks = Integer(1)
    trips = math.prod(taps, start=reached) * blocks
    values: dict[str, Expr] = {}
    loop = None
    if scribe.space.number(trips) != 1:
        # Without a name to take apart, a step only says that the phase's one tap exists.
        variable = "step" if len(names) > 1 else "".join(names) or "_"
        loop = Loop(variable, scribe.text(trips))
        step = scribe.name(loop.variable, 0, trips - 1)
        for name, last, digit in zip(names, lasts, unflatten(step, radices), strict=True):
            values[name] = scribe.define(lines, name, digit, (0, last))
        kernel.loop |= {step, symbol("channel"), *map(symbol, names)}
    indices = [
        values.get(f"k{letter}" if axis.tap_step == 1 else f"tap_{letter}", Integer(0))
        for _, letter, axis in kernel.axes
    ]
    whole = sizes.is_multiple(sizes.group_in, "BLOCK_K")
    high = sizes.group_in - (sizes.named("BLOCK_K") if whole else 1)
    channel = values.get("block", Integer(0)) * sizes.named("BLOCK_K")
    channel = scribe.define(lines, "channel", channel, (0, high))
    return loop, indices, channel + _lane(kernel, "ci", "BLOCK_K")


def _taps(
    kernel: _Kernel, lines: list[str], firsts: list[Expr], indices: list[Expr]
) -> tuple[list[Expr], Expr]:
    """Define the input shift of each axis; return them with the flat kernel index."""
    shifts, flat = [], Integer(0)
    define = kernel.scribe.define
    for (number, letter, axis), first, index in zip(kernel.axes, firsts, indices, strict=True):
        shift = first - index * axis.input_step
        shifts.append(define(lines, f"shift_{letter}", shift, axis.shifts))
        tap = kernel.coordinate(f"phase_{letter}") + index * axis.tap_step
        tap = define(lines, f"k{letter}", tap, (0, axis.kernel - 1))
        if index.free_symbols:
            kernel.loop |= {symbol(f"shift_{letter}"), symbol(f"k{letter}")}
        flat = flat * kernel.sizes.kernel(number) + tap
    return shifts, flat


def _tensor(
    kernel: _Kernel,
    image: Expr,
    channel: tuple[Expr, Expr, Expr, Expr],
    indices: list[Expr],
    extents: list[Expr],
) -> list[Coordinate]:
    """Return coordinates in input or output: image; channels, group, its channels, index; axes."""
    channels, group, group_channels, index = channel
    groups = Integer(kernel.plan.spec.groups)
    channels_last = kernel.plan.spec.layout == "channels_last"
    strides = kernel.sizes.strides(extents, channels, channels_last)
    return [
        Coordinate(image, kernel.sizes.named("BATCH"), strides[0]),
        Coordinate(group, groups, group_channels * strides[1]),
        Coordinate(index, group_channels, strides[1]),
        *map(Coordinate, indices, extents, strides[2:]),
    ]


def _weight(
    kernel: _Kernel, kernel_index: Expr, group: Expr, ci: Expr, co: Expr
) -> list[Coordinate]:
    """Return coordinates in the packed weight [taps, C_OUT, GROUP_C_IN]."""
    sizes = kernel.sizes
    groups = Integer(kernel.plan.spec.groups)
    taps = sizes.product(sizes.kernel(axis) for axis, _, _ in kernel.axes)
    group_stride = sizes.group_out * sizes.group_in
    return [
        Coordinate(kernel_index, taps, sizes.named("C_OUT") * sizes.group_in),
        Coordinate(group, groups, group_stride),
        Coordinate(co, sizes.group_out, sizes.group_in),
        Coordinate(ci, sizes.group_in, Integer(1)),
    ]
