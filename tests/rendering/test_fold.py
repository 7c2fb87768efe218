"""Folding: small sources with each construct, and the text that is to come of them."""

from __future__ import annotations

import textwrap

import pytest

from convgen.rendering.fold import fold, read_source
from convgen.rendering.glue import runtime_text


def folded(text, words=None, **values):
    """Return the one section of a source below its first line."""
    source = read_source(f"# ---- all ----\n{textwrap.dedent(text)}", frozenset(values))
    return fold(source, values, words or {})["all"]


BRANCHES = """\
    def f():
        # before
        if FLAG:
            a = 1  # one
            # between
            b = (
                2
            )
        else:
            a = 3
        return a
"""


def test_a_flag_becomes_its_branch():
    taken = folded(BRANCHES, FLAG=True)
    assert taken == (
        "def f():\n    # before\n    a = 1  # one\n    # between\n    b = (\n        2\n    )\n"
        "    return a"
    )
    assert folded(BRANCHES, FLAG=False) == "def f():\n    # before\n    a = 3\n    return a"


def test_a_flag_without_else_may_leave_nothing():
    text = "def f():\n    if FLAG:\n        a = 1\n    return 2\n"
    assert folded(text, FLAG=False) == "def f():\n    return 2"


def test_branches_in_branches():
    text = """\
    if OUTER:
        if INNER:
            a = 1
        else:
            a = 2
    else:
        if INNER:
            a = 3
    """
    assert folded(text, OUTER=True, INNER=True) == "a = 1"
    assert folded(text, OUTER=True, INNER=False) == "a = 2"
    assert folded(text, OUTER=False, INNER=True) == "a = 3"
    assert folded(text, OUTER=False, INNER=False) == ""


def test_tests_read_flags_and_integers():
    text = "if RANK > 1 and not FLAG:\n    a = RANK\n"
    assert folded(text, RANK=3, FLAG=False) == "a = 3"
    assert folded(text, RANK=1, FLAG=False) == ""
    assert folded(text, RANK=3, FLAG=True) == ""


def test_other_tests_stay():
    text = "def f(x):\n    if x == RANK:\n        return 1\n    elif x:\n        return 2\n"
    assert folded(text, RANK=4) == text.replace("RANK", "4").rstrip()


def test_definitions_are_set_apart_as_a_formatter_does():
    text = """\
    def f():
        return 1


    if FLAG:

        # of g
        @cache
        def g():
            return 2

        def h():
            return 3


    a = 4
    """
    f = "def f():\n    return 1\n\n\n"
    with_g = f"{f}# of g\n@cache\ndef g():\n    return 2\n\n\ndef h():\n    return 3\n\n\na = 4"
    assert folded(text, FLAG=True) == with_g
    assert folded(text, FLAG=False) == f"{f}a = 4"


def test_methods_are_set_apart_by_one_line():
    text = """\
    class C:
        a = 1

        if FLAG:

            def f(self):
                return 1

        else:

            def g(self):
                return 2

            def h(self):
                return 3

        def i(self):
            return 4
    """
    taken = folded(text, FLAG=True)
    head, last = "class C:\n    a = 1\n\n", "    def i(self):\n        return 4"
    assert taken == f"{head}    def f(self):\n        return 1\n\n{last}"
    other = folded(text, FLAG=False)
    g, h = "    def g(self):\n        return 2\n\n", "    def h(self):\n        return 3\n\n"
    assert other == f"{head}{g}{h}{last}"


def test_names_become_values():
    assert folded("a = f(AXES, b.dim() == RANK)\n", AXES="(1, 0)", RANK=4) == (
        "a = f((1, 0), b.dim() == 4)"
    )
    # Only names: neither parts of them, nor text, nor an attribute, nor an argument's name.
    kept = 'a = RANKS + b.RANK + f(RANK_=1, x="RANK")  # RANK'
    assert folded(f"{kept}\nc = RANK\n", RANK=4) == f"{kept}\nc = 4"


def test_names_in_texts():
    text = 'a = f"{OP}_packed"\nb = f"{OP}::{c}"\nd = f"layout {LAYOUT}, got {e}"\n'
    assert folded(text, OP='"conv"', LAYOUT='"last"') == (
        'a = "conv_packed"\nb = f"conv::{c}"\nd = f"layout last, got {e}"'
    )


def test_attributes_by_name():
    text = (
        'a = getattr(F, OP)(x, OP)\nb = getattr(getattr(ops, SPACE), f"{OP}_of")\ngetattr(c, d)\n'
    )
    assert folded(text, OP='"conv"') == (
        'a = F.conv(x, "conv")\nb = getattr(ops, SPACE).conv_of\ngetattr(c, d)'
    )


def test_defaults_that_there_are_not():
    text = "def f(a=A, b=B, *, c=C):\n    return a\n"
    assert folded(text, A=None, B=3, C="x.y") == "def f(a, b=3, *, c=x.y):\n    return a"


def test_fields_of_docstrings():
    text = '''\
    def f():
        """Pack [{AXES}].

        It is {STAGES}.
        Of {OTHER}: {LINES}
        """
        return "{AXES}"
    '''
    filled = folded(text, AXES='"KH"', STAGES=None, LINES="one\ntwo")
    assert filled == (
        'def f():\n    """Pack [KH].\n\n    Of {OTHER}: one\n    two\n    """\n    return "{AXES}"'
    )


def test_lines_that_a_formatter_skips():
    assert folded("if FLAG:\n    a = f(b)  # fmt: skip\n", FLAG=True) == "a = f(b)"


RECORD = """\
    def f(plan, x):
        return g(x, plan, 1) + plan.start(x) + h(plan)


    def g(plan, x):
        if plan.LAST:
            return x + plan.TAPS
        return i(plan, x)


    def k(x):
        plan = ONLY
        return x, plan.TAPS, x.plan
    """


def test_a_record_without_a_value_is_no_parameter():
    """What is read from it are names like others."""
    names = {"plan": None, "plan.start": "_start", "plan.LAST": True, "plan.TAPS": 9}
    assert folded(RECORD, **names) == (
        "def f(x):\n    return g(x, 1) + _start(x) + h()\n\n\n"
        "def g(x):\n    return x + 9\n    return i(x)\n\n\n"
        "def k(x):\n    return x, 9, x.plan"
    )


def test_a_record_that_stays_is_read_for_what_has_no_value():
    kept = folded(RECORD, **{"plan.TAPS": 9})
    assert kept == textwrap.dedent(RECORD).replace("plan.TAPS", "9").rstrip()
    kept = folded(RECORD, **{"plan.LAST": False})
    assert "plan.TAPS" in kept
    assert "if" not in kept
    assert "def f(plan, x):\n    return g(x, plan, 1) + plan.start(x) + h(plan)" in kept


def test_a_test_of_text_stays():
    """What stands in the text only a call knows: `LAST` is then a name of the shared runtime."""
    text = """\
    if not LAST:
        a = 1
        if FLAG:
            b = LAST
    else:
        c = 2
    """
    assert folded(text, LAST="of.LAST", FLAG=True) == (
        "if not of.LAST:\n    a = 1\n    b = of.LAST\nelse:\n    c = 2"
    )
    both = "if LAST and FLAG:\n    a = 1\nb = 2\n"
    assert folded(both, LAST="of.LAST", FLAG=True) == "if of.LAST and True:\n    a = 1\nb = 2"


def test_words_are_replaced_in_names_and_texts():
    text = 'def conv2d_packed():\n    """Of `conv2d`."""\n'
    assert folded(text, words={"conv2d": "conv3d"}) == (
        'def conv3d_packed():\n    """Of `conv3d`."""'
    )


@pytest.mark.parametrize(
    ("text", "values", "error"),
    [
        ("a = FLAG\n", {"FLAG": True, "OTHER": 1}, "no such name: OTHER"),
        ("if FLAG and x:\n    a = 1\n", {"FLAG": True}, "line 2: a test of FLAG and others"),
        ("if FLAG:\n    a = 1\nelif x:\n    a = 2\n", {"FLAG": True}, "line 2: an elif"),
        ("if FLAG:\n    a = 1\nelif x:\n    a = 2\nelse:\n    a = 3\n", {"FLAG": True}, "an elif"),
        ('a = (\n    f"{OP}"\n    "b"\n)\n', {"OP": "1"}, "OP in a text of several lines"),
    ],
)
def test_what_cannot_be_folded_is_an_error(text, values, error):
    with pytest.raises(ValueError, match=error):
        folded(text, **values)


def test_each_name_needs_a_value_and_each_value_a_name():
    source = read_source("# ---- all ----\nif FLAG:\n    a = 1\n", frozenset({"FLAG"}))
    with pytest.raises(ValueError, match=r"\['FLAG'\]"):
        fold(source, {}, {})
    with pytest.raises(ValueError, match=r"\['OTHER'\]"):
        fold(source, {"FLAG": True, "OTHER": True}, {})


def test_a_flag_that_the_runtime_does_not_know_is_an_error():
    """Nothing else would say that a file's flag decides nothing."""
    with pytest.raises(ValueError, match="no such name: HAS_NOTHING"):
        read_source(runtime_text(), frozenset({"HAS_NOTHING"}))
