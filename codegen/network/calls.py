"""Calls of a model's transposed convolutions: the sizes, layouts and dtypes that a run has.

Beside the stages; needs torch, imported when a function is called. Input: layers by their names,
and a block that runs their model; output: `Call`s.
"""

from __future__ import annotations

import contextlib
import random
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..language.torch_module import layout_of
from .layers import torch_kinds

_PACKAGE = str(Path(__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a layer, as far as its spec depends on it.

    Attributes:
        name: the layer's name.
        shape: (batch, channels, spatial…) of the input, with batch 1 for an unbatched one.
        batched: whether the input has a batch.
        layout: layout of the input, by its strides.
        dtype: the dtype of autocast, None without.
        output: spatial extents of the output if the call gave `output_size`, else None.
    """

    name: str
    shape: tuple[int, ...] = ()
    batched: bool = True
    layout: str = "channels_first"
    dtype: str | None = None
    output: tuple[int, ...] | None = None


@contextlib.contextmanager
def recorded(layers: dict[str, Any]) -> Iterator[list[Call]]:
    """Yield a list to which each call of a layer in the block is added, in order."""
    import torch

    calls: list[Call] = []

    def seen(name: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(_call(name, layer, args, kwargs, output))

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            # The first of all hooks: others may change the output.
            handle = layer.register_forward_hook(seen(name), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        # Unless Dynamo is loaded nothing is compiled; a compiled graph has no hooks.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield calls


def _call(name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> Call:
    from torch import Tensor

    x = args[0] if args else kwargs.get("input")
    kinds = torch_kinds()
    rank = next(rank for rank, kind in enumerate(kinds, 1) if isinstance(layer, kind))
    if not isinstance(x, Tensor) or x.dim() not in (rank + 1, rank + 2):
        return Call(name)  # of a subclass with a forward of its own
    batched = x.dim() == rank + 2
    x = x if batched else x.unsqueeze(0)  # as torch does
    resized = (args[1] if len(args) > 1 else kwargs.get("output_size")) is not None
    return Call(
        name,
        tuple(x.shape),
        batched,
        layout_of(x),
        _autocast_dtype(x),
        tuple(output.shape[-rank:]) if resized and isinstance(output, Tensor) else None,
    )


def _autocast_dtype(tensor: Any) -> str | None:
    """Return the dtype of the autocast that is on for a tensor's device, None without."""
    import torch

    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")


# ---- the user's code ----


@contextlib.contextmanager
def random_restored(gpus: list[int]) -> Iterator[None]:
    """Restore the random states of Python, of torch on the CPU and these GPUs, and of NumPy."""
    import torch

    own, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn whatever the user's code in the block raises into a ModelError with its place."""
    try:
        yield
    except (Exception, SystemExit) as error:  # SystemExit: a script that parses arguments
        lines = "".join(traceback.format_exception_only(error)).rstrip()
        raise ModelError(f"{what} failed{_place(error)}\n{_indented(lines)}") from error


def _place(error: BaseException) -> str:
    """Return the innermost line that is not convgen's, torch's or of Python's own modules."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not _is_library(frame.filename)]
    if not theirs:  # a syntax error, which says its place itself
        return ""
    file, line, name, text = theirs[-1]
    return f", at {file}:{line} in {name}" + (f"\n{_indented(text)}" if text else "")


def _is_library(file: str) -> bool:
    import torch

    python = sysconfig.get_path("stdlib")
    own = file.startswith(python) and "site-packages" not in file.removeprefix(python)
    return own or file.startswith((_PACKAGE, str(Path(torch.__file__).parent), "<frozen importlib"))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))
