"""The gradient of the input, as a layer of its own.

Stage 2, beside decompose. Input: a spec; output: the spec of the transposed convolution that leads
back from the gradient of the output to that of the input.

At stride 1 input i reaches output `o = i + d*k - p` through kernel index k, so that its gradient is
the sum over k of `w[k] * grad[i + d*k - p]`. With the taps in reverse, `l = K-1 - k`, that is
`i + P = o + d*l` where `P = d*(K-1) - p`: by definition (phases.py) a transposed convolution of
stride 1 and padding P, whose weight is the layer's with the channels of a group swapped.
"""

from __future__ import annotations

import dataclasses

from ..language.spec import MAX_OFFSET, ConvTransposeSpec

PREFIX = "GRAD_"  # of the names of its sizes, in the file of the layer


def gradient_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why the gradient of the input of `spec` is torch's, None if a kernel can give it."""
    if spec.before or spec.after:
        return "the stages around the layer are differentiated by torch, and the layer with them"
    if any(stride > 1 for stride in spec.stride):
        return "the stride is not 1: it is a convolution of that stride, which convgen has not"
    if any(spec.output_padding):
        return "with output_padding no transposed convolution leads back"
    if not all(0 <= padding <= MAX_OFFSET for padding in _padding(spec)):
        return (
            "the padding of the layer that leads back would be negative, or beyond convgen's limit"
        )
    return None


def input_gradient(spec: ConvTransposeSpec) -> ConvTransposeSpec:
    """Return the layer that takes the gradient of the output of `spec` to that of its input."""
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
