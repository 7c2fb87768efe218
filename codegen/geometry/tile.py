"""The tile: the block of work of one program.

Stage 2, decompose. Input: extents and a family's name; output: a `Tile`, which names a kernel too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SpecError, shown, text_of
from ..values import check_integer

# Of a tile's numbers, from what no kernel has less of to what no GPU or kernel has more of.
TILE_RANGES = (
    *((block, 1, 1024) for block in ("block_m", "block_n", "block_k")),
    ("num_warps", 1, 32),  # 1024 threads a block
    ("num_stages", 1, 16),
    ("span", 1, 16),
    ("rows", 1, 16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The block of work of one program, and the kernel that does it.

    Attributes:
        block_m: output positions; block_n: output channels; block_k: input channels a step.
        num_warps: warps a program.
        num_stages: loads in flight ahead of the matrix units, Triton's pipeline depth.
        family: a name of `FAMILIES`.
        span: neighbouring inputs of a row that a position takes together (groups.py).
        rows: neighbouring rows of outputs that a program computes together (row_blocks.py).
        relayout: the input is copied first, in channels_last (input_copy.py).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    family: str = "gather"
    span: int = 1
    rows: int = 1
    relayout: bool = False

    def __post_init__(self) -> None:
        """Check that it is a tile at all; whether it serves a layer and fits a GPU, planning does.

        Raises:
            SpecError: a field is of another type or out of range; it names the field.
        """
        for name, low, high in TILE_RANGES:
            value = check_integer(f"{name} of a tile", getattr(self, name), low, high)
            if name not in ("num_stages", "rows") and value & (value - 1):
                raise SpecError(f"{name} of a tile must be a power of two, got {value}", name)
            object.__setattr__(self, name, value)
        family = text_of(self.family)
        if family is None or not re.fullmatch("[a-z][a-z0-9_]{0,39}", family):
            raise SpecError(
                f"family of a tile must be the name of a family, got {shown(self.family)}", "family"
            )
        object.__setattr__(self, "family", family)
        if type(self.relayout) is not bool:
            raise SpecError(
                f"relayout of a tile must be true or false, got {shown(self.relayout)}", "relayout"
            )

    def __str__(self) -> str:
        inputs = f" x {self.span} inputs" if self.span > 1 else ""
        rows = f" x {self.rows} rows" if self.rows > 1 else ""
        shape = f"{self.block_m} positions{rows} x {self.block_n} channels"
        depth = f"{self.block_k}{inputs} deep"
        copy = ", of a copy of the input" if self.relayout else ""
        return f"{shape}, {depth}, {self.num_warps} warps, {self.num_stages} stages{copy}"
