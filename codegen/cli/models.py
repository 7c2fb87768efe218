"""Models that a user names on the command line, and inputs for them.

Part of the command line; needs torch, imported when a function is called. Input: MODULE:FACTORY and
shapes; output: a torch module and tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import MachineError, SpecError, nearest, shown, visible
from ..network.calls import user_code
from ..values import check_choice, check_integer

FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_MOST = 2**40  # elements of an input


@contextlib.contextmanager
def imports_from_here() -> Iterator[None]:
    """Let modules of the current folder be imported in the block."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have changed the path
            sys.path.remove(here)


def find_model(text: str) -> Any:
    """Return the torch module that MODULE:FACTORY names or makes.

    Raises:
        SpecError: there is no such name, or it is neither a torch module nor a function without
            required arguments that returns one.
        ModelError: the user's own code raised.
    """
    module_name, _, path = text.partition(":")
    names = path.split(".")
    if not all(name.isidentifier() for name in (*module_name.split("."), *names)):
        raise SpecError(
            f"MODEL must be MODULE:FACTORY, names of Python such as nets:UNet, got {shown(text)}",
            "model",
        )
    found: Any = _module(module_name)
    where = module_name
    for name in names:
        found = _attribute(found, where, name)
        where = f"{where}.{name}" if ":" in where else f"{where}:{name}"
    return _made(found, text)


def _module(name: str) -> Any:
    module: Any = None
    parts = name.split(".")
    for number, part in enumerate(parts, 1):
        path, whole = getattr(module, "__path__", None), ".".join(parts[:number])
        if module is not None and path is None:
            hint = "; leave out the suffix .py" * (part == "py")
            raise SpecError(
                f"module {module.__name__} has no module {part}: it is no package{hint}"
            )
        with user_code(f"importing {whole}"):
            try:
                missing = importlib.util.find_spec(whole) is None
            except ValueError:  # as of __main__, which is loaded otherwise
                missing = True
            module = None if missing else importlib.import_module(whole)
        if missing:
            known = tuple(each.name for each in pkgutil.iter_modules(path))
            said = f"there is no module {whole}{nearest(part, known)}"
            raise SpecError(said, "model")
    return module


def _attribute(owner: Any, where: str, name: str) -> Any:
    missing = object()
    with user_code(f"reading {name} of {where}"):
        found = getattr(owner, name, missing)
        known = tuple(map(str, dir(owner))) if found is missing else ()
    if found is missing:
        raise SpecError(f"{where} has no {name}{nearest(name, known)}", "model")
    return found


def _made(found: Any, text: str) -> Any:
    """Return `found` if it is a torch module, else the one that it returns when called."""
    from torch import nn

    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        said = f"{text} is {shown(found)}, neither a torch.nn.Module nor a function that makes one"
        raise SpecError(said, "model")
    needed = _required(found)
    if needed:
        said = f"{text} needs arguments ({', '.join(needed)}); name a function that needs none"
        raise SpecError(visible(said, 500), "model")
    with user_code(text):
        made = found()
    if not isinstance(made, nn.Module):
        raise SpecError(f"{text} must return a torch.nn.Module, got {shown(made)}", "model")
    return made


def _required(function: Any) -> list[str]:
    """Return the names of the arguments that a function must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one of C tells nothing
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def made_inputs(texts: tuple[str, ...]) -> list[Any]:
    """Return a tensor for each `4,3,256,256` or `1,80:float16`; raises SpecError or MachineError.

    Floating-point inputs are normal random numbers, the same at each call; others are zero.
    """
    import torch

    numbers = torch.Generator().manual_seed(0)
    inputs = []
    for shape, dtype in [_shape(text) for text in texts]:
        kind = getattr(torch, dtype)
        try:
            if dtype in FLOATS:
                inputs.append(torch.randn(shape, generator=numbers).to(kind))
            else:
                inputs.append(torch.zeros(shape, dtype=kind))
        except (RuntimeError, MemoryError) as error:  # more than the machine's memory
            raise MachineError(f"--input: {visible(str(error))}") from None
    return inputs


def _shape(text: str) -> tuple[tuple[int, ...], str]:
    """Split an input's shape and dtype."""
    sizes, colon, dtype = text.partition(":")
    parts = [part.strip() for part in sizes.split(",")]
    try:
        if not all(re.fullmatch("[0-9]{1,30}", part) for part in parts):
            raise SpecError(f"must be sizes such as 4,3,256,256 or 1,80:float16, got {shown(text)}")
        shape = tuple(check_integer("a size", int(part), 1, _MOST) for part in parts)
        return shape, check_choice(
            "dtype", dtype.strip() if colon else FLOATS[0], FLOATS + INTEGERS
        )
    except SpecError as error:
        raise SpecError(f"--input: {error}", "input") from None
