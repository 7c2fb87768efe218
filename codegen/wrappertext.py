"""The names of the emitted wrappers and module, as text.

Stage 5, part of render. Input: a `KernelPlan`, its `Sizes` and the kernel's run-time arguments;
output: a `WrapperContext`. Sizes print here as Python variables of the wrapper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from .grouping import Grouping
from .kerneltext import KernelText
from .plan import GRID_LIMITS, GridCoordinate, KernelPlan
from .pointwise import Stage
from .printer import WIDTH, bare, split
from .sizes import AXES, BLOCKS, Sizes
from .spec import ConvTransposeSpec

_FORMATS = {2: "channels_last", 3: "channels_last_3d"}


@dataclass(frozen=True, slots=True)
class Check:
    """A condition that the file was not generated for, what it was, and a line before it."""

    condition: str
    message: str
    setup: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperContext:
    """The names of `parts/wrapper.jinja`, `parts/operator.jinja` and `parts/module.jinja`.

    Attributes:
        input_shape, weight_shape: what the file was generated for, None for any size.
        stride, padding, output_padding, dilation, groups: the geometry, as Python text.
        input_axes: names of the input's axes, as torch orders them, and its format.
        kernel_axes: names of the weight's last axes.
        group_taps: the lines of the table of kernel indices, empty if no axis is grouped.
        group_zeros: some weights of the table are zero.
        rounds: the packed weight is rounded to TF32.
        lanes, span: outputs and inputs of a group, as in Python; 1 if they are no factor.
        layout, other_layout: the spec's layout, and the one an input may have instead.
        own_axes, other_axes: the axes of a tensor dense in those layouts, the innermost first.
        last_axes: those of channels_last.
        own_format: the argument that names the layout to torch; empty if none does.
        shape_names: the lines that name the sizes which grid and launch read.
        check_names, checks: conditions on run-time sizes, and the lines that name those.
        check_reads_output: those lines read the shape of the output.
        grid: the line that defines the launch grid.
        launch: the arguments of the launch.
        tensors: its tensors.
        launch_sizes: its sizes as a tuple, empty if there are none.
        aligned: the condition that its tensors are, to 16 bytes.
        torch_before, torch_after: the pipeline's stages in torch, but the last.
        torch_result: the last stage after the layer, None if there is none.
        module_arguments: the parameters of `ModelNew`.
        pipeline: the stages around the layer, None if there are none.
    """

    input_shape: str
    weight_shape: str
    stride: str
    padding: str
    output_padding: str
    dilation: str
    groups: int
    input_axes: str
    kernel_axes: str
    group_taps: tuple[str, ...]
    group_zeros: bool
    rounds: bool
    lanes: str
    span: str
    layout: str
    other_layout: str
    own_axes: str
    other_axes: str
    last_axes: str
    own_format: str
    shape_names: tuple[str, ...]
    check_names: tuple[str, ...]
    check_reads_output: bool
    checks: tuple[Check, ...]
    grid: str
    launch: tuple[str, ...]
    tensors: str
    launch_sizes: str
    aligned: str
    torch_before: tuple[str, ...]
    torch_after: tuple[str, ...]
    torch_result: str | None
    module_arguments: tuple[str, ...]
    pipeline: str | None


def wrapper_context(plan: KernelPlan, sizes: Sizes, kernel: KernelText) -> WrapperContext:
    """Return the names of the wrapper's templates, for the kernel of `plan`."""
    arguments = kernel.arguments
    spec = plan.spec
    names, check_names = _Names(plan, sizes), _Names(plan, sizes)
    checks = check_names.checks()
    check_lines = check_names.shape_lines("shape", "output") if checks else ()
    channels_last = spec.layout == "channels_last"
    tuned = any(size.name in BLOCKS and size.value is None for size in sizes.table)
    grid = _grid_text([names.extent(axis) for axis in plan.grid], tuned)
    spatial = tuple(range(spec.rank + 1, 1, -1))
    axes = [_tuple((*spatial, 1, 0)), _tuple((1, *spatial, 0))]
    tensors = ("x", "packed_weight", *(["bias"] if spec.bias else []), "y")
    launch_sizes = names.launch_sizes(arguments)
    tile, packed = plan.tile, plan.grouping
    if packed is not None and packed.unrolled:  # the weight is as it is without groups
        packed = None
    options = () if plan.tuned else (f"num_warps={tile.num_warps}", f"num_stages={tile.num_stages}")
    return WrapperContext(
        input_shape=_tuple((spec.batch, spec.in_channels, *spec.spatial)),
        weight_shape=_tuple(_weight_shape(spec)),
        stride=_tuple(spec.stride),
        padding=_tuple(spec.padding),
        output_padding=_tuple(spec.output_padding),
        dilation=_tuple(spec.dilation),
        groups=spec.groups,
        input_axes=_input_axes(spec),
        kernel_axes=", ".join(f"K{letter.upper()}" for letter in AXES[spec.rank]),
        group_taps=() if packed is None else _table(packed, plan.prefix),
        group_zeros=packed is not None and packed.has_zeros,
        rounds=kernel.rounds,
        lanes="1" if packed is None else _value(sizes.lanes),
        span="1" if packed is None else _value(sizes.span),
        layout=spec.layout,
        other_layout="channels_first" if channels_last else "channels_last",
        own_axes=axes[channels_last],
        other_axes=axes[not channels_last],
        last_axes=axes[True],
        own_format=f"memory_format=torch.{_FORMATS[spec.rank]}" if channels_last else "",
        shape_names=names.launch_names(arguments),
        check_names=check_lines,
        check_reads_output=any("= output" in line for line in check_lines),
        checks=checks,
        grid=grid,
        launch=(*tensors, *launch_sizes, *options, "enable_fp_fusion=True"),
        tensors=", ".join(tensors),
        launch_sizes=_tuple(launch_sizes) if launch_sizes else "",
        aligned=f"({' | '.join(f'{tensor}.data_ptr()' for tensor in tensors)}) % 16 == 0",
        torch_before=tuple(_torch_line("input", stage) for stage in spec.before),
        torch_after=tuple(_torch_line("output", stage) for stage in spec.after[:-1]),
        torch_result=_torch_text("output", spec.after[-1]) if spec.after else None,
        module_arguments=_module_arguments(spec),
        pipeline=_pipeline(spec),
    )


def _input_axes(spec: ConvTransposeSpec) -> str:
    axes = ["BATCH", "C_IN", *(f"{letter.upper()}_IN" for letter in AXES[spec.rank])]
    return f"[{', '.join(axes)}]" + (" in channels_last" if spec.layout == "channels_last" else "")


def _grid_text(extents: list[str], tuned: bool) -> str:
    """Return the assignment of `grid`, a function where blocks are tuned, broken as by ruff."""
    broken = [
        extent if len(f"        {extent},") <= WIDTH else "\n    ".join(split(extent, "*"))
        for extent in extents
    ]
    exploded = "(\n" + "".join(f"    {extent},\n" for extent in broken) + ")"
    if tuned:
        return f"grid = lambda META: (  # noqa: E731{exploded[1:]}"
    line = f"grid = ({', '.join(extents)}{',' if len(extents) == 1 else ''})"
    return line if len(line) + 4 <= WIDTH else f"grid = {exploded}"


def _reach_text(products: list[str]) -> str:
    """Return the assignment of `reach`, broken as by ruff."""
    if len(products) == 1:
        return f"reach = {products[0]}"
    line = f"reach = max({', '.join(products)})"
    broken = "reach = max(\n" + "".join(f"    {product},\n" for product in products) + ")"
    return line if len(line) + 4 <= WIDTH else broken


def _value(size: Expr) -> str:
    return "1" if size == 1 else f"{size}.value"


def _table(grouping: Grouping, prefix: str) -> tuple[str, ...]:
    """Return the lines of a grouping's table of kernel indices, -1 where there is none."""
    lines = []
    for outputs in grouping.table:
        rows = [_tuple(tuple(-1 if k is None else k for k in inputs)) for inputs in outputs]
        text = f"({', '.join(rows)}{',' if len(rows) == 1 else ''}),"
        if len(text) + 4 <= WIDTH:
            lines.append(text)
        else:
            lines += ["(", *(f"    {row}," for row in rows), "),"]
    whole = f"{prefix}GROUP_TAPS = ({lines[0]})"
    if len(lines) == 1 and len(whole) <= WIDTH:
        return (whole,)
    return (f"{prefix}GROUP_TAPS = (", *(f"    {line}" for line in lines), ")")


def _tuple(values: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, values))}{',' if len(values) == 1 else ''})"


def _weight_shape(spec: ConvTransposeSpec) -> tuple[int | None, ...]:
    per_group = spec.out_channels and spec.out_channels // spec.groups
    return (spec.in_channels, per_group, *spec.kernel_size)


def _torch_line(variable: str, stage: Stage) -> str:
    return f"{variable} = {_torch_text(variable, stage)}"


def _torch_text(variable: str, stage: Stage) -> str:
    return stage.text(stage.row.torch, variable)


def _pipeline(spec: ConvTransposeSpec) -> str | None:
    if not spec.before and not spec.after:
        return None
    return " | ".join([*map(str, spec.before), "layer", *map(str, spec.after)])


def _module_arguments(spec: ConvTransposeSpec) -> tuple[str, ...]:
    """The parameters of the module in torch's order; open channels have no default."""

    def axes(values: tuple[int, ...]) -> str:
        return str(values[0]) if len(set(values)) == 1 else str(values)

    channels = [
        name if value is None else f"{name}={value}"
        for name, value in (("in_channels", spec.in_channels), ("out_channels", spec.out_channels))
    ]
    if spec.in_channels is not None and spec.out_channels is None:
        channels[0] = "in_channels"  # a default cannot stand before a required argument
    return (
        *channels,
        f"kernel_size={axes(spec.kernel_size)}",
        f"stride={axes(spec.stride)}",
        f"padding={axes(spec.padding)}",
        f"output_padding={axes(spec.output_padding)}",
        f"groups={spec.groups}",
        f"bias={spec.bias}",
        f"dilation={axes(spec.dilation)}",
        'padding_mode="zeros"',
        "device=None",
        "dtype=None",
    )


class _Names:
    """Prints sizes as variables of the wrapper: `H_IN` is `h_in`."""

    def __init__(self, plan: KernelPlan, sizes: Sizes) -> None:
        self.plan = plan
        self.sizes = sizes
        self.space = sizes.space
        self.definitions = {size.symbol: size for size in sizes.table}
        self.used: set[str] = set()
        self.positions: str | None = None

    def text(self, expr: Expr) -> str:
        """Print a product of sizes."""
        if expr.is_Integer:
            return str(expr)
        if isinstance(expr, Symbol):
            return self._symbol(expr)
        joint = " * " if expr.is_Mul else " + "
        parts = (
            [self.text(part) for part in expr.as_ordered_factors()]
            if expr.is_Mul
            else [self.text(part) for part in expr.as_ordered_terms()]
        )
        return joint.join(parts)

    def _symbol(self, size: Symbol) -> str:
        entry = self.definitions[size]
        if entry.name in BLOCKS:
            return f'META["{entry.text}"]' if entry.value is None else f"{entry.text}.value"
        if entry.block is not None:
            block = self._symbol(self.sizes.named(entry.block))
            if entry.block == "BLOCK_M":
                images = f"{self._variable('BATCH')} * " if entry.name == "folded_tiles" else ""
                return f"triton.cdiv({bare(images + self._positions())}, {block})"
            return f"triton.cdiv({bare(self.text(entry.definition))}, {block})"
        if entry.name.endswith("_ROW"):
            count = self.text(self.sizes.count(self.plan.spec.rank - 1))
            return f"triton.cdiv({bare(count)}, 2) * 2"
        grouping = self.plan.grouping
        if grouping is not None and grouping.span > 1 and entry.name.endswith("_GROUPS"):
            output = self._variable(entry.name.replace("_GROUPS", "_OUT"))
            offset = f" + {grouping.offset}" if grouping.offset else ""
            return f"triton.cdiv({output}{offset}, {self.sizes.named('PHASES')}.value)"
        if entry.name.endswith("_BLOCKS"):
            output = self._variable(entry.name.replace("_BLOCKS", "_OUT"))
            return f"triton.cdiv({output}, {self.sizes.named('ROWS')}.value)"
        if entry.name.endswith(("_PHASE", "_GROUPS")):
            letter = entry.name.partition("_")[0]
            axis = AXES[self.plan.spec.rank].index(letter.lower())
            growth = self.plan.phases[axis].extent_growth
            if grouping is not None and entry.name.endswith("_GROUPS"):
                growth = grouping.growth
            source = self._variable(f"{letter}_IN")
            if growth == 0:
                return source
            return f"({source} {'+' if growth > 0 else '-'} {abs(growth)})"
        if entry.name.startswith("GROUP_"):
            return f"{self._variable(entry.name[6:])} // GROUPS"
        return self._variable(entry.name)

    def _positions(self) -> str:
        """Return the name of the positions of an image, which `shape_line` then defines."""
        text = self.text(self.sizes.positions)
        if self.plan.spec.rank == 1:
            return text
        self.positions = bare(text)
        return "positions"

    def _variable(self, name: str) -> str:
        self.used.add(name)
        return name.lower()

    def extent(self, coordinates: tuple[GridCoordinate, ...]) -> str:
        """Print the extent of a grid axis."""
        live = [c.extent for c in coordinates if self.space.number(c.extent) != 1]
        numbers = [int(extent) for extent in live if extent.is_Integer]
        texts = [self.text(extent) for extent in live if not extent.is_Integer]
        count = 1
        for number in numbers:
            count *= number
        if count > 1:
            texts.insert(0, str(count))
        return " * ".join(texts) or "1"

    def launch_names(self, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """Return the lines that name the sizes which grid and launch read."""
        for axis in self.plan.grid:
            self.extent(axis)
        self.launch_sizes(arguments)  # which names them
        if not self.plan.prefix:
            self.used.discard("C_OUT")  # it has a line already
        return self.shape_lines("x.shape", "shape")

    def shape_lines(self, inputs: str, outputs: str) -> tuple[str, ...]:
        """Return the lines that name the sizes printed so far, from these two shapes."""
        letters = [letter.upper() for letter in AXES[self.plan.spec.rank]]
        lines = []
        for end, first, source in (("IN", "BATCH", inputs), ("OUT", "", outputs)):
            names = [first, f"C_{end}", *(f"{letter}_{end}" for letter in letters)]
            read = [(n, name) for n, name in enumerate(names) if name in self.used]
            if len(read) == 1:
                lines.append(f"{read[0][1].lower()} = {source}[{read[0][0]}]")
            elif read:
                shown = [name.lower() if (n, name) in read else "_" for n, name in enumerate(names)]
                lines.append(f"{', '.join(shown)} = {source}")
        if self.positions is not None:
            lines.append(f"positions = {self.positions}")
        return tuple(lines)

    def launch_sizes(self, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """Return the sizes that the launch passes."""
        symbols = {size.text: size.symbol for size in self.sizes.table}
        return tuple(self.text(symbols[name]) for name in arguments)

    def checks(self) -> tuple[Check, ...]:
        """Refuse run-time sizes that int32 offsets inside a tile or a grid axis cannot reach."""
        found = []
        reach = self._reach()
        if reach:
            what = "sizes whose offsets in a tile stay below 2**31"
            # The margin is for the lanes that hang over the end of the positions.
            found.append(Check("reach >= 2**31 - 2**16", what, _reach_text(reach)))
        for number, axis in enumerate(self.plan.grid):
            live = [c.extent for c in axis if self.space.number(c.extent) is None]
            if number and live:
                extent = self.extent(axis).replace('META["BLOCK_N"]', str(self._least("block_n")))
                limit = GRID_LIMITS[number]
                what = f"at most {limit} programs on axis {number} of the grid"
                found.append(Check(f"{extent} > {limit}", what))
        return tuple(found)

    def _least(self, block: str) -> int:
        return min(int(getattr(tile, block)) for tile in self.plan.tiles)

    def _most(self, block: str) -> int:
        return max(int(getattr(tile, block)) for tile in self.plan.tiles)

    def _reach(self) -> list[str]:
        """Bounds of the offsets inside a tile of input and output that run time decides."""
        sizes, spec = self.sizes, self.plan.spec
        channels_last = spec.layout == "channels_last"
        images = Integer(1)
        if self.plan.fold_batch:  # the tile's images: its positions are known, or it would not fold
            positions = self.space.number(sizes.positions) or 1
            images = Integer(self._most("block_m") // positions + 2)
        inputs, outputs = [], []
        for axis, phases in enumerate(self.plan.phases):
            grows = phases.extent_growth > 0
            count, span = sizes.phase(axis), 1
            if self.plan.grouping is not None and sizes.is_grouped(axis):
                span = self.plan.grouping.span
                known = self.space.number(count)  # as it is with a span above 1
                count = count if known is None else Integer(known)
            if self.plan.block is not None and sizes.is_blocked(axis):  # its extents are known
                count = Integer(self.plan.block.rows * (self.space.number(count) or 0))
            inputs.append(span * count if grows or span > 1 else sizes.input(axis))
            outputs.append(phases.stride * span * count)
        blocks_in = self._most("block_n" if self.plan.tile.depthwise else "block_k")
        whole = channels_last or self.plan.fold_batch
        depth_in = sizes.groups * sizes.group_in if whole else Integer(blocks_in)
        depth_out = sizes.groups * sizes.group_out if whole else Integer(self._most("block_n"))
        products = [images * depth_in * math.prod(inputs), images * depth_out * math.prod(outputs)]
        largest: dict[Expr, Expr] = {}  # of products of the same sizes
        for product in products:
            count, size = product.as_coeff_Mul()
            if self.space.number(product) is None:
                largest[size] = max(largest.get(size, Integer(0)), count)
        kept: list[Expr] = []  # the larger of two, where the sizes prove which one that is
        for reach in (count * size for size, count in largest.items()):
            if not any(self.space.is_nonnegative(other - reach) for other in kept):
                kept = [other for other in kept if not self.space.is_nonnegative(reach - other)]
                kept.append(reach)
        return [self.text(reach) for reach in kept]
