"""Printing sizes as Python for the wrapper, which computes them from the shapes of tensors.

Stage 5, render. Input: an expression in `Sizes`; output: text that evaluates to the same number on
the host, by the same definitions as in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

from sympy import Expr, Mul, Symbol

from ..symbolic.lines import bare
from ..symbolic.sizes import AXES, GROUPS, Sizes
from ..symbolic.space import CeilDiv, FloorDiv, symbol

POSITIONS = symbol("positions")


def extent_names(rank: int, end: str) -> list[str]:
    """Return the names of a tensor's extents in torch's order, such as BATCH, C_IN, H_IN, W_IN.

    `end` is "IN" for the input and "OUT" for the output.
    """
    return ["BATCH", f"C_{end}", *(f"{letter.upper()}_{end}" for letter in AXES[rank])]


class HostPrinter:
    """Prints sums, products and quotients of sizes as Python.

    An extent of a tensor prints as a variable (`H_IN` as `h_in`), any other constant of the file as
    its `.value`, and a tuned block as an entry of `META`. All other sizes print as their
    definition.

    Attributes:
        sizes: the sizes of a kernel.
        blocks: numbers to print for tuned blocks, instead of entries of `META`.
        read: names of the variables printed so far: tensors' extents and `POSITIONS`.
    """

    def __init__(self, sizes: Sizes, blocks: Mapping[str, int] | None = None) -> None:
        self.sizes = sizes
        self.blocks = blocks or {}
        self.read: set[str] = set()
        self._table = {size.symbol: size for size in sizes.table}
        self._extents = {*extent_names(sizes.rank, "IN"), *extent_names(sizes.rank, "OUT")}

    def text(self, expr: Expr) -> str:
        """Return `expr` as Python; raises KeyError for a symbol that is not a size."""
        if expr.is_Integer:
            return str(expr)
        if isinstance(expr, Symbol):
            return self._symbol(expr)
        if isinstance(expr, CeilDiv):
            over, each = expr.args
            return f"triton.cdiv({bare(self.text(self._named(over)))}, {self.text(each)})"
        if isinstance(expr, FloorDiv):
            return f"({' // '.join(map(self.text, expr.args))})"
        if expr.is_Mul:
            factors = expr.as_ordered_factors()  # numbers first, or last if there is a quotient
            if any(isinstance(factor, CeilDiv) for factor in factors):
                factors.sort(key=lambda factor: factor.is_Integer)
            return " * ".join(map(self.text, factors))
        first, *rest = expr.as_ordered_terms()
        return self.text(first) + "".join(map(self._signed, rest))

    def _signed(self, term: Expr) -> str:
        negative = term.could_extract_minus_sign()
        return f" - {self.text(-term)}" if negative else f" + {self.text(term)}"

    def _symbol(self, name: Symbol) -> str:
        if name in (GROUPS, POSITIONS):
            return str(name)
        size = self._table[name]
        if size.name in self._extents:
            self.read.add(size.name)
            return size.name.lower()
        if size.found is not None:  # an exact division: correct without parentheses in a product
            return bare(self.text(size.found))
        if size.definition is not None and not size.spelled:
            text = self.text(size.definition)
            return f"({text})" if size.definition.is_Add else text
        if size.name.islower():  # a variable of the launch
            return size.name
        if size.value is not None:
            return f"{size.text}.value"
        return str(self.blocks.get(size.name, f'META["{size.text}"]'))

    def _named(self, extent: Expr) -> Expr:
        """Return `extent` with `POSITIONS` in place of the product of an image's axes."""
        factors, of_image = map(set, map(Mul.make_args, (extent, self.sizes.positions)))
        if len(of_image) == 1 or not of_image <= factors:
            return extent
        self.read.add(POSITIONS.name)
        return Mul(*(factors - of_image), POSITIONS)
