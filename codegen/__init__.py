"""convgen: a compiler from a description of a transposed convolution to a Triton kernel.

`parse(text)` reads a description, `emit(spec)` returns the text of the file,
`replace_layers(model)` puts such files to use in a torch model, `freeze(model)` is for one whose
weights no longer change. Importing this package imports neither sympy nor jinja2, torch nor triton:
what needs them loads when it is first used.
"""

from __future__ import annotations

import os
from typing import Any, cast

from .errors import ConvgenError, SpecError
from .language.parser import parse
from .language.spec import ConvTransposeSpec, check_target
from .tables.targets import TARGETS, GpuTarget, find_target
from .version import __version__

__all__ = [
    "TARGETS",
    "ConvTransposeSpec",
    "ConvgenError",
    "GpuTarget",
    "SpecError",
    "__version__",
    "emit",
    "find_target",
    "freeze",
    "parse",
    "replace_layers",
    "unfreeze",
]


def emit(spec: ConvTransposeSpec | str, target: GpuTarget | str | None = None) -> str:
    """Return the text of the file for `spec`.

    Args:
        spec: a spec, or its text.
        target: the GPU it is for, or its name; None is the spec's own, or the RTX 4090.

    Raises:
        SpecError: the text is no spec, the name no GPU's, or no launch grid can hold its programs.
    """
    from .compiler import compile_kernel

    # A subclass could print itself as it likes, into the file.
    if target is not None and type(target) is not GpuTarget:
        target = find_target(check_target(target))
    layer = spec if type(spec) is ConvTransposeSpec else parse(cast(str, spec))
    return compile_kernel(layer, target).text


def replace_layers(
    model: Any,
    *,
    target: str | None = None,
    precision: str | None = None,
    dtype: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """Let every transposed convolution of a torch model compute by an emitted kernel.

    The layers change in place, the model itself if it is one: each stays the same object with the
    same parameters, hooks, parametrizations and attributes, and becomes an emitted `ModelNew`. So
    optimizers, tied weights and checkpoints of before and after fit. A spec leaves batch and
    spatial sizes open, so that inputs may have any: [N, C_in, spatial...] or [C_in, spatial...].

    Subclasses of torch's layers, layers on devices other than CPU and CUDA, and what no spec can
    express (complex numbers, for one) stay, and a warning names them.

    Args:
        model: a `torch.nn.Module`.
        target: the GPU to plan for; None is the one nearest to the GPU at hand, without one the
            RTX 4090.
        precision: of the layers in float32; None is tf32.
        dtype: "float16" or "bfloat16" for layers in float32 that are to run under that autocast;
            None is the dtype of each layer's parameters.
        folder: where the files go; None is a folder that is removed when the process ends. A model
            that is pickled whole is loaded by importing them: give a folder that can be imported
            from, and that nobody else may write to. Checkpoints need none.

    Returns:
        The text of the spec of each replaced layer, by the layer's name in `named_modules()`.

    Raises:
        ConvgenError: the model is as it was then. SpecError: an argument is none of these, or a
            lazy layer is not initialised. ProjectError: a file in `folder` was edited, or others
            may write to it. MachineError: it cannot be written.

    Warns:
        UserWarning: layers stay as they are, each with the reason.
    """
    from .execution.replace import replace_layers as replace

    return replace(model, target, precision, dtype, folder)


def freeze(model: Any) -> list[str]:
    """Let the emitted layers of a torch model keep their packed weights, to serve it unchanged.

    A layer packs its weight at every call, by a kernel of its own, so that no edit goes unseen; a
    frozen one launches that kernel no more, and sees no edit that torch does not report: one
    through `weight.data`, or by a fused optimizer. For a layer it ends with `unfreeze`, `train()`,
    a move to another device or dtype, a load, an edit that torch reports, a call that records a
    gradient of the weight, and another weight or a parametrization of it. It does not count in a
    graph that is captured or compiled.

    Args:
        model: a `torch.nn.Module`, such as `replace_layers` changed.

    Returns:
        The names in `named_modules()` of the emitted layers.

    Raises:
        SpecError: the model is no torch module.
    """
    from .execution.replace import freeze_layers

    return freeze_layers(model, frozen=True)


def unfreeze(model: Any) -> list[str]:
    """End `freeze`: the emitted layers of a torch model pack their weights at every call again.

    Args, returns and errors are those of `freeze`.
    """
    from .execution.replace import freeze_layers

    return freeze_layers(model, frozen=False)
