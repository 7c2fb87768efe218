"""The kernel families: a table, whose tiles the planner ranks together.

Stage 4, part of plan. Input: a spec; output: a row. A new family is one row and one template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernels.gemm import GemmContext
from ..language.spec import ConvTransposeSpec
from .direct import DirectContext, direct_context, direct_refusal
from .gather import gather_context
from .polyphase import polyphase_context, polyphase_refusal
from .stencil import StencilContext, stencil_context, stencil_refusal
from .window import window_context, window_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFamily:
    """One way of computing a transposed convolution.

    Attributes:
        name: the family's name.
        template: prints its kernel.
        idea: what it does, in a line.
        serves: which specs, in a line.
        refuses: why it cannot serve a spec, None if it can.
        products: whether it multiplies in matrix units, in the spec's precision; else all is
            done in the accumulator's.
        context: prints a plan's index math for the template.
        context_type: the dataclass that `context` returns: the names of the template.
    """

    name: str
    template: str
    idea: str
    serves: str
    products: bool
    refuses: Callable[[ConvTransposeSpec], str | None]
    context: Callable[..., Any]
    context_type: type


FAMILIES = (
    KernelFamily(
        name="gather",
        template="kernels/gemm.py.jinja",
        idea="implicit GEMM, output-stationary: phase by phase, one loop over (channel block, tap)",
        serves="any",
        products=True,
        refuses=lambda spec: None,
        context=gather_context,
        context_type=GemmContext,
    ),
    KernelFamily(
        name="window",
        template="kernels/gemm.py.jinja",
        idea="implicit GEMM over neighbours in a row: a tap's inputs are a box that the tensor "
        "memory accelerator loads, without an address or a mask for an element",
        serves="known sizes in channels_last or with a copy, on GPUs since Hopper",
        products=True,
        refuses=window_refusal,
        context=window_context,
        context_type=GemmContext,
    ),
    KernelFamily(
        name="polyphase",
        template="kernels/gemm.py.jinja",
        idea="implicit GEMM over groups of neighbours in a row, which become channels: aligned "
        "loads, and all phases of the last axis in one contiguous store",
        serves="channels_first, where a group of the last axis is small",
        products=True,
        refuses=polyphase_refusal,
        context=polyphase_context,
        context_type=GemmContext,
    ),
    KernelFamily(
        name="direct",
        template="kernels/direct.py.jinja",
        idea="one multiplication a tap and output, without matrix units, in full precision; in "
        "channels_first all phases of the last axis in one contiguous store",
        serves="depthwise layers",
        products=False,
        refuses=direct_refusal,
        context=direct_context,
        context_type=DirectContext,
    ),
    KernelFamily(
        name="stencil",
        template="kernels/stencil.py.jinja",
        idea="groups of neighbours in a row, loaded and stored as vectors; weights are scalars of "
        "the program, without matrix units, in full precision",
        serves="depthwise layers in channels_first whose rows come in whole groups",
        products=False,
        refuses=stencil_refusal,
        context=stencil_context,
        context_type=StencilContext,
    ),
)


def find_family(name: str) -> KernelFamily:
    """Return the row of `name`; raises KeyError if there is none."""
    return {family.name: family for family in FAMILIES}[name]
