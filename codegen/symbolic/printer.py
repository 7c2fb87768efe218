"""Printing index expressions as Triton text.

Stage 5, render. Input: an expression and the `Space` of its symbols; output: text that evaluates
to the same number. An expression without faithful text raises PrintError. Triton's `//` and `%`
truncate where Python's floor, so both print only if the dividend is proved non-negative and the
divisor positive. That must hold even for a loop of 0 steps: a pipelined loop computes addresses
ahead of its trip count. Both print in parentheses: `28*m // 28` is not `28*(m // 28)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
from sympy import Expr, Symbol

from .lines import bare
from .space import AtLeast, CeilDiv, FloorDiv, Modulo, Space, expand

# By the rank of a tile: the index that broadcasts a vector along each dimension.
SPREADS = {
    1: ("",),
    2: ("[:, None]", "[None, :]"),
    3: ("[:, None, None]", "[None, :, None]", "[None, None, :]"),
}


class PrintError(Exception):
    """An expression that has no faithful text: a bug in convgen, whatever the spec."""


@dataclass(frozen=True, slots=True)
class Printer:
    """Prints expressions of one space.

    Attributes:
        space: ranges of the symbols, for the proofs that `//` and `%` need.
        wide: symbols that are cast to int64 wherever they are read.
    """

    space: Space
    wide: frozenset[Symbol] = frozenset()

    def text(self, expr: Expr) -> str:
        """Return `expr` as text, terms ordered from the largest stride to the smallest.

        Raises PrintError if `expr` has no faithful text.
        """
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
        """Sort key: positive terms, then variables before constants, then large strides first."""
        sizes = sum(1 for factor in sympy.Mul.make_args(term) if factor in self.space.sizes)
        moving = not term.free_symbols <= self.space.sizes.keys()
        return (term.could_extract_minus_sign(), not moving, -sizes, _name(term))

    def _size_order(self, size: Symbol) -> tuple[bool, bool, str]:
        """Sort key: run-time sizes first, as Triton's interpreter has no constexpr * tensor."""
        return (self.space.number(size) is not None, size.name.isupper(), size.name)

    def _term(self, term: Expr) -> str:
        factors = sympy.Mul.make_args(term)
        sizes = sorted((f for f in factors if f in self.space.sizes), key=self._size_order)
        numbers = [f for f in factors if f.is_Integer and f != 1]
        moving = sorted((f for f in factors if f not in sizes and not f.is_Integer), key=_name)
        texts = [self._atom(factor) for factor in moving]
        constants = [self._atom(factor) for factor in [*numbers, *sizes]]
        # Parentheses around a product of known sizes let Triton fold it at compile time.
        # Run-time sizes have none: each multiplication then stays int64 if its left side is.
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
    """Return sympy's text of `expr`, the last sort key (cached: sympy prints slowly)."""
    return str(expr)
