"""Parts of the families that are an implicit GEMM, output-stationary.

Stages 3 and 5. Input: a `KernelPlan` and its `Sizes`; output: the pieces of a `GemmContext`. A
program computes BLOCK_M positions of one phase times BLOCK_N channels; one flat loop over (channel
block, tap) gathers the inputs that reach them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy
from sympy import Expr, Integer, Symbol

from .index import Access, AtLeast, Coordinate, FloorDiv, Modulo, access, symbol, unflatten
from .phases import AxisPhases
from .plan import KernelPlan
from .printer import Scribe, assignment, bare
from .sizes import AXES, Sizes

# A step function with more steps than this prints as a division.
MAX_COMPARISONS = 8
ONE = Integer(1)


@dataclass(frozen=True, slots=True)
class AccessText:
    """A tile's place in a tensor, as lines of the kernel.

    Attributes:
        base: the line of `<name>_tile`, the pointer outside the loop; None if it is the tensor's.
        lanes: the lines of `<name>_lanes`, the offsets inside the tile.
        step_lines: the lines of `<name>_step` and `<name>_mask`, where the access has them.
        stepped: a step of the loop adds `<name>_step`.
        masked: `<name>_mask` says which elements exist; else all do.
        pointer: the name of the pointer that the lanes are added to.
    """

    base: str | None
    lanes: tuple[str, ...]
    step_lines: tuple[str, ...]
    stepped: bool
    masked: bool
    pointer: str


@dataclass(frozen=True, slots=True)
class Loop:
    """The loop over (channel block, tap): its variable and its trip count, as text."""

    variable: str
    trips: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmContext:
    """The names of `kernels/gemm.py.jinja`: text, flags and tuples of text only.

    Attributes:
        program_lines: the program's coordinates, from its ids.
        phase_lines: what the phase fixes: taps, shifts and residues.
        position_lines: the outputs of the tile, along the image.
        step_lines: tap and channel block of a step; empty if there is but one step.
        loop: the loop over the steps, None for one step, which needs no loop.
        lane_lines: the lanes over channels.
        x, w, y, bias: the accesses.
        operand_lines: lines that bring the x tile into the product's shape.
        x_operand: the x tile as left operand of the product, [positions, channels].
        acc_shape: extents of the product.
        bias_lanes: the bias of each of its columns.
        pointer_lines, y_pointers: where the elements go.
        output_lines: lines that bring the product into the output's shape, and its lanes there.
        result: the product as it is stored.
    """

    program_lines: tuple[str, ...]
    phase_lines: tuple[str, ...]
    position_lines: tuple[str, ...]
    step_lines: tuple[str, ...]
    loop: Loop | None
    lane_lines: tuple[str, ...]
    x: AccessText
    w: AccessText
    y: AccessText
    bias: AccessText
    operand_lines: tuple[str, ...]
    x_operand: str
    acc_shape: str
    bias_lanes: str
    pointer_lines: tuple[str, ...]
    y_pointers: str
    output_lines: tuple[str, ...]
    result: str


@dataclass(slots=True)
class Kernel:
    """The kernel as it is being written: what its earlier lines have defined."""

    plan: KernelPlan
    sizes: Sizes
    scribe: Scribe
    program: dict[str, Expr] = field(default_factory=dict)
    loop: set[Symbol] = field(default_factory=set)

    @property
    def axes(self) -> list[tuple[int, str, AxisPhases]]:
        """Number, letter and phases of each axis; a grouped one has stride 1, group by group."""
        phases = list(self.plan.phases)
        if self.plan.grouping is not None:
            phases[-1] = self.plan.grouping.groups
        return list(zip(range(3), AXES[self.plan.spec.rank], phases, strict=False))

    def tap_name(self, number: int, letter: str, axis: AxisPhases) -> str:
        """Return the name of an axis' tap: `kw` where it is the kernel's own index."""
        own = axis.tap_step == 1 and not self.sizes.is_grouped(number)
        return f"k{letter}" if own else f"tap_{letter}"

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
            pointer=f"{name}_tile" if base else f"{name}_ptr",
        )


def triton_sees_rows(kernel: Kernel) -> bool:
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


def define_program(kernel: Kernel, lines: list[str]) -> None:
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


def output_start(kernel: Kernel, lines: list[str]) -> Expr:
    """Define the tile's first output channel in its group."""
    sizes = kernel.sizes
    whole = sizes.is_multiple(sizes.group_out, "BLOCK_N")
    high = sizes.group_out - (sizes.named("BLOCK_N") if whole else 1)
    start = kernel.coordinate("co_tile") * sizes.named("BLOCK_N")
    return kernel.scribe.define(lines, "co_start", start, (0, high))


def define_lane(kernel: Kernel, name: str, block: str, width: Expr = ONE) -> Symbol:
    """Return a lane that runs over a block, `width` times for each of its channels."""
    extent = kernel.sizes.named(block) * width
    kernel.scribe.used |= extent.free_symbols
    return kernel.scribe.name(name, 0, extent - 1, name)


@dataclass(frozen=True, slots=True)
class PhaseText:
    """What a program's phase fixes.

    Attributes:
        firsts, residues, taps: first shift, residue and number of taps of each axis.
        reached: 1 or 0: whether any tap reaches the phase.
    """

    firsts: list[Expr]
    residues: list[Expr]
    taps: list[Expr]
    reached: Expr


def define_phase(kernel: Kernel, lines: list[str]) -> PhaseText:
    """Define what the phase fixes; numbers of taps divide steps, so that no gap may make one 0."""
    firsts: list[Expr] = []
    residues: list[Expr] = []
    taps: list[Expr] = []
    reached: Expr = Integer(1)
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
    return PhaseText(firsts, residues, taps, reached)


def _first(axis: AxisPhases, offset: Expr) -> Expr:
    """`first` of phases.py: ceil((padding - offset) / stride), as a sum of comparisons."""
    highest, lowest = axis.first(0), axis.first(axis.last_offset)
    if highest - lowest > MAX_COMPARISONS:  # far-spread taps: one scalar division a program
        lift = max(0, -lowest)
        top = axis.padding + axis.stride * (1 + lift) - 1 - offset
        return FloorDiv(top, Integer(axis.stride)) - lift
    thresholds = [axis.padding - axis.stride * (value - 1) for value in range(highest, lowest, -1)]
    return highest - sum((AtLeast(offset, Integer(t)) for t in thresholds), start=Integer(0))


@dataclass(frozen=True, slots=True)
class TileStart:
    """Where a tile starts: its image, and its first position there."""

    image: Expr
    position: Expr


def define_start(kernel: Kernel, lines: list[str]) -> TileStart:
    """Define image and position the tile starts at; of several images, the first one."""
    start = kernel.coordinate("tile") * kernel.sizes.named("BLOCK_M")
    kernel.scribe.used.add(kernel.sizes.named("BLOCK_M"))
    if not kernel.plan.fold_batch:
        return TileStart(kernel.coordinate("image"), start)
    total, batch = kernel.sizes.positions, kernel.sizes.named("BATCH")
    start = kernel.scribe.define(lines, "start", start, (0, batch * total - 1))
    image = kernel.scribe.define(lines, "image", FloorDiv(start, total), (0, batch - 1))
    return TileStart(image, start - image * total)


@dataclass(frozen=True, slots=True)
class Positions:
    """The lanes of a tile: their image, their position along each axis, their place in it."""

    image: Expr
    axes: list[Expr]
    place: Expr


def define_positions(
    kernel: Kernel, lines: list[str], start: TileStart, width: Expr, suffix: str = ""
) -> Positions:
    """Define the lanes over BLOCK_M positions, `width` of them for each position.

    Names end in `suffix`.
    """
    scribe, sizes, folded = kernel.scribe, kernel.sizes, kernel.plan.fold_batch
    block, total, batch = sizes.named("BLOCK_M"), sizes.positions, sizes.named("BATCH")
    extents = [sizes.phase(axis) for axis, _, _ in kernel.axes]
    names = [f"q_{letter}{suffix}" for letter in AXES[kernel.plan.spec.rank]]
    if folded:
        extents.insert(0, batch)
        names.insert(0, f"next_image{suffix}")
    exact = not folded and sizes.is_multiple(total, "BLOCK_M")
    overflow = Integer(0) if exact else block
    kind, place, lanes = f"position{suffix}", Integer(0), "tl.arange(0, BLOCK_M)"
    if width != 1:
        scribe.used.add(width)
        lines.append(f"lane{suffix} = tl.arange(0, BLOCK_M * {width})")
        lane = scribe.name(f"lane{suffix}", 0, block * width - 1, kind)
        place = scribe.define(lines, f"place{suffix}", Modulo(lane, width), (0, width - 1))
        lanes = f"{lane} // {width}"
    begin = _start_text(scribe, start.position, total + overflow)
    lines.append(f"{kind} = {begin}{lanes}")
    position = scribe.name(kind, 0, total - 1 + overflow, kind)
    digits: list[Expr] = []
    for number, digit in enumerate(unflatten(position, extents[::-1])):
        slot = len(extents) - 1 - number
        high = extents[slot] - 1 + (overflow if slot == 0 else 0)
        digits.insert(0, scribe.define(lines, names[slot], digit, (0, high)))
    if folded:
        return Positions(start.image + digits[0], digits[1:], place)
    return Positions(start.image, digits, place)


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


@dataclass(frozen=True, slots=True)
class Steps:
    """The flat loop: None if there is but one step; tap of each axis, first input channel."""

    loop: Loop | None
    taps: list[Expr]
    channel: Expr


def define_steps(
    kernel: Kernel, lines: list[str], phase: PhaseText, blocks: Expr | None = None
) -> Steps:
    """Define taps and first input channel of a step of the flat loop, taps fastest.

    `blocks` is the number of channel blocks, if it is not that of the sizes.
    """
    scribe, sizes = kernel.scribe, kernel.sizes
    blocks = sizes.named("channel_blocks") if blocks is None else blocks
    names, radices, lasts = [], [], []
    for (number, letter, axis), count in list(zip(kernel.axes, phase.taps, strict=True))[::-1]:
        if axis.most_taps > 1:
            names.append(kernel.tap_name(number, letter, axis))
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
    trips = math.prod(phase.taps, start=phase.reached) * blocks
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
    taps = [
        values.get(kernel.tap_name(number, letter, axis), Integer(0))
        for number, letter, axis in kernel.axes
    ]
    whole = sizes.is_multiple(sizes.group_in, "BLOCK_K")
    high = sizes.group_in - (sizes.named("BLOCK_K") if whole else 1)
    channel = values.get("block", Integer(0)) * sizes.named("BLOCK_K")
    channel = scribe.define(lines, "channel", channel, (0, high))
    return Steps(loop, taps, channel)


def define_taps(
    kernel: Kernel, lines: list[str], phase: PhaseText, steps: Steps
) -> tuple[list[Expr], Expr]:
    """Define the input shift of each axis; return them with the flat index of the tap."""
    shifts: list[Expr] = []
    flat: Expr = Integer(0)
    define = kernel.scribe.define
    for (number, letter, axis), first, index in zip(
        kernel.axes, phase.firsts, steps.taps, strict=True
    ):
        shift = first - index * axis.input_step
        shifts.append(define(lines, f"shift_{letter}", shift, axis.shifts))
        tap = kernel.coordinate(f"phase_{letter}") + index * axis.tap_step
        tap = define(lines, f"k{letter}", tap, (0, axis.kernel - 1))
        if index.free_symbols:
            kernel.loop |= {symbol(f"shift_{letter}"), symbol(f"k{letter}")}
        flat = flat * kernel.sizes.kernel(number) + tap
    return shifts, flat


def define_flat_tap(kernel: Kernel, lines: dict[str, list[str]], tap: Expr) -> Expr:
    """Define the flat index of the tap, where that takes several axes; return it."""
    looped = bool(tap.free_symbols & kernel.loop)
    flat = kernel.scribe.define(lines["step" if looped else "phase"], "tap", tap, None)
    if looped and isinstance(flat, Symbol):
        kernel.loop.add(flat)
    return flat


def tensor(
    kernel: Kernel, image: Expr, channel: Expr, end: str, axes: list[list[Coordinate]]
) -> list[Coordinate]:
    """Return coordinates in input (`end` IN) or output (OUT): image, group, its channel, axes.

    Strides of the `axes` are in units of the axis' own stride.
    """
    sizes = kernel.sizes
    spatial = [
        sizes.input(axis) if end == "IN" else sizes.output(axis) for axis, _, _ in kernel.axes
    ]
    channels = sizes.named(f"C_{end}")
    per_group = sizes.group_in if end == "IN" else sizes.group_out
    channels_last = kernel.plan.spec.layout == "channels_last"
    strides = sizes.strides(spatial, channels, channels_last)
    groups = Integer(sizes.groups)
    return [
        Coordinate(image, sizes.named("BATCH"), strides[0]),
        Coordinate(kernel.coordinate("group"), groups, per_group * strides[1]),
        Coordinate(channel, per_group, strides[1]),
        *(
            Coordinate(part.index, part.extent, part.stride * stride)
            for parts, stride in zip(axes, strides[2:], strict=True)
            for part in parts
        ),
    ]


def bias_coordinates(kernel: Kernel, channel: Expr) -> list[Coordinate]:
    """Return coordinates in the bias."""
    sizes = kernel.sizes
    return [
        Coordinate(kernel.coordinate("group"), Integer(sizes.groups), sizes.group_out),
        Coordinate(channel, sizes.group_out, Integer(1)),
    ]


def weight_coordinates(
    kernel: Kernel, tap: Expr, row: tuple[Expr, Expr], column: tuple[Expr, Expr]
) -> list[Coordinate]:
    """Return coordinates in the packed weight: tap, group, row and column of its matrix.

    Rows and columns come with the extent they have in a group.
    """
    sizes = kernel.sizes
    groups = Integer(sizes.groups)
    taps = sizes.product(sizes.kernel(axis) for axis, _, _ in kernel.axes)
    (row_index, rows), (column_index, columns) = row, column
    # C_OUT has a name of its own: groups * GROUP_C_OUT would be the longer text.
    all_rows = rows * sizes.named("C_OUT") / sizes.group_out
    return [
        Coordinate(tap, taps, all_rows * columns),
        Coordinate(kernel.coordinate("group"), groups, rows * columns),
        Coordinate(row_index, rows, columns),
        Coordinate(column_index, columns, Integer(1)),
    ]


def channel_lanes(*names: str) -> tuple[str, ...]:
    """Return the lines of lanes over the blocks of input and output channels."""
    blocks = {"ci": "BLOCK_K", "co": "BLOCK_N"}
    return tuple(f"{name} = tl.arange(0, {blocks[name]})" for name in names)
