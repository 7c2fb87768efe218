"""Index math: symbols with ranges, and the proofs that need them.

Stage 3, index. Input: sympy expressions in symbols of known range; output: their bounds, their
simplified form, and proofs that they are non-negative or fit int32. `access.py` uses these to
mask every coordinate that is not proved to be in [0, extent).

Legend: a *size* is a positive symbol, either a number that the plan knows or an argument at run
time; a *lane* symbol is a vector over one dimension of the tile; all others are scalars of the
program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sympy
from sympy import Expr, Integer, Symbol

INT32_MAX = 2**31 - 1

Fact = TypeVar("Fact")


def expand(expr: Expr) -> Expr:
    """Return `expr` as a sum of products.

    Skips `sympy.expand` if there is nothing to expand, because it is slow even then.
    """
    return expr if _is_expanded(expr) else sympy.expand(expr)


def _is_expanded(expr: Expr) -> bool:
    return all(
        factor.is_Atom or (factor.is_Function and all(map(_is_expanded, factor.args)))
        for term in sympy.Add.make_args(expr)
        for factor in sympy.Mul.make_args(term)
    )


@functools.cache
def symbol(name: str) -> Symbol:
    """Return the integer symbol `name`; equal names give the same symbol everywhere."""
    return Symbol(name, integer=True)


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """`a // b` for a >= 0 and b > 0; sympy would rewrite its own floor(a/b) into fractions."""

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        """Fold the cases that need no ranges."""
        if b == 1 or a == 0:
            return a
        return a // b if a.is_Integer and b.is_Integer else None

    def _eval_is_integer(self) -> bool:
        return True


class CeilDiv(sympy.Function):  # type: ignore[misc]
    """`a / b`, rounded up, for a >= 0 and b > 0; a `Space` takes it only after `floors`."""

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        """Fold the cases that need no ranges."""
        if b == 1 or a == 0:
            return a
        return -(-a // b) if a.is_Integer and b.is_Integer else None

    def _eval_is_integer(self) -> bool:
        return True


class Modulo(sympy.Function):  # type: ignore[misc]
    """`a % b` for a >= 0 and b > 0."""

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        """Fold the cases that need no ranges."""
        if b == 1 or a == 0:
            return Integer(0)
        return a % b if a.is_Integer and b.is_Integer else None

    def _eval_is_integer(self) -> bool:
        return True


class AtLeast(sympy.Function):  # type: ignore[misc]
    """1 where a >= b, else 0."""

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        """Fold numbers."""
        return Integer(int(bool(a >= b))) if a.is_Integer and b.is_Integer else None

    def _eval_is_integer(self) -> bool:
        return True


@functools.lru_cache(maxsize=4096)
def floors(expr: Expr) -> Expr:
    """Return `expr` with every `ceil(a / n)` whose n is a number replaced by `(a + n - 1) // n`."""
    rounded = {up: FloorDiv(up.args[0] + up.args[1] - 1, up.args[1]) for up in expr.atoms(CeilDiv)}
    return expr.xreplace({up: down for up, down in rounded.items() if up.args[1].is_Integer})


def _has_no_negative_terms(expr: Expr) -> bool:
    terms = expand(expr).as_coefficients_dict()
    return all(coefficient >= 0 for coefficient in terms.values())


@dataclass(frozen=True, slots=True)
class Range:
    """The values `low … high`, both included, as expressions in sizes."""

    low: Expr
    high: Expr


def _remembered(find: Callable[[Space, Expr], Fact]) -> Callable[[Space, Expr], Fact]:
    """Cache a method of `Space` in `facts`; valid as a symbol's range never changes.

    The rows of a block and the proofs of a printed line ask for the same facts many times.
    """
    name = find.__name__

    @functools.wraps(find)
    def fact(space: Space, expr: Expr) -> Fact:
        known: Fact | None = space.facts.get((name, expr))
        if known is None:
            known = space.facts[name, expr] = find(space, expr)
        return known

    return fact


@dataclass(frozen=True, slots=True)
class Space:
    """The values and ranges of symbols.

    Attributes:
        sizes: value of each size symbol: a number, an expression in other sizes, or None for an
            argument at run time, which is at least 1.
        least: lower bounds of run-time sizes, where they are above 1.
        ranges: range of every other symbol.
        facts: cached results, by method name and expression (`_remembered`).
    """

    sizes: Mapping[Symbol, Expr | None]
    least: Mapping[Symbol, int] = field(default_factory=dict)
    ranges: dict[Symbol, Range] = field(default_factory=dict)
    facts: dict[tuple[str, Expr], Any] = field(default_factory=dict, init=False, compare=False)

    def learn(self, name: Symbol, values: Range) -> None:
        """Record the range of a symbol; raises ValueError if it already has a different one."""
        if self.ranges.setdefault(name, values) != values:
            raise ValueError(f"{name} is in {self.ranges[name]}, not in {values}")

    @_remembered
    def value(self, expr: Expr) -> Expr:
        """Return `expr` with every known size replaced by its value."""
        expr = sympy.sympify(expr)
        if expr.is_Integer or (expr.is_Symbol and self.sizes.get(expr) is None):
            return expr
        while known := self._known(expr):
            expr = expr.xreplace(known)
        return expand(expr)

    def _known(self, expr: Expr) -> dict[Symbol, Expr]:
        values = ((symbol, self.sizes.get(symbol)) for symbol in expr.free_symbols)
        return {symbol: value for symbol, value in values if value is not None}

    def number(self, expr: Expr) -> int | None:
        """Return the value of `expr`, None if it depends on run time."""
        value = self.value(expr)
        return int(value) if value.is_Integer else None

    @_remembered
    def is_nonnegative(self, expr: Expr) -> bool:
        """Whether `expr >= 0` is proved: no coefficient in (size - its least value) is negative.

        A quotient counts as its least value plus a new variable. False where nothing is proved.
        """
        value = self.value(expr)
        if value.is_Integer:
            return bool(value >= 0)
        if not value.free_symbols <= set(self.sizes):
            return False  # callers pass `bounds`, which contain sizes only
        least = {size: size + self.least.get(size, 1) for size in value.free_symbols}
        shifted = expand(value.xreplace(least))
        quotients = {
            node: sympy.Dummy() + node.xreplace(dict.fromkeys(node.free_symbols, Integer(0)))
            for node in shifted.atoms(FloorDiv)
            if node.args[1].is_Integer and _has_no_negative_terms(node.args[0])
        }
        return _has_no_negative_terms(shifted.xreplace(quotients))

    @_remembered
    def bounds(self, expr: Expr) -> Range:
        """Return a range of `expr`, in sizes, by interval arithmetic over its terms.

        Raises ValueError for a symbol without a range, or a product of factors of unknown sign.
        """
        parts = [self._term_bounds(term) for term in sympy.Add.make_args(expand(expr))]
        low = sum((part.low for part in parts), start=Integer(0))
        high = sum((part.high for part in parts), start=Integer(0))
        return Range(self.value(low), self.value(high))

    def _term_bounds(self, term: Expr) -> Range:
        sign, factors = term.as_coeff_mul()
        fixed = math.prod((self.value(f) for f in factors if f in self.sizes), start=sign)
        moving = [self._factor_bounds(factor) for factor in factors if factor not in self.sizes]
        if len(moving) > 1 and not all(self.is_nonnegative(part.low) for part in moving):
            raise ValueError(f"no range for the product {term}")
        low = math.prod((self.value(part.low) for part in moving), start=fixed)
        high = math.prod((self.value(part.high) for part in moving), start=fixed)
        return Range(low, high) if sign >= 0 else Range(high, low)

    def _factor_bounds(self, factor: Expr) -> Range:
        if factor in self.ranges:
            return self.ranges[factor]
        if isinstance(factor, AtLeast):
            return Range(Integer(0), Integer(1))
        if isinstance(factor, Modulo):
            return Range(Integer(0), factor.args[1] - 1)
        if isinstance(factor, FloorDiv):
            top, divisor = (
                self.number(self.bounds(factor.args[0]).high),
                self.number(factor.args[1]),
            )
            if top is not None and divisor is not None:
                return Range(Integer(0), Integer(top // divisor))
            return Range(Integer(0), self.bounds(factor.args[0]).high)
        raise ValueError(f"no range for {factor}")

    @_remembered
    def reduce(self, expr: Expr) -> Expr:
        """Return `expr` without each `//`, `%` and comparison that the ranges decide."""
        rebuilt = {old: self._reduced(old) for old in expr.atoms(FloorDiv, Modulo, AtLeast)}
        return expand(expr.xreplace(rebuilt))

    def _reduced(self, node: Expr) -> Expr:
        left, right = (self.reduce(argument) for argument in node.args)
        if isinstance(node, AtLeast):
            scale, rest = left.as_coeff_Mul()
            if scale > 1 and right.is_Integer:  # c*x >= t is x >= ceil(t/c)
                left, right = rest, -(-right // scale)
            bounds = self.bounds(left)
            if self.is_nonnegative(bounds.low - right):
                return Integer(1)
            if self.is_nonnegative(right - bounds.high - 1):
                return Integer(0)
            if self.value(bounds.low - right + 1) == self.value(bounds.high - right) == 0:
                return left - right + 1  # left is either right - 1 or right
            return AtLeast(left, right)
        small = self.is_nonnegative(right - self.bounds(left).high - 1)
        if isinstance(node, FloorDiv):
            return Integer(0) if small else FloorDiv(left, right)
        return left if small else Modulo(left, right)

    def fits_int32(self, expr: Expr) -> bool:
        """Whether every value of `expr` is known to fit a signed 32-bit integer."""
        bounds = self.bounds(expr)
        low, high = self.number(bounds.low), self.number(bounds.high)
        return low is not None and high is not None and low >= -INT32_MAX and high <= INT32_MAX
