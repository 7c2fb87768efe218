"""The definition of a transposed convolution along one axis, enumerated.

By definition input i reaches output o through kernel index k where `o = s*i + d*k - p`. Everything
here enumerates that equation; nothing divides by the stride.
"""

from convgen import ConvTransposeSpec
from convgen.geometry.phases import decompose


def axis_of(kernel, stride=1, padding=0, output_padding=0, dilation=1):
    """Return the phases of a layer with one axis."""
    (axis,) = decompose(
        ConvTransposeSpec(
            rank=1,
            kernel_size=(kernel,),
            stride=(stride,),
            padding=(padding,),
            output_padding=(output_padding,),
            dilation=(dilation,),
        )
    )
    return axis


def output_extent(size, kernel, stride, padding, output_padding, dilation):
    """torch.nn.ConvTranspose1d, "Shape"."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def scattered(size, extent, kernel, stride, padding, dilation):
    """Return for each output the pairs (input, kernel index) that reach it."""
    pairs = {o: set() for o in range(extent)}
    for i in range(size):
        for k in range(kernel):
            o = stride * i + dilation * k - padding
            if o in pairs:
                pairs[o].add((i, k))
    return pairs


def random_parameters(rng, stride):
    """Kernel, padding, output padding and dilation; every fourth padding exceeds the kernel."""
    kernel, dilation = rng.randint(1, 9), rng.choice((1, 1, 2, 3, 4, 6, 12, stride, 2 * stride))
    reach = dilation * (kernel - 1)
    padding = reach + rng.randint(1, 9) if rng.random() < 0.25 else rng.randint(0, reach)
    return kernel, stride, padding, rng.randrange(max(stride, dilation)), dilation
