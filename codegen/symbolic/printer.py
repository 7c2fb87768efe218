"""Printing index expressions as Triton text.

Stage 5, the spelling of sympy. Input: an expression and the `Space` it lives in; output: text that
evaluates to the same number. What cannot be printed faithfully is refused: Triton's `//` and `%`
truncate where Python's floor, so both print only for operands proved non-negative, by divisors
proved positive (a pipelined loop computes addresses ahead of its trip count, even for none), and
always in parentheses (`28*m // 28` is not `28*(m // 28)`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
from sympy import Expr, Symbol

from .lines import bare
from .space import AtLeast, CeilDiv, FloorDiv, Modulo, Space, expand

# What spreads a vector over the dimensions of a tile, by how many there are.
SPREADS = {
    1: ("",),
    2: ("[:, None]", "[None, :]"),
    3: ("[:, None, None]", "[None, :, None]", "[None, None, :]"),
}


class PrintError(Exception):
    """An expression that has no faithful text; a bug of convgen, never of a spec."""


@dataclass(frozen=True, slots=True)
class Printer:
    """Prints expressions of one space.

    Attributes:
        space: ranges, for the proofs that `//` and `%` need.
        wide: symbols to be cast to int64 where they are read.
    """

    space: Space
    wide: frozenset[Symbol] = frozenset()

    def text(self, expr: Expr) -> str:
        """Return `expr` as text, its terms from the longest stride to the shortest."""
        terms = sorted(sympy.Add.make_args(expand(expr)), key=self._term_order)
        text = ""
        for term in terms:
            negative = term.could_extract_minus_sign()
            factor = self._term(-term if negative else term)
            if not text:
                text = f"-{factor}" if negative else factor
            else:
                text += f" - {factor}" if negative else f" + {factor}"
        return text

    def _term_order(self, term: Expr) -> tuple[bool, bool, int, str]:
        """Variables before constants, positive before negative terms, long strides first."""
        sizes = sum(1 for factor in sympy.Mul.make_args(term) if factor in self.space.sizes)
        moving = not term.free_symbols <= self.space.sizes.keys()
        return (term.could_extract_minus_sign(), not moving, -sizes, _name(term))

    def _size_order(self, size: Symbol) -> tuple[bool, bool, str]:
        """Sizes of run time first: the interpreter cannot multiply a constant by a tensor."""
        return (self.space.number(size) is not None, size.name.isupper(), size.name)

    def _term(self, term: Expr) -> str:
        factors = sympy.Mul.make_args(term)
        sizes = sorted((f for f in factors if f in self.space.sizes), key=self._size_order)
        numbers = [f for f in factors if f.is_Integer and f != 1]
        moving = sorted((f for f in factors if f not in sizes and not f.is_Integer), key=_name)
        texts = [self._atom(factor) for factor in moving]
        constants = [self._atom(factor) for factor in [*numbers, *sizes]]
        # A product of known sizes is a number: grouped, it is multiplied once, at compile time.
        # Sizes of run time multiply one after the other, so that an int64 on the left spreads.
        if len(constants) > 1 and texts and all(self.space.number(f) is not None for f in sizes):
            constants = [f"({' * '.join(constants)})"]
        return " * ".join([*texts, *constants]) or "1"

    def _atom(self, expr: Expr) -> str:
        if expr.is_Integer:
            return str(int(expr))
        if isinstance(expr, Symbol):
            return f"tl.cast({expr.name}, tl.int64)" if expr in self.wide else str(expr.name)
        if isinstance(expr, AtLeast):
            return f"tl.cast({self.text(expr.args[0])} >= {self.text(expr.args[1])}, tl.int32)"
        if isinstance(expr, CeilDiv):
            return f"tl.cdiv({', '.join(map(self.text, expr.args))})"
        if isinstance(expr, (FloorDiv, Modulo)):
            for operand, least in zip(expr.args, (0, 1), strict=True):
                if not self.space.is_nonnegative(self.space.bounds(operand).low - least):
                    raise PrintError(f"{operand} may be below {least} in {expr}")
            sign = "//" if isinstance(expr, FloorDiv) else "%"
            return f"({self._operand(expr.args[0])} {sign} {self._operand(expr.args[1])})"
        raise PrintError(f"no text for {expr!r} ({type(expr).__name__})")

    def _operand(self, expr: Expr) -> str:
        text = self.text(expr)
        return f"({text})" if " " in bare(text) and text == bare(text) else text


@functools.lru_cache(maxsize=4096)
def _name(expr: Expr) -> str:
    """Return sympy's text of `expr`, which orders what nothing else does."""
    return str(expr)
