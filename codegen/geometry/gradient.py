"""The gradient of the input, as a layer of its own.

Stage 2, beside decompose. Input: a spec; output: the spec of the transposed convolution that maps
the gradient of the output to the gradient of the input.

At stride 1 input i reaches output `o = i + d*k - p` through kernel index k, so the gradient of
input i is the sum over k of `w[k] * grad[i + d*k - p]`. Reverse the taps, `l = K-1 - k`, and
`i + P = o + d*l` where `P = d*(K-1) - p`. By definition (phases.py) that is a transposed
convolution of stride 1 and padding P; its weight is the layer's, with the input and output channels
of a group swapped and the taps reversed.
"""

from __future__ import annotations

import dataclasses

from ..language.spec import MAX_OFFSET, ConvTransposeSpec


def gradient_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why torch must compute the input gradient of `spec`, None if a kernel can."""
    if spec.before or spec.after:
        return "torch differentiates the stages around the layer, and the layer with them"
    if any(stride > 1 for stride in spec.stride):
        return "the stride is not 1: it is a strided convolution, which convgen does not implement"
    if any(spec.output_padding):
        return "with output_padding it is no transposed convolution"
    if not all(0 <= padding <= MAX_OFFSET for padding in _padding(spec)):
        return (
            "the padding of its transposed convolution would be negative, or above convgen's limit"
        )
    return None


def input_gradient(spec: ConvTransposeSpec) -> ConvTransposeSpec:
    """Return the layer that maps the output gradient of `spec` to its input gradient."""
    assert gradient_refusal(spec) is None
    return dataclasses.replace(
        spec,
        in_channels=spec.out_channels,
        out_channels=spec.in_channels,
        padding=_padding(spec),
        bias=False,
        input=(spec.batch, spec.out_channels, *spec.output_spatial),
        grid=None,
    )


def _padding(spec: ConvTransposeSpec) -> tuple[int, ...]:
    axes = zip(spec.kernel_size, spec.padding, spec.dilation, strict=True)
    return tuple(d * (k - 1) - p for k, p, d in axes)
