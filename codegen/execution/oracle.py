"""The oracle: a transposed convolution by its definition (scatter), in int64 or float64.

Beside the stages, used by verify and the tests; needs numpy. Input: a spec and numpy arrays in
torch's shapes; output: the layer's result. It shares no code with phases.py or torch: every input
element times every tap is added to the output it reaches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..language.spec import ConvTransposeSpec

Array = npt.NDArray[Any]

POINTWISE: Mapping[str, Callable[..., Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x, slope: np.where(x > 0, x, x * slope),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "clamp": np.clip,
    "add": lambda x, other: x + other,
    "mul": lambda x, other: x * other,
}


def scatter(spec: ConvTransposeSpec, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return the layer's output without its pipeline, in the dtype of `x`.

    Args:
        spec: the geometry.
        x: [N, C_in, spatial…], int64 or float64.
        weight: [C_in, C_out / groups, kernel…] of the same dtype.
        bias: [C_out] or None.
    """
    y = _zeros(spec, x, weight)
    _add_taps(spec, y, x, weight)
    return _with_bias(spec, y, bias)


def _zeros(spec: ConvTransposeSpec, x: Array, weight: Array) -> Array:
    """Return zeros in the shape of the output, [N, groups, C_out / groups, spatial…]."""
    spatial = [
        (size - 1) * s - 2 * p + d * (k - 1) + op + 1
        for size, k, s, p, op, d in zip(
            x.shape[2:],
            spec.kernel_size,
            spec.stride,
            spec.padding,
            spec.output_padding,
            spec.dilation,
            strict=True,
        )
    ]
    return np.zeros((x.shape[0], spec.groups, weight.shape[1], *spatial), dtype=x.dtype)


def _add_taps(spec: ConvTransposeSpec, y: Array, x: Array, weight: Array) -> None:
    """Add to `y` every input times every tap, at the output it reaches."""
    groups, spatial = spec.groups, y.shape[3:]
    grouped_x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    grouped_w = weight.reshape(groups, -1, *weight.shape[1:])
    for tap in itertools.product(*map(range, spec.kernel_size)):
        source, landing = [], []
        for axis, k in enumerate(tap):
            start = k * spec.dilation[axis] - spec.padding[axis]
            s = spec.stride[axis]
            low = max(0, math.ceil(-start / s))
            high = min(x.shape[2 + axis], (spatial[axis] - 1 - start) // s + 1)
            source.append(slice(low, max(low, high)))
            first = start + s * low
            landing.append(slice(first, first + s * max(0, high - low), s))
        part = grouped_x[(slice(None), slice(None), slice(None), *source)]
        if part.size == 0:
            continue
        where: tuple[Any, ...] = (..., *tap)
        products = np.einsum("ngc...,gco->ngo...", part, grouped_w[where])
        y[(slice(None), slice(None), slice(None), *landing)] += products


def _with_bias(spec: ConvTransposeSpec, y: Array, bias: Array | None) -> Array:
    y = y.reshape(y.shape[0], -1, *y.shape[3:])
    return y if bias is None else y + bias.reshape(1, -1, *[1] * spec.rank)


def _summed_in_turn(spec: ConvTransposeSpec, pairs: list[tuple[Array, Array]]) -> Array:
    """Return the sum of the layers of `pairs` (input, weight), added term by term in their dtype.

    The order of summation is that of an accumulator of a GPU thread: over channels, in each channel
    over pairs, in each pair over taps. numpy's own sum over channels would be partly pairwise.
    """
    y = _zeros(spec, *pairs[0])
    split = [
        (
            x.reshape(x.shape[0], spec.groups, -1, *x.shape[2:]),
            weight.reshape(spec.groups, -1, *weight.shape[1:]),
        )
        for x, weight in pairs
    ]
    for channel in range(split[0][0].shape[2]):
        for x, weight in split:
            _add_taps(spec, y, x[:, :, channel], weight[:, channel])
    return _with_bias(spec, y, None)


def rounded(x: Array, to: str) -> Array:
    """Return `x` as float32, rounded to nearest `tf32` (ties away) or `bfloat16` (ties to even)."""
    bits = x.astype(np.float32).view(np.uint32)
    if to == "tf32":
        bits = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    else:
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        bits = bits & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def expected(spec: ConvTransposeSpec, x: Array, weight: Array, bias: Array | None) -> Array:
    """Return the output of a faithful kernel of the spec's precision.

    It rounds or splits operands as the precision says, and sums products term by term in float32
    (float64 for that dtype); of a split product, the smallest parts are summed first.

    Arguments are float64 arrays that the spec's dtype represents exactly. Stages are not applied.
    """
    single = np.float64 if spec.dtype == "float64" else np.float32
    parts = {"tf32": ("tf32", 1, 1), "tf32x3": ("tf32", 2, 2), "bf16x3": ("bfloat16", 2, 2)}
    parts["bf16x6"] = ("bfloat16", 3, 3)
    if spec.precision in parts:
        to, count, most = parts[spec.precision]
        xs, ws = _split(x, to, count), _split(weight, to, count)
        places = [(a, b) for a in range(count) for b in range(count) if a + b < most]
        pairs = [(xs[a], ws[b]) for a, b in reversed(places)]
    else:
        pairs = [(x.astype(single), weight.astype(single))]
    y = _summed_in_turn(spec, pairs)
    if bias is not None:
        y = y + bias.astype(single).reshape(1, -1, *[1] * spec.rank)
    return y


def _split(x: Array, to: str, count: int) -> list[Array]:
    """Return `x` split into `count` rounded parts, each the rounded rest of those before it."""
    left, parts = x.astype(np.float32), []
    for _ in range(count):
        part = rounded(left, to)
        parts.append(part)
        left = left - part
    return parts


def reference(spec: ConvTransposeSpec, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return the output of the whole pipeline; arguments as for `scatter`."""
    for stage in spec.before:
        x = POINTWISE[stage.name](x, *stage.values)
    y = scatter(spec, x, weight, bias)
    for stage in spec.after:
        y = POINTWISE[stage.name](y, *stage.values)
    return y
