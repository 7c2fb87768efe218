"""The reader of torch modules: from an `nn.ConvTransposeNd` instance to the arguments of a spec.

Stage 1, parse. Input: a module; output: keyword arguments of `ConvTransposeSpec`. Only attributes
of the module are read: torch is never imported.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import SpecError, shown, visible

_CLASS = re.compile(r"ConvTranspose([123])d")


def read_module(module: Any) -> dict[str, Any]:
    """Return the spec arguments of `module`; raises SpecError if it is no ConvTransposeNd."""
    names = [cls.__name__ for cls in type(module).__mro__]
    matches = [match for match in map(_CLASS.fullmatch, names) if match]
    if not matches:
        raise SpecError(
            f"module must be a torch.nn.ConvTranspose1d, 2d or 3d, got {shown(names[0])}", "module"
        )
    try:
        return _arguments(module, int(matches[0].group(1)))
    except AttributeError as error:  # a class of that name that is not torch's, or no __init__ yet
        raise SpecError(f"module must be initialised: {visible(str(error))}", "module") from None


def _arguments(module: Any, rank: int) -> dict[str, Any]:
    if "Uninitialized" in type(module.weight).__name__:
        raise SpecError("module must be initialised: call a lazy one once", "module")
    if module.padding_mode != "zeros":
        raise SpecError(
            f"padding_mode must be zeros, got {shown(module.padding_mode)}", "padding_mode"
        )
    return {
        "rank": rank,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "output_padding": module.output_padding,
        "groups": module.groups,
        "bias": module.bias is not None,
        "dilation": module.dilation,
        "dtype": str(module.weight.dtype).removeprefix("torch."),
        "layout": layout_of(module.weight),
    }


def layout_of(tensor: Any) -> str:
    """Return the layout of a layer's weight, or of its input [N, C, spatial…], by its strides.

    torch runs a layer in channels_last if one of the two is. Axes of size 1 can make a tensor dense
    in both formats (the weight of a depthwise layer, for example); its strides decide then too. If
    both formats have the same strides, it is channels_first.
    """
    if tensor.dim() < 4 or 0 in tensor.shape:
        return "channels_first"
    sizes, strides = tensor.shape, tensor.stride()
    least = 0
    for axis in (1, *range(tensor.dim() - 1, 1, -1), 0):  # from the innermost to the outermost
        if strides[axis] < least or (axis == 0 and least == strides[1]):
            return "channels_first"
        least = strides[axis] * sizes[axis]
    return "channels_last"
