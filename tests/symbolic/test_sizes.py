"""What a size follows from: the number that the plan has of it, and what the wrapper finds.

The oracle is the number beside a definition, which planning counts in integers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sympy import Integer

from convgen.compiler import plan
from convgen.language.spec import ConvTransposeSpec
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


def test_a_quotient_rounds_up() -> None:
    m, n = symbol("m"), symbol("n")
    assert [CeilDiv(Integer(k), Integer(3)) for k in range(5)] == [0, 1, 1, 1, 2]
    assert CeilDiv(m, Integer(1)) == m
    half = 2 * CeilDiv(m, Integer(2)) + CeilDiv(m, n)
    assert floors(half) == 2 * FloorDiv(m + 1, Integer(2)) + CeilDiv(m, n)
