"""The kernel families: an ordered table, from which the planner takes the first that fits.

Stage 4, part of plan. Input: a spec; output: a row. A new family is one row and one template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gather import GatherContext, gather_context
from .spec import ConvTransposeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFamily:
    """One way of computing a transposed convolution.

    Attributes:
        name: the family's name, also of its template `kernels/<name>.py.jinja`.
        idea: what it does, in a line.
        serves: which specs, in a line.
        refuses: why it cannot serve a spec, None if it can.
        context: prints a plan's index math for the template.
        context_type: the dataclass that `context` returns: the names of the template.
    """

    name: str
    idea: str
    serves: str
    refuses: Callable[[ConvTransposeSpec], str | None]
    context: Callable[..., Any]
    context_type: type


FAMILIES = (
    KernelFamily(
        name="gather",
        idea="implicit GEMM, output-stationary: phase by phase, one loop over (channel block, tap)",
        serves="any",
        refuses=lambda spec: None,
        context=gather_context,
        context_type=GatherContext,
    ),
)


def find_family(name: str) -> KernelFamily:
    """Return the row of `name`; raises KeyError if there is none."""
    return {family.name: family for family in FAMILIES}[name]


def choose_family(spec: ConvTransposeSpec) -> KernelFamily:
    """Return the first family that serves `spec`; gather, the last, serves all."""
    return next(family for family in FAMILIES if family.refuses(spec) is None)
