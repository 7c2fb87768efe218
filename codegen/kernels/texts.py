"""The dataclasses that kernel templates read: lines, names and flags of a kernel.

Stage 5, render. Input: text from the families and the other modules of this folder; output: the
fields that `templates/kernels/` and `templates/parts/` print. Every field is text or a flag.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AccessText:
    """The pointers and the mask of a tile in a tensor, as lines of the kernel.

    Attributes:
        base: line that defines `<name>_tile`, the pointer outside the loop; None if the tile starts
            at the tensor's own pointer.
        lanes: lines that define `<name>_lanes`, the offsets inside the tile.
        step_lines: line that defines `<name>_step`; none if `step` is already a name.
        mask_lines: lines that define `<name>_mask`; none without a mask.
        step: name of the offset that a step of the loop adds; empty if it adds none.
        masked: whether loads and stores take `<name>_mask`; if not, all elements exist.
        pointer: name of the pointer to which `added` is added, or of a tensor descriptor.
        added: offsets that a load adds to `pointer`: `<name>_lanes`, or the part of it that
            `pointer` does not already contain.
        boxed: whether `pointer` is a tensor descriptor, from which boxes are loaded.
    """

    base: str | None
    lanes: tuple[str, ...]
    step_lines: tuple[str, ...]
    mask_lines: tuple[str, ...]
    step: str
    masked: bool
    pointer: str
    added: str
    boxed: bool = False


@dataclass(frozen=True, slots=True)
class LoadText:
    """A tile that a step loads from an access.

    Attributes:
        offset: offset from the access's pointer, with its sign; empty for 0. For a box, the call
            that loads it.
        masked: whether the load takes `<name>_mask`.
        mask_lines: lines that define that mask; none if an earlier line defines it.
    """

    offset: str
    masked: bool
    mask_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OperandText(LoadText):
    """An input tile, and the lines (casts, stages, rounding) between its load and its product."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreText:
    """A tile that is stored.

    Attributes:
        acc: its accumulator's name; empty if no input reaches its outputs.
        lines: lines that apply the stages to the accumulator and define the pointers.
        pointers: the pointers of the store, as text.
        value: the stored value, as text.
        masked: whether the store takes `y_mask`.
    """

    acc: str
    lines: tuple[str, ...]
    pointers: str
    value: str
    masked: bool


@dataclass(frozen=True, slots=True)
class Loop:
    """The loop over (channel block, tap): its variable and its range, as text."""

    variable: str
    over: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlineText:
    """The first lines of a kernel, by section.

    Attributes:
        program: lines that define the program's coordinates from its ids.
        phase: lines that define the taps, shifts and residues of the phase.
        position: lines that define the lanes over the tile's positions.
        step: lines that define a step's tap and channel block; empty if none vary.
        loop: the loop over the steps; None for a single step.
    """

    program: tuple[str, ...]
    phase: tuple[str, ...]
    position: tuple[str, ...]
    step: tuple[str, ...]
    loop: Loop | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBody:
    """The names in kernel templates that all families share; a family's subclass adds its own.

    Attributes:
        outline: the first lines of the kernel.
        x, w, bias: accesses of input, weight and bias.
        y: access of the output, for `explain` only; templates print `outputs`.
        inputs: input tiles that a step loads.
        outputs: tiles that are stored.
    """

    outline: OutlineText
    x: AccessText
    w: AccessText
    y: AccessText
    bias: AccessText
    inputs: tuple[OperandText, ...]
    outputs: tuple[StoreText, ...]


@dataclass(frozen=True, slots=True)
class RowMask:
    """The mask of one row of a row block.

    Attributes:
        masked: whether the row needs a mask.
        fresh: lines that define the mask; none if it equals the mask of the row before.
    """

    masked: bool
    fresh: tuple[str, ...]
