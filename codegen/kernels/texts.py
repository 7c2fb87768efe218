"""What a template prints of a kernel's accesses: lines, names and flags.

Stage 5. Made by the families (builder.py, gemm.py and others), read by `templates/kernels/` and
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
    """A tile that is stored, at an access.

    Attributes:
        acc: its accumulator's name; empty where no input reaches its outputs.
        offset, masked, mask_lines: as of `LoadText`.
        start_lines: the lines that begin it.
        lane_lines, place_lines, pointer_lines: the lanes of the output, the access, the pointers
            of its elements, where they are not defined yet.
        value: what is stored, which `kerneltext` knows.
    """

    acc: str
    offset: str
    masked: bool
    mask_lines: tuple[str, ...]
    start_lines: tuple[str, ...]
    lane_lines: tuple[str, ...]
    place_lines: tuple[str, ...]
    pointer_lines: tuple[str, ...]
    value: str = ""


@dataclass(frozen=True, slots=True)
class Loop:
    """The loop over (channel block, tap): its variable and what it runs over, as text."""

    variable: str
    over: str


@dataclass(frozen=True, slots=True)
class RowMask:
    """Whether a row of a block is masked; the mask's lines, none where the row before has it."""

    masked: bool
    fresh: tuple[str, ...]
