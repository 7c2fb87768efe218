"""The printed text of an expression, evaluated as Triton would, against the expression itself.

Triton's `//` and `%` truncate toward zero where Python's round down. `Int` below does as Triton
does, so text that divides a negative number gives another value here than the expression has.
"""

import itertools
import random
import re
from types import SimpleNamespace

import pytest
import sympy
from sympy import Integer

from convgen import emit, parse
from convgen.symbolic.lines import WIDTH, assignment, bare
from convgen.symbolic.printer import Printer, PrintError
from convgen.symbolic.space import AtLeast, FloorDiv, Modulo, Range, Space, symbol

M, N, S, T = map(symbol, ("m", "n", "s", "t"))
Z = symbol("z")
W_IN, W_OUT, KW = map(symbol, ("W_IN", "W_OUT", "KW"))

SPACE = Space(
    sizes={W_IN: None, W_OUT: W_IN + 2, KW: Integer(3)},
    ranges={
        M: Range(Integer(0), Integer(60)),
        N: Range(Integer(0), W_IN - 1),
        S: Range(Integer(-3), Integer(2)),
        T: Range(Integer(1), Integer(2)),
        Z: Range(Integer(0), Integer(2)),
    },
)
SYMBOLS = (W_IN, W_OUT, KW, M, N, S, T)
DOMAIN = tuple(
    (w, w + 2, 3, m, n, s, t)
    for w in (1, 2, 5)
    for m, n, s, t in itertools.product((0, 1, 27, 28, 60), range(w), range(-3, 3), (1, 2))
)
MEANING = {
    "FloorDiv": lambda a, b: a // b,
    "Modulo": lambda a, b: a % b,
    "AtLeast": lambda a, b: int(a >= b),
}


class Int:
    """An integer with the arithmetic of C."""

    def __init__(self, value):
        self.value = int(value)

    def __add__(self, other):
        return Int(self.value + int(other))

    def __sub__(self, other):
        return Int(self.value - int(other))

    def __rsub__(self, other):
        return Int(int(other) - self.value)

    def __mul__(self, other):
        return Int(self.value * int(other))

    def __neg__(self):
        return Int(-self.value)

    def __floordiv__(self, other):
        sign = -1 if (self.value < 0) != (int(other) < 0) else 1
        return Int(sign * (abs(self.value) // abs(int(other))))

    def __rfloordiv__(self, other):
        return Int(other) // self

    def __mod__(self, other):
        return self - (self // other) * other

    def __rmod__(self, other):
        return Int(other) % self

    def __ge__(self, other):
        return self.value >= int(other)

    def __le__(self, other):
        return self.value <= int(other)

    def __int__(self):
        return self.value

    __radd__, __rmul__ = __add__, __mul__


TL = SimpleNamespace(cast=lambda value, dtype: Int(value), int32="int32", int64="int64")


def texts_values(text):
    """Return what `text` evaluates to under each assignment of the domain."""
    code = compile(text, "<printed>", "eval")
    names = [symbol.name for symbol in SYMBOLS]
    return [
        int(eval(code, {"tl": TL}, dict(zip(names, map(Int, values), strict=True))))
        for values in DOMAIN
    ]


def values_of(expr):
    """Return what `expr` is under each assignment of the domain."""
    function = sympy.lambdify(SYMBOLS, expr, modules=[MEANING])
    return [function(*values) for values in DOMAIN]


def nonnegative(rng, depth):
    """Return a random expression that is never negative."""
    kind = rng.choice(("symbol", "sum", "shifted") + ("div", "mod", "step") * (2 * (depth > 0)))
    if kind == "symbol":
        return rng.choice((M, N, T, W_IN, M * W_OUT, N * KW, N * W_IN * KW, 28 * M, Integer(5)))
    if kind == "shifted":
        return rng.choice((1, KW)) * S + 9
    if kind == "sum":
        return rng.randint(1, 28) * nonnegative(rng, depth) + nonnegative(rng, depth)
    if kind == "step":
        return AtLeast(anything(rng, depth - 1), rng.choice((Integer(rng.randint(-3, 30)), W_IN)))
    divisor = rng.choice((Integer(rng.choice((2, 3, 4, 28))), W_IN, W_OUT * KW, T))
    return (FloorDiv if kind == "div" else Modulo)(nonnegative(rng, depth - 1), divisor)


def anything(rng, depth=3):
    """Return a random expression, a sum of both signs."""
    terms = [
        rng.choice((-28, -1, 1, 3)) * nonnegative(rng, depth) for _ in range(rng.randint(1, 3))
    ]
    return sum(terms, start=rng.randint(-2, 2) + rng.choice((0, 1, -2)) * S)


@pytest.mark.parametrize("seed", range(120))
def test_text_has_the_value_of_its_expression(seed):
    """Breaks on a missing parenthesis, a lost sign, or a division of a negative number."""
    rng = random.Random(seed)
    expr = anything(rng)
    wide = frozenset(rng.sample([M, N, S, T], rng.randint(0, 4)))
    text = Printer(SPACE, wide).text(expr)
    assert texts_values(text) == values_of(expr), text
    assert texts_values(bare(text)) == values_of(expr), text
    for read in wide & expr.free_symbols:
        assert not re.search(rf"(?<!tl\.cast\()\b{read}\b", text), "read without its cast"


def test_the_arithmetic_of_these_tests_is_that_of_c():
    """Breaks if `Int` rounds down, which would hide what this file is about."""
    assert [int(Int(-7) // 2), int(Int(-7) % 2), int(7 // Int(-2)), int(-7 % Int(2))] == [
        -3,
        -1,
        -3,
        -1,
    ]
    assert texts_values("s // 2") != values_of(FloorDiv(S, Integer(2)))


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (FloorDiv(M, Integer(28)) * 28, "(m // 28) * 28"),  # not `28 * m // 28`
        (M - FloorDiv(M, Integer(28)) * 28, "m - (m // 28) * 28"),
        (28 * Modulo(M, Integer(28)), "(m % 28) * 28"),
        (FloorDiv(FloorDiv(M, Integer(4)), Integer(7)), "((m // 4) // 7)"),
        (Modulo(FloorDiv(M, W_IN), KW), "((m // W_IN) % KW)"),
        (FloorDiv(M * W_IN + N, Integer(4)), "((m * W_IN + n) // 4)"),
        (FloorDiv(M, W_IN * KW), "(m // (W_IN * KW))"),
        (FloorDiv(Modulo(M, Integer(6)) * 4, Integer(3)), "(((m % 6) * 4) // 3)"),
        (1 - AtLeast(M - 1, W_IN), "1 - tl.cast(m - 1 >= W_IN, tl.int32)"),
        (Integer(0), "0"),
        (Integer(-1), "-1"),
        (-S, "-s"),
        (-2 * S - 3, "-s * 2 - 3"),
        (N * KW * 2, "n * (2 * KW)"),  # known: one number when compiled
        (N * W_OUT * W_IN, "n * W_IN * W_OUT"),
        (1 + S + M * W_IN, "m * W_IN + s + 1"),
    ],
)
def test_text_of_common_expressions(expr, text):
    """Breaks if the spelling of emitted kernels changes."""
    assert Printer(SPACE).text(expr) == text
    assert texts_values(text) == values_of(expr)


def test_wide_symbols_are_cast_where_they_are_read():
    """Breaks if an offset that needs int64 is multiplied in int32."""
    printer = Printer(SPACE, frozenset({M}))
    text = "tl.cast(m, tl.int64) * W_IN * W_OUT + n"
    assert printer.text(M * W_IN * W_OUT + N) == text


@pytest.mark.parametrize(
    ("expr", "operand"),
    [
        (FloorDiv(S, Integer(2)), "s may be below 0"),
        (Modulo(M - 1, Integer(4)), "m - 1 may be below 0"),
        (1 + 3 * FloorDiv(N - W_IN, Integer(2)), "n may be below 0"),
        (Modulo(Modulo(M, Integer(4)) - 1, Integer(2)), "may be below 0"),
        (AtLeast(FloorDiv(S, Integer(2)), Integer(0)), "s may be below 0"),
        (FloorDiv(M, S), "s may be below 1"),
        (Modulo(M, Z), "z may be below 1"),
    ],
    ids=str,
)
def test_operands_out_of_range_are_refused(expr, operand):
    """Breaks if a kernel could truncate where the index math rounds down, or divide by 0."""
    with pytest.raises(PrintError, match=operand):
        Printer(SPACE).text(expr)


@pytest.mark.parametrize(
    "expr",
    [
        M / 2,
        sympy.Rational(1, 2) + M,
        sympy.floor(M / 2),
        M**2,
        sympy.Mod(M, 3),
        sympy.Max(M, N),
        sympy.Float(1.5) * M,
        FloorDiv(M, Integer(2)) ** 2,
    ],
    ids=str,
)
def test_what_has_no_faithful_text_is_refused(expr):
    """Breaks if sympy's own spelling of something reaches a kernel."""
    with pytest.raises(PrintError, match="no text for"):
        Printer(SPACE).text(expr)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("(m // 4)", "m // 4"),
        ("((m // 4) // 7)", "(m // 4) // 7"),
        ("(m // 4) * (n % 4)", "(m // 4) * (n % 4)"),
        ("tl.cast(m >= 2, tl.int32)", "tl.cast(m >= 2, tl.int32)"),
        ("m", "m"),
    ],
)
def test_bare_drops_only_parentheses_around_everything(text, inside):
    """Breaks if `(a) * (b)` becomes `a) * (b`."""
    assert bare(text) == inside


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("indent", [4, 8])
def test_assignments_fit_the_line_and_keep_their_value(seed, indent):
    """Breaks if a long sum is split where it changes its value, or not at all."""
    rng = random.Random(seed)
    digits = (FloorDiv(nonnegative(rng, 0), divisor) for divisor in (W_IN, W_OUT, KW, Integer(7)))
    text = Printer(SPACE).text(sum(itertools.islice(digits, seed % 5), start=anything(rng, 0)))
    lines = assignment("value", text, indent).split("\n")
    assert all(indent + len(line) <= WIDTH for line in lines)
    assert len(lines) == 1 or indent + len(f"value = {text}") > WIDTH
    (value,) = re.fullmatch(r"value = (.*)", " ".join(lines)).groups()
    assert texts_values(value) == texts_values(text)


def test_the_longest_lines_of_a_kernel_fit():
    """Breaks on a term or a formula that is longer than a line: rank 3, two digits everywhere."""
    axes = "3, 16, 12, groups=2, dilation=11, layout=channels_last"
    kernel = emit(parse(f"ConvTranspose3d(34, 34, {axes}, input=(16, 34, 17, 16, 17))"))
    kernel = kernel.partition("@triton.jit")[2].partition("\ndef pack_weight")[0]
    assert [line for line in kernel.split("\n") if len(line) > WIDTH] == []
