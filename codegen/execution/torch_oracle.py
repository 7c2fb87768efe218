"""The oracle on a GPU: a transposed convolution by its definition, in float64.

Used by bench and by the examples; needs torch, which the compiler does not. Input: a spec and
tensors in torch's shapes; output: the layer's result. It calls no convolution of torch's, whose
rounding is what bench compares, and shares no code with oracle.py, which a test compares it with.
"""

from __future__ import annotations

import itertools
from typing import Any

from ..language.spec import ConvTransposeSpec
from ..tables.pointwise import Stage


def reference(spec: ConvTransposeSpec, x: Any, weight: Any, bias: Any) -> Any:
    """Return the output of the whole pipeline in float64; arguments as `scatter`."""
    return staged(scatter(spec, staged(x.double(), spec.before), weight, bias), spec.after)


def staged(x: Any, stages: tuple[Stage, ...]) -> Any:
    """Return `x` with stages applied by torch's functions of their names."""
    import torch

    for stage in stages:
        owner = torch if hasattr(torch, stage.name) else torch.nn.functional
        x = getattr(owner, stage.name)(x, *stage.values)
    return x


def scatter(spec: ConvTransposeSpec, x: Any, weight: Any, bias: Any) -> Any:
    """Return the layer without its stages: every tap adds its share of the output.

    Args:
        spec: the geometry; its batch may differ from that of `x`.
        x: [N, C_in, spatial…].
        weight: [C_in, C_out / groups, kernel…].
        bias: [C_out] or None.
    """
    import torch

    batch, extents = x.shape[0], x.shape[2:]
    growth = zip(extents, spec.stride, spec.output_growth, strict=True)
    output = [(size - 1) * s + extra for size, s, extra in growth]
    # Room for what padding cuts off, so that a tap's outputs are one strided slice.
    reach = zip(extents, spec.stride, spec.dilation, spec.kernel_size, strict=True)
    full = [max((i - 1) * s + d * (k - 1) + 1, 0) for i, s, d, k in reach]
    full = [max(f, o + p) for f, o, p in zip(full, output, spec.padding, strict=True)]
    per_group = weight.shape[1]
    y = torch.zeros((batch, spec.groups, per_group, *full), dtype=torch.float64, device=x.device)
    gx = x.double().reshape(batch, spec.groups, -1, *extents)
    gw = weight.double().reshape(spec.groups, -1, *weight.shape[1:])
    for tap in itertools.product(*map(range, spec.kernel_size)):
        where = tuple(
            slice(k * d, k * d + (i - 1) * s + 1, s)
            for k, d, i, s in zip(tap, spec.dilation, extents, spec.stride, strict=True)
        )
        y[(..., *where)] += torch.einsum("ngc...,gco->ngo...", gx, gw[(..., *tap)])
    cut = [slice(p, p + o) for p, o in zip(spec.padding, output, strict=True)]
    y = y[(..., *cut)].reshape(batch, -1, *output)
    return y if bias is None else y + bias.double().reshape(-1, *[1] * spec.rank)
