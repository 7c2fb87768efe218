"""Values of foreign types at every public door: they count as what they stand for, or are refused.

What would break it: a number or a word that keeps its own type. Emitted files are made of what it
prints as, keys and caches of what it equals.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import operator

import numpy as np
import pytest
import torch

import convgen
from convgen import ConvTransposeSpec, GpuTarget, SpecError, find_target
from convgen.compiler import compile_kernel
from convgen.errors import shown, visible
from convgen.families.registry import FAMILIES
from convgen.geometry.tile import Tile
from convgen.language.spec import make_stage
from convgen.planning.choices import tile_of
from convgen.tables.pointwise import Stage

INJECTED = "0\nimport os  # injected"


def _lies(self, *_):
    return INJECTED


def _agrees(self, other):
    return True


LYING = {"__repr__": _lies, "__str__": _lies, "__format__": _lies, "__hash__": lambda self: 0}
LYING |= {"__eq__": _agrees, "__lt__": _agrees, "__le__": _agrees, "__ge__": _agrees}
LYING |= {"__add__": _lies, "__mod__": lambda self, other: 0, "__bool__": lambda self: True}
LyingInt = type("LyingInt", (int,), LYING)
LyingText = type("LyingText", (str,), LYING)
LyingFloat = type("LyingFloat", (float,), LYING)
NUMBERS = {
    "IntEnum": lambda value: enum.IntEnum("K", {"A": value}).A,
    "IntFlag": lambda value: enum.IntFlag("K", {"A": value})(value),
    "numpy": np.int64,
    "a 0-d tensor": torch.tensor,
    "lying": LyingInt,
}
TEXTS = {
    "str Enum": lambda value: enum.Enum("D", {"A": value}, type=str).A,
    "StrEnum": lambda value: enum.StrEnum("D", {"A": value}).A,
    "numpy": np.str_,
    "lying": LyingText,
}
PLAIN = {
    "rank": 2,
    "in_channels": 8,
    "out_channels": 4,
    "kernel_size": (3, 4),
    "stride": (2, 1),
    "padding": (1, 0),
    "output_padding": (1, 0),
    "dilation": (1, 2),
    "groups": 2,
    "input": (2, 8, 9, 9),
    "grid": 2,
    "dtype": "float32",
    "precision": "ieee",
    "layout": "channels_first",
    "target": "h100",
    "autotune": "none",
    "after": (Stage("mul", (2.0,)),),
}


def exact(value: object) -> bool:
    """Whether nothing but exact builtin values, tuples of them and stages is in `value`."""
    if type(value) is Stage:
        return type(value.name) is str and exact(value.values)
    if type(value) is tuple:
        return all(map(exact, value))
    return value is None or type(value) in (int, float, str, bool)


def disguised(value, number, text):
    """Return `value` with its numbers and texts in other types."""
    if isinstance(value, tuple):
        return tuple(disguised(entry, number, text) for entry in value)
    if isinstance(value, Stage):
        return Stage(text(value.name), tuple(map(LyingFloat, value.values)))
    return text(value) if isinstance(value, str) else number(value)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_spec_holds_what_its_arguments_stand_for(number, text):
    plain = ConvTransposeSpec(**PLAIN)
    given = {k: disguised(v, NUMBERS[number], TEXTS[text]) for k, v in PLAIN.items()}
    made = ConvTransposeSpec(**given)
    for field in dataclasses.fields(made):
        assert exact(getattr(made, field.name)), field.name
    assert (made, hash(made), str(made)) == (plain, hash(plain), str(plain))
    emitted = convgen.emit(made)
    assert emitted == convgen.emit(plain)
    ast.parse(emitted)


INTEGERS = [name for name, value in PLAIN.items() if not isinstance(value, str) and name != "after"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", None, [[2]], object()])
def test_what_is_no_integer_is_refused_by_name(name, value):
    """A truth value too: torch takes `stride=True` for 1, and nobody means that."""
    if value is None and name in ("in_channels", "out_channels", "grid", "input"):
        return  # left open
    with pytest.raises(SpecError) as caught:
        ConvTransposeSpec(**PLAIN | {name: value})
    assert caught.value.argument == name


@pytest.mark.parametrize("value", [1, 0, "True", np.True_, None])
def test_a_truth_value_is_one(value):
    with pytest.raises(SpecError, match="bias must be True or False"):
        ConvTransposeSpec(**PLAIN | {"bias": value})


class Impostor:
    """Says that it is an int and a text, and is neither."""

    __class__ = property(lambda self: self.kind)

    def __init__(self, kind):
        self.kind = kind

    def __repr__(self):
        raise RuntimeError("no")

    def __index__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("kind", [int, str, tuple, bool, float, Stage, GpuTarget])
def test_what_only_says_that_it_is_one_is_refused(kind):
    for name in (*PLAIN, "bias"):
        with pytest.raises(SpecError) as caught:
            ConvTransposeSpec(**PLAIN | {name: Impostor(kind)})
        assert caught.value.argument == name
    for call in (convgen.parse, convgen.emit, lambda v: convgen.emit("a", v)):
        with pytest.raises(SpecError):
            call(Impostor(kind))


# ---- the other doors ----


@pytest.mark.parametrize("text", TEXTS)
def test_every_door_for_text(text):
    made = TEXTS[text]
    layer = "ConvTranspose1d(4, 2, 4, stride=2) | relu"
    assert exact(convgen.parse(made(layer)).kernel_size)
    assert convgen.parse(made(layer)) == convgen.parse(layer)
    assert convgen.emit(made(layer), made("h100")) == convgen.emit(layer, "h100")
    assert find_target(made("a100")) is find_target("a100")


def test_a_name_that_equals_everything_finds_nothing():
    with pytest.raises(KeyError):
        find_target(LyingText("gtx"))
    with pytest.raises(SpecError, match="target must be one of"):
        convgen.emit("ConvTranspose1d(1, 1, 3)", LyingText("gtx"))
    with pytest.raises(SpecError, match="unknown stage"):
        make_stage(LyingText("zap"), (), {})


def test_a_subclass_that_prints_itself_is_no_spec_and_no_target():
    class Spec(ConvTransposeSpec):
        def __str__(self):
            return INJECTED

    class Target(GpuTarget):
        arch = property(_lies)

    fields = {f.name: getattr(find_target("h100"), f.name) for f in dataclasses.fields(GpuTarget)}
    with pytest.raises(SpecError, match="described by text"):
        convgen.emit(Spec(rank=1, kernel_size=3))
    with pytest.raises(SpecError, match="target must be one of"):
        convgen.emit("ConvTranspose1d(1, 1, 3)", Target(**fields))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(GpuTarget)])
def test_a_gpu_of_one_s_own(name):
    """Its name stands in the header, its numbers in the plan."""
    h100 = find_target("h100")
    value = getattr(h100, name)
    made = dataclasses.replace(h100, **{name: disguised_field(value)})
    assert exact(getattr(made, name))
    assert getattr(made, name) == value
    for wrong in (INJECTED, "", -1, True, None, float("nan"), object(), (1,)):
        with pytest.raises(SpecError, match=name):
            dataclasses.replace(h100, **{name: wrong})


def disguised_field(value):
    if isinstance(value, tuple):
        return tuple(map(LyingInt, value))
    return {int: LyingInt, float: LyingFloat, str: LyingText}[type(value)](value)


TILE = {"block_m": 32, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_tile_of_other_numbers(number):
    spec = ConvTransposeSpec(rank=1, in_channels=16, out_channels=16, kernel_size=3)
    numbers = {name: NUMBERS[number](value) for name, value in TILE.items()}
    tile = Tile(**numbers, family=LyingText("gather"))
    assert all(exact(getattr(tile, field.name)) for field in dataclasses.fields(tile))
    assert compile_kernel(spec, tile=tile).text == compile_kernel(spec, tile=Tile(**TILE)).text


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("block_m", [True, 0, -32, 48, 2048, "32", 32.0, None]),
        ("num_warps", [True, 0, 3, 64, 1024]),
        ("num_stages", [False, 0, 17]),
        ("span", [True, 0, 3, 32]),
        ("rows", [True, 0, 17]),
        ("family", ["", "a b", "Gather", INJECTED, 3, None]),
        ("relayout", [0, 1, "no", None]),
    ],
)
def test_a_wrong_tile_is_refused_by_its_field(field, values):
    for value in values:
        with pytest.raises(SpecError, match=field):
            Tile(**TILE | {field: value})
        with pytest.raises(SpecError, match=field):
            tile_of(TILE | {"family": "gather", "span": 1} | {field: value}, FAMILIES)


def test_a_module_of_other_numbers():
    layer = torch.nn.ConvTranspose2d(4, 2, 3)
    plain = ConvTransposeSpec.from_module(layer)
    layer.in_channels, layer.groups = NUMBERS["IntEnum"](4), LyingInt(1)
    layer.kernel_size, layer.stride = [LyingInt(3)] * 2, NUMBERS["numpy"](1)
    made = ConvTransposeSpec.from_module(layer, input_size=(LyingInt(2), None, None, None))
    assert all(exact(getattr(made, field.name)) for field in dataclasses.fields(made))
    assert str(dataclasses.replace(made, input=None)) == str(plain)


def test_a_class_of_torch_s_name_alone():
    class ConvTranspose2d:
        """Has nothing of a layer."""

    with pytest.raises(SpecError, match="module must be initialised"):
        ConvTransposeSpec.from_module(ConvTranspose2d())


@pytest.mark.parametrize("text", TEXTS)
def test_replacing_with_other_texts(tmp_path, text):
    made = TEXTS[text]

    def replaced(folder, word):
        model = torch.nn.Sequential(torch.nn.ConvTranspose1d(4, 2, 4))
        done = convgen.replace_layers(
            model,
            target=word("h100"),
            precision=None,
            dtype=word("float16"),
            folder=folder,
            include=word("0"),
        )
        return done, [path.read_text() for path in sorted(folder.glob("*.py"))]

    assert replaced(tmp_path / "a", made) == replaced(tmp_path / "b", str)
    for name in ("target", "precision", "dtype", "include", "exclude"):
        with pytest.raises(SpecError, match=name):
            convgen.replace_layers(torch.nn.Sequential(), **{name: LyingText("zap")})


def test_the_doors_are_these():
    """Another public function needs its test here."""
    callables = {name for name in convgen.__all__ if callable(getattr(convgen, name))}
    functions = {name for name in callables if not inspect.isclass(getattr(convgen, name))}
    of_a_model_alone = {"freeze", "report", "restore_layers", "unfreeze"}
    assert functions == {"emit", "find_target", "parse", "replace_layers"} | of_a_model_alone


# ---- what messages show ----


def test_what_is_shown_is_one_printable_line():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    values = [deep, "\x1b[31m\n" * 999, Impostor(int), LyingInt(3), 10**5000, [10**5000], "\udcff"]
    values += [LyingText("a\nb"), object(), float("nan"), b"\x1b", type("\x1b", (), {})]
    for value in values:
        assert shown(value).isprintable()
        assert len(shown(value)) <= 60
    assert shown(LyingInt(3)) == "3"
    assert shown("a'b") == '"a\'b"'
    assert shown(True) == "True"
    assert visible("\x1b[2J\ud800é\n") == "\\x1b[2J\\ud800é\\n"


def test_the_number_of_an_index_is_asked_once():
    """A number that changes between the check and the use would pass it."""

    class Changing:
        values = iter([3, 10**9])

        def __index__(self):
            return next(self.values)

    made = ConvTransposeSpec(rank=1, kernel_size=Changing())
    assert made.kernel_size == (3,)
    assert operator.index(Changing()) == 10**9
