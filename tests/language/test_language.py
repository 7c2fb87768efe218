"""The language: what is read, how it is written back, and what an error shows.

An error is always a SpecError, comes within a second, and stands under the text at fault.
"""

import dataclasses
import random
import re
import time
from pathlib import Path

import pytest

from convgen import ConvTransposeSpec, SpecError, find_target, parse
from convgen.language.parser import NamedSpec, parse_document
from convgen.tables.pointwise import POINTWISE, Stage
from drawing import draw

LAYER = "ConvTranspose2d(4, 6, 3)"
CANONICAL = "ConvTranspose2d(4, 6, kernel_size=3, stride=1)"


def piped(seed):
    """Return a random spec with random stages around it, a target and autotune."""
    rng = random.Random(seed)
    numbers = (-1e38, -0.5, -5e-324, -0.0, 1e-7, 0.2, 3.0, rng.gauss(0, 1e6))
    stages = [
        Stage(row.name, tuple(sorted(rng.sample(numbers, len(row.parameters)))))
        for row in POINTWISE
    ]
    return dataclasses.replace(
        draw(seed)[1],
        before=tuple(rng.sample(stages, rng.choice((0, 0, 1, 3)))),
        after=tuple(rng.sample(stages, rng.choice((0, 0, 1, 4)))),
        target=rng.choice((None, "h100", "rtx4090")),
        autotune=rng.choice(("none", "blocks", "launch")),
    )


@pytest.mark.parametrize("seed", range(300))
def test_a_spec_is_its_text(seed):
    """Breaks if the key of headers and manifests loses an argument or adds one."""
    spec = piped(seed)
    text = str(spec)
    quoted = re.sub(r"=([a-z]\w*)", r"='\1'", text)
    spread = text.replace(", ", ",  # a comment | with 'this'\n    ")
    for variant in (text, quoted, spread, f"  up = {text}\n"):
        again = parse(variant)
        assert (again, str(again)) == (spec, text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (LAYER, CANONICAL),
        ("torch.nn.ConvTranspose1d(kernel_size=3)", "ConvTranspose1d(kernel_size=3, stride=1)"),
        ("nn.ConvTranspose2d(4, 6, [3, 3])", CANONICAL),
        ("ConvTranspose2d(4, 6, 3, input=None, grid=None, target=None, precision=None)", CANONICAL),
        ("ConvTranspose2d(4, 6, 3, input=(None, 4, None, None), dtype='float32')", CANONICAL),
        (f"  (up): {LAYER}\n", CANONICAL),
        (
            "ConvTranspose2d(4, 6, (3, 5), (2, 2), 1, (1, 0), 2, False, (1, 2), 'zeros')",
            "ConvTranspose2d(4, 6, kernel_size=(3, 5), stride=2, padding=1, "
            "output_padding=(1, 0), groups=2, bias=False, dilation=(1, 2))",
        ),
        (
            "ConvTranspose1d(None, 6, 3, input=(8, 4, None), dtype=torch.float16)",
            "ConvTranspose1d(4, 6, kernel_size=3, stride=1, input=(8, 4, None), dtype=float16)",
        ),
        (
            f"{LAYER[:-1]}, autotune=blocks, target='a100', grid=2, layout=channels_last)",
            f"{CANONICAL[:-1]}, layout=channels_last, grid=2, target=a100, autotune=blocks)",
        ),
        (
            f"tanh() | {LAYER} | leaky_relu | leaky_relu(2) | leaky_relu(negative_slope=-3)",
            f"tanh | {CANONICAL} | leaky_relu(0.01) | leaky_relu(2.0) | leaky_relu(-3.0)",
        ),
        (
            f"clamp(-1, +6) | {LAYER} | sigmoid | clamp(max=2, min=0) | add(other=1)",
            f"clamp(-1.0, 6.0) | {CANONICAL} | sigmoid | clamp(0.0, 2.0) | add(1.0)",
        ),
    ],
)
def test_canonical_text(text, canonical):
    """Breaks if an emitted file's header changes for the same layer."""
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    "call",
    [
        "ConvTranspose1d(4, 6, 3)",
        "ConvTranspose1d(4, 6, 3, 2, 1, 1, bias=False)",
        "ConvTranspose2d(64, 32, (3, 5), (2, 1), padding=(1, 2), output_padding=(1, 0))",
        "ConvTranspose2d(6, 6, 4, stride=2, groups=3, dilation=(1, 2), bias=False)",
        "ConvTranspose3d(4, 4, (1, 2, 3), stride=2, groups=4)",
    ],
)
def test_what_torch_prints_can_be_pasted(call):
    """Breaks if `print(module)` and the module itself are different layers."""
    nn = pytest.importorskip("torch").nn
    module = eval(call, vars(nn))
    spec = ConvTransposeSpec.from_module(module)
    assert parse(repr(module)) == parse(call) == spec
    line = str(nn.ModuleDict({"up": module})).split("\n")[1]
    assert parse_document(line).statements == (NamedSpec("up", spec),)


def test_a_document():
    """Breaks if the statements of a file lose their names, their order or their target."""
    document = parse_document(
        f"""
        # kernels of a decoder
        target = h100

        up   = {LAYER}
        head = relu | ConvTranspose1d(  # over several lines
            kernel_size=2,
        ) | tanh
        {LAYER}
        {LAYER}
        """
    )
    assert document.target == "h100"
    assert [(each.name, str(each.spec)) for each in document.statements] == [
        ("up", CANONICAL),
        ("head", "relu | ConvTranspose1d(kernel_size=2, stride=1) | tanh"),
        (None, CANONICAL),
        (None, CANONICAL),
    ]
    assert parse_document("# nothing").statements == ()
    assert str(parse("# :(\n" * 30 + LAYER)) == CANONICAL  # brackets of comments are no nesting
    assert parse_document(f"target = 'a100'; up: {LAYER}").target == "a100"


def refused(text):
    """Return the message that refuses `text`, which must be a SpecError and come at once."""
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert time.process_time() - start < 1
    return str(caught.value)


def pointed(message):
    """Return the text from the caret of a message on."""
    *_, line, caret = message.split("\n")
    return line[caret.index("^") :]


INTEGERS = ("-1", "2.0", "True", "'3'", "word", "(1, 2, 3)", "(3,)", "()", "(1, None)", "1e400")
COUNTS = ("0", "-1", "1048577", "2.0", "True", "'4'", "word", "(4, 4)")
HUGE = f"0x{'f' * 5000}"
WRONG = {
    "in_channels": (*COUNTS, HUGE, f"({HUGE},)"),
    "out_channels": COUNTS,
    "kernel_size": ("0", "4097", "1000000", "None", "(3, 0)", "(4096, 17)", *INTEGERS),
    "stride": ("0", "4097", "None", "(0, 1)", f"({HUGE}, 1, 1)", *INTEGERS),
    "padding": ("1048577", "None", "same", *INTEGERS),
    "output_padding": ("2", "1048577", "(0, 2)", "None", *INTEGERS),
    "groups": ("0", "-1", "5", "1000000000", "2.0", "True", "None", "'2'", "(2, 2)"),
    "bias": ("1", "0", "None", "'True'", "yes", "(True, True)"),
    "dilation": ("0", "1048577", "None", *INTEGERS),
    "padding_mode": ("reflect", "1", "None", "('zeros',)"),
    "input": (
        *("5", "word", "()", "(1, 12, 5)", "(1, 12, 5, 5, 5)", "(1, 12, 0, 5)", "(0, 12, 5, 5)"),
        *("(1, 12, -5, 5)", "(1, 12, 5.0, 5)", "(1, 12, True, 5)", "(1, 12, 5, 'w')"),
        *("(1, 13, 5, 5)", "(1, 12, 1099511627776, 5)", "(1, 12, 1000000000, 1000000000)"),
    ),
    "rungs": (
        *("5", "word", "None", "((1, 12, 5),)", "((1, 12, None, 5),)", "((1, 13, 5, 5),)"),
        *("((1, 12, 5, 5), (2, 12, 5, 5))", "((1, 12, 5, 5.0),)", "(1, 12, 5, 5)"),
        "((1, 12, 5, 5), (1, 12, 5, 6), (1, 12, 5, 7), (1, 12, 5, 8))",
    ),
    "dtype": ("float8", "3", "None", "(float32,)", "torch.int32", HUGE, f"(1, {HUGE})"),
    "precision": ("tf16", "3", "True", "(tf32,)"),
    "layout": ("channels_middle", "1", "None", "NHWC"),
    "grid": ("0", "4", "-1", "2.0", "True", "two", "(1, 2)"),
    "target": ("gtx1080", "4090", "True", "(h100, a100)"),
    "autotune": ("all", "True", "None", "1"),
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [(argument, value) for argument, values in WRONG.items() for value in values],
    ids=lambda text: text[:30],
)
def test_every_wrong_argument_is_named_and_pointed_at(argument, value):
    """Breaks if a value of the wrong type, sign, length or size passes, or the blame moves."""
    given = {"in_channels": "12", "out_channels": "12", "kernel_size": "3", "stride": "2"}
    given[argument] = value
    message = refused(f"ConvTranspose2d({', '.join(f'{k}={v}' for k, v in given.items())})")
    assert re.search(rf"\b{argument}\b", message.split("\n")[0])
    assert pointed(message).startswith(value[:40])


@pytest.mark.parametrize(
    ("text", "says", "at"),
    [
        ("ConvTranspose2d(4, 6, 3, groups=4)", "divisible by groups", "4)"),
        ("ConvTranspose1d(4, 6, 4096, dilation=300000)", "dilation * (kernel_size", "300000)"),
        ("ConvTranspose1d(4, 6, 3, layout=channels_last)", "layout", "channels_last)"),
        ("ConvTranspose2d(4, 6, 3, dtype=float16, precision=tf32)", "precision is for", "tf32)"),
        ("ConvTranspose1d(4, 6, 3, padding=9, input=(1, 4, 5))", "gives output size", "(1, 4, 5)"),
        ("ConvTranspose2d(4, 6, 3, groups=10**9)", "expected a number", "10**9)"),
        ("ConvTranspose2d(4, 6, 3, stride=1, stride=2)", "stride is given twice", "stride=2"),
        ("ConvTranspose2d(4, 6, 3, **{})", "no argument **", "**{}"),
        ("ConvTranspose2d(*[4, 6, 3], kernel_size=3)", "expected a number", "*[4"),
        ("ConvTranspose2d(4, 6)", "kernel_size", "4, 6)"),
        ("ConvTranspose2d()", "needs kernel_size", "ConvTranspose2d()"),
        ("ConvTranspose2d(4, 6, 3, 1, 0, 0, 1, True, 1, 'é', 7)", "at most 10", "7)"),
        (f"relu | {LAYER} | {LAYER}", "exactly one of", LAYER),
        ("relu | tanh", "exactly one of", "relu | tanh"),
        ("ConvTranspose4d(4, 6, 3)", "ConvTranspose3d, got ConvTranspose4d", "ConvTranspose4d"),
        (f"{LAYER[:-1]}, padding_mode=reflect)", "must be zeros, got 'reflect'", "reflect)"),
        (f"{LAYER} | relu(1)", "relu() got 1 arguments", "relu(1)"),
        (f"{LAYER} | clamp(2, 1)", "min <= max", "clamp(2, 1)"),
        (f"{LAYER} | mul", "mul(other) needs other", "mul"),
        (f"{LAYER} | mul(1e400)", "finite", "mul(1e400)"),
        (f"{LAYER} | mul(True)", "other of mul", "mul(True)"),
        (f"{LAYER} | mul(({HUGE},))", "other of mul", "mul("),
        (f"{LAYER} | mul(1, other=2)", "other", "mul(1, other=2)"),
        (f"{LAYER} | mul(other=1, other=2)", "other", "other=2)"),
        (f"{LAYER} | 'relu'", "expected a stage", "'relu'"),
        (f"{'relu|' * 32}{LAYER}{'|relu' * 33}", "at most 64 stages, got 32 before", "Conv"),
        (f"up = {LAYER}\nup = {LAYER}", "line 2: the name up is used twice", "up = "),
        (f"up = {LAYER}\nUp = {LAYER}", "line 2: Up and up are one file's name", "Up = "),
        (f"up = {LAYER}\n\n  # é\nlow = {LAYER}\né = 1", "line 5: ", "é = 1"),
        (f"'é' | {LAYER} | 'é'", "expected a stage", "'é'"),
        (f"# é\u2028\x0c\x85\n{LAYER[:-1]}, stride=0)", "line 2: stride", "0)"),
        (f"{LAYER}\n{LAYER}", "expected one statement, got 2", None),
        ("", "expected one statement, got 0", None),
        (f"relu = {LAYER}", "the name relu is taken", "relu"),
        (f"a.b = {LAYER}", "expected `name = layer`", "a.b"),
        (f"{LAYER[:-1]}", "'(' was never closed", "(4, 6, 3"),
        ("target = gpu", "target must be one of", "gpu"),
        ("ConvTranspos2d(4, 6, 3)", "(did you mean ConvTranspose2d", "ConvTranspos2d"),
        ("ConvTranspose2d(4, 6, 3, strid=2)", "(did you mean stride", "strid=2"),
        ("ConvTranspose2d(4, 6, 3, dtype=bfloat)", "(did you mean bfloat16", "bfloat)"),
        ("ConvTranspose2d(4, 6, 3, precision=tf32x)", "(did you mean tf32x3", "tf32x)"),
        ("ConvTranspose2d(4, 6, 3, layout=channel_last)", "(did you mean channels_last", "chan"),
        ("ConvTranspose2d(4, 6, 3, target=rtx490)", "(did you mean rtx4090", "rtx490)"),
        (f"{LAYER} | leakyrelu", "(did you mean leaky_relu", "leakyrelu"),
    ],
)
def test_errors_say_what_and_where(text, says, at):
    """Breaks if a reader is sent to the wrong place."""
    message = refused(text)
    assert says in message
    assert at is None or pointed(message).startswith(at)


def test_sixty_four_stages_are_taken_and_no_more():
    """The compiler of machine code takes seconds for 64, and most of a minute for 900."""
    relu = Stage("relu", ())
    spec = parse(f"relu | {LAYER}{' | relu' * 63}")
    assert (len(spec.before), len(spec.after)) == (1, 63)
    for place in ("before", "after"):
        with pytest.raises(SpecError, match="at most 64 stages"):
            dataclasses.replace(spec, **{place: (relu,) * 64})


MONSTERS = {
    "a line of 1 MB": "x" * 2**20,
    "1 MB of spaces in front": " " * 2**20 + LAYER,
    "1 MB of indented lines": f"   {LAYER}\n" * 40_000,
    "60 KB of one word": f"{LAYER} | {'x' * 60_000}",
    "21 parentheses": f"{'(' * 21}{LAYER}{')' * 21}",
    "brackets of each kind": "([{" * 7 + "}])" * 7,
    "unary minuses": f"ConvTranspose2d(4, 6, {'-' * 60_000}3)",
    "a chain of stages": "a|" * 20_000 + LAYER,
    "a chain of attributes": "x" + ".a" * 30_000,
    "a chain of calls": "x" + "()" * 30_000,
    "a chain of lambdas": "lambda:" * 9_000 + "1",
    "a chain of targets": "x = " * 15_000 + LAYER,
    "many entries": f"ConvTranspose2d(4, 6, 3, input=({'1,' * 30_000}))",
    "many digits": f"ConvTranspose2d(4, 6, {'9' * 60_000})",
    "a null byte": f"{LAYER[:-1]}, \0stride=2)",
    "a lone surrogate": f"{LAYER} | '\ud800'",
    "a byte-order mark": f"\ufeff{LAYER}",
    "an unfinished string": f"{LAYER} | '''",
}


@pytest.mark.parametrize("name", MONSTERS)
def test_monsters_are_refused_at_once(name):
    """Breaks on a crash, another exception, slow work, or a message as long as the text."""
    message = refused(MONSTERS[name])
    assert len(message) < 1000
    assert message.isprintable() or set(filter(lambda c: not c.isprintable(), message)) == {"\n"}


PAYLOAD = "__import__('os').system('touch x')"


@pytest.mark.parametrize(
    "text",
    [
        PAYLOAD,
        f"ConvTranspose2d({PAYLOAD}, 6, 3)",
        f"ConvTranspose2d(4, 6, 3, input=(1, 4, {PAYLOAD}, 5))",
        f"ConvTranspose2d(4, 6, 3, dtype=f'{{{PAYLOAD}}}')",
        f"ConvTranspose2d(4, 6, 3, **{PAYLOAD})",
        f"ConvTranspose2d(4, 6, 3, input=[{PAYLOAD} for _ in (1,)])",
        f"{PAYLOAD} | {LAYER}",
        f"{LAYER} | mul({PAYLOAD})",
        f"{LAYER} | (lambda: {PAYLOAD})()",
        f"{LAYER}.{PAYLOAD}",
        f"{PAYLOAD}; {LAYER}",
        f"target = {PAYLOAD}; {LAYER}",
    ],
)
def test_nothing_is_evaluated(text, tmp_path, monkeypatch):
    """Breaks if a spec from a stranger can run code."""
    monkeypatch.chdir(tmp_path)
    refused(text)
    assert list(Path().iterdir()) == []


def test_a_target_that_is_none_is_told_with_all() -> None:
    with pytest.raises(KeyError, match=r"no target is called 'h101', only rtx4090, .*h100, h200"):
        find_target("h101")
