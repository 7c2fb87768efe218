"""The scribe: names for the values of a kernel, in lines that fit the page.

Stage 5, render. Input: expressions of a `Space`; output: lines of Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import sympy
from sympy import Expr, Symbol

from .access import Mask
from .lines import WIDTH, assignment, bare, split
from .printer import SPREADS, Printer, PrintError
from .space import Range, Space, symbol

LONG = 40  # columns of a part of an offset that is written in place


def _fitting(name: str, condition: str) -> list[str]:
    """Return the parts of a condition that fit a line `name &= part` each."""
    if len(f"        {name} &= {condition}") <= WIDTH:
        return [condition]
    return [part.removeprefix("& ") for part in split(condition, "&")]


def _joined(name: str, parts: dict[str, str], order: tuple[str, ...]) -> str:
    """Return the line that joins the conditions of a tile's dimensions."""
    indices = dict(zip(order, SPREADS[len(order)], strict=True))
    return f"{name} = {' & '.join(f'{text}{indices[kind]}' for kind, text in parts.items())}"


@dataclass(slots=True)
class Scribe:
    """Writes the lines of one kernel: names quantities, prints offsets and masks of tiles.

    Attributes:
        space: what is known of the sizes, and of the symbols defined so far.
        kinds: for each lane symbol what it runs over, `position` or `channel`.
        used: sizes that the printed text reads.
        checked: the wrapper refuses sizes of run time whose offsets in a tile int32 cannot hold.
    """

    space: Space
    kinds: dict[Symbol, str] = field(default_factory=dict)
    used: set[Symbol] = field(default_factory=set)
    checked: bool = True

    def name(self, name: str, low: Expr | int, high: Expr | int, kind: str | None = None) -> Symbol:
        """Return a new symbol in `low … high`; with `kind` it is a lane."""
        result = symbol(name)
        self.space.learn(result, Range(sympy.sympify(low), sympy.sympify(high)))
        if kind is not None:
            self.kinds[result] = kind
        return result

    def define(
        self, lines: list[str], name: str, expr: Expr, bounds: tuple[Expr | int, Expr | int] | None
    ) -> Expr:
        """Append `name = expr` and return its symbol; a number or a symbol needs no name.

        Args:
            lines: where the line goes.
            name: the new name.
            expr: its value.
            bounds: a range tighter than what interval arithmetic finds, or None.
        """
        expr = self.space.reduce(expr)
        if expr.is_Integer or isinstance(expr, Symbol):
            return expr
        lines.append(assignment(name, bare(self.text(expr)), 8))
        low, high = bounds or (self.space.bounds(expr).low, self.space.bounds(expr).high)
        kinds = {self.kinds[free] for free in expr.free_symbols if free in self.kinds}
        return self.name(name, low, high, kinds.pop() if kinds else None)

    def text(self, expr: Expr, wide: frozenset[Symbol] = frozenset()) -> str:
        """Print `expr` as far as the ranges reduce it."""
        reduced = self.space.reduce(expr)
        self.used |= reduced.free_symbols & set(self.space.sizes)
        return Printer(self.space, wide).text(reduced)

    def scalar(self, expr: Expr) -> str | None:
        """Print a scalar offset, int64 where int32 is not known to hold it; None if it is 0."""
        expr = self.space.reduce(expr)
        if expr == 0:
            return None
        if self.space.fits_int32(expr):
            return self.text(expr)
        terms = sympy.Add.make_args(expr)
        large = [term for term in terms if not self.space.fits_int32(term)]
        moving = {free for term in large for free in term.free_symbols} - set(self.space.sizes)
        return self.text(expr, frozenset(moving))

    def lane_lines(
        self, name: str, expr: Expr, order: tuple[str, ...], indent: int = 4
    ) -> list[str]:
        """Return the lines that define `<name>_lanes`, an offset inside a tile over `order`.

        It is int32, except where a known size makes it too large, or one of run time that nothing
        checks. A long part has a line of its own, `<name>_<kind>`.
        """
        expr = self.space.reduce(expr)
        lanes = frozenset(expr.free_symbols & set(self.kinds))
        known = self.space.number(self.space.bounds(expr).high) is not None
        far = (known or not self.checked) and not self.space.fits_int32(expr)
        wide = lanes if far else frozenset()
        parts: dict[str, str] = {}
        for kind in order:
            terms = [t for t in sympy.Add.make_args(expr) if self._kind(t) == kind]
            if terms:
                parts[kind] = self.text(sympy.Add(*terms), wide)
        lines = []
        spread = " + ".join(f"(){index}" for index in SPREADS[len(order)])
        room = WIDTH - indent - len(f"{name}_lanes = {spread}")
        for kind, text in parts.items():
            together = sum(map(len, parts.values()))
            if len(order) > 1 and (len(text) > LONG or (together > room and " " in text)):
                lines.append(assignment(f"{name}_{kind}", text, indent))
                parts[kind] = f"{name}_{kind}"
        if len(order) == 1:
            return [f"{name}_lanes = {text}" for text in parts.values()]
        texts = []
        for kind, index in zip(order, SPREADS[len(order)], strict=True):
            if kind in parts:
                text = parts[kind]
                texts.append(f"{text}{index}" if text.isidentifier() else f"({text}){index}")
        return [*lines, f"{name}_lanes = {' + '.join(texts)}"]

    def mask_lines(
        self,
        name: str,
        masks: tuple[Mask, ...],
        order: tuple[str, ...],
        shared: Mapping[str, str] = MappingProxyType({}),
    ) -> list[str]:
        """Return the lines that define `name`, the conditions of a tile over `order`.

        Conditions on positions are joined first, axis by axis, in a vector `<name>_inside`. One on
        the whole tile, as where all of its positions have one coordinate, joins the first of them.
        A vector that is `shared` with other tiles, by the kind of its lanes, is joined with them.
        """
        lines: list[str] = []
        parts: dict[str, str] = {}  # condition of a kind of lanes, as a vector
        kinds = {*shared, *(self._kind(mask.index) for mask in masks)}
        first = next((kind for kind in order if kind in kinds), None)
        if first is None:
            each = [self.condition(mask) for mask in masks]
            return [f"{name} {'&=' if n else '='} {bare(part)}" for n, part in enumerate(each)]
        for kind in order:
            axes: dict[Expr, list[str]] = {}
            for mask in masks:
                own = self._kind(mask.index) or first
                if own == kind:
                    axes.setdefault(mask.index, []).append(self.condition(mask))
            conditions = [" & ".join(axis) for axis in axes.values()]
            if kind in shared:
                conditions.insert(0, shared[kind])
            if conditions and len(order) == 1:
                text = " & ".join(conditions)
                each = [part for condition in conditions for part in _fitting(name, condition)]
                each = [text] if len(f"        {name} = {text}") <= WIDTH else each
                return [f"{name} {'&=' if n else '='} {bare(part)}" for n, part in enumerate(each)]
            if sum(map(len, axes.values())) + (kind in shared) > 1:
                vector = name.replace("mask", "inside")
                vector += f"_{kind}" * (vector in parts.values())
                each = [part for condition in conditions for part in _fitting(vector, condition)]
                if kind in shared and len(f"        {vector} = {' & '.join(each[:2])}") <= WIDTH:
                    each[:2] = [" & ".join(each[:2])]
                lines.append(f"{vector} = {bare(each[0])}")
                lines += [f"{vector} &= {bare(part)}" for part in each[1:]]
                parts[kind] = vector
            elif conditions:
                parts[kind] = conditions[0]
        line = _joined(name, parts, order)
        if len(order) > 2:  # of no step: it stands 4 columns from the margin
            each = [line] if len(line) + 4 <= WIDTH else split(line, "&")
            return [*lines, each[0], *(f"{name} &= {part[2:]}" for part in each[1:])]
        if len(line) + 8 > WIDTH:  # ruff would break it inside an index
            for kind, text in parts.items():
                if not text.isidentifier():
                    lines.append(assignment(f"{name}_{kind}", bare(text), 8))
                    parts[kind] = f"{name}_{kind}"
            line = _joined(name, parts, order)
        return [*lines, line] if parts else []

    def shared_lines(
        self, name: str, masks: tuple[Mask, ...], order: tuple[str, ...], axes: str
    ) -> tuple[list[str], dict[str, str]]:
        """Return lines of the vectors that several tiles share, and their names by kind of lanes.

        The one over positions is named after the `axes` that it is of; conditions on the whole tile
        join it, or else the first one. With them alone there is no vector.
        """
        lines: list[str] = []
        names: dict[str, str] = {}
        kinds = [self._kind(mask.index) for mask in masks]
        present = [kind for kind in order if kind in kinds]
        home = next((kind for kind in present if kind.startswith("position")), "".join(present[:1]))
        for kind in present:
            own = tuple(m for m, k in zip(masks, kinds, strict=True) if (k or home) == kind)
            suffix = axes if kind.startswith("position") else kind
            names[kind] = f"{name.replace('mask', 'inside')}_{suffix}"
            lines += self.mask_lines(names[kind], own, (kind,))
        return lines, names

    def condition(self, mask: Mask) -> str:
        """Print a condition, in parentheses."""
        index = self.space.reduce(mask.index)
        known = self.space.number(self.space.bounds(index).high) is not None
        # Run-time indices that int32 cannot hold are refused by the wrapper.
        far = known and not self.space.fits_int32(index)
        wide = index.free_symbols - set(self.space.sizes) if far else frozenset()
        text = self.text(index, frozenset(wide))
        return f"({text} >= 0)" if mask.extent is None else f"({text} < {self.text(mask.extent)})"

    def _kind(self, expr: Expr) -> str | None:
        kinds = sorted({self.kinds[free] for free in expr.free_symbols if free in self.kinds})
        if len(kinds) > 1:
            raise PrintError(f"{expr} mixes lanes of {' and '.join(kinds)}")
        return kinds[0] if kinds else None
