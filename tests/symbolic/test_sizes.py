"""What a size follows from: the number that the plan has of it, and what the wrapper finds.

The oracle is the number beside a definition, which planning counts in integers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sympy import Integer

from convgen.compiler import plan
from convgen.language.spec import LAYOUTS, ConvTransposeSpec
from convgen.planning.plan import KernelPlan
from convgen.rendering.host_printer import HostPrinter, extent_names
from convgen.symbolic.space import CeilDiv, FloorDiv, floors, symbol
from drawing import draw, forms


def plans(spec: ConvTransposeSpec) -> list[KernelPlan]:
    """Return a plan of each form that serves `spec`."""
    return [plan(spec, tile=tiles[0]) for tiles in forms(spec).values()]


def ceil_div(a: int, b: int) -> int:
    """Round a / b up."""
    return -(-a // b)


@pytest.mark.parametrize("seed", range(40))
def test_a_size_is_what_its_definition_says(seed: int) -> None:
    for each in plans(draw(seed)[0]):
        values = {size.symbol: Integer(size.value) for size in each.sizes.table}
        for size in each.sizes.table:
            if size.definition is not None:
                assert size.definition.xreplace(values) == size.value, size.name


@pytest.mark.parametrize("seed", range(40))
def test_the_wrapper_finds_the_sizes_of_the_plan(seed: int) -> None:
    spec = draw(seed)[0]
    assert spec.input is not None
    shapes = {"IN": spec.input, "OUT": (spec.batch, spec.out_channels, *spec.output_spatial)}
    for each in plans(spec):
        printer = HostPrinter(each.sizes)
        names = {"triton": SimpleNamespace(cdiv=ceil_div), "GROUPS": spec.groups}
        for size in each.sizes.table:
            names[size.text] = SimpleNamespace(value=size.value)
        for end, shape in shapes.items():
            read = zip(extent_names(spec.rank, end), shape, strict=True)
            names |= {name.lower(): extent for name, extent in read}
        names["positions"] = eval(printer.text(each.sizes.positions), names)
        for size in each.sizes.table:
            assert eval(printer.text(size.symbol), names) == size.value, size.name


STRIDES = {"channels_first": [105, 35, 7, 1], "channels_last": [105, 1, 21, 3]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_every_layout(layout: str) -> None:
    """Of three channels of 5 x 7; a layout that is added has to be listed."""
    sizes = plan(ConvTransposeSpec(rank=2, kernel_size=3)).sizes
    assert sizes.strides([Integer(5), Integer(7)], Integer(3), layout) == STRIDES[layout]


def test_an_unknown_layout_is_not_taken_for_another() -> None:
    sizes = plan(ConvTransposeSpec(rank=2, kernel_size=3)).sizes
    with pytest.raises(KeyError, match="channels_between"):
        sizes.strides([Integer(5), Integer(7)], Integer(3), "channels_between")


def test_a_quotient_rounds_up() -> None:
    m, n = symbol("m"), symbol("n")
    assert [CeilDiv(Integer(k), Integer(3)) for k in range(5)] == [0, 1, 1, 1, 2]
    assert CeilDiv(m, Integer(1)) == m
    half = 2 * CeilDiv(m, Integer(2)) + CeilDiv(m, n)
    assert floors(half) == 2 * FloorDiv(m + 1, Integer(2)) + CeilDiv(m, n)
