"""The scribe: writes named values, offsets and masks of a kernel in lines of at most 100 columns.

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

LONG = 40  # columns; a longer part of an offset has a line and a name of its own


def _fitting(parts: list[str], room: int) -> list[str]:
    """Return the conditions joined by `&` if they fit in `room` columns, else unjoined."""
    together = " & ".join(parts)
    return [together] if len(together) <= room else parts


def _room(begin: str) -> int:
    """Return the columns left after `begin` on a line of the loop's body."""
    return WIDTH - len(f"        {begin} ")


def _apart(name: str, axes: list[list[str]]) -> list[str]:
    """Return the conditions, joined per axis where a line `name &= part` has room."""
    return [part for axis in axes for part in _fitting(axis, _room(f"{name} &="))]


def _conjunction(name: str, parts: list[str]) -> list[str]:
    """Return the lines that define `name` as the conjunction of `parts`, one part a line."""
    return [f"{name} {'&=' if n else '='} {bare(part)}" for n, part in enumerate(parts)]


def _spread(parts: dict[str, str], order: tuple[str, ...]) -> list[str]:
    """Return the vectors of `parts`, by kind of lane, each broadcast to the tile's dimensions."""
    indices = dict(zip(order, SPREADS[len(order)], strict=True))
    return [f"{text}{indices[kind]}" for kind, text in parts.items()]


@dataclass(frozen=True, slots=True)
class LanePart:
    """The summand of an offset that varies with one kind of lane.

    Attributes:
        text: the summand, a vector.
        index: the index that broadcasts it over the tile, such as `[:, None]`.
    """

    text: str
    index: str

    def spread(self) -> str:
        """Return the summand, broadcast over the tile."""
        plain = not self.index or self.text.isidentifier()
        return f"{self.text if plain else f'({self.text})'}{self.index}"


@dataclass(frozen=True, slots=True)
class LaneText:
    """An offset inside a tile.

    Attributes:
        name: its name in the kernel.
        before: lines that define the parts that are too long to be written in place.
        parts: its summands, in the order of the tile's dimensions.
    """

    name: str
    before: tuple[str, ...]
    parts: tuple[LanePart, ...]

    def text(self) -> str:
        """Return the offset as a sum."""
        return " + ".join(part.spread() for part in self.parts)

    def lines(self) -> tuple[str, ...]:
        """Return the lines that define the name; without parts there is no name to define."""
        return (*self.before, f"{self.name} = {self.text()}") if self.parts else self.before


@dataclass(slots=True)
class Scribe:
    """Writes the lines of one kernel: names quantities, prints offsets and masks of tiles.

    Attributes:
        space: the sizes, and the ranges of all symbols defined so far.
        kinds: the kind of each lane symbol: the name of the tile dimension that it runs over.
        used: sizes that the printed text reads.
        checked: whether the wrapper rejects run-time sizes whose offsets inside a tile overflow
            int32.
    """

    space: Space
    kinds: dict[Symbol, str] = field(default_factory=dict)
    used: set[Symbol] = field(default_factory=set)
    checked: bool = True

    def name(self, name: str, low: Expr | int, high: Expr | int, kind: str | None = None) -> Symbol:
        """Return a new symbol with values `low … high`; it is a lane if it has a `kind`."""
        result = symbol(name)
        self.space.learn(result, Range(sympy.sympify(low), sympy.sympify(high)))
        if kind is not None:
            self.kinds[result] = kind
        return result

    def define(
        self, lines: list[str], name: str, expr: Expr, bounds: tuple[Expr | int, Expr | int] | None
    ) -> Expr:
        """Append `name = expr` to `lines` and return the symbol of `name`.

        If `expr` reduces to a number or a symbol, return that and append nothing.

        Args:
            lines: the lines to append to.
            name: the new name.
            expr: its value.
            bounds: a range tighter than that of interval arithmetic; None to use the latter.
        """
        expr = self.space.reduce(expr)
        if expr.is_Integer or isinstance(expr, Symbol):
            return expr
        lines.append(assignment(name, bare(self.text(expr)), 8))
        low, high = bounds or (self.space.bounds(expr).low, self.space.bounds(expr).high)
        kinds = {self.kinds[free] for free in expr.free_symbols if free in self.kinds}
        return self.name(name, low, high, kinds.pop() if kinds else None)

    def text(self, expr: Expr, wide: frozenset[Symbol] = frozenset()) -> str:
        """Print `expr`, reduced by the ranges, with the symbols of `wide` cast to int64."""
        reduced = self.space.reduce(expr)
        self.used |= reduced.free_symbols & set(self.space.sizes)
        return Printer(self.space, wide).text(reduced)

    def scalar(self, expr: Expr) -> str | None:
        """Print a scalar offset, in int64 unless it is known to fit int32; None if it is 0."""
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

        It is int32 unless known sizes make it too large, or run-time sizes may and the wrapper does
        not check them. A long part has a line of its own, `<name>_<kind>`.
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

        Several conditions on one kind of lane are first joined, axis by axis, in a vector
        `<tensor>_inside`. A scalar condition (a coordinate that all lanes have in common) is joined
        with those on the first kind. `shared` has, by kind, the names of vectors that were defined
        for several tiles; they are joined too.
        """
        name = f"{tensor}_mask"
        kinds = {*shared, *(self._kind(mask.index) for mask in masks)}
        first = next((kind for kind in order if kind in kinds), None)
        if first is None or len(order) == 1:
            return self.vector_lines(name, masks)
        lines: list[str] = []
        parts: dict[str, str] = {}  # by kind of lane, the vector of its conditions
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
        if len(order) > 2:  # such masks are outside the loop: indented 4 columns less
            return [*lines, *_conjunction(name, _fitting(spread, room + 4))]
        if len(" & ".join(spread)) > room:  # ruff would break it inside an index
            for kind, text in parts.items():
                if not text.isidentifier():
                    lines.append(assignment(f"{name}_{kind}", bare(text), 8))
                    parts[kind] = f"{name}_{kind}"
        return [*lines, f"{name} = {' & '.join(_spread(parts, order))}"]

    def vector_lines(self, name: str, masks: Iterable[Mask]) -> list[str]:
        """Return the lines that define `name`, conditions on one kind of lane, axis by axis.

        If all conditions are scalars, each has a line of its own.
        """
        given = list(masks)
        if not any(self._kind(mask.index) for mask in given):
            return _conjunction(name, [self.condition(mask) for mask in given])
        each = _apart(name, self._by_axis(given))
        return _conjunction(name, _fitting(each, _room(f"{name} =")))

    def _by_axis(self, masks: list[Mask]) -> list[list[str]]:
        """Print the conditions, one list per axis."""
        axes: dict[Expr, list[str]] = {}
        for mask in masks:
            axes.setdefault(mask.index, []).append(self.condition(mask))
        return list(axes.values())

    def shared_lines(
        self, tensor: str, masks: tuple[Mask, ...], order: tuple[str, ...], axes: str
    ) -> tuple[list[str], dict[str, str]]:
        """Return the lines of mask vectors that several tiles share, and their names by kind.

        The name of the vector over positions ends in `axes`, the letters of the masked axes. Scalar
        conditions are joined with it, or with the first vector if no condition is on positions. If
        all conditions are scalars, there are no vectors.
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
        # The wrapper rejects run-time sizes with indices that overflow int32.
        far = known and not self.space.fits_int32(index)
        wide = index.free_symbols - set(self.space.sizes) if far else frozenset()
        text = self.text(index, frozenset(wide))
        return f"({text} >= 0)" if mask.extent is None else f"({text} < {self.text(mask.extent)})"

    def _kind(self, expr: Expr) -> str | None:
        kinds = sorted({self.kinds[free] for free in expr.free_symbols if free in self.kinds})
        if len(kinds) > 1:
            raise PrintError(f"{expr} mixes lanes of {' and '.join(kinds)}")
        return kinds[0] if kinds else None
