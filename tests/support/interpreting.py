"""Triton's interpreter: without what it computes for nothing, and only where it works.

It works out again, in int64, whether each sum and product of integers overflows; the assert that
would read it is made in debug mode alone. It also looks for the functions of triton.language anew
at each call of a function, and describes the same few shapes, and checks the same few types, again
at each sum. Without all that, tests take less than a third of the time.
"""

from __future__ import annotations

import ast
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

KNOWN = "3.7.1"  # of Triton; the only one whose inner functions are replaced


@functools.cache  # once a process: what takes the place of a function calls the one before it
def prepare() -> None:
    """Have the interpreter in this process leave out what nobody reads, and what it has done."""
    import triton

    name_callers_alone()
    leave_out_overflow_checks()
    if triton.__version__ == KNOWN:
        patch_once()
        read_once()
        describe_once()
        check_once()
        shift_bfloat16()
        locate_by_axes()


def name_callers_alone() -> None:
    """Have torch note the file and line of who registers an operator, which each emitted file does.

    It would search all modules for him: that takes most of the time in which a file is loaded.
    """
    import torch

    def source_of(level: int) -> str:
        frame = sys._getframe(level)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    torch._library.utils.get_source = source_of


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

    def attribute(of: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # without the check of the argument
        semantic = interpreter.interpreter_semantic

        def called(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            return function(*args, **kwargs, _semantic=semantic)

        scope.set_attr(of, name, called)

    interpreter._patch_lang, interpreter._patch_attr = patched, attribute


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

    plain, of_shape = core.block_type.__init__, functools.cache(core.tuple)

    @functools.cache
    def of_block(element: core.dtype, shape: tuple[int, ...]) -> core.block_type:
        block = object.__new__(core.block_type)
        plain(block, element, list(shape))
        block.shape = of_shape(shape)  # the same object in blocks of any element
        return block

    def block(_: type, element: core.dtype, shape: Any) -> core.block_type:
        unwrap = core._unwrap_if_constexpr
        return of_block(element, tuple([s if type(s) is int else unwrap(s) for s in shape]))

    @functools.cache
    def of_tensor(shape: tuple[int, ...]) -> tuple[core.constexpr, core.tuple]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(s) for s in shape])

    def tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensor(tuple(type.shape.values) if type.is_block() else ())

    of_scalar = functools.cache(interpreter._get_np_dtype)
    of_pointer = of_scalar(core.uint64)

    def of_numpy(type: core.dtype) -> np.dtype:
        scalar = type.scalar
        return of_pointer if isinstance(scalar, core.pointer_type) else of_scalar(scalar)

    def handle(self: interpreter.TensorHandle, data: np.ndarray, dtype: core.dtype) -> None:
        self.data, self.dtype, self.attr = data, dtype, {}  # without a check of its own arrays

    interpreter.TensorHandle.__init__ = handle
    core.block_type.__new__, core.block_type.__init__ = block, lambda *_: None
    core.dtype.__hash__ = core.pointer_type.__hash__ = lambda self: hash(self.name)
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = of_numpy


def check_once() -> None:
    """Have operands of the same types checked, and equal numbers made to tensors, once.

    Nor are scalars filled into blocks, as numpy computes a number with an array.
    """
    from triton.language.core import dtype, tensor
    from triton.language.semantic import TritonSemantic

    plain = TritonSemantic.binary_op_type_checking_impl
    Operand = dtype | int | float | bool

    @functools.lru_cache(maxsize=None, typed=True)  # 1, 1.0 and True are of other types
    def checked(
        semantic: TritonSemantic, left: Operand, right: Operand, *flags: bool
    ) -> tuple[tensor, tensor]:
        """Return what becomes of numbers, and of zeros in place of tensors of these types."""
        operands = (
            semantic.scalar_constant(0, x) if isinstance(x, dtype) else x for x in (left, right)
        )
        return plain(semantic, *operands, *flags)

    def become(semantic: TritonSemantic, operand: tensor | float, like: tensor) -> tensor:
        if not isinstance(operand, tensor):
            return like
        return operand if operand.dtype is like.dtype else semantic.cast(operand, like.dtype)

    def check(
        self: TritonSemantic, left: tensor | float, right: tensor | float, *flags: bool
    ) -> tuple[tensor, tensor]:
        known = [x.dtype if isinstance(x, tensor) else x for x in (left, right)]
        zero = (type(left) is float and not left) or (type(right) is float and not right)
        # As keys 0.0 and -0.0 are one.
        one, other = (checked.__wrapped__ if zero else checked)(self, *known, *flags)
        left, right = become(self, left, one), become(self, right, other)
        if left.type.is_block() and right.type.is_block():
            same = left.type.shape is right.type.shape
            return (left, right) if same else self.broadcast_impl_value(left, right)
        if left.type.is_block():
            right = tensor(right.handle, left.type.with_element_ty(right.dtype))
        elif right.type.is_block():
            left = tensor(left.handle, right.type.with_element_ty(left.dtype))
        return left, right

    TritonSemantic.binary_op_type_checking_impl = check


def shift_bfloat16() -> None:
    """Have bfloat16 and float32 become each other by a shift of their bits, as they differ by 16.

    The interpreter's own cast, which truncates too, takes numbers apart into sign, exponent and
    mantissa, and looks for the first bit of those that may be subnormal, zeros among them.
    """
    from triton.language import bfloat16, core, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast(self: InterpreterBuilder, source: TensorHandle, to: core.dtype) -> TensorHandle:
        types = source.dtype.scalar, to.scalar
        if types == (bfloat16, float32):
            bits = source.data.view(np.uint16).astype(np.uint32) << 16
            return TensorHandle(bits.view(np.float32), float32)
        if types == (float32, bfloat16):
            return TensorHandle((source.data.view(np.uint32) >> 16).astype(np.uint16), bfloat16)
        return plain(self, source, to)

    InterpreterBuilder.cast_impl = cast


def locate_by_axes() -> None:
    """Have a box's addresses summed axis by axis: only the last sum has the size of the box."""
    from triton.runtime.interpreter import TensorDescHandle, TensorHandle

    def located(
        self: TensorDescHandle, offsets: list[TensorHandle]
    ) -> tuple[TensorHandle, np.ndarray]:
        size = self.base.dtype.element_ty.primitive_bitwidth // 8
        assert offsets[-1].data * size % 16 == 0, "block offset start must be 16-byte aligned"
        address, inside = self.base.data.reshape(()), np.bool_(True)
        axes = zip(offsets, self.block_shape, self.shape, self.strides, strict=True)
        for offset, length, extent, stride in axes:
            at = offset.data + np.arange(length)
            address = address[..., None] + (size * at * stride.data).astype(np.uint64)
            inside = inside[..., None] & (at >= 0) & (at < extent.data)
        return TensorHandle(address, self.base.dtype.scalar), inside

    TensorDescHandle.materialize_pointers = located


def skip_where_it_fails() -> None:
    """Skip a test that runs the interpreter even beside a GPU, if the versions do not fit.

    Before 3.7.1 Triton takes arrays of one element for numbers, which numpy refuses since 2.4.
    """
    import triton

    if Version(triton.__version__) < Version("3.7.1") and Version(np.__version__) >= Version("2.4"):
        versions = f"Triton {triton.__version__} with numpy {np.__version__}"
        pytest.skip(f"the interpreter of {versions} fails in loops; Triton 3.7.1's works")
