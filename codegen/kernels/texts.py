"""What a template prints of a kernel's accesses: lines, names and flags.

Stage 5. Made by the families and by their parts here, read by `templates/kernels/` and
`templates/parts/`; each holds text and flags alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AccessText:
    """A tile's place in a tensor, as lines of the kernel.

    Attributes:
        base: the line of `<name>_tile`, the pointer outside the loop; None if it is the tensor's.
        lanes: the lines of `<name>_lanes`, the offsets inside the tile.
        step_lines: the line of `<name>_step`, where no other name has it.
        mask_lines: the lines of `<name>_mask`, where the access has it.
        step: the name of what a step of the loop adds, empty for nothing.
        masked: `<name>_mask` says which elements exist; else all do.
        pointer: the name of the pointer that the lanes are added to, or of a tensor descriptor.
        added: the lanes as text, `<name>_lanes`, or what is left of them to be added.
        boxed: it is a descriptor, whose boxes are loaded.
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
    """A tile that a step loads, at an access.

    Attributes:
        offset: what is added to the access' pointer, with its sign; empty for nothing. Of a box,
            the call that loads it.
        masked: `<name>_mask` says which elements exist.
        mask_lines: the lines of that mask, where it is not defined yet.
    """

    offset: str
    masked: bool
    mask_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OperandText(LoadText):
    """A tile of the input, and the lines of what becomes of it before it is multiplied."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreText:
    """A tile that is stored.

    Attributes:
        acc: its accumulator's name; empty where no input reaches its outputs.
        lines: what becomes of the accumulator, and where its elements go.
        pointers: where they go, as text.
        value: what is stored there.
        masked: `y_mask` says which elements exist.
    """

    acc: str
    lines: tuple[str, ...]
    pointers: str
    value: str
    masked: bool


@dataclass(frozen=True, slots=True)
class Loop:
    """The loop over (channel block, tap): its variable and what it runs over, as text."""

    variable: str
    over: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlineText:
    """Lines of a kernel, by where they stand.

    Attributes:
        program: the program's coordinates, from its ids.
        phase: what the phase fixes: taps, shifts and residues.
        position: the outputs of the tile, along the image.
        step: tap and channel block of a step; empty if there is but one step.
        loop: the loop over the steps, None for one step, which needs no loop.
    """

    program: tuple[str, ...]
    phase: tuple[str, ...]
    position: tuple[str, ...]
    step: tuple[str, ...]
    loop: Loop | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBody:
    """What the kernels of all families have: names of the templates they share, as text.

    A family has its own names beside these, in a subclass.

    Attributes:
        outline: the lines that they start with.
        x, w, y, bias: the accesses; `outputs` hold what is printed of that of the output, which
            is here for a report.
        inputs, outputs: the tiles that a step loads of the input, and those that are stored.
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
    """Whether a row of a block is masked; the mask's lines, none where the row before has it."""

    masked: bool
    fresh: tuple[str, ...]
