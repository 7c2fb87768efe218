"""Parts of an emitted kernel: program coordinates, the lanes of a tile, accesses to tensors.

Stages 3 and 5, common to the families. Input: a `KernelPlan` and its `Sizes`; output: lines of the
kernel, and the sympy expressions of what they define.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy
from sympy import Expr, Integer, Symbol

from ..geometry.phases import AxisPhases
from ..planning.plan import KernelPlan
from ..symbolic.access import Access, Coordinate, TensorIndex, access, masks_of, unflatten
from ..symbolic.lines import assignment, bare
from ..symbolic.scribe import LaneText, Scribe
from ..symbolic.sizes import AXES, Sizes
from ..symbolic.space import FloorDiv, Modulo
from .texts import AccessText, RowMask

ONE = Integer(1)


@dataclass(slots=True)
class Kernel:
    """The kernel being written, with what its earlier lines define.

    Attributes:
        plan: the kernel's plan.
        sizes: the plan's sizes, by name.
        scribe: writes the lines and keeps the ranges of all symbols.
        program: value of each name that the start of the kernel defines, such as a coordinate of
            the program.
        loop: symbols that change from one step of the loop to the next.
    """

    plan: KernelPlan
    sizes: Sizes
    scribe: Scribe
    program: dict[str, Expr] = field(default_factory=dict)
    loop: set[Symbol] = field(default_factory=set)

    @property
    def axes(self) -> list[tuple[int, str, AxisPhases]]:
        """Number, letter and phases of each spatial axis, as the tap loop sees it.

        A grouped axis has stride 1 (in groups). An axis in row blocks has a single tap, because
        the block unrolls its own.
        """
        phases = list(self.plan.phases)
        if self.plan.grouping is not None:
            phases[-1] = self.plan.grouping.groups
        if self.plan.block is not None:
            phases[-2] = self.plan.block.taps
        return list(zip(range(3), AXES[self.plan.spec.rank], phases, strict=False))

    def tap_name(self, number: int, letter: str, axis: AxisPhases) -> str:
        """Return the name of a tap of an axis: `kw` if it is the kernel index, else `tap_w`."""
        own = axis.tap_step == 1 and not self.sizes.is_grouped(number)
        return f"k{letter}" if own else f"tap_{letter}"

    def coordinate(self, name: str) -> Expr:
        """Return a coordinate of the program: 0 if it is not on the launch grid."""
        return self.program.get(name, Integer(0))

    def access(
        self, name: str, coordinates: list[Coordinate], order: tuple[str, ...], indent: int = 4
    ) -> AccessText:
        """Print the access at `coordinates`: a base before the loop, and what each step adds.

        Lines before the loop are indented by `indent` columns, lines of a step by 8.
        """
        return self.access_and_lanes(name, coordinates, order, indent)[0]

    def access_and_lanes(
        self, name: str, coordinates: list[Coordinate], order: tuple[str, ...], indent: int = 4
    ) -> tuple[AccessText, LaneText]:
        """Return `access` and the parts of its lanes, for callers that add them in another way."""
        scribe = self.scribe
        tensor: Access = access(scribe.space, coordinates, frozenset(scribe.kinds))
        scalar = scribe.space.reduce(tensor.scalar)
        terms = sympy.Add.make_args(scalar)
        in_loop = sympy.Add(*(term for term in terms if term.free_symbols & self.loop))
        base, step = scribe.scalar(scalar - in_loop), bare(scribe.scalar(in_loop) or "")
        named = step == "" or step.isidentifier()
        mask = tuple(scribe.mask_lines(name, tensor.masks, order))
        lanes = scribe.lane_text(name, tensor.lanes, order, indent)
        text = AccessText(
            base=assignment(f"{name}_tile", f"{name}_ptr + {base}", indent) if base else None,
            lanes=lanes.lines(),
            step_lines=() if named else (assignment(f"{name}_step", step, 8),),
            mask_lines=mask,
            step=step if named else f"{name}_step",
            masked=bool(mask),
            pointer=f"{name}_tile" if base else f"{name}_ptr",
            added=lanes.name,
        )
        return text, lanes

    def row_masks(
        self, name: str, rows: Iterable[TensorIndex], order: tuple[str, ...]
    ) -> tuple[tuple[str, ...], list[RowMask]]:
        """Return lines that the masks of all `rows` share, and the mask of each row.

        If no row has conditions of its own, there are no shared lines: each row has all conditions.
        """
        scribe, masks = self.scribe, []
        indices = list(rows)
        each = [masks_of(scribe.space, index.coordinates()) for index in indices]
        common = tuple(m for m in each[0] if all(m in others for others in each))
        lines: list[str] = []
        shared: dict[str, str] = {}
        if any(len(own) > len(common) for own in each):
            axes = indices[0].letters(AXES[self.plan.spec.rank], common)
            lines, shared = scribe.shared_lines(name, common, order, axes)
        before: list[str] = []
        for own in each:
            left = tuple(m for m in own if not (shared and m in common))
            fresh = scribe.mask_lines(name, left, order, shared)
            masks.append(RowMask(bool(fresh), tuple(fresh) if fresh != before else ()))
            before = fresh
        return tuple(lines), masks

    def offset(self, expr: Expr) -> str:
        """Print a scalar offset with its sign, to be appended to a pointer; empty for 0."""
        text = self.scribe.scalar(expr) or ""
        if text.startswith("-"):
            return f" - {text[1:]}"
        return text and f" + {text}"


def define_program(kernel: Kernel, lines: list[str]) -> None:
    """Define the program's coordinates on the launch grid."""
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
    """Define the tile's first output channel in its group.

    If channels are masked, LLVM must not know the bounds of `co_tile`. Otherwise it vectorizes
    `thread & 31` (a lane over input channels) with `co_tile << 6`, and applies both operations to
    both halves. The unused `thread << 31` inherits the no-wrap flag of the shift; the LLVM of
    Triton 3.6 then packs the halves into 64 bits, and the bits shifted out end up in the channel.
    Found by the fuzzer: 3 of 4000 specs.
    """
    sizes, tile = kernel.sizes, kernel.coordinate("co_tile")
    whole = sizes.is_multiple(sizes.group_out, "BLOCK_N")
    high = sizes.group_out - (sizes.named("BLOCK_N") if whole else 1)
    if not whole and tile != 0:
        tile += hidden_zero(kernel, lines)
    return kernel.scribe.define(lines, "co_start", tile * sizes.named("BLOCK_N"), (0, high))


def hidden_zero(kernel: Kernel, lines: list[str]) -> Expr:
    """Define, once, an opaque zero: LLVM cannot fold it, so a sum with it has unknown bounds."""
    if "zero" not in kernel.program:
        lines += [
            "# Always 0, which LLVM cannot prove: before Triton 3.8 it gets joint index math wrong",
            "# where it knows the bounds of what that starts from",
            "zero = tl.maximum(tl.program_id(0) - tl.num_programs(0) + 1, 0)",
        ]
        kernel.program["zero"] = kernel.scribe.name("zero", 0, 0)
    return kernel.coordinate("zero")


def define_lane(kernel: Kernel, name: str, block: str, width: Expr = ONE) -> Symbol:
    """Return a lane over `block` channels, with `width` elements for each channel."""
    extent = kernel.sizes.named(block) * width
    kernel.scribe.used |= extent.free_symbols
    return kernel.scribe.name(name, 0, extent - 1, name)


@dataclass(frozen=True, slots=True)
class TileStart:
    """Image of a tile's first position, and that position within the image."""

    image: Expr
    position: Expr


def define_start(kernel: Kernel, lines: list[str]) -> TileStart:
    """Define the image and position at which the tile starts."""
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
    """The lanes of a tile over positions.

    Attributes:
        image: image of each lane.
        axes: position of each lane along each spatial axis.
        place: index of each lane within its position, 0 if a position has one lane.
    """

    image: Expr
    axes: list[Expr]
    place: Expr


def define_positions(
    kernel: Kernel, lines: list[str], start: TileStart, width: Expr, suffix: str = ""
) -> Positions:
    """Define the lanes over BLOCK_M positions, `width` lanes for each position.

    The names in the kernel end in `suffix`.
    """
    scribe, sizes, folded = kernel.scribe, kernel.sizes, kernel.plan.fold_batch
    block, total, batch = sizes.named("BLOCK_M"), sizes.positions, sizes.named("BATCH")
    extents = [sizes.phase(axis) for axis, _, _ in kernel.axes]
    names = [
        f"{'block' if sizes.is_blocked(axis) else 'q'}_{letter}{suffix}"
        for axis, letter, _ in kernel.axes
    ]
    if folded:
        extents.insert(0, batch)
        names.insert(0, f"next_image{suffix}")
    exact = not folded and sizes.is_multiple(total, "BLOCK_M")
    overflow = Integer(0) if exact else block
    kind, place, lanes = f"position{suffix}", Integer(0), f"tl.arange(0, {block})"
    if width != 1:
        scribe.used.add(width)
        lines.append(f"lane{suffix} = tl.arange(0, {block} * {width})")
        lane = scribe.name(f"lane{suffix}", 0, block * width - 1, kind)
        place = scribe.define(lines, f"place{suffix}", Modulo(lane, width), (0, width - 1))
        lanes = f"{lane} // {width}"
    begin = _start_text(scribe, start.position, total + overflow)
    lines.append(assignment(kind, f"{begin}{lanes}", 4))
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
    """Print the scalar added to a tile's positions, in int64 if the known `extent` needs it."""
    if start == 0:
        return ""
    known = scribe.space.number(extent) is not None
    wide = (
        start.free_symbols - set(scribe.space.sizes)
        if known and not scribe.space.fits_int32(extent)
        else ()
    )
    return f"{scribe.text(start, frozenset(wide))} + "
