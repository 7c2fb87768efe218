"""One transposed convolution in torch and in emitted files: its numbers, twins and errors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import convgen
from convgen.execution.loading import load_module

LAYER = "ConvTranspose{rank}d(4, 6, 3, stride=2, padding=1, groups=2, dtype={dtype})"
GEOMETRY = {"stride": 2, "padding": 1, "groups": 2}
REFUSAL = "this file was generated for"
close = functools.partial(torch.allclose, rtol=1e-10, atol=1e-10)


def loader(folder: Path) -> Callable[[str], ModuleType]:
    """Return the function from a spec's text to its module, emitted once."""
    count = itertools.count()
    return functools.cache(
        lambda text: load_module(convgen.emit(text), f"{folder.name}_{next(count)}", folder)
    )


def numbers(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(rank=2, dtype=torch.float64, device="cpu"):
    """Return input, weight and bias of the plain layer."""
    spatial, kernel = (3, 4, 2)[:rank], (3,) * rank
    shapes = ((2, 4, *spatial), (4, 3, *kernel), (6,))
    return [numbers(*shape, dtype=dtype, seed=n).to(device) for n, shape in enumerate(shapes)]


def reference(x, weight, bias):
    """Call torch's function with the plain layer's geometry."""
    return getattr(F, f"conv_transpose{weight.dim() - 2}d")(x, weight, bias, **GEOMETRY)


def twin(model, rank=2, **others):
    """Return torch's layer with copies of the model's weights."""
    layer = getattr(nn, f"ConvTranspose{rank}d")(
        4, 6, 3, **{**GEOMETRY, **others}, dtype=model.weight.dtype, device=model.weight.device
    )
    layer.load_state_dict(model.state_dict())
    return layer


def raised(call):
    """Return the type and text of what `call` raises."""
    with pytest.raises(Exception, match=r"\w") as caught:
        call()
    return type(caught.value), str(caught.value)


def outcome(call):
    """Return the type and text of what `call` raises, None if it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None
