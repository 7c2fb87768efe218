"""Triton's interpreter: without what it computes for nothing, and only where it works.

It works out again, in int64, whether each sum and product of integers overflows; the assert that
would read it is made in debug mode alone. It also looks for the functions of triton.language anew
at each call of a function, and describes the same few shapes again at each sum. Without all that,
tests take a third of the time.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

KNOWN = "3.7.1"  # of Triton; the only one whose inner functions are replaced


def prepare() -> None:
    """Have the interpreter in this process leave out what nobody reads, and what it has done."""
    import triton

    leave_out_overflow_checks()
    if triton.__version__ == KNOWN:
        patch_once()
        read_once()
        describe_once()


def leave_out_overflow_checks() -> None:
    """Have the interpreter in this process compute no checks that nobody reads."""
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def patch_once() -> None:
    """Leave the interpreter's functions in the places of those of triton.language.

    It puts them there at each launch, and again at each call of a function that is none of
    theirs, `zeros` for example, after a search of all of triton.language. What kernels are written
    with has no other use in a process that interprets.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def patched(function: Callable[..., Any]) -> interpreter._LangPatchScope:
        patch(function)
        return interpreter._LangPatchScope()  # restores nothing

    interpreter._patch_lang = patched


def read_once() -> None:
    """Have a kernel's text, which is rewritten before its first launch, read and walked once.

    The interpreter reads it a second time for the number of its line, and adds that to each node.
    """
    from triton.runtime.interpreter import FunctionRewriter

    prepared = FunctionRewriter._prepare_source

    def source(self: FunctionRewriter, lines: list[str]) -> str:
        above = self.fn.__code__.co_firstlineno + self.def_lineno - 2
        return "\n" * above + prepared(self, lines)

    def tree(self: FunctionRewriter, text: str) -> ast.Module:
        return ast.fix_missing_locations(self.ast_transformer.visit(ast.parse(text)))

    FunctionRewriter._get_jit_fn_file_line = lambda self: (self.fn.__code__.co_filename, 1)
    FunctionRewriter._prepare_source, FunctionRewriter._transform_ast = source, tree


def describe_once() -> None:
    """Have equal shapes and types described once: each operation makes several of them."""
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def of_tensor(shape: tuple[int, ...]) -> tuple[core.constexpr, core.tuple]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(s) for s in shape])

    def tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensor(tuple(type.shape) if type.is_block() else ())

    @functools.cache
    def of_block(shape: tuple[int, ...]) -> tuple[core.tuple, int]:
        return core.tuple(shape), core.validate_block_shape(shape)

    plain = core.block_type.__init__

    def block(self: core.block_type, element: core.dtype, shape: Any) -> None:
        sizes = tuple(shape)
        if not sizes or any(type(size) is not int for size in sizes):
            plain(self, element, shape)
            return
        self.element_ty = element
        self.shape, self.numel = of_block(sizes)
        self.name = f"<{self.shape}, {element}>"

    of_scalar = functools.cache(interpreter._get_np_dtype)
    of_pointer = of_scalar(core.uint64)

    def of_numpy(type: core.dtype) -> np.dtype:
        scalar = type.scalar
        return of_pointer if isinstance(scalar, core.pointer_type) else of_scalar(scalar)

    core.tensor.__init__, core.block_type.__init__ = tensor, block
    interpreter._get_np_dtype = of_numpy


def skip_where_it_fails() -> None:
    """Skip a test that runs the interpreter even beside a GPU, if the versions do not fit.

    Before 3.7.1 Triton takes arrays of one element for numbers, which numpy refuses since 2.4.
    """
    import triton

    if Version(triton.__version__) < Version("3.7.1") and Version(np.__version__) >= Version("2.4"):
        versions = f"Triton {triton.__version__} with numpy {np.__version__}"
        pytest.skip(f"the interpreter of {versions} fails in loops; Triton 3.7.1's works")
