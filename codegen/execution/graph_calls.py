"""An emitted file's operator as Inductor's graphs call it: without the dispatcher and its checks.

Beside the stages; needs torch. Input: the names of an emitted file; output: a function that
computes what its operator does. The first and the second call of a kind take the way of the file's
own `_forward`, and what the second launches is noted; later ones launch the same again, on their
own tensors. A kind is all that `_forward` decides by: sizes, strides, dtypes, device and alignment;
under autocast, which decides, too, calls take the file's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

MOST_KINDS = 1024  # further kinds of call always take the file's own way
ALIGNED = 16  # bytes; Inductor's tensors are, and kernels are compiled for it

# What leads from `_forward` to `_launched`, by the names in a file; some it may not have.
_FUNCTIONS = ("_forward", "_launch", "_pack", "_packed", "_copied")


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch to be made again.

    Attributes:
        operands: what it reads, each a place among input, weight, bias and what earlier launches
            of the call made; and the class of the tensor descriptor that it takes, if it is one.
        dtype, shape, stride: of the tensor that it makes.
        run, programs, kernel, others, compiled: as `_launched` of an emitted file keeps them.
    """

    operands: tuple[tuple[int, type | None], ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    run: Callable[..., None]
    programs: tuple[int, ...]
    kernel: tuple[Any, ...]
    others: tuple[Any, ...]
    compiled: Any


class GraphCalls:
    """The calls of a file's operator in graphs; call it as the operator.

    Args:
        file: the names of an emitted module.
    """

    def __init__(self, file: dict[str, Any]) -> None:
        self._file = file
        # Launches by kind of call: none yet before its second, None if they cannot be made again.
        self._kinds: dict[Any, Sequence[_Launch] | None] = {}

    def __call__(self, input: Any, weight: Any, bias: Any) -> Any:
        """Return the output of the layer, as the operator does."""
        device, pointers = input.get_device(), input.data_ptr() | weight.data_ptr()
        kind: tuple[Any, ...] = device, _kind(input), _kind(weight)
        together = weight.get_device() == device
        if bias is not None:
            kind = *kind, _kind(bias)
            pointers |= bias.data_ptr()
            together = together and bias.get_device() == device
        launches = None
        here = together and device >= 0 and torch._C._cuda_getDevice() == device
        if here and not pointers % ALIGNED and not torch._C._is_any_autocast_enabled():
            launches = self._kinds.get(kind, ())
        if launches:
            return self._again(launches, [input, weight, bias], device)
        if launches is None:
            return self._file["_forward"](input, weight, bias)
        if kind in self._kinds:
            output, self._kinds[kind] = self._noted(input, weight, bias)
            return output
        if len(self._kinds) < MOST_KINDS:
            self._kinds[kind] = ()
        return self._file["_forward"](input, weight, bias)

    def _again(self, launches: Sequence[_Launch], tensors: list[Any], device: int) -> Any:
        """Launch again; return what the last one makes."""
        empty = self._file["_empty_strided_cuda"]
        stream = torch._C._cuda_getCurrentRawStream(device)
        for each in launches:
            made = empty(each.shape, each.stride, each.dtype)
            operands = [
                tensors[place].data_ptr() if box is None else _described(box, tensors[place])
                for place, box in each.operands
            ]
            each.run(*each.programs, stream, *each.kernel, *operands, made.data_ptr(), *each.others)
            tensors.append(made)
        return tensors[-1]

    def _noted(self, *tensors: Any) -> tuple[Any, list[_Launch] | None]:
        """Return the output of a first call, and its launches if they can be made again."""
        file, noted = self._file, list[tuple[Any, Any, Any]]()

        def launched(call: Any, operands: Any, arguments: Any) -> Any:
            made = file["_launched"](call, operands, arguments)
            noted.append((call, operands, made))
            return made

        # The file's own functions, in a scope of their own: other threads may call it meanwhile.
        scope = file | {"_launched": launched}
        for name in _FUNCTIONS:
            if name in file:
                scope[name] = FunctionType(file[name].__code__, scope)
        try:
            output = scope["_forward"](*tensors)
        finally:
            scope.clear()  # a function's scope that has the function would keep what is noted
        return output, self._launches(noted, tensors, output)

    def _launches(
        self, noted: Sequence[tuple[Any, Any, Any]], tensors: Sequence[Any], output: Any
    ) -> list[_Launch] | None:
        """Return what has to be kept of noted launches; None if something else computed, too."""
        known = [None if each is None else each.data_ptr() for each in tensors]
        found = []
        for call, operands, made in noted:
            kept = self._file["LAUNCHED"].get(call)
            places = tuple(place for each in operands if (place := _place(each, known)))
            if kept is None or len(places) < len(operands):
                return None
            found.append(_Launch(places, made.dtype, *kept))
            known.append(made.data_ptr())
        if not found or output.data_ptr() != known[-1]:
            return None
        last = found[-1]
        return found if (output.shape, output.stride()) == (last.shape, last.stride) else None


def _kind(tensor: Any) -> tuple[Any, ...]:
    """Return what `_forward` decides by of a tensor, but for its address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()


def _place(operand: Any, known: Sequence[int | None]) -> tuple[int, type | None] | None:
    """Return which tensor an operand is, by its address, and its descriptor's class; None if none.

    Addresses that two tensors share tell nothing: another call's tensors may not share theirs.
    """
    if isinstance(operand, int):
        address, box = operand, None
    else:
        address, box = operand.base.data_ptr(), type(operand)
        if not hasattr(box, "shape"):  # the file keeps no class for this kind of call
            return None
    return (known.index(address), box) if known.count(address) == 1 else None


def _described(box: type, tensor: Any) -> Any:
    """Return the descriptor of a tensor: the class has all fields but this one."""
    made: Any = object.__new__(box)
    made.base = tensor
    return made
