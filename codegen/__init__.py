"""convgen: a compiler from a description of a transposed convolution to a Triton kernel.

`parse(text)` reads a description, `emit(spec)` returns the text of the file,
`replace_layers(model)` lets the layers of a torch model run such files, `report(model)` says what
became of them, `restore_layers(model)` undoes it, and `freeze(model)` speeds up a model whose
weights no longer change. Importing this package imports none of sympy, jinja2, torch and triton:
the functions that need them import them when called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from .errors import ConvgenError, SpecError
from .language.parser import parse
from .language.spec import ConvTransposeSpec, check_target
from .tables.targets import TARGETS, GpuTarget, find_target
from .version import __version__

if TYPE_CHECKING:
    from .network.report import Report

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
    "report",
    "restore_layers",
    "unfreeze",
]


def emit(spec: ConvTransposeSpec | str, target: GpuTarget | str | None = None) -> str:
    """Return the text of the file for `spec`.

    Args:
        spec: a spec, or its text.
        target: the GPU to plan for, or its name; None means the spec's own, or the RTX 4090.

    Raises:
        SpecError: `spec` does not parse, `target` is unknown, or no launch grid can hold the
            kernel's programs.
    """
    from .compiler import compile_kernel

    # Exact types only: a subclass could print arbitrary text into the file.
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
    example_inputs: Any = None,
    include: str | Iterable[str] | Callable[[str, Any], bool] | None = None,
    exclude: str | Iterable[str] | Callable[[str, Any], bool] | None = None,
    prefer: str = "fastest",
    choices: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> dict[str, str]:
    """Let the transposed convolutions of a torch model run emitted kernels.

    Layers change in place; `model` itself may be such a layer. Each layer stays the same object
    with the same parameters, hooks, parametrizations and attributes; only its class becomes an
    emitted `ModelNew`. So optimizers, tied weights and checkpoints made before or after still fit.
    The specs leave batch and spatial sizes to run time, so that a layer takes inputs
    [N, C_in, spatial...] or [C_in, spatial...] of any size. Those of rank 2 and 3 run a kernel for
    channels_first and for channels_last, whichever arrives; the output has the format that torch's
    layer would give it.

    With `example_inputs` the model runs once, and the sizes that a layer is then called with get
    kernels of their own beside that for any size: it is planned for their batch, and serves any
    batch. Other sizes run the kernel for any. Of many sizes the two that are called most count.

    Layers of a subclass of torch's layers are replaced if it overrides nothing that the kernel
    relies on (`forward`, for example), and stay instances of that subclass.

    Layers that cannot be replaced stay torch's, and a warning names them: those of subclasses that
    do override such an attribute, layers on devices other than CPU and CUDA, and layers that no
    spec can express (complex numbers, for example).

    Choices files may have torch's times of a layer beside its kernel's. A layer stays torch's if
    torch was measured to be faster at each size that has a kernel of its own (by `example_inputs`,
    with the batch that it is planned for), in each layout that arrives. What counts is the time of
    torch's operator as the layer calls it, or for a layer in a compiled module (`model` itself, for
    example) that in the better layout. If one such size was not measured or is faster in the
    kernel, or there is none, the layer is replaced. `report` has the times. `prefer="kernel"`
    replaces all.

    A second call plans anew what has changed: the dtype, device or geometry of a layer, or the
    arguments of the call. Layers whose spec is the same stay as they are. `restore_layers`
    undoes the call, `report` says what became of it.

    A call that the kernel cannot compute (another dtype than the layer's, for example) is computed
    by torch, with a warning for each layer and kind of reason.

    Args:
        model: a `torch.nn.Module`.
        target: the GPU to plan for; None means the target nearest to the GPU of this machine, or
            the RTX 4090 if it has no GPU.
        precision: precision of the float32 layers; None means tf32, or ieee if
            `torch.backends.cudnn.allow_tf32` is False at the time of the call.
        dtype: "float16" or "bfloat16" if float32 layers will run under autocast of that dtype;
            None means the dtype of each layer's parameters.
        folder: folder for the files; None means a folder that is removed when the process ends.
            Unpickling a whole model imports the files, so it needs a folder on the import path
            that nobody else may write to; layers of a subclass need convgen too. Checkpoints
            (state_dict) do not need the files.
        example_inputs: what the model will be called with: a tensor, a tuple of positional or a
            dict of keyword arguments, a list of these for several calls, or a function that calls
            the model it is given. The model runs in its mode, under the autocast that is on (whose
            dtype its layers then get), without gradients; buffers, modes and random numbers are
            afterwards as they were. None plans for any size alone, or for those of an earlier call.
        include: the layers to replace: a name in `named_modules()`, a list of names, or a function
            (name, layer) -> bool; names may be patterns ("decoder.*"). None means all.
        exclude: layers that the call leaves as they are, given in the same ways.
        prefer: "fastest" leaves a layer to torch if torch was measured to be faster, "kernel" none.
        choices: file of measured tiles from `convgen tune`, preferred to the package's own and to
            the cost model; "none" uses the cost model alone. A model that is pickled without
            `folder` is planned without this file where it is loaded.
        strict: a layer that stays torch's, for whatever reason, is an error, and so is, later, a
            call of a replaced layer that the kernel cannot compute (a ValueError).

    Returns:
        The text of the spec of each layer that now runs an emitted file, by the layer's name in
        `named_modules()`.

    Raises:
        SpecError: an argument is not one of the above, `include` or `exclude` names no transposed
            convolution of the model, `choices` is for another GPU, a lazy layer is not initialised,
            or with `strict` a layer would stay torch's.
        ModelError: the model's own code raised, with `example_inputs`.
        ProjectError: a file in `folder` was edited, other users may write to the folder, or
            `choices` cannot be read.
        MachineError: the folder cannot be written. On any error the model is unchanged.

    Warns:
        UserWarning: some layers cannot be replaced; the message names each with the reason.
    """
    from .network.replace import replace_layers as replace

    return replace(
        model,
        target=target,
        precision=precision,
        dtype=dtype,
        folder=folder,
        example_inputs=example_inputs,
        include=include,
        exclude=exclude,
        prefer=prefer,
        choices=choices,
        strict=strict,
    )


def restore_layers(model: Any) -> list[str]:
    """Undo `replace_layers`: every layer that it replaced gets back the class that it had.

    Layers change in place: each stays the same object with the same parameters, hooks,
    parametrizations and attributes; packed weights and counts of calls are dropped. Emitted layers
    that somebody built from a file stay what they are. It is for code that looks up `type(layer)`
    (`torch.ao.quantization`, some counters of FLOPs).

    Args:
        model: a `torch.nn.Module`; a compiled one or one inside of DistributedDataParallel, too.

    Returns:
        The names in `named_modules()` of the layers that were restored.

    Raises:
        SpecError: `model` is not a torch module, or something else has changed the class of a
            replaced layer since (FSDP2, for example). Nothing is changed then.
    """
    from .network.restore import restore_layers as restore

    return restore(model)


def report(model: Any) -> Report:
    """Return which transposed convolutions of a torch model ran kernels, how often, and why not.

    Calls are counted since a layer was replaced, built or copied. Compiled and captured graphs do
    not count theirs.

    Args:
        model: a `torch.nn.Module`.

    Returns:
        A report: `str()` is a table, `as_dict()` is for JSON, `layers` has a row for each layer:
        its name and spec, whether it is emitted or torch's and why, the calls that its kernel
        computed, and those that torch did, by the reason. Of a layer that was left to torch, which
        was measured to be faster, it has the times and what they were measured with.

    Raises:
        SpecError: `model` is not a torch module.
    """
    from .network.report import report as made

    return made(model)


def freeze(model: Any) -> list[str]:
    """Let the emitted layers of a torch model keep their packed weights, for inference.

    By default a layer packs its weight at every call, in a separate kernel, so that it sees every
    edit of the weight. A frozen layer skips that kernel. It does not see edits that torch does not
    report: those through `weight.data` and those by a fused optimizer.

    A layer is frozen until `unfreeze`, `train()`, a move to another device or dtype, a load of a
    checkpoint, an edit that torch reports, a new weight or parametrization, or a call that records
    a gradient of the weight. Freezing has no effect in a captured or compiled graph, nor on a layer
    whose weight is computed at each call (`weight_norm`, a parametrization).

    Args:
        model: a `torch.nn.Module` with emitted layers, such as one from `replace_layers`.

    Returns:
        The names in `named_modules()` of the emitted layers.

    Raises:
        SpecError: `model` is not a torch module.
        MachineError: torch is not installed.
    """
    from .network.replace import freeze_layers

    return freeze_layers(model, frozen=True)


def unfreeze(model: Any) -> list[str]:
    """Undo `freeze`: the emitted layers of a torch model pack their weights at every call again.

    Arguments, return value and errors are those of `freeze`.
    """
    from .network.replace import freeze_layers

    return freeze_layers(model, frozen=False)
