"""The scribe: names for the values of a kernel, in lines that fit the page.

Stage 5, render. Input: expressions of a `Space`; output: lines of Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import sympy
from sympy import Expr, Symbol

from .access import Mask
from .lines import WIDTH, assignment, bare
from .printer import SPREADS, Printer, PrintError
from .space import Range, Space, symbol

LONG = 40  # columns of a part of an offset that is written in place


def _fitting(parts: list[str], room: int) -> list[str]:
    """Return conditions as one where all of them fit the room of a line, else each by itself."""
    together = " & ".join(parts)
    return [together] if len(together) <= room else parts


def _room(begin: str) -> int:
    """Return the columns that are left of a line of a step behind its beginning."""
    return WIDTH - len(f"        {begin} ")


def _apart(name: str, axes: list[list[str]]) -> list[str]:
    """Return the conditions of each axis as one where they fit a line `name &= part`."""
    return [part for axis in axes for part in _fitting(axis, _room(f"{name} &="))]


def _conjunction(name: str, parts: list[str]) -> list[str]:
    """Return the lines that define `name`, all of the parts, one a line."""
    return [f"{name} {'&=' if n else '='} {bare(part)}" for n, part in enumerate(parts)]


def _spread(parts: dict[str, str], order: tuple[str, ...]) -> list[str]:
    """Return the conditions of a tile's dimensions, each spread over all of them."""
    indices = dict(zip(order, SPREADS[len(order)], strict=True))
    return [f"{text}{indices[kind]}" for kind, text in parts.items()]


@dataclass(frozen=True, slots=True)
class LanePart:
    """What the lanes of one kind add to an offset, and the index that spreads it over the tile."""

    text: str
    index: str

    def spread(self) -> str:
        """Return the part as a summand of the offset."""
        plain = not self.index or self.text.isidentifier()
        return f"{self.text if plain else f'({self.text})'}{self.index}"


@dataclass(frozen=True, slots=True)
class LaneText:
    """An offset inside a tile.

    Attributes:
        name: its name.
        before: the lines of parts that are too long to stand in its own.
        parts: its summands, in the order of the tile's dimensions.
    """

    name: str
    before: tuple[str, ...]
    parts: tuple[LanePart, ...]

    def text(self) -> str:
        """Return the offset."""
        return " + ".join(part.spread() for part in self.parts)

    def lines(self) -> tuple[str, ...]:
        """Return the lines that define the name; none where no lane moves the offset."""
        return (*self.before, f"{self.name} = {self.text()}") if self.parts else self.before


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

    def lane_text(self, name: str, expr: Expr, order: tuple[str, ...], indent: int = 4) -> LaneText:
        """Return `<name>_lanes`, an offset inside a tile over `order`.

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
        around = " + ".join(f"(){index}" for index in SPREADS[len(order)])
        room = WIDTH - indent - len(f"{name}_lanes = {around}")
        for kind, text in parts.items():
            together = sum(map(len, parts.values()))
            if len(order) > 1 and (len(text) > LONG or (together > room and " " in text)):
                lines.append(assignment(f"{name}_{kind}", text, indent))
                parts[kind] = f"{name}_{kind}"
        indices = zip(order, SPREADS[len(order)], strict=True)
        spread = [LanePart(parts[kind], index) for kind, index in indices if kind in parts]
        return LaneText(f"{name}_lanes", tuple(lines), tuple(spread))

    def mask_lines(
        self,
        tensor: str,
        masks: tuple[Mask, ...],
        order: tuple[str, ...],
        shared: Mapping[str, str] = MappingProxyType({}),
    ) -> list[str]:
        """Return the lines that define `<tensor>_mask`, the conditions of a tile over `order`.

        Conditions on positions are joined first, axis by axis, in a vector `<tensor>_inside`. One
        on the whole tile, as where all of its positions have one coordinate, joins the first of
        them. A vector that is `shared` with other tiles, by the kind of its lanes, is joined with
        them.
        """
        name = f"{tensor}_mask"
        kinds = {*shared, *(self._kind(mask.index) for mask in masks)}
        first = next((kind for kind in order if kind in kinds), None)
        if first is None or len(order) == 1:
            return self.vector_lines(name, masks)
        lines: list[str] = []
        parts: dict[str, str] = {}  # condition of a kind of lanes, as a vector
        for kind in order:
            own = [mask for mask in masks if (self._kind(mask.index) or first) == kind]
            axes = [*([[shared[kind]]] if kind in shared else []), *self._by_axis(own)]
            if sum(map(len, axes)) > 1:
                parts[kind] = vector = f"{tensor}_inside" + f"_{kind}" * bool(lines)
                each = _apart(vector, axes)
                if kind in shared:
                    each[:2] = _fitting(each[:2], _room(f"{vector} ="))
                lines += _conjunction(vector, each)
            elif axes:
                parts[kind] = axes[0][0]
        spread, room = _spread(parts, order), _room(f"{name} =")
        if len(order) > 2:  # of no step: it stands 4 columns further left
            return [*lines, *_conjunction(name, _fitting(spread, room + 4))]
        if len(" & ".join(spread)) > room:  # ruff would break it inside an index
            for kind, text in parts.items():
                if not text.isidentifier():
                    lines.append(assignment(f"{name}_{kind}", bare(text), 8))
                    parts[kind] = f"{name}_{kind}"
        return [*lines, f"{name} = {' & '.join(_spread(parts, order))}"]

    def vector_lines(self, name: str, masks: Iterable[Mask]) -> list[str]:
        """Return the lines that define `name`, conditions of one kind of lanes, axis by axis.

        Those of the whole tile alone, of no lanes, have a line each.
        """
        given = list(masks)
        if not any(self._kind(mask.index) for mask in given):
            return _conjunction(name, [self.condition(mask) for mask in given])
        each = _apart(name, self._by_axis(given))
        return _conjunction(name, _fitting(each, _room(f"{name} =")))

    def _by_axis(self, masks: list[Mask]) -> list[list[str]]:
        """Print the conditions, those of an axis together."""
        axes: dict[Expr, list[str]] = {}
        for mask in masks:
            axes.setdefault(mask.index, []).append(self.condition(mask))
        return list(axes.values())

    def shared_lines(
        self, tensor: str, masks: tuple[Mask, ...], order: tuple[str, ...], axes: str
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
            own = [m for m, k in zip(masks, kinds, strict=True) if (k or home) == kind]
            suffix = axes if kind.startswith("position") else kind
            names[kind] = f"{tensor}_inside_{suffix}"
            lines += self.vector_lines(names[kind], own)
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
