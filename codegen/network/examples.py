"""Example inputs of a model: the sizes and dtypes that its transposed convolutions are called with.

Beside the stages; needs torch, imported when a function is called. Input: a model and examples of
what it is called with; output: the calls of its layers, and the rungs of a layer's spec.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import SpecError, shown
from .calls import Call, random_restored, recorded, user_code
from .layers import is_emitted

# Of an emitted layer: what a run with examples is not to change.
OWN = ("_strict", "_calls", "_notice")
MOST = 2  # rungs of a layer: with both layouts each has two kernels


def example_calls(
    model: Any, layers: dict[str, Any], examples: Any
) -> dict[str, tuple[Call, ...]] | None:
    """Run a model with examples; return the calls of each layer, None without examples.

    It runs as it is, in its mode and under the caller's autocast, but without gradients. Buffers,
    modes and random numbers are afterwards as they were before.

    Args:
        model: a `torch.nn.Module`.
        layers: its transposed convolutions by their names.
        examples: a tensor, a tuple of positional or a dict of keyword arguments; a list of these;
            or a function that calls the model it is given.

    Raises:
        SpecError: `examples` is none of these.
        ModelError: the model's own code raised.
    """
    if examples is None:
        return None
    import torch

    runs = [_run(each) for each in (examples if isinstance(examples, list) else [examples])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_restored(_gpus(model)))
        stack.enter_context(_state_restored(model))
        calls = stack.enter_context(recorded(layers))
        stack.enter_context(torch.no_grad())
        stack.enter_context(user_code("the model's forward"))
        results = [run(model) for run in runs]
    if any(map(inspect.isgenerator, results)):
        raise SpecError(
            "example_inputs: a call gave a generator, whose code has not run", "example_inputs"
        )
    return {name: tuple(each for each in calls if each.name == name) for name in layers}


def _run(example: Any) -> Callable[[Any], object]:
    """Return what calls a model as an example says."""
    from torch import Tensor

    if isinstance(example, Tensor):
        return lambda model: model(example)
    if isinstance(example, tuple):
        return lambda model: model(*example)
    if isinstance(example, dict):
        return lambda model: model(**example)
    if callable(example) and not isinstance(example, type):
        return lambda model: example(model)
    raise SpecError(
        "example_inputs must be a tensor, a tuple of arguments, a dict of named ones, a list of "
        f"these, or a function that calls the model, got {shown(example)}",
        "example_inputs",
    )


def _gpus(model: Any) -> list[int]:
    """Return the CUDA devices of a model, and the current one."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {tensor.get_device() for tensor in model.parameters() if tensor.is_cuda}
    return sorted(found | {torch.cuda.current_device()})


@contextlib.contextmanager
def _state_restored(model: Any) -> Iterator[None]:
    """Restore the buffers and modes of a model's modules, and what emitted layers count.

    Only buffers that have changed are written: a backward pass may still need the others.
    """
    modes = {module: module.training for module in model.modules()}
    kept = [
        (module, name, buffer, None if buffer is None else _value_of(buffer))
        for module in modes
        for name, buffer in module._buffers.items()
    ]
    emitted = [module for module in modes if is_emitted(module)]
    before = [
        {name: vars(each).pop(name) for name in OWN if name in vars(each)} for each in emitted
    ]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*computed by torch", UserWarning)  # by old layers
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for each, own in zip(emitted, before, strict=True):
            vars(each).pop("_calls", None)
            vars(each).update(own)
        for module, name, buffer, value in kept:
            module._buffers[name] = buffer
            if value is not None:
                _put_back(buffer, value)


def _value_of(buffer: Any) -> Any:
    """Return a copy of a buffer; raises SpecError if it is nothing yet."""
    from torch.nn.parameter import is_lazy

    if is_lazy(buffer):
        raise SpecError(
            "a module of the model is lazy and not initialised: run the model once first", "model"
        )
    return buffer.detach().clone()


def _put_back(buffer: Any, value: Any) -> None:
    """Give a buffer its value again, if it has another: batch norm's change leaves no mark."""
    import torch

    if buffer.shape != value.shape:
        buffer.data = value
    elif not torch.equal(buffer, value):
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.copy_(value)


def rungs_of(calls: Sequence[Call]) -> tuple[tuple[int, ...], ...]:
    """Return the inputs that get a kernel of their own: the sizes that are called most.

    Of calls with equal spatial sizes the largest batch counts: one kernel serves them all.
    """
    batches: dict[tuple[int, ...], int] = {}
    times: Counter[tuple[int, ...]] = Counter()
    for call in calls:
        if call.shape and 0 not in call.shape:
            sizes = call.shape[1:]
            batches[sizes] = max(batches.get(sizes, 0), call.shape[0])
            times[sizes] += 1
    often = sorted(times, key=lambda sizes: (-times[sizes], -batches[sizes] * math.prod(sizes)))
    return tuple((batches[sizes], *sizes) for sizes in often[:MOST])


def dtype_of(calls: Sequence[Call]) -> str | None:
    """Return the dtype of autocast that all calls were made under, None if they differ."""
    dtypes = {call.dtype for call in calls}
    return dtypes.pop() if len(dtypes) == 1 else None
