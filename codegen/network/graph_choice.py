"""What computes a layer in a graph of Inductor's, and in which layout: what costs the graph least.

Beside the stages; needs torch, imported when a function is called. Input: the node of an emitted
operator in a graph of torch's basic operators, and its layer's spec; output: a `Choice`.

Inductor asks itself the same of torch's convolutions, and changes the layout of nearly all of them.
What is weighed here are times of the kernels of both layouts (as measured, else as predicted) and
of torch's convolution (where it was measured), the copy of the input into the other layout, and
what the operators behind the layer make of its output. Of these, those count whose code Inductor
makes faster or slower in one layout; their figures are of a reading of the 31 networks of
KernelBench that have a transposed convolution, each compiled in both layouts (NVIDIA H200, torch
2.11.0, 2026-11-30).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..compiler import plan
from ..errors import SpecError
from ..language.spec import LAYOUTS, ConvTransposeSpec
from ..planning.choices import Choices
from .preference import LEAST_SHARE

RESHAPES = "view", "_unsafe_view", "reshape"
REDUCTIONS = (
    *("amax", "amin", "sum", "mean", "prod", "var", "var_mean", "argmax", "argmin", "logsumexp"),
    *("_softmax", "_log_softmax", "prepare_softmax_online"),
)
MOST_NODES = 100  # behind the layer: what is further away is no longer looked at
# What an operator behind the layer takes longer in channels_last, in passes over the output.
RESHAPED = 1.0  # channels in groups, as group norm has them: they lie apart
WITHIN_ROWS = 1.0  # a reduction along axes that leaves some positions, as layer norm's
COPIED = 2.0  # the graph returns the layer's own output, in channels_first
RETURNED = 0.1  # the graph returns channels_first: the last operator writes what lies apart
OVER_CHANNELS = -0.5  # a reduction over the channels of a position, which lie together
POOLED = -0.5  # windows of positions: whole lines are loaded, whatever the window's width
# What torch's convolution takes longer in either layout.
BIASED = 2.0  # Inductor adds its bias in a pass before a pool; else whatever comes next adds it
# What a kernel whose weight is packed takes longer than torch's convolution on the host, in ms: the
# time of a launch (a compiled U-Net, float16, NVIDIA H200, torch 2.11.0, 2026-12-01: 0.017, of
# which the GPU's gain of 0.005 a layer is no part). A graph that is captured has no such time.
PACKING = 0.008


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a node, and what the graph takes for it, in milliseconds."""

    ms: float
    layout: str
    by_torch: bool = False


def choice_of(
    node: Any,
    spec: ConvTransposeSpec,
    sizes: Sequence[int],
    layout: str,
    choices: Choices | None,
    *,
    is_free: bool,
    is_captured: bool,
    torch_too: bool,
) -> Choice | None:
    """Return what computes the node of a layer of `layout=any`; None if no kernel can.

    Args:
        node: the node of its operator.
        spec: the spec of the operator's file.
        sizes: of the input, [N, C, spatial…].
        layout: of the input. One in channels_last keeps it, as torch's output would have it.
        choices: measured tiles and times that are preferred to the package's own.
        is_free: whether the input is computed in the graph, in either layout.
        is_captured: whether the graph is replayed as a CUDA graph.
        torch_too: whether torch's convolution may take the place of the kernel.
    """
    known = replace(spec, rungs=(), input=tuple(sizes))
    found: list[Choice] = []
    for each in LAYOUTS if layout == LAYOUTS[0] else (layout,):
        try:
            kernel = plan(replace(known, layout=each), choices=choices)
        except SpecError:  # no launch grid holds it
            return None
        pass_ms = _numbers(known) * node.meta["val"].dtype.itemsize / kernel.target.dram_gbps / 1e6
        others = 0.0
        if each != layout:
            copied = 0 if is_free else 2 * math.prod(sizes) / _numbers(known)
            others = pass_ms * (copied + passes_behind(node))
        row = kernel.measured
        host_ms = 0.0 if is_captured or kernel.reads_raw_weight else PACKING
        kernel_ms = host_ms + (kernel.cost.model_ms if row is None else row.ms)
        found.append(Choice(others + kernel_ms, each))
        if torch_too and row is not None and row.torch is not None:
            biased = pass_ms * BIASED * (spec.bias and _is_pooled(node))
            torch_ms = (row.torch.ms + biased) / LEAST_SHARE
            found.append(Choice(others + torch_ms, each, by_torch=True))
    return min(found, key=lambda choice: choice.ms)


def _numbers(known: ConvTransposeSpec) -> int:
    """Return how many numbers the output has."""
    shape = known.batch, known.out_channels, *known.output_spatial
    return math.prod(size for size in shape if size is not None)


def _is_pooled(node: Any) -> bool:
    """Whether a pool reads the output of a node."""
    return any("pool" in getattr(user.target, "_opname", "") for user in node.users)


def passes_behind(node: Any) -> float:
    """Return what the operators behind a node take longer if its output is in channels_last.

    In passes over the output; below 0 if they take less time. Each kind of operator counts once.
    """
    return sum({_cost(each, read, is_own=read is node) for each, read in _behind(node)})


def _behind(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the nodes behind a node, and behind pointwise ones; each with the one it reads."""
    import torch

    waiting = [(user, node) for user in node.users]
    seen: set[Any] = set()
    while waiting and len(seen) < MOST_NODES:
        each, read = waiting.pop(0)
        if each in seen:
            continue
        seen.add(each)
        yield each, read
        if torch.Tag.pointwise in getattr(each.target, "tags", ()):
            waiting += [(user, each) for user in each.users]


def _cost(node: Any, read: Any, *, is_own: bool) -> float:
    """Return what an operator takes longer if `read`, which it reads, is in channels_last.

    `is_own`: `read` is the layer's own output.
    """
    if node.op == "output":
        return COPIED if is_own else RETURNED
    name = getattr(node.target, "_opname", "")
    shape = read.meta["val"].shape
    if "pool" in name:
        return POOLED
    if name in RESHAPES:
        return 0.0 if node.meta["val"].shape[:2] == shape[:2] else RESHAPED
    if name not in REDUCTIONS:
        return 0.0
    axes = node.args[1] if len(node.args) > 1 else None
    axes = range(len(shape)) if axes is None else [axes] if isinstance(axes, int) else axes
    reduced = {axis % len(shape) for axis in axes}
    if reduced == {1}:
        return OVER_CHANNELS
    return 0.0 if reduced >= set(range(2, len(shape))) else WITHIN_ROWS
