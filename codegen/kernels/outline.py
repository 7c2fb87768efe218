"""The outline of an emitted kernel: program, phase, positions and steps, in the order of its lines.

Stages 3 and 5, common to the families. Input: a `Kernel`; output: an `Outline`, which holds the
lines written so far, and the sympy expressions of what they define.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sympy import Expr

from .builder import (
    ONE,
    Kernel,
    Positions,
    TileStart,
    define_positions,
    define_program,
    define_start,
    output_start,
)
from .taps import Phase, Steps, define_phase, define_steps, define_taps
from .texts import OutlineText


@dataclass(slots=True)
class Lines:
    """The lines of a kernel written so far, by section of the kernel.

    Attributes:
        program: lines that define the program's coordinates.
        phase: lines that define what the phase fixes: first shift, residue and number of taps.
        position: lines that define the lanes of the tile.
        step: lines of a step of the loop.
        out: lines after the loop, for output lanes that differ from those of the input.
    """

    program: list[str] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    position: list[str] = field(default_factory=list)
    step: list[str] = field(default_factory=list)
    out: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outline:
    """The beginning of a kernel, common to all families.

    Attributes:
        kernel: the kernel.
        lines: its lines so far.
        co_start: first output channel of the tile, in its group.
        phase: first shift, residue and number of taps that the program's phase fixes.
        steps: the loop over taps and input channels.
        shifts: for each axis, the input read by a step's tap minus the position, in inputs.
        tap: flat kernel index of a step's tap.
    """

    kernel: Kernel
    lines: Lines
    co_start: Expr
    phase: Phase
    steps: Steps
    shifts: list[Expr]
    tap: Expr

    def start(self) -> TileStart:
        """Define and return the image and position at which the tile starts."""
        return define_start(self.kernel, self.lines.position)

    def positions(self, start: TileStart, width: Expr = ONE) -> Positions:
        """Define the lanes over positions, `width` lanes for the inputs of each position."""
        return define_positions(self.kernel, self.lines.position, start, width)

    def outputs(self, start: TileStart, width: Expr) -> Positions:
        """Define, after the loop, lanes over the same positions: `width` outputs for each."""
        return define_positions(self.kernel, self.lines.out, start, width, "_out")

    def named_tap(self, tap: Expr) -> Expr:
        """Return the symbol `tap`, defined as the flat index `tap` unless that is a mere symbol."""
        kernel, lines = self.kernel, self.lines
        looped = bool(tap.free_symbols & kernel.loop)
        flat = kernel.scribe.define(lines.step if looped else lines.phase, "tap", tap, None)
        if looped and flat.is_Symbol:
            kernel.loop.add(flat)
        return flat

    def text(self) -> OutlineText:
        """Return the lines before the loop, and the first lines of a step."""
        return OutlineText(
            program=tuple(self.lines.program),
            phase=tuple(self.lines.phase),
            position=tuple(self.lines.position),
            step=tuple(self.lines.step),
            loop=self.steps.loop,
        )


def define_outline(kernel: Kernel, *, depthwise: bool = False) -> Outline:
    """Define the outline except its positions.

    A `depthwise` kernel has no loop over input channels: each step covers the channels of a tile.
    """
    lines = Lines()
    define_program(kernel, lines.program)
    co_start = output_start(kernel, lines.program)
    phase = define_phase(kernel, lines.phase)
    steps = define_steps(kernel, lines.step, phase, depthwise)
    shifts, tap = define_taps(kernel, lines.step, phase, steps)
    return Outline(kernel, lines, co_start, phase, steps, shifts, tap)
