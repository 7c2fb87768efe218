"""The taps of an emitted kernel: a program's phase, and the flat loop over (channel block, tap).

Stages 3 and 5, common to the families. Input: a `Kernel`; output: lines of the kernel, and the
sympy expressions of taps, shifts and channels (phases.py has the algebra).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sympy import Expr, Integer

from ..geometry.phases import AxisPhases
from ..symbolic.access import unflatten
from ..symbolic.scribe import Scribe
from ..symbolic.space import AtLeast, FloorDiv, symbol
from .builder import Kernel, hidden_zero
from .texts import Loop

# Steps without matrix units that are written out, so that the loads of all are in flight: Triton
# pipelines no others.
MOST_UNROLLED = 9
# A step function with more steps than this prints as a division.
MAX_COMPARISONS = 8


@dataclass(frozen=True, slots=True)
class Phase:
    """What a program's phase fixes.

    Attributes:
        firsts, residues, taps: first shift, residue and number of taps of each axis.
        reached: 1 or 0: whether any tap reaches the phase.
    """

    firsts: list[Expr]
    residues: list[Expr]
    taps: list[Expr]
    reached: Expr


def define_phase(kernel: Kernel, lines: list[str]) -> Phase:
    """Define what the phase fixes; numbers of taps divide steps, so that no gap may make one 0."""
    firsts: list[Expr] = []
    residues: list[Expr] = []
    taps: list[Expr] = []
    reached: Expr = Integer(1)
    define = kernel.scribe.define
    zero = _zero_of_axes(kernel, lines)
    for number, letter, axis in kernel.axes:
        tap, gap = kernel.coordinate(f"phase_{letter}"), kernel.coordinate(f"gap_{letter}")
        offset = axis.dilation * tap + gap
        bounds = (axis.first(axis.last_offset), axis.first(0))
        start = kernel.scribe.space.reduce(_first(axis, offset))
        first = define(lines, f"first_{letter}", start + zero, bounds)
        plain = axis.stride == 1 or not (zero or start.atoms(AtLeast, FloorDiv))
        residue = axis.stride * (start if plain else first) + offset - axis.padding
        firsts.append(first)
        residues.append(define(lines, f"residue_{letter}", residue, (0, axis.stride - 1)))
        count = kernel.sizes.taps(number)
        if count is None:
            most = kernel.sizes.named(f"TAPS_{letter.upper()}")
            count = most - AtLeast(tap, Integer(axis.full_phases))
            count = define(lines, f"taps_{letter}", count, (axis.least_taps, axis.most_taps))
        taps.append(count)
        if axis.gaps > 1:
            hit = 1 - AtLeast(gap, Integer(1))
            reached = reached * define(lines, f"reached_{letter}", hit, (0, 1))
    return Phase(firsts, residues, taps, reached)


def _zero_of_axes(kernel: Kernel, lines: list[str]) -> Expr:
    """Return a 0 that LLVM cannot tell, for index math that it would get wrong; else 0.

    LLVM knows how small the numbers are that the axes start from, puts those of several axes into
    a vector and narrows it. Where the axes differ, so do the operations on them: up to Triton 3.7
    (and right since 3.8) it gives the flags of one to another, so that a difference below 0 is no
    number; and on sm_90 ptxas 12.8 and 12.9 lose the constant of a pair's half whose other half is
    never read. Numbers without known bounds meet neither. Found by the fuzzer: 2 of 2000 specs.
    """
    axes = [axis for number, _, axis in kernel.axes if not kernel.sizes.is_grouped(number)]
    live = {(a.stride, a.padding, a.dilation) for a in axes if a.stride > 1 or a.kernel > 1}
    odd = any(stride > 1 or dilation & (dilation - 1) for stride, _, dilation in live)
    if len(live) < 2 or not odd:
        return Integer(0)
    return hidden_zero(kernel, lines)


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
class Steps:
    """The flat loop: None if there is but one step; tap of each axis, first input channel."""

    loop: Loop | None
    taps: list[Expr]
    channel: Expr


def define_steps(kernel: Kernel, lines: list[str], phase: Phase, depthwise: bool = False) -> Steps:
    """Define taps and first input channel of a step of the flat loop, taps fastest.

    With `depthwise` a channel is all of its block, and a short loop is written out.
    """
    scribe, sizes = kernel.scribe, kernel.sizes
    blocks = Integer(1) if depthwise else sizes.named("channel_blocks")
    names, radices, lasts = [], [], []
    for (number, letter, axis), count in list(zip(kernel.axes, phase.taps, strict=True))[::-1]:
        if axis.most_taps > 1:
            names.append(kernel.tap_name(number, letter, axis))
            radices.append(count)
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
        short = (scribe.space.number(trips) or MOST_UNROLLED + 1) <= MOST_UNROLLED
        over = "tl.static_range" if depthwise and short else "range"
        loop = Loop(variable, f"{over}({scribe.text(trips)})")
        step = scribe.name(loop.variable, 0, trips - 1)
        digits = unflatten(step, radices)
        for number, (name, last, digit) in enumerate(zip(names, lasts, digits, strict=True)):
            if number == 0 and len(names) > 1:
                lines.append(f"{name} = {_first_digit(scribe, step, radices[0])}")
                values[name] = scribe.name(name, 0, last)
            else:
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


def _first_digit(scribe: Scribe, step: Expr, radix: Expr) -> str:
    """Print the step's fastest digit; the interpreter's loop variable is a Python int."""
    text = scribe.text(radix)
    if scribe.space.number(radix) is None:
        return f"{step} % {text}"
    return f"{step} % int({text})  # int(): Triton's interpreter has no int % constexpr"


def define_taps(
    kernel: Kernel, lines: list[str], phase: Phase, steps: Steps
) -> tuple[list[Expr], Expr]:
    """Define the input shift of each axis; return them with the flat index of the tap."""
    shifts: list[Expr] = []
    flat: Expr = Integer(0)
    define = kernel.scribe.define
    for (number, letter, axis), first, index in zip(
        kernel.axes, phase.firsts, steps.taps, strict=True
    ):
        plain = axis.stride == axis.dilation == 1 and not kernel.sizes.is_grouped(number)
        if plain and first == axis.kernel - 1 > 0:  # as of a gradient: the taps in reverse
            first = kernel.sizes.kernel(number) - 1
        shift = first - index * axis.input_step
        shifts.append(define(lines, f"shift_{letter}", shift, axis.shifts))
        tap = kernel.coordinate(f"phase_{letter}") + index * axis.tap_step
        tap = define(lines, f"k{letter}", tap, (0, axis.kernel - 1))
        if index.free_symbols:
            kernel.loop |= {symbol(f"shift_{letter}"), symbol(f"k{letter}")}
        flat = flat * kernel.sizes.kernel(number) + tap
    return shifts, flat
