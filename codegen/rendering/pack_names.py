"""The names in the templates of the kernel that packs the weight, as text.

Stages 3 and 5. Input: a `KernelPlan` and the `Sizes` of its kernel; output: a `PackText`, in which
every expression is already printed. A program packs a tile of one channel group: PACK_IN input
channels, PACK_OUT output channels, and PACK_TAPS taps. If the last axis is grouped, PACK_TAPS
counts slots instead: combinations of tap, output and input of a group (kernels/packing.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from ..kernels.builder import ONE, Kernel, define_program
from ..kernels.pack_tiles import (
    SLOTS,
    block_lines,
    block_name,
    constant_lines,
    extent_lines,
    grid_of,
    last_output,
    slot_count,
    tile_of,
    with_tiles,
)
from ..kernels.packing import (
    grouped_reach,
    grouped_tap,
    kernel_extents,
    packed_grouping,
    packed_taps,
)
from ..kernels.stages import cast
from ..kernels.texts import AccessText
from ..planning.plan import KernelPlan
from ..symbolic.access import Coordinate, Mask, masks_of, unflatten
from ..symbolic.lines import call_text
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, Sizes
from .host_sizes import HostNames, grid_text
from .kernel_names import TRITON_DTYPES, packed_shape
from .size_lines import list_text, size_lines

ORDER = ("tap", "co", "ci")  # dimensions of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class PackText:
    """The names in `kernels/pack.py.jinja` and `parts/pack.jinja`, as text.

    Attributes:
        kernel: the kernel's name.
        function: name of the function that launches it.
        purpose: words that say what for, where a file has several, after "packs the weight".
        summary, formula: lines of the kernel's docstring.
        triton_dtype: element type of the tensors, in comments.
        w_shape, packed_shape: axes of the tensors, in comments.
        constants: lines that define the extents of a tile.
        arguments: names of the run-time sizes.
        argument_names: the names in `arguments`, as a Python list; empty if there are none.
        locals: lines that define extents of the tile that depend on the weight's layout, and the
            numbers of tiles that the program's coordinates need.
        program_lines: lines that define the program's coordinates.
        lane_lines: lines that define the lanes of its tile.
        packed: access of the packed weight.
        w: access of a contiguous weight.
        w_last: access of a weight in channels_last; None if that is the same layout.
        w_common: lines of both, before what differs; w_sum: the line of both after that, if any.
        extent_lines: lines of the launch that choose the tile's extents by the weight's layout.
        zero_lines: lines that define the mask of elements that have a weight; empty if all do.
        masked: whether elements of a tile may be outside the weight.
        value: text of a packed element.
        taps: number of taps (matrices) of the packed weight.
        rows, columns: factor of each channel in the rows and columns of a matrix, such as
            " * SPAN.value"; empty for 1.
        channels: names of the weight's first two axes.
        grid: line that defines the launch grid.
        launch: lines of the launch.
        given: the arguments that the launch passes after the tensors, as a tuple in text.
    """

    kernel: str
    function: str
    purpose: str
    summary: str
    formula: tuple[str, ...]
    triton_dtype: str
    w_shape: str
    packed_shape: str
    constants: tuple[str, ...]
    arguments: tuple[str, ...]
    argument_names: str
    locals: tuple[str, ...]
    program_lines: tuple[str, ...]
    lane_lines: tuple[str, ...]
    packed: AccessText
    w_common: tuple[str, ...]
    w_sum: str | None
    w: AccessText
    w_last: AccessText | None
    extent_lines: tuple[str, ...]
    zero_lines: tuple[str, ...]
    masked: bool
    value: str
    taps: int
    rows: str
    columns: str
    channels: str
    grid: str
    launch: str
    given: str


def pack_text(plan: KernelPlan, sizes: Sizes) -> tuple[PackText, set[Symbol]]:
    """Return the names in the templates that pack the weight, and the sizes that these read."""
    tile = tile_of(plan, sizes)
    sizes = with_tiles(plan, sizes, tile)
    grid = grid_of(sizes)
    kernel = Kernel(
        dataclasses.replace(plan, grid=(grid,)), sizes, Scribe(sizes.space, checked=False)
    )
    program: list[str] = []
    define_program(kernel, program)
    lanes: list[str] = []
    ci = _lane(kernel, lanes, "ci", "in_tile", "PACK_IN")
    known = sizes.space.number(sizes.group_out)
    high = None if known is None else last_output(tile, known)
    co = _lane(kernel, lanes, "co", "out_tile", block_name(tile, "PACK_OUT"), high)
    slot = "tap" if packed_grouping(plan) is None else "slot"
    # Rounded up to whole tiles of the largest extent, the bound also holds for smaller tiles.
    most = -(-slot_count(plan) // tile.taps) * tile.taps
    tap = _lane(kernel, lanes, slot, "tap_tile", block_name(tile, "PACK_TAPS"), most - 1)
    packed, kernel_index, zeros = _taps(kernel, lanes, tap, co, ci)
    first = kernel.access("packed", packed, ORDER)
    weights = [
        kernel.access("w", _weight(kernel, co, ci, kernel_index, last=last), ORDER, indent=8)
        for last in (False, True)[: 1 + (tile.last is not None)]
    ]
    zero_lines = kernel.scribe.mask_lines("w", zeros, ORDER)
    if zero_lines and first.masked:
        zero_lines.append("w_mask &= packed_mask")
    common = _common(weights)
    w_sum = weights[0].lanes[-1] if weights[0].lanes[-1] in common else None  # of named parts
    weights = [_without(weight, common) for weight in weights]
    host = HostNames(kernel.plan, sizes)
    _, arguments, local_lines = size_lines(sizes, kernel.scribe)
    given = (*host.launch_sizes(arguments), *["last"] * (tile.last is not None))
    back, p = plan.is_backward, plan.prefix
    grouping, op = packed_grouping(plan), f"conv_transpose{plan.spec.rank}d"
    purpose = f"pack{'_for_gradient' * back}{plan.suffix}"
    text = PackText(
        kernel=f"{op}_{purpose}_kernel",
        function=f"_start_{purpose}",
        purpose=_purpose(plan),
        summary=_summary(plan),
        formula=_formula(plan),
        triton_dtype=TRITON_DTYPES[plan.spec.dtype],
        w_shape=_weight_shape(plan),
        packed_shape=packed_shape(plan),
        constants=constant_lines(tile, p, SLOTS[slot]),
        arguments=arguments,
        argument_names=list_text(arguments) if arguments else "",
        locals=(*block_lines(tile, p), *local_lines),
        program_lines=tuple(program),
        lane_lines=tuple(lanes),
        packed=first,
        w_common=tuple(line for line in common if line != w_sum),
        w_sum=w_sum,
        w=weights[0],
        w_last=weights[1] if tile.last else None,
        extent_lines=extent_lines(tile, p, host.extent(grid)),
        zero_lines=tuple(zero_lines),
        masked=first.masked,
        value=_value(plan),
        taps=packed_taps(plan),
        rows=_times(sizes.lanes) if grouping else "",
        columns=_times(sizes.span) if grouping else "",
        channels="c_out, c_in" if back else "c_in, c_out",
        grid=grid_text([host.extent(grid)], tuned=False),
        launch=call_text(
            f"compiled = {op}_{purpose}_kernel[grid]",
            ("weight", "packed", *given, "num_warps=4", "enable_fp_fusion=True"),
            indent=8,
        ),
        given=f"({', '.join(given)}{',' * (len(given) == 1)})",
    )
    return text, kernel.scribe.used


def _common(weights: list[AccessText]) -> tuple[str, ...]:
    """Return the lines that all accesses have; but the last, none reads what another defines."""
    lines = [[*([each.base] if each.base else []), *each.lanes] for each in weights]
    return tuple(line for line in lines[0] if all(line in other for other in lines))


def _without(access: AccessText, lines: tuple[str, ...]) -> AccessText:
    """Return an access that needs lines before its own."""
    base = None if access.base in lines else access.base
    lanes = tuple(line for line in access.lanes if line not in lines)
    return dataclasses.replace(access, base=base, lanes=lanes)


def _lane(
    kernel: Kernel,
    lines: list[str],
    name: str,
    coordinate: str,
    block: str,
    high: Expr | int | None = None,
) -> Symbol:
    """Define the lanes over a block of this program's tile.

    `high` is the largest value of a lane in any tile; None to derive it from the ranges.
    """
    each = kernel.sizes.named(block)
    kernel.scribe.used.add(each)
    start = kernel.coordinate(coordinate) * each
    begin = f"{kernel.scribe.text(start)} + " if start != 0 else ""
    lines.append(f"{name} = {begin}tl.arange(0, {each})")
    high = kernel.scribe.space.bounds(start).high + each - 1 if high is None else high
    return kernel.scribe.name(name, 0, high, "tap" if coordinate == "tap_tile" else name)


def _taps(
    kernel: Kernel, lines: list[str], tap: Symbol, co: Symbol, ci: Symbol
) -> tuple[list[Coordinate], list[Coordinate], tuple[Mask, ...]]:
    """Return coordinates in the packed weight, those of the kernel index, and the weight's masks.

    The masks leave out slots to which no kernel index belongs; these are packed as 0.
    """
    sizes, grouping = kernel.sizes, packed_grouping(kernel.plan)
    extents = kernel_extents(kernel)
    group = kernel.coordinate("group")
    if grouping is None:
        rows, columns = sizes.group_out, sizes.group_in
        packed = [
            Coordinate(tap, math.prod(extents), sizes.named("C_OUT") * columns),
            Coordinate(group, Integer(sizes.groups), rows * columns),
            Coordinate(co, rows, columns),
            Coordinate(ci, columns, ONE),
        ]
        return packed, [Coordinate(tap, math.prod(extents), ONE, looped=True)], ()
    lanes, span, taps = sizes.lanes, sizes.span, sizes.kernel(sizes.rank - 1)
    rows, columns = sizes.group_out * lanes, sizes.group_in * span
    outers = math.prod(extents[:-1], start=ONE)
    radices = {"place": span, "lane": lanes, "group_tap": taps, "outer_tap": outers}
    live = [name for name in radices if name != "outer_tap" or len(extents) > 1]
    digits = dict.fromkeys(radices, Integer(0))
    for name, digit in zip(live, unflatten(tap, map(radices.get, live)), strict=True):
        digits[name] = kernel.scribe.define(lines, name, digit, None)
    place, lane, group_tap, outer = digits.values()
    matrix = sizes.named("C_OUT") * lanes * columns
    packed = [
        Coordinate(outer, outers, taps * matrix),
        Coordinate(group_tap, taps, matrix),
        Coordinate(group, Integer(sizes.groups), rows * columns),
        Coordinate(co, sizes.group_out, lanes * columns),
        Coordinate(lane, lanes, columns),
        Coordinate(ci, sizes.group_in, span),
        Coordinate(place, span, ONE),
    ]
    last = grouped_tap(kernel, grouped_reach(kernel, group_tap, lane, place), lane)
    index = kernel.scribe.define(lines, f"k{AXES[sizes.rank][-1]}", last[0].index, None)
    last[0] = dataclasses.replace(last[0], index=index)
    zeros = masks_of(kernel.scribe.space, last) if grouping.has_zeros else ()
    flat = extents[-1] * outer + index
    kernel_index = [Coordinate(flat, math.prod(extents), ONE, looped=True)]
    return packed, kernel_index, zeros


def _weight(
    kernel: Kernel, co: Symbol, ci: Symbol, taps: list[Coordinate], *, last: bool
) -> list[Coordinate]:
    """Return coordinates in torch's weight: contiguous, or in channels_last if `last`.

    The kernel of the input's gradient reads the same weight with channels swapped and taps
    reversed.
    """
    sizes, back = kernel.sizes, kernel.plan.is_backward
    count = math.prod(kernel_extents(kernel))
    outer, inner = (co, ci) if back else (ci, co)
    outers, inners = (
        (sizes.group_out, sizes.group_in) if back else (sizes.group_in, sizes.group_out)
    )
    of_inner, of_tap = (ONE, inners) if last else (count, ONE)
    if back:
        taps = [dataclasses.replace(tap, index=count - 1 - tap.index) for tap in taps]
    return [
        Coordinate(kernel.coordinate("group"), Integer(sizes.groups), outers * inners * count),
        Coordinate(outer, outers, inners * count, looped=True),
        Coordinate(inner, inners, of_inner, looped=True),
        *(dataclasses.replace(tap, stride=tap.stride * of_tap) for tap in taps),
    ]


def _value(plan: KernelPlan) -> str:
    """Return the text of a packed element; the weight may be float32, under autocast."""
    spec = plan.spec
    if plan.rounds:
        return "round_to_tf32(w)"
    if spec.dtype == "bfloat16":
        return cast(spec, "w.to(tl.float32)")
    return f"w.to(tl.{spec.element.triton})" if spec.dtype == "float16" else "w"


def _times(size: Expr) -> str:
    return "" if size == 1 else f" * {size}.value"


def _summary(plan: KernelPlan) -> str:
    rounded = ", rounded to TF32" * plan.rounds
    return f"Pack one tile of the weight{_purpose(plan)}{rounded}."


def _purpose(plan: KernelPlan) -> str:
    inputs = plan.inputs_text
    if not plan.is_backward:
        return f" for {inputs}" if inputs else ""
    joined = " in " if inputs == "channels_last" else ", "
    return " for the input's gradient" + (joined + inputs if inputs else "")


def _formula(plan: KernelPlan) -> tuple[str, ...]:
    """Return the docstring lines that define the packed weight, in the names of the lanes."""
    letters = AXES[plan.spec.rank]
    inner = ", ".join(f"k{letter}" for letter in letters)
    if plan.is_backward:
        lines = [f"packed[taps, co, ci] = w[co, ci, {inner}], the taps in reverse order"]
    else:
        lines = [f"packed[taps, co, ci] = w[ci, co, {inner}]"]
    if (grouping := packed_grouping(plan)) is not None:
        letter = letters[-1]
        rows = "co and lane" if grouping.lanes > 1 else "co"
        columns = "ci and place" if grouping.span > 1 else "ci"
        lines[0] = lines[0].replace("[taps, co, ci]", f"[taps, {rows}, {columns}]")
        source = "input `place` of a group" if grouping.span > 1 else "an input"
        output = "output `lane` of a group" if grouping.lanes > 1 else "an output"
        lines.append(f"where k{letter} leads from {source} to {output}")
        if grouping.taps > 1:
            lines[-1] += ","
            lines.append("`group_tap` groups before the last that it reaches")
    return tuple(lines)


def _weight_shape(plan: KernelPlan) -> str:
    sizes = plan.sizes
    axes = [sizes.named("C_IN"), sizes.group_out]
    if plan.is_backward:
        axes = [sizes.named("C_OUT"), sizes.group_in]
    axes += [sizes.named(f"K{sizes.letter(axis)}") for axis in range(sizes.rank)]
    return f"[{', '.join(map(str, axes))}]"
