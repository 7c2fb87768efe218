"""How often the kernels of an emitted file are launched by Triton, and how often again without it.

On a GPU the launches are real. Triton's interpreter compiles nothing, so that there a file never
repeats a launch: a stand-in for a card and its driver does, whose compiled kernels are as narrow as
Triton's own. They serve the device they were loaded on, the stream they are told, tensors aligned
as those that they were compiled for, and the integers that became part of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

ALIGNED = 16  # bytes; Triton compiles for addresses that are multiples of it, or for any


class Compiled:
    """What Triton returns of a launch; the code on the card is unloaded with it."""

    def __init__(self, code: Code) -> None:
        self.run, self.function, self.packed_metadata = code.run, code.function, code.metadata
        self.code = code

    def __del__(self) -> None:
        self.code.loaded = False


class Code:
    """A kernel on the card, which takes addresses instead of tensors."""

    def __init__(self, card: Card, launch: Any, kernel: Any, arguments: tuple[Any, ...]) -> None:
        self.card, self.launch, self.device = card, launch, card.current
        self.function, self.metadata = object(), object()
        self.loaded = True
        self.first = arguments
        names = list(inspect.signature(kernel.fn).parameters)
        free = kernel.kwargs["do_not_specialize"] or ()
        self.free = [name in free for name in names[: len(arguments)]]

    def run(self, *given: Any) -> None:
        """Launch again: the grid, the stream, what `_launched` hands over, and the arguments."""
        *programs, stream, function, metadata, _, _, _ = given[:9]
        arguments = given[9:]
        assert self.loaded, "a kernel that nobody kept"
        assert (function, metadata) == (self.function, self.metadata)
        assert self.card.current == self.device, "a kernel that was loaded on another device"
        assert stream == self.card.stream, "not the current stream"
        pairs = zip(arguments, self.first, self.free, strict=True)
        self.launch(tuple(programs), *(self._taken(*pair) for pair in pairs))

    def _taken(self, given: Any, first: Any, free: bool) -> Any:
        """Return an argument as the interpreter takes it, if this kernel serves it."""
        if isinstance(first, torch.Tensor):
            assert type(given) is int
            aligned = first.data_ptr() % ALIGNED == 0
            assert not (aligned and given % ALIGNED), "an address that it was not compiled for"
            element = (ctypes.c_char * first.element_size()).from_address(given)
            return torch.frombuffer(element, dtype=first.dtype)
        if isinstance(first, int) and not free:
            assert (given == 1, given % ALIGNED) == (first == 1, first % ALIGNED)
        return given


class Kernel:
    """A kernel of a file, whose launches by Triton are counted."""

    def __init__(self, card: Card, name: str, kernel: Any) -> None:
        self.card, self.name, self.kernel = card, name, kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            card = self.card
            card.launched[self.name] += 1
            compiled = self.kernel[grid](*arguments, **options)
            if card.real:
                return compiled
            assert card.current == card.tensors, "launched on another device than the tensors'"
            again = functools.partial(self._again, options)
            return Compiled(Code(card, again, self.kernel, arguments))

        return launch

    def _again(self, options: dict[str, Any], grid: tuple[int, ...], *arguments: Any) -> None:
        self.kernel[grid](*arguments, **options)


class Launches(dict):
    """A file's `LAUNCHED`, empty at first, whose launches count on a card."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def __setitem__(self, call: Any, launch: tuple[Any, ...]) -> None:
        shape, stride, run, *rest = launch

        def counted(*arguments: Any) -> None:
            self.card.repeated += 1
            run(*arguments)

        super().__setitem__(call, (shape, stride, counted, *rest))


class Card:
    """Counts the launches of one file's kernels.

    Attributes:
        launched: by Triton, of each kernel; repeated: those without it, of all.
        current, tensors: the device that is chosen, and the one that tensors lie on.
        stream: the current one of each device.
    """

    def __init__(self, real: bool) -> None:
        self.real = real
        self.launched: Counter[str] = Counter()
        self.repeated = 0
        self.current = self.tensors = 0
        self.stream = 0

    def counts(self) -> tuple[int, int]:
        """Return launches by Triton and those without it, and count anew."""
        found = self.launched.total(), self.repeated
        self.launched.clear()
        self.repeated = 0
        return found

    @contextlib.contextmanager
    def device_of(self, tensor: torch.Tensor) -> Iterator[None]:
        """Stand in for `torch.cuda.device_of`."""
        before, self.current = self.current, self.tensors
        yield
        self.current = before

    def take(self, file: ModuleType, patch: pytest.MonkeyPatch) -> None:
        """Count the launches of a file's kernels from now on, on this card."""
        for name, kernel in list(vars(file).items()):
            if name.endswith("_kernel"):
                patch.setattr(file, name, Kernel(self, name, kernel))
        patch.setattr(file, "LAUNCHED", Launches(self))
        if self.real:
            return
        patch.setattr(file, "_empty_strided_cuda", self._empty)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        stream = "_cuda_getCurrentRawStream"
        patch.setattr(torch._C, stream, lambda device: self.stream, raising=False)
        patch.setattr(torch.cuda, "device_of", self.device_of)
        patch.setattr(torch.Tensor, "get_device", lambda tensor: self.tensors)

    @staticmethod
    def _empty(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype)
