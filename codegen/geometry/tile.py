"""The tile: the work of one program, and the kernel variant that does it.

Stage 2, decompose. Input: block sizes and a family's name; output: a checked `Tile`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SpecError, shown, text_of
from ..values import check_integer

# Name, smallest and largest value of each number of a tile, for all kernels and GPUs.
TILE_RANGES = (
    *((block, 1, 1024) for block in ("block_m", "block_n", "block_k")),
    ("num_warps", 1, 32),  # 1024 threads per block
    ("num_stages", 1, 16),
    ("span", 1, 16),
    ("rows", 1, 16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The work of one program, and the kernel variant that does it.

    Attributes:
        block_m: output positions per program.
        block_n: output channels per program.
        block_k: input channels per step.
        num_warps: warps per program.
        num_stages: depth of Triton's software pipeline.
        family: name of a family in `FAMILIES`.
        span: neighbouring inputs of a row per position (groups.py).
        rows: rows of outputs per program (row_blocks.py).
        relayout: whether the kernel reads a copy of the input in channels_last (input_copy.py).
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
        """Check types and ranges; planning checks whether a tile serves a layer and fits a GPU.

        Raises:
            SpecError: a field has a wrong type or is out of range; it names the field.
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
