"""Why a kernel of a planned tile may keep bytes in local memory.

What is not listed here should not spill: test_planned.py compiles a part of the layers, spills.py
all of them.
"""

from __future__ import annotations

from convgen.forms import form_of
from convgen.plan import KernelPlan, problem_of
from convgen.registers import accumulators_of, input_from_shared

FEW = 24
MANY = 128


def reason_for(plan: KernelPlan, registers: int, spills: int) -> str | None:
    """Return why a kernel may spill so many bytes at so many registers, None if it should not.

    1. ptxas aims at a step of occupancy, and keeps a few values in local memory to get there, such
       as addresses that the loop does not change: no bound on registers would avoid it.
    2. On Hopper, rows of many sums whose products read both operands from shared memory: ptxas
       moves the sums between some of the products, in one layer and not in the next with the same
       tile, where it is the fastest by a tenth. `tune` leaves out those that spill.
    """
    target, tile, spec = plan.target, plan.tile, plan.spec
    if registers < target.registers_per_thread and spills <= FEW:
        return f"up to {FEW} bytes below the limit of registers"
    form = form_of(spec, plan.phases, problem_of(spec, plan.phases), tile)
    shared = tile.family == "gather" and input_from_shared(spec, form, tile, target)
    if shared and form.inputs > 1 and accumulators_of(spec, form, tile) >= MANY:
        return f"rows of {MANY} sums from shared memory"
    return None
