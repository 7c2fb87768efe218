"""Why a kernel of a planned tile may keep bytes in local memory.

What is not listed here should not spill: test_planned.py compiles a part of the layers, spills.py
all of them.
"""

from __future__ import annotations

from convgen import find_target
from convgen.execution.cubin import Binary

TENSOR_COLUMNS = 512  # of tensor memory, as Triton counts it: a kernel with more cannot be launched
FEW = 24
SOME = 56


def reason_for(target_name: str, registers: int, spills: int) -> str | None:
    """Return why a kernel may spill so many bytes at so many registers, None if it should not.

    Below the limit, ptxas aims at a step of occupancy, and keeps values that the loop does not
    change in local memory to get there, such as addresses: no bound on registers would avoid it. At
    the limit, a few values are fewer than the estimate can tell.
    """
    if registers < find_target(target_name).registers_per_thread:
        return f"up to {SOME} bytes below the limit of registers" if spills <= SOME else None
    return f"up to {FEW} bytes at the limit of registers" if spills <= FEW else None


def tensor_columns(binary: Binary) -> int:
    """Return columns of tensor memory that a kernel takes: 0 where there is none."""
    return int(binary.metadata.get("tmem_size", 0))
