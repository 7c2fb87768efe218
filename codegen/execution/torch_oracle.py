"""The oracle on a GPU: a transposed convolution by its definition, in float64.

Beside the stages, used by bench and the examples; needs torch. Input: a spec and tensors in torch's
shapes; output: the layer's result. It calls no convolution of torch, since bench measures their
rounding, and shares no code with oracle.py: a test compares the two.
"""

from __future__ import annotations

import itertools
from typing import Any

from ..language.spec import ConvTransposeSpec
from ..tables.pointwise import Stage


def reference(spec: ConvTransposeSpec, x: Any, weight: Any, bias: Any) -> Any:
    """Return the output of the whole pipeline in float64; arguments as for `scatter`."""
    return staged(scatter(spec, staged(x.double(), spec.before), weight, bias), spec.after)


def staged(x: Any, stages: tuple[Stage, ...]) -> Any:
    """Return `x` with stages applied, by torch's functions of the same names."""
    import torch

    for stage in stages:
        owner = torch if hasattr(torch, stage.name) else torch.nn.functional
        x = getattr(owner, stage.name)(x, *stage.values)
    return x


def scatter(spec: ConvTransposeSpec, x: Any, weight: Any, bias: Any) -> Any:
    """Return the output of the layer without stages, in float64: each tap adds its products.

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
    # Include the outputs that padding crops, so that a tap's outputs are one strided slice.
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
