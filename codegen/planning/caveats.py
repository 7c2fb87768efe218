"""Caveats of an emitted kernel: cases in which its infinities and NaNs differ from torch's.

After stage 4, plan. Input: a `KernelPlan`; output: the sentences that apply to its kernels. The
emitted file's docstring and `convgen explain` print them; the README lists all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .plan import KernelPlan


@dataclass(frozen=True, slots=True)
class Caveat:
    """A sentence, and a predicate: whether it applies to the kernels of a plan."""

    text: str
    holds: Callable[[KernelPlan], bool]


def _spreads(plan: KernelPlan | None) -> bool:
    return plan is not None and plan.grouping is not None and plan.grouping.spreads


def _reads_padding(plan: KernelPlan) -> bool:
    return any(axis.reads_padding for axis in plan.phases)


CAVEATS = (
    Caveat(
        "An infinity or NaN of the input also reaches neighbours, in their row, of the outputs "
        "that it has weights for: they are computed together, and what has no weight is "
        "multiplied by zero.",
        _spreads,
    ),
    Caveat(
        "An infinity or NaN of the output's gradient also reaches neighbours, in their row, of the "
        "elements of the input's gradient that it has weights for.",
        lambda plan: _spreads(plan.gradient),
    ),
    Caveat("An infinite weight gives NaN where it meets padding, which is zero.", _reads_padding),
)


def caveats_of(plan: KernelPlan) -> tuple[str, ...]:
    """Return the sentences that apply to the kernels of `plan`."""
    return tuple(caveat.text for caveat in CAVEATS if any(map(caveat.holds, plan.kernels)))
