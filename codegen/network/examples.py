"""Example inputs of a model: the sizes and dtypes that its transposed convolutions are called with.

Beside the stages; needs torch, imported when a function is called. Input: a model and examples of
what it is called with; output: the calls of its layers, and the rungs of a layer's spec.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import SpecError, shown
from .calls import Call, random_restored, recorded, user_code

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
        for run in runs:
            run(model)
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
    if callable(example):
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
    """Restore the buffers and the modes of a model's modules."""
    from torch import no_grad

    modes = {module: module.training for module in model.modules()}
    kept = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modes
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                if buffer is not None:
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
