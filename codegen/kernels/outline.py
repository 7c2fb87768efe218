"""The outline of an emitted kernel: program, phase, positions and steps, in the order of its lines.

Stages 3 and 5, common to the families. Input: a `Kernel`; output: an `Outline`, which holds the
lines as they are being written, and the sympy expressions of what they define.
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
    """The lines of a kernel as they are being written, by where they stand.

    Attributes:
        program: of the program's coordinates.
        phase: of what its phase fixes.
        position: of the lanes of the tile.
        step: of a step of the loop.
        out: of the output's lanes where these are others, behind the loop.
    """

    program: list[str] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    position: list[str] = field(default_factory=list)
    step: list[str] = field(default_factory=list)
    out: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outline:
    """What the kernels of all families start with.

    Attributes:
        kernel: the kernel.
        lines: its lines so far.
        co_start: first output channel of the tile, in its group.
        phase: what the program's phase fixes.
        steps: the loop over taps and input channels.
        shifts: of each axis, from a position to the input that a step's tap leads to it from.
        tap: flat index of that tap.
    """

    kernel: Kernel
    lines: Lines
    co_start: Expr
    phase: Phase
    steps: Steps
    shifts: list[Expr]
    tap: Expr

    def start(self) -> TileStart:
        """Define where the tile starts."""
        return define_start(self.kernel, self.lines.position)

    def positions(self, start: TileStart, width: Expr = ONE) -> Positions:
        """Define the lanes over positions, `width` for the inputs of each."""
        return define_positions(self.kernel, self.lines.position, start, width)

    def outputs(self, start: TileStart, width: Expr) -> Positions:
        """Define lanes over the same positions behind the loop, `width` for the outputs of each."""
        return define_positions(self.kernel, self.lines.out, start, width, "_out")

    def named_tap(self, tap: Expr) -> Expr:
        """Define a flat index of a step's tap as `tap`, where that takes several axes."""
        kernel, lines = self.kernel, self.lines
        looped = bool(tap.free_symbols & kernel.loop)
        flat = kernel.scribe.define(lines.step if looped else lines.phase, "tap", tap, None)
        if looped and flat.is_Symbol:
            kernel.loop.add(flat)
        return flat

    def text(self) -> OutlineText:
        """Return the lines that stand before the loop, and those that begin a step of it."""
        return OutlineText(
            program=tuple(self.lines.program),
            phase=tuple(self.lines.phase),
            position=tuple(self.lines.position),
            step=tuple(self.lines.step),
            loop=self.steps.loop,
        )


def define_outline(kernel: Kernel, *, depthwise: bool = False) -> Outline:
    """Define all but the positions; a step of a `depthwise` kernel has all channels of a block."""
    lines = Lines()
    define_program(kernel, lines.program)
    co_start = output_start(kernel, lines.program)
    phase = define_phase(kernel, lines.phase)
    steps = define_steps(kernel, lines.step, phase, depthwise)
    shifts, tap = define_taps(kernel, lines.step, phase, steps)
    return Outline(kernel, lines, co_start, phase, steps, shifts, tap)
