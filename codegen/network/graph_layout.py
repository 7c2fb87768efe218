"""The layout in which a compiled graph computes a transposed convolution.

Beside the stages; needs torch, imported when a function is called. Input: a node of Dynamo's graph
whose input is in channels_first, and the plan of its file, which has a kernel for each layout;
output: whether the kernel for channels_last, and the change of layout before it, are predicted to
be faster.

Inductor does the same for other convolutions: it decides for a whole graph that they compute in
channels_last. It then also fuses the changes of layout into the operators around them. Here the
graph states these changes, so that every tensor keeps the strides that it has without convgen.
"""

from __future__ import annotations

from typing import Any

from ..geometry.problem import problem_of
from ..language.torch_module import layout_of
from ..planning.costs import copy_ms
from ..planning.plan import KernelPlan

# Kernels that Inductor writes for pooling and norms are up to four times faster in channels_last
# (H200, torch 2.11, KernelBench's problems 2/10 and 2/11): a layer may lose a little there.
WORTH_LAST = 1.1


def gains_in_channels_last(plan: KernelPlan, input: Any, weight: Any) -> bool:
    """Whether the layer of a plan should change its input to channels_last, and its output back.

    Args:
        plan: the plan of a file; only of known sizes, since others have no predicted times.
        input: the layer's input, a fake tensor.
        weight: its weight.
    """
    kernels = {kernel.spec.layout: kernel for kernel in plan.kernels if kernel.rung is None}
    if len(kernels) < 2 or any(kernel.nominal for kernel in kernels.values()):
        return False
    if "channels_last" in (layout_of(input), layout_of(weight)):
        return False
    first, last = kernels["channels_first"], kernels["channels_last"]
    change = copy_ms(last.spec, problem_of(last.spec, last.phases), last.target)
    return last.cost.model_ms + change < WORTH_LAST * first.cost.model_ms


def has_convolutions(graph: Any) -> bool:
    """Whether a graph has convolutions of torch's, whose layouts Inductor decides for all of it."""
    import torch

    of_torch = {
        getattr(torch, f"conv{way}{rank}d") for way in ("", "_transpose") for rank in (1, 2, 3)
    }
    return any(node.target in of_torch for node in graph.nodes)


def is_recorded(tensors: list[Any]) -> bool:
    """Whether autograd records an operator of these tensors; its gradient keeps their layouts."""
    import torch

    given = [each for each in tensors if isinstance(each, torch.Tensor)]
    return torch.is_grad_enabled() and any(each.requires_grad for each in given)
