"""Why a kernel of a planned tile may keep bytes in local memory.

What is not listed here should not spill: test_planned.py compiles a part of the layers, spills.py
all of them.
"""

from __future__ import annotations

from convgen import find_target

FEW = 24


def reason_for(target_name: str, registers: int, spills: int) -> str | None:
    """Return why a kernel may spill so many bytes at so many registers, None if it should not.

    ptxas aims at a step of occupancy, and keeps a few values in local memory to get there, such as
    addresses that the loop does not change: no bound on registers would avoid it.
    """
    below = registers < find_target(target_name).registers_per_thread
    return f"up to {FEW} bytes below the limit of registers" if below and spills <= FEW else None
