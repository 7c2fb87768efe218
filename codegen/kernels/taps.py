"""The taps of an emitted kernel: a program's phase, and the flat loop over (channel block, tap).

Stages 3 and 5, common to the families. Input: a `Kernel`; output: lines of the kernel, and the
sympy expressions of taps, shifts and channels (geometry/phases.py derives the formulas).
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

# Triton does not pipeline a loop without tl.dot. Up to this many steps are unrolled instead, so
# that the loads of all steps are in flight at once.
MOST_UNROLLED = 9
# `first` is a step function of the phase: a sum of comparisons up to this many, else a division.
MAX_COMPARISONS = 8


@dataclass(frozen=True, slots=True)
class Phase:
    """The values that a program's phase fixes.

    Attributes:
        firsts: shift of tap 0 along each axis, in inputs.
        residues: output index modulo the stride, along each axis.
        taps: number of taps along each axis.
        reached: 1 if any tap reaches the phase, 0 if it is a gap.
    """

    firsts: list[Expr]
    residues: list[Expr]
    taps: list[Expr]
    reached: Expr


def define_phase(kernel: Kernel, lines: list[str]) -> Phase:
    """Define the values that the phase fixes.

    A gap has `reached` 0 and not 0 taps, because the step is divided by the numbers of taps.
    """
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
    """Return an opaque zero if LLVM would miscompile the axes' index math without it, else 0.

    From the bounds of the axes' phases, LLVM vectorizes the math of several axes and narrows it.
    Axes with different parameters need different operations. Up to Triton 3.7, LLVM copies no-wrap
    flags from one to the other, and a negative difference becomes undefined. On sm_90, ptxas 12.8
    and 12.9 also lose a constant in one half of a pair whose other half is unused. Neither happens
    to values without known bounds. Found by the fuzzer: 2 of 2000 specs.
    """
    axes = [axis for number, _, axis in kernel.axes if not kernel.sizes.is_grouped(number)]
    live = {(a.stride, a.padding, a.dilation) for a in axes if a.stride > 1 or a.kernel > 1}
    odd = any(stride > 1 or dilation & (dilation - 1) for stride, _, dilation in live)
    if len(live) < 2 or not odd:
        return Integer(0)
    return hidden_zero(kernel, lines)


def _first(axis: AxisPhases, offset: Expr) -> Expr:
    """Return `first` of geometry/phases.py, ceil((padding - offset) / stride).

    It is a sum of comparisons, or a division if it takes many values.
    """
    highest, lowest = axis.first(0), axis.first(axis.last_offset)
    if highest - lowest > MAX_COMPARISONS:  # one scalar division per program costs less
        lift = max(0, -lowest)
        top = axis.padding + axis.stride * (1 + lift) - 1 - offset
        return FloorDiv(top, Integer(axis.stride)) - lift
    thresholds = [axis.padding - axis.stride * (value - 1) for value in range(highest, lowest, -1)]
    return highest - sum((AtLeast(offset, Integer(t)) for t in thresholds), start=Integer(0))


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a program.

    Attributes:
        loop: the flat loop over (channel block, tap); None if there is a single step.
        taps: a step's tap along each axis.
        channel: a step's first input channel, in its group.
    """

    loop: Loop | None
    taps: list[Expr]
    channel: Expr


def define_steps(kernel: Kernel, lines: list[str], phase: Phase, depthwise: bool = False) -> Steps:
    """Define the taps and the first input channel of a step; in the flat loop, taps vary fastest.

    A `depthwise` kernel loops over taps only, and unrolls the loop if it is short.
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
        # Without names, the loop only skips the single step if the phase is a gap.
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
    """Print `step % radix`, the fastest index of a step.

    A constexpr radix is cast, because the loop variable of Triton's interpreter is a Python int.
    """
    text = scribe.text(radix)
    if scribe.space.number(radix) is None:
        return f"{step} % {text}"
    return f"{step} % int({text})  # int(): Triton's interpreter has no int % constexpr"


def define_taps(
    kernel: Kernel, lines: list[str], phase: Phase, steps: Steps
) -> tuple[list[Expr], Expr]:
    """Define a step's input shift along each axis; return the shifts and the flat kernel index."""
    shifts: list[Expr] = []
    flat: Expr = Integer(0)
    define = kernel.scribe.define
    for (number, letter, axis), first, index in zip(
        kernel.axes, phase.firsts, steps.taps, strict=True
    ):
        plain = axis.stride == axis.dilation == 1 and not kernel.sizes.is_grouped(number)
        if plain and first == axis.kernel - 1 > 0:  # as in a gradient: prints as K - 1 - k
            first = kernel.sizes.kernel(number) - 1
        shift = first - index * axis.input_step
        shifts.append(define(lines, f"shift_{letter}", shift, axis.shifts))
        tap = kernel.coordinate(f"phase_{letter}") + index * axis.tap_step
        tap = define(lines, f"k{letter}", tap, (0, axis.kernel - 1))
        if index.free_symbols:
            kernel.loop |= {symbol(f"shift_{letter}"), symbol(f"k{letter}")}
        flat = flat * kernel.sizes.kernel(number) + tap
    return shifts, flat
