"""Kernel variants: every (family, span, row block, input copy) that can compute a layer.

Stage 4, part of plan, before tile sizes are chosen. Input: a spec, its phases and sizes, and the
families; output: a `Form` for each variant that serves the spec.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from ..errors import SpecError, visible
from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem
from ..geometry.row_blocks import ROWS, RowBlock, rows_refusal
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..symbolic.size_table import needs_even_rows
from .family import Family, Form


def forms(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    problem: Problem,
    families: tuple[Family, ...],
) -> Iterator[Form]:
    """Yield every form that serves `spec`: those of one row, then those of several."""
    of_one_row = [
        form
        for family in families
        if family.refusal(spec) is None
        for form in family.forms(spec, phases, problem)
    ]
    yield from of_one_row
    served = [rows for rows in ROWS if rows_refusal(spec, rows) is None]
    for form, rows in itertools.product(of_one_row, served):
        if form.family.takes_rows:
            yield _in_blocks(form, problem, RowBlock(phases[-2], rows))


def single_outputs(
    family: Family, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
) -> Form:
    """Return the form whose positions are single outputs; a program computes one phase."""
    count = math.prod(axis.stride for axis in phases)
    row = _row(spec, problem.phase_extents[-1], span=1)
    return Form(
        family=family,
        span=1,
        lanes=1,
        positions=math.prod(problem.phase_extents[:-1]) * row,
        phases=count,
        # The taps of all phases add up to the layer's taps: this is the average per phase.
        taps=math.prod(axis.kernel for axis in phases) / count,
    )


def grouped_outputs(
    family: Family,
    spec: ConvTransposeSpec,
    grouping: Grouping,
    phases: tuple[AxisPhases, ...],
    problem: Problem,
) -> Form:
    """Return the form whose positions are groups of a row, with all phases of the last axis."""
    groups = -(-(problem.output_extents[-1] + grouping.offset) // grouping.width)
    count = math.prod(axis.stride for axis in phases[:-1])
    return Form(
        family=family,
        span=grouping.span,
        lanes=grouping.lanes,
        positions=math.prod(problem.phase_extents[:-1]) * _row(spec, groups, grouping.span),
        phases=count,
        taps=math.prod(axis.kernel for axis in phases[:-1]) / count * grouping.groups.kernel,
    )


def _in_blocks(form: Form, problem: Problem, block: RowBlock) -> Form:
    """Return `form` with row blocks: a program computes all phases of the last axis but one."""
    stride, kernel = block.axis.stride, block.axis.kernel
    blocks = -(-problem.output_extents[-2] // block.rows)
    extents = (*form.extents[:-2], blocks, form.extents[-1]) if form.extents else ()
    return dataclasses.replace(
        form,
        positions=form.positions // problem.phase_extents[-2] * blocks,
        phases=form.phases // stride,
        taps=form.taps * stride / kernel,
        rows=block.rows,
        extents=extents,
        inputs=len(block.inputs),
        weights=kernel,
        products=block.products,
    )


def _row(spec: ConvTransposeSpec, count: int, span: int) -> int:
    """Return the positions of a row of `count` outputs or groups, padded as in sizes.py."""
    return count + count % 2 if needs_even_rows(spec, span, fold=False) else count


def form_of(
    spec: ConvTransposeSpec,
    phases: tuple[AxisPhases, ...],
    problem: Problem,
    tile: Tile,
    families: tuple[Family, ...],
) -> Form:
    """Return the form of a layer that `tile` belongs to; raises SpecError if there is none."""
    wanted = tile.family, tile.span, tile.rows, tile.relayout
    for form in forms(spec, phases, problem, families):
        if (form.family.name, form.span, form.rows, form.relayout) == wanted:
            return form
    copy = " with a copy of the input" if tile.relayout else ""
    kind = f"family {tile.family}, span {tile.span} and rows {tile.rows}{copy}"
    raise SpecError(f"no kernel of {kind} serves {visible(str(spec))}")
