"""What somebody outside can add with a row or an object: a family, a stage, a GPU, a precision.

Nothing else has to be told of it: planning, printing, explaining, tuning and verifying take what
they are handed. So none of them knows the names of those that convgen has.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import numpy as np
import pytest

from convgen import emit, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.execution.verify import verify
from convgen.explain import explain
from convgen.families.gather import gather_context
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import AxisPhases, decompose
from convgen.geometry.problem import Problem
from convgen.geometry.tile import Tile
from convgen.kernels.gemm import GemmContext
from convgen.language.spec import ConvTransposeSpec
from convgen.measuring.tune import shortlist
from convgen.planning.candidates import rank_tiles
from convgen.planning.family import Demand, Family, Form
from convgen.planning.forms import single_outputs
from convgen.planning.plan import KernelPlan
from convgen.symbolic.scribe import Scribe
from convgen.symbolic.sizes import Sizes
from convgen.tables.dtypes import PRECISIONS, Precision
from convgen.tables.pointwise import POINTWISE, Parameter, Pointwise
from convgen.tables.targets import TARGETS, GpuTarget
from running import run

LAYER = "ConvTranspose2d(8, 6, 3, stride=2, padding=1, input=(2, 8, 7, 5))"


def extend(monkeypatch: pytest.MonkeyPatch, table: tuple[Any, ...], row: Any) -> None:
    """Add a row to a table, wherever a module has it by a name of its own."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "convgen":
            for attribute, value in list(vars(module).items()):
                if value is table:
                    monkeypatch.setattr(module, attribute, (*table, row))


# ---- a family: a plain loop over channels and taps, of any layer, of one tile ----

KERNEL = """\
{% from "parts/load.jinja" import load %}
{% macro step() %}
{% for line in kernel.body.outline.step %}
{{ line }}
{% endfor %}
{% for line in kernel.body.x.step_lines %}
{{ line }}
{% endfor %}
{% for tile in kernel.body.inputs %}
{{ load("x", kernel.body.x, tile, "x") -}}
{% for weight in tile.weights %}
{% for line in weight.step_lines %}
{{ line }}
{% endfor %}
{{ load("w", kernel.body.w, weight, weight.name) -}}
{% endfor %}
{% for line in tile.lines %}
{{ line }}
{% endfor %}
{% endfor %}
acc += tl.sum(x.to(tl.{{ kernel.accumulator }})[:, :, None] * w.to(tl.{{ kernel.accumulator }}), 1)
{%- endmacro %}
{% include "parts/signature.jinja" %}
{% for line in kernel.body.lane_lines %}
    {{ line }}
{% endfor %}

{% include "parts/accesses.jinja" %}

    acc = tl.zeros(({{ kernel.body.acc_shape }}), dtype=tl.{{ kernel.accumulator }})
{% if kernel.body.outline.loop %}
    for {{ kernel.body.outline.loop.variable }} in {{ kernel.body.outline.loop.over }}:
        {{ step() | indent(8) }}
{% else %}
    {{ step() | indent(4) }}
{% endif %}
{% if kernel.has_bias %}
{% if kernel.body.bias.base %}
    {{ kernel.body.bias.base | indent(4) }}
{% endif %}
{% for line in kernel.body.bias.mask_lines %}
    {{ line | indent(4) }}
{% endfor %}
    bias_ptr += {{ kernel.body.bias_lanes }}
    bias = tl.load(bias_ptr{{ ", mask=bias_mask, other=0.0" if kernel.body.bias.masked }})
    acc += {{ kernel.bias_value }}[None, :]
{% endif %}
{% include "parts/store.jinja" %}
"""


class PlainLoop(Family):
    """Multiplies without matrix units, by broadcasting; slow, and good for a test."""

    name = "plain_loop"
    method = "every product by itself"
    serves = "any"
    template = "kernels/plain_loop.py.jinja"
    context_type = GemmContext
    loader = jinja2.DictLoader({"kernels/plain_loop.py.jinja": KERNEL})
    products = False
    takes_rows = False

    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        return "a test has no use for it in 3-D" if spec.rank == 3 else None

    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        yield single_outputs(self, spec, phases, problem)

    def blocks(
        self, spec: ConvTransposeSpec, problem: Problem, form: Form
    ) -> Iterator[tuple[int, int, int, int]]:
        yield 32, 16, 16, 4

    def stages(self, form: Form) -> tuple[int, ...]:
        return (2,)

    def most_registers(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> int:
        return target.registers_per_thread

    def demand(self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget) -> Demand:
        return Demand(128, 128, step=4 * (32 + 16) * 16)

    def program_ns(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
    ) -> float:
        return 1e-3 * steps  # a lie by which it comes first

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
        return gather_context(plan, sizes, scribe)


WITH_TOY = (*FAMILIES, PlainLoop())


def test_a_family_is_planned_and_printed() -> None:
    source = compile_kernel(parse(LAYER), families=WITH_TOY)
    assert source.plan.family == PlainLoop()
    assert "# family: plain_loop" in source.text
    assert "acc += tl.sum(" in source.text
    assert compile_kernel(parse(LAYER)).text == emit(LAYER)
    assert "plain_loop" not in emit(LAYER)


def test_a_family_is_explained() -> None:
    (section,) = explain(plan(parse(LAYER), families=WITH_TOY), "plan")
    rows = dict(section.rows)
    assert rows["family"] == "plain_loop: every product by itself"
    deep = parse("ConvTranspose3d(4, 4, 2, stride=2)")
    (section,) = explain(plan(deep, families=WITH_TOY), "candidates")
    assert "a test has no use for it in 3-D" in dict(section.rows)["family plain_loop"]


def test_a_family_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    extend(monkeypatch, FAMILIES, PlainLoop())
    assert "plain_loop serves any: every product by itself" in run("families").stdout


def test_a_family_s_tiles_are_tuned() -> None:
    spec = parse(LAYER)
    ranking = rank_tiles(spec, decompose(spec), find_target("h100"), WITH_TOY)
    assert "plain_loop" in {tile.family for tile in shortlist(ranking, 12)}


@pytest.mark.interpreter
@pytest.mark.parametrize("text", [LAYER, f"{LAYER[:-1]}, dtype=float64, layout=channels_last)"])
def test_a_family_is_verified(text: str) -> None:
    report = verify(parse(text), families=WITH_TOY)
    assert report.exact is True
    assert report.error < 1e-6  # the order of its sums is its own affair


# ---- a stage, a GPU, a precision: a row each ----


@pytest.mark.interpreter
def test_a_stage_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from convgen.execution import oracle

    row = Pointwise(
        name="halfway",
        triton="{x} + ({to} - {x}) * 0.5",
        torch="{x} + ({to} - {x}) * 0.5",
        parameters=(Parameter(name="to"),),
    )
    extend(monkeypatch, POINTWISE, row)
    by_hand = {**oracle.POINTWISE, "halfway": lambda x, to: np.asarray(x + (to - x) * 0.5)}
    monkeypatch.setattr(oracle, "POINTWISE", by_hand)
    spec = parse(f"{LAYER} | halfway(3.0) | relu")
    assert str(parse(str(spec))) == str(spec)
    assert "(3.0 - " in emit(spec)
    assert verify(spec).passed


def test_a_target_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        find_target("rtx4090"), name="toy", product="a card of 2 SMs", sms=2
    )
    extend(monkeypatch, TARGETS, small)
    assert find_target("toy") == small
    assert "toy" in run("targets").stdout
    large = parse(f"{LAYER[:-1]}, target=toy)".replace("7, 5", "70, 50"))
    assert plan(large).target == small
    assert plan(large).cost.waves > plan(large, find_target("rtx4090")).cost.waves
    assert "# target: toy" in emit(large)


def test_a_precision_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Precision(name="bf16", rounds=False, interpreted=False, rate="bf16", products=1)
    extend(monkeypatch, PRECISIONS, row)
    text = emit(f"{LAYER[:-1]}, precision=bf16)", "h100")
    assert "precision=bf16" in text.splitlines()[1]
    assert '"bf16"' in text
