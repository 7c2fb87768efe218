"""The stencil family: depthwise layers whose rows are whole groups, bound by memory.

Stages 3 and 5. Input: a `KernelPlan` with an unrolled `Grouping`; output: the `StencilContext` of
the template. A program computes one channel at BLOCK_M positions; a position is PHASES neighbouring
outputs of a row. They read SPAN neighbouring inputs, which are loaded as one vector, and a few
inputs beside these, which are loaded one by one. All are multiplied by weights that are scalars of
the program, and the outputs are stored as vectors. The flat loop covers the taps of other axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sympy import Expr, Integer

from ..geometry.groups import Grouping
from ..geometry.phases import AxisPhases, decompose
from ..geometry.problem import Problem
from ..kernels.builder import ONE, Kernel, Positions, define_lane
from ..kernels.coordinates import bias_coordinates, tensor
from ..kernels.outline import define_outline
from ..kernels.packing import raw_weight
from ..kernels.stores import Result, stores
from ..kernels.texts import AccessText, KernelBody, OperandText
from ..language.spec import ConvTransposeSpec
from ..planning.family import Form
from ..planning.forms import grouped_outputs
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate, Mask, TensorIndex, access
from ..symbolic.lines import assignment, bare
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import Sizes
from .depthwise import DepthwiseFamily, depthwise_refusal

STENCIL_SPANS = (2, 4, 8)
VECTOR = 16  # bytes that a thread loads at once
MOST_PRODUCTS = 64  # products of a group; each takes a term in the kernel and registers
MOST_BESIDE = 8  # inputs beside a group that are loaded one by one


@dataclass(frozen=True, slots=True)
class ScalarText:
    """A value that is loaded by itself: its name, and its offset from the access's pointer."""

    name: str
    offset: str


@dataclass(frozen=True, slots=True)
class BesideText(ScalarText):
    """An input beside the group, with the name of its mask."""

    mask: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StencilContext(KernelBody):
    """The names of `kernels/stencil.py.jinja`: text, flags and tuples of text only.

    Attributes:
        beside_lines: lines that define the masks of the inputs beside the group.
        beside: the inputs beside the group.
        span, phases: inputs and outputs of a group.
        widths: extents of the accumulator.
        wide: suffix that casts a value to the accumulator's dtype; empty if there is no cast.
        weights: the weights that a step loads.
        sum_lines: lines that compute what a step adds to each output of a group.
        join_lines: lines that interleave these sums and add them to `acc`.
    """

    beside_lines: tuple[str, ...]
    beside: tuple[BesideText, ...]
    span: str
    phases: str
    widths: str
    wide: str
    weights: tuple[ScalarText, ...]
    sum_lines: tuple[str, ...]
    join_lines: tuple[str, ...]


def stencil_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why the family cannot serve `spec` with any span, None if it can."""
    if (reason := depthwise_refusal(spec)) is not None:
        return reason
    if spec.layout != "channels_first":
        return "channels_last: the channels are neighbours, not the inputs of a row"
    if spec.before:
        return "stages before the layer"
    reasons = [stencil_span_refusal(spec, span) for span in STENCIL_SPANS]
    return reasons[0] if all(reasons) else None


def stencil_span_refusal(spec: ConvTransposeSpec, span: int) -> str | None:
    """Return why groups of `span` inputs cannot serve a depthwise `spec`, None if they can."""
    extent, stride = spec.spatial[-1], spec.stride[-1]
    if extent is None:
        return "the last extent is left to run time"
    if stride & (stride - 1):
        return f"stride {stride} along the last axis is not a power of two"
    if span * spec.element.itemsize > VECTOR:
        return f"groups of {span} inputs exceed a vector of {VECTOR} bytes"
    grouping = Grouping(decompose(spec)[-1], span, unrolled=True)
    outputs = spec.output_spatial[-1]
    if extent % span or outputs != extent * stride:
        return f"{extent} inputs and {outputs} outputs of a row are not whole groups of {span}"
    products = [pair for sums in grouping.sums for pair in sums]
    if not all(grouping.sums):
        return "no tap reaches some outputs of the last axis"
    if len(products) > MOST_PRODUCTS:
        return f"{len(products)} products a group, at most {MOST_PRODUCTS}"
    beside = {place for place, _ in products if not 0 <= place < span}
    if len(beside) > MOST_BESIDE:
        return f"{len(beside)} inputs beside a group, at most {MOST_BESIDE}"
    return None


def stencil_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> StencilContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    assert plan.grouping is not None
    kernel, grouping = Kernel(plan, sizes, scribe), plan.grouping
    outline = define_outline(kernel, depthwise=True)
    channel, shifts = outline.co_start, outline.shifts
    at, tap = outline.positions(outline.start()), outline.named_tap(outline.tap)
    inputs = define_lane(kernel, "inputs", "SPAN")
    every = _inputs(kernel, at, channel, shifts, inputs)
    x = kernel.access("x", every.coordinates(), ("position", "inputs"))
    x_text = _over_groups(kernel, x, _inputs(kernel, at, channel, shifts, Integer(0)))
    w = raw_weight(kernel, channel, [Coordinate(tap, ONE, ONE, looped=True)])
    place = define_lane(kernel, "outputs", "PHASES")
    y = _outputs(kernel, at, channel, outline.phase.residues, place)
    element = plan.spec.element
    wide = "" if element.triton == element.accumulator else f".to(tl.{element.accumulator})"
    cast = (f"x = x{wide}",) if wide else ()
    split = _split_lines(str(sizes.named("BLOCK_M")), grouping.span)
    beside_lines, beside = _beside(kernel, at, x_text.masked)
    used = sorted({k for sums in grouping.sums for _, k in sums})
    turn = Integer(-1 if plan.is_backward else 1)  # the input's gradient reads the taps in reverse
    span, width = sizes.named("SPAN"), sizes.named("PHASES")
    widths = f"{sizes.named('BLOCK_M')}, {width}"
    result = Result(shape=widths, order=("position", "outputs"))
    y_text, output_texts = stores(kernel, lambda row: y, result)
    return StencilContext(
        outline=outline.text(),
        x=x_text,
        w=kernel.access("w", w, ("co",)),
        inputs=(OperandText("", x_text.masked, x_text.mask_lines, (*cast, *split)),),
        outputs=output_texts,
        beside_lines=beside_lines,
        beside=beside,
        span=str(span),
        phases=str(width),
        y=y_text,
        bias=kernel.access("bias", bias_coordinates(kernel, channel), ("co",)),
        widths=widths,
        wide=wide,
        weights=tuple(ScalarText(f"w_{k}", kernel.offset(turn * k)) for k in used),
        sum_lines=_sum_lines(grouping),
        join_lines=_join_lines(grouping.width, widths),
    )


def _inputs(
    kernel: Kernel, at: Positions, channel: Expr, shifts: list[Expr], place: Expr
) -> TensorIndex:
    """Return the index of the input at `place` of each group."""
    sizes, last = kernel.sizes, kernel.plan.spec.rank - 1
    axes = [
        [Coordinate(position + shift, sizes.input(number), ONE)]
        for number, (position, shift) in enumerate(zip(at.axes, shifts, strict=True))
    ]
    groups = sizes.named(f"{sizes.letter(last)}_IN_GROUPS")
    axes[last] = [
        Coordinate(at.axes[last], groups, sizes.span),
        Coordinate(place, sizes.span, ONE),
    ]
    return tensor(kernel, at.image, channel, "IN", axes)


def _over_groups(kernel: Kernel, x: AccessText, firsts: TensorIndex) -> AccessText:
    """Return `x` with lines that define the offsets of the groups' first inputs.

    The inputs beside a group are loaded at a constant offset from these.
    """
    scribe = kernel.scribe
    one = access(scribe.space, firsts.coordinates(), frozenset(scribe.kinds))
    group = scribe.lane_text("group", one.lanes, ("position",))
    inside = scribe.vector_lines("x_inside", one.masks)
    return dataclasses.replace(
        x,
        lanes=(*group.lines(), "x_lanes = group_lanes[:, None] + inputs[None, :]"),
        mask_lines=(*inside, "x_mask = x_inside[:, None]") if inside else (),
    )


def _outputs(
    kernel: Kernel, at: Positions, channel: Expr, residues: list[Expr], place: Expr
) -> TensorIndex:
    """Return the index of the output at `place` of each group."""
    sizes, last = kernel.sizes, kernel.plan.spec.rank - 1
    axes = [
        [Coordinate(axis.stride * position + residue, sizes.output(number), ONE)]
        for (number, _, axis), position, residue in zip(kernel.axes, at.axes, residues, strict=True)
    ]
    phases = sizes.named("PHASES")
    axes[last] = [
        Coordinate(at.axes[last], sizes.phase(last), phases),
        Coordinate(place, phases, ONE),
    ]
    return tensor(kernel, at.image, channel, "OUT", axes)


def _beside(
    kernel: Kernel, at: Positions, masked: bool
) -> tuple[tuple[str, ...], tuple[BesideText, ...]]:
    """Return the lines that define the masks of neighbouring groups, and the inputs read there."""
    grouping, sizes = kernel.plan.grouping, kernel.sizes
    assert grouping is not None
    last, span, masks, texts = kernel.plan.spec.rank - 1, grouping.span, {}, []
    places = {place for sums in grouping.sums for place, _ in sums}
    for place in sorted(places - set(range(span))):
        shift, side = place // span, "before" if place < 0 else "after"
        mask = f"{side}_mask" if abs(shift) == 1 else f"{side}_mask_{abs(shift)}"
        extent = None if place < 0 else sizes.named(f"{sizes.letter(last)}_IN_GROUPS")
        condition = kernel.scribe.condition(Mask(at.axes[last] + shift, extent))
        masks[mask] = (
            f"{mask} = x_inside & {condition}" if masked else f"{mask} = {bare(condition)}"
        )
        texts.append(
            BesideText(_name(place, span), f" {'-' if place < 0 else '+'} {abs(place)}", mask)
        )
    comment = ("# The inputs beside the group",) if texts else ()
    return (*comment, *masks.values()), tuple(texts)


def _name(place: int, span: int) -> str:
    """Return the name of the input `place` inputs after the first of a group."""
    if place < 0:
        return f"before_{-place}"
    return f"x_{place}" if place < span else f"after_{place - span + 1}"


def _names(letter: str, numbers: range) -> str:
    return "_".join([letter, *map(str, numbers)])


def _split_lines(block: str, span: int) -> tuple[str, ...]:
    """Return the lines that split `x` into one tile for each input of a group."""
    levels = span.bit_length() - 1
    lines = ["# The inputs of a group one by one, from halves of even and odd places"]
    lines += [f"x = x.reshape({block}, {', '.join(['2'] * levels)})"] * (levels > 1)
    for level in range(levels):
        step = 2**level
        for first in range(step):
            whole = _names("x", range(first, span, step)) if level else "x"
            halves = [_names("x", range(first + n * step, span, 2 * step)) for n in (0, 1)]
            lines.append(f"{', '.join(halves)} = tl.split({whole})")
    return tuple(lines)


def _sum_lines(grouping: Grouping) -> tuple[str, ...]:
    """Return the lines that compute what a step adds to each output of a group."""
    lines = []
    for output, sums in enumerate(grouping.sums):
        products = [f"{_name(place, grouping.span)} * w_{k}" for place, k in sums]
        lines.append(assignment(f"y_{output}", " + ".join(products), 8))
    return tuple(lines)


def _join_lines(width: int, widths: str) -> tuple[str, ...]:
    """Return the lines that interleave the outputs of a group and add them to the accumulator."""
    lines = ["# Side by side, the same way back"]
    for level in reversed(range(width.bit_length() - 1)):
        step = 2**level
        for first in range(step):
            halves = [_names("y", range(first + n * step, width, 2 * step)) for n in (0, 1)]
            joined = f"tl.join({', '.join(halves)})"
            if level:
                lines.append(f"{_names('y', range(first, width, step))} = {joined}")
            else:
                shape = f".reshape({widths})" if width > 2 else ""
                lines.append(f"acc += {joined}{shape}")
    return tuple(lines)


class Stencil(DepthwiseFamily):
    """Serves depthwise layers whose rows are whole groups."""

    name = "stencil"
    method = (
        "groups of neighbours in a row, loaded and stored as vectors; weights are scalars of "
        "the program, without matrix units, in full precision"
    )
    serves = "depthwise layers in channels_first whose rows come in whole groups"
    template = "kernels/stencil.py.jinja"
    context_type = StencilContext
    unrolled = True
    prefers_wide = True
    columns: ClassVar = {"channels_first": (1,)}
    loads = 3  # a vector, and the inputs beside it

    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        """Return why it cannot serve `spec` with any span, None if it can."""
        return stencil_refusal(spec)

    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield a form for each span that serves `spec`."""
        for span in STENCIL_SPANS:
            if stencil_span_refusal(spec, span) is None:
                grouping = Grouping(phases[-1], span, self.unrolled)
                yield grouped_outputs(self, spec, grouping, phases, problem)

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> StencilContext:
        """Return the names in its template; `scribe.used` then holds the sizes the kernel reads."""
        return stencil_context(plan, sizes, scribe)


STENCIL = Stencil()
