"""Proofs about index expressions, against every assignment of small domains.

The compiler drops a mask when it has proved it needless, so what `Space` says of an expression
must hold for each value its symbols can take: here all of them are tried.
"""

import itertools
import random

import pytest
import sympy
from sympy import Integer

from convgen.symbolic.access import Coordinate, Mask, access, unflatten
from convgen.symbolic.space import INT32_MAX, AtLeast, FloorDiv, Modulo, Range, Space, symbol

Q, R, S, T, LANE = map(symbol, ("q", "r", "s", "t", "lane"))
H_IN, W_IN, W_OUT, KH = map(symbol, ("H_IN", "W_IN", "W_OUT", "KH"))

# H_IN and W_IN are known at run time alone, W_IN is 3 at least; W_OUT follows from W_IN.
SPACE = Space(
    sizes={H_IN: None, W_IN: None, W_OUT: 2 * W_IN - 1, KH: Integer(3)},
    least={W_IN: 3},
    ranges={
        Q: Range(Integer(0), Integer(6)),
        R: Range(Integer(0), W_IN - 1),
        S: Range(Integer(-2), Integer(3)),
        T: Range(Integer(1), Integer(2)),
        LANE: Range(Integer(0), Integer(3)),
    },
)
SYMBOLS = (H_IN, W_IN, W_OUT, KH, Q, R, S, T)
MEANING = {
    "FloorDiv": lambda a, b: a // b,
    "Modulo": lambda a, b: a % b,
    "AtLeast": lambda a, b: int(a >= b),
}


def assignments(sizes, *, corners=False):
    """Yield values for `SYMBOLS`: every one in range, or only the ends of each range."""
    for h, w in itertools.product(sizes, sizes):
        if w >= SPACE.least[W_IN]:
            moving = (range(7), range(w), range(-2, 4), range(1, 3))
            moving = [(m[0], m[-1]) for m in moving] if corners else moving
            for values in itertools.product(*moving):
                yield (h, w, 2 * w - 1, 3, *values)


DOMAIN = tuple(assignments((1, 2, 3, 9)))
# For sums of single symbols the ends of the ranges suffice, with sizes beyond any constant.
CORNERS = tuple(assignments((1, 2, 3, 4, 10**6), corners=True))


def values_of(expr, domain=DOMAIN):
    """Return what `expr` is under each assignment."""
    function = sympy.lambdify(SYMBOLS, sympy.sympify(expr), modules=[MEANING], cse=False)
    return [function(*values) for values in domain]


def nonnegative(rng, depth):
    """Return a random expression that is never negative, as `//` and `%` want them."""
    kind = rng.choice(("symbol", "sum", "shifted") + ("div", "mod", "step") * (depth > 0))
    if kind == "symbol":
        return rng.choice((Q, R, T, H_IN, W_OUT, Q * R, R * W_IN, Integer(4)))
    if kind == "shifted":
        return S + rng.randint(2, 5)
    if kind == "sum":
        return rng.randint(1, 4) * nonnegative(rng, depth) + nonnegative(rng, depth)
    if kind == "step":
        return AtLeast(anything(rng, depth - 1), rng.choice((Integer(rng.randint(-3, 8)), KH)))
    divisor = rng.choice((Integer(rng.randint(1, 9)), W_IN, KH, T))
    return (FloorDiv if kind == "div" else Modulo)(nonnegative(rng, depth - 1), divisor)


def anything(rng, depth=2):
    """Return a random expression, a sum of both signs."""
    terms = [rng.choice((-3, -1, 1, 2)) * nonnegative(rng, depth) for _ in range(rng.randint(1, 3))]
    return sum(terms, start=rng.randint(-4, 4) + rng.choice((0, 1, -2)) * S)


@pytest.mark.parametrize("seed", range(60))
def test_bounds_hold_for_every_value(seed):
    """Breaks if interval arithmetic loses a value: a mask would be dropped that is needed."""
    expr = anything(random.Random(seed))
    bounds = SPACE.bounds(expr)
    for low, value, high in zip(
        values_of(bounds.low), values_of(expr), values_of(bounds.high), strict=True
    ):
        assert low <= value <= high, (expr, bounds)


@pytest.mark.parametrize("seed", range(60))
def test_reducing_changes_no_value(seed):
    """Breaks if a `//`, `%` or comparison is dropped whose result is not fixed."""
    expr = anything(random.Random(1000 + seed))
    assert values_of(SPACE.reduce(expr)) == values_of(expr), expr


@pytest.mark.parametrize("seed", range(40))
def test_what_is_proved_nonnegative_is(seed):
    """Breaks if a proof of `>= 0` is wrong, or misses a sum of sizes that is never negative."""
    rng = random.Random(2000 + seed)
    expr = sum((rng.randint(-2, 3) * size for size in (H_IN, W_IN)), start=rng.randint(-12, 6))
    assert SPACE.is_nonnegative(expr) == (min(values_of(expr, CORNERS)) >= 0), expr


@pytest.mark.parametrize(
    ("expr", "low", "high"),
    [
        (Q, 0, 6),
        (3 * S - 2 * Q + 1, -17, 10),
        (R, 0, W_IN - 1),
        (W_IN - 1 - R, 0, W_IN - 1),
        (R * W_IN, 0, W_IN * W_IN - W_IN),
        (Q * R, 0, 6 * W_IN - 6),
        (W_OUT - R, W_IN, 2 * W_IN - 1),
        (FloorDiv(Q, 4), 0, 1),
        (Modulo(5 * Q, KH), 0, 2),
        (FloorDiv(R, H_IN), 0, W_IN - 1),
        (1 - 2 * AtLeast(Q, Integer(3)), -1, 1),
    ],
)
def test_bounds_are_tight_where_each_symbol_stands_once(expr, low, high):
    """Breaks if a range widens: kernels would get masks that they do not need."""
    bounds = SPACE.bounds(expr)
    assert (bounds.low, bounds.high) == (low, sympy.expand(high))


def test_no_range_is_made_up():
    """Breaks if an unknown symbol, or a product of signs unknown, gets a range in silence."""
    for expr in (symbol("stranger"), S * Q, Q**2):
        with pytest.raises(ValueError, match="no range for"):
            SPACE.bounds(expr)


def test_what_is_known_of_a_symbol_never_changes():
    """Breaks if a name of a kernel can be defined again: what was proved of it would be reused."""
    space = Space(SPACE.sizes, SPACE.least)
    with pytest.raises(ValueError, match="no range for q"):
        space.bounds(Q)
    space.learn(Q, Range(Integer(0), Integer(6)))
    assert space.bounds(Q).high == 6
    space.learn(Q, Range(Integer(0), Integer(6)))
    with pytest.raises(ValueError, match=r"q is in .*high=6"):
        space.learn(Q, Range(Integer(0), Integer(7)))
    assert space.bounds(2 * Q).high == 12


@pytest.mark.parametrize(
    ("expr", "reduced"),
    [
        (FloorDiv(Q, Integer(7)), Integer(0)),
        (FloorDiv(Q, Integer(6)), FloorDiv(Q, Integer(6))),
        (Modulo(R, W_IN), R),
        (Modulo(R + 1, W_IN), Modulo(R + 1, W_IN)),
        (Modulo(Q, T), Modulo(Q, T)),
        (AtLeast(S, Integer(-2)), Integer(1)),
        (AtLeast(S, Integer(4)), Integer(0)),
        (AtLeast(S, Integer(0)), AtLeast(S, Integer(0))),
        (AtLeast(T, Integer(2)), T - 1),  # T is 1 or 2
        (FloorDiv(Modulo(Q, Integer(4)) + 4 * Modulo(Q, Integer(7)), Integer(28)), Integer(0)),
    ],
)
def test_what_ranges_fix_is_dropped(expr, reduced):
    """Breaks if emitted kernels divide or compare where the result is known."""
    assert SPACE.reduce(expr) == reduced


@pytest.mark.parametrize(
    ("low", "high", "fits"),
    [
        (0, INT32_MAX, True),
        (-INT32_MAX, 0, True),
        (0, INT32_MAX + 1, False),
        (-INT32_MAX - 1, 0, False),
        (0, W_IN, False),
    ],
)
def test_offsets_are_int32_only_if_known_to_fit(low, high, fits):
    """Breaks if an offset could overflow, or a run-time size passes for a small one."""
    space = Space(SPACE.sizes, SPACE.least, {Q: Range(Integer(low), sympy.sympify(high))})
    assert space.fits_int32(Q) is fits


@pytest.mark.parametrize("extents", [(5,), (3, 4), (1, 7, 2), (4, 1, 3, 2)])
def test_unflatten_gives_the_digits_back(extents):
    """Breaks if a program or a position is split into the wrong coordinates."""
    flat = 0
    for slow_to_fast in itertools.product(*map(range, reversed(extents))):
        digits = tuple(reversed(slow_to_fast))
        assert unflatten(Integer(flat), map(Integer, extents)) == digits
        flat += 1
    past = unflatten(Integer(flat), map(Integer, extents))
    assert past == (0,) * (len(extents) - 1) + (extents[-1],)  # the last digit is not reduced


def test_unflatten_with_sizes_of_run_time():
    """Breaks if the radices are not multiplied up, fastest digit first."""
    flat = Q * W_IN * H_IN + S * W_IN + T
    x, y, z = unflatten(flat, (W_IN, H_IN, symbol("BATCH")))
    assert x == Modulo(flat, W_IN)
    assert y == Modulo(FloorDiv(flat, W_IN), H_IN)
    assert z == FloorDiv(flat, W_IN * H_IN)


def random_coordinate(rng, moving):
    """Return a coordinate whose index holds each symbol once, so that bounds are exact."""
    index = sum(
        (rng.choice((-2, -1, 1, 1, 2)) * part for part in rng.sample(moving, rng.randint(1, 2))),
        start=Integer(rng.choice((-3, -1, 0, 0, 2, 4))),
    )
    extent = rng.choice((Integer(3), Integer(7), Integer(12), W_IN, W_OUT, H_IN, KH))
    return Coordinate(index, extent, rng.choice((Integer(1), Integer(5), W_IN, W_IN * H_IN)))


@pytest.mark.parametrize("seed", range(80))
def test_an_access_is_masked_exactly_where_it_can_leave_its_tensor(seed):
    """Breaks if a needed mask is missing, a needless one is emitted, or the offset is wrong."""
    rng = random.Random(3000 + seed)
    coordinates = [random_coordinate(rng, [Q, S, T]), random_coordinate(rng, [R, T])]
    found = access(SPACE, coordinates, frozenset({R, S}))
    for coordinate in coordinates:
        below = min(values_of(coordinate.index, CORNERS)) < 0
        beyond = max(values_of(coordinate.index - coordinate.extent, CORNERS)) >= 0
        assert (Mask(coordinate.index, None) in found.masks) == below
        assert (Mask(coordinate.index, coordinate.extent) in found.masks) == beyond
    offset = sum(coordinate.index * coordinate.stride for coordinate in coordinates)
    assert values_of(found.scalar + found.lanes) == values_of(offset)
    assert not found.scalar.free_symbols & {R, S}
    assert all(term.free_symbols & {R, S} for term in sympy.Add.make_args(found.lanes) if term)


def test_a_tile_that_fits_has_no_mask():
    """The two ends of it: 4 lanes in an axis of 4 need none, in one of 3 they do."""
    for extent, masks in ((4, ()), (3, (Mask(LANE, Integer(3)),))):
        found = access(SPACE, [Coordinate(LANE, Integer(extent), W_IN)], frozenset({LANE}))
        assert found.masks == masks
        assert (found.scalar, found.lanes) == (0, LANE * W_IN)
