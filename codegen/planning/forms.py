"""Forms: what a family, a span and rows make of a layer, before there is a tile.

Stage 4, part of plan. Input: a spec, its phases and sizes; output: a `Form` for each kind of kernel
that serves it, which says what the programs of such a kernel have to do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import SpecError, visible
from ..families.direct import direct_refusal
from ..families.polyphase import SPANS, span_refusal
from ..families.stencil import STENCIL_SPANS, stencil_refusal, stencil_span_refusal
from ..families.window import window_refusal
from ..geometry.boxes import box_of
from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem
from ..geometry.row_blocks import ROWS, RowBlock, rows_refusal
from ..geometry.tile import DEPTHWISE, Tile
from ..language.spec import ConvTransposeSpec
from ..symbolic.sizes import needs_even_rows
from .input_copy import relayout_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a family and a span make of a layer: the products that its programs share.

    Attributes:
        family: a name of `FAMILIES`.
        span: inputs that a position takes together.
        rows: rows of outputs that a program has of each position.
        relayout: the input is copied first (relayout.py).
        extents: of the images and of the positions along each axis, where tiles are boxes of them.
        lanes: columns of the product for each output channel.
        positions: positions of a phase of one image.
        phases: phases that have programs of their own.
        taps: taps of a phase that have steps of their own, on average.
        inputs, weights: input tiles and weights that a step loads.
        products: products of a step.
    """

    family: str
    span: int
    lanes: int
    positions: int
    phases: int
    taps: float
    rows: int = 1
    relayout: bool = False
    extents: tuple[int, ...] = ()
    inputs: int = 1
    weights: int = 1
    products: int = 1

    def step_elements(self, tile: Tile) -> int:
        """Return elements that a step of a tile loads."""
        lines = self.inputs * tile.block_m + self.weights * self.columns(tile)
        return lines * self.depth(tile)

    def box(self, tile: Tile) -> tuple[int, ...]:
        """Return the box of images and positions that a tile is."""
        return box_of(self.extents, tile.block_m, self.rows > 1)

    def columns(self, tile: Tile) -> int:
        """Return columns of the product of a tile: its channels, `lanes` of each."""
        return tile.block_n * self.lanes

    def depth(self, tile: Tile) -> int:
        """Return the depth of a step of a tile: its channels, `span` inputs of each."""
        return tile.block_k * self.span


def forms(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
) -> Iterator[Form]:
    """Yield every form that serves `spec`: those of one row, then those of several."""
    of_one_row = list(_forms_of_one_row(spec, phases, problem))
    if relayout_refusal(spec) is None:
        gathers = spec.stride[-1] == 1 or spec.layout == "channels_last"
        of_one_row += [
            dataclasses.replace(form, relayout=True)
            for form in of_one_row
            if form.family == ("gather" if gathers else "polyphase") and form.span == 1
        ]
    if window_refusal(spec) is None:
        of_one_row += [
            dataclasses.replace(
                form,
                family="window",
                positions=math.prod(problem.phase_extents),
                extents=(problem.batch, *problem.phase_extents),
            )
            for form in of_one_row
            if form.family == "gather" and (form.relayout or spec.layout == "channels_last")
        ]
    yield from of_one_row
    for form, rows in itertools.product(of_one_row, ROWS):
        if form.family not in DEPTHWISE and rows_refusal(spec, rows) is None:
            yield _in_blocks(form, problem, RowBlock(phases[-2], rows))


def _in_blocks(form: Form, problem: Problem, block: RowBlock) -> Form:
    """Return a form whose programs have blocks of rows, and with them all phases of that axis."""
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


def _forms_of_one_row(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
) -> Iterator[Form]:
    count = math.prod(axis.stride for axis in phases)
    # Taps of all phases together are the layer's taps: a phase has its share.
    kernel = math.prod(axis.kernel for axis in phases)
    gather = Form(
        family="gather",
        span=1,
        lanes=1,
        positions=math.prod(problem.phase_extents[:-1])
        * _row(spec, problem.phase_extents[-1], span=1),
        phases=count,
        taps=kernel / count,
    )
    yield gather
    last, depthwise = phases[-1], direct_refusal(spec) is None
    if spec.layout == "channels_last":
        if depthwise:
            yield dataclasses.replace(gather, family="direct")
        return
    if depthwise:
        if last.stride == 1:  # a group has one output: there are none
            yield dataclasses.replace(gather, family="direct")
        else:
            yield _grouped(spec, "direct", Grouping(last, 1), phases, problem)
    for span in STENCIL_SPANS if stencil_refusal(spec) is None else ():
        if stencil_span_refusal(spec, span) is None:
            yield _grouped(spec, "stencil", Grouping(last, span, unrolled=True), phases, problem)
    for span in SPANS:
        if span_refusal(spec, span) is None:
            yield _grouped(spec, "polyphase", Grouping(last, span), phases, problem)


def _row(spec: ConvTransposeSpec, count: int, span: int) -> int:
    """Return the positions of a row of `count` outputs or groups, as sizes.py has them."""
    return count + count % 2 if needs_even_rows(spec, span, fold=False) else count


def _grouped(
    spec: ConvTransposeSpec,
    family: str,
    grouping: Grouping,
    phases: tuple[AxisPhases, ...],
    problem: Problem,
) -> Form:
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


def form_of(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem, tile: Tile
) -> Form:
    """Return the form that `tile` belongs to; raises SpecError if the spec has no such form."""
    for form in forms(spec, phases, problem):
        if _kind(form) == _kind(tile):
            return form
    copy = " of a copy" if tile.relayout else ""
    kind = f"family {tile.family}, span {tile.span} and rows {tile.rows}{copy}"
    raise SpecError(f"no kernel of {kind} serves {visible(str(spec))}")


def _kind(of: Form | Tile) -> tuple[str, int, int, bool]:
    return of.family, of.span, of.rows, of.relayout
