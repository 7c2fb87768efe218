"""The names of the emitted launch and its wrapper, as text.

Stage 5, render. Input: a `KernelPlan`, its `Sizes` and the `KernelText`; output: a
`WrapperContext`. Sizes print here as Python variables of the wrapper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sympy import Expr

from ..kernels.packing import packed_grouping
from ..language.spec import MEMORY_FORMATS, ConvTransposeSpec
from ..planning.family import Boxes
from ..planning.plan import KernelPlan
from ..symbolic.lines import call_text
from ..symbolic.sizes import BLOCKS, Sizes
from ..tables.pointwise import Stage
from .host_printer import HostPrinter
from .host_sizes import Check, HostNames, grid_text
from .kernel_names import KernelText


@dataclass(frozen=True, slots=True, kw_only=True)
class DescriptorText:
    """A tensor descriptor, from which the kernel loads boxes.

    Attributes:
        name: its name.
        tensor: name of the tensor.
        shape, strides: the tensor's extents and strides, as Python lists; strides in elements.
        box: extents of a box, as a Python list.
    """

    name: str
    tensor: str
    shape: str
    strides: str
    box: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperContext:
    """The names of `parts/launch.jinja`, `parts/gradient.jinja` and what stands beside them.

    Attributes:
        input_shape, weight_shape: shapes that the file supports, as text; None for any extent.
        stride, padding, output_padding, dilation, groups: the geometry, as Python text.
        raw_weight: whether the kernel reads torch's weight, without packing.
        lanes: outputs of a group of the packed weight, as Python; 1 if they are no factor.
        own_format: memory_format argument for the spec's layout; empty for channels_first.
        shape_names: lines that assign the sizes which the grid and the launch read.
        check_names, checks: conditions on run-time sizes, and the lines that name those.
        check_reads_output: whether those lines read the output's shape.
        grid: line that defines the launch grid.
        launch: lines of the launch.
        addresses: lines that assign the addresses of the tensors, the output excepted.
        descriptors: tensor descriptors of the operands; empty if the kernel takes pointers.
        again: the tensor arguments of a repeated launch: addresses and descriptors.
        launch_sizes: sizes that the launch passes, as a tuple in text; empty if there are none.
        aligned: condition that the addresses in `addresses` are multiples of 16 bytes.
        torch_before, torch_after: the pipeline's stages in torch, but the last.
        torch_result: the last stage after the layer, as an expression; None if there is none.
        has_stages: there are some around the layer.
    """

    input_shape: str
    weight_shape: str
    stride: str
    padding: str
    output_padding: str
    dilation: str
    groups: int
    raw_weight: bool
    lanes: str
    own_format: str
    shape_names: tuple[str, ...]
    check_names: tuple[str, ...]
    check_reads_output: bool
    checks: tuple[Check, ...]
    grid: str
    launch: str
    addresses: tuple[str, ...]
    descriptors: tuple[DescriptorText, ...]
    again: str
    launch_sizes: str
    aligned: str
    torch_before: tuple[str, ...]
    torch_after: tuple[str, ...]
    torch_result: str | None
    has_stages: bool


def wrapper_context(plan: KernelPlan, sizes: Sizes, kernel: KernelText) -> WrapperContext:
    """Return the names in the wrapper's templates, for the kernel of `plan`."""
    arguments = kernel.arguments
    spec = plan.spec
    least = {block: min(getattr(tile, block.lower()) for tile in plan.tiles) for block in BLOCKS}
    names, check_names = HostNames(plan, sizes), HostNames(plan, sizes, least)
    checks = check_names.checks()
    check_lines = check_names.shape_lines("shape", "output") if checks else ()
    channels_last = spec.layout == "channels_last"
    tuned = any(size.name in BLOCKS and size.value is None for size in sizes.table)
    grid = grid_text([names.extent(axis) for axis in plan.grid], tuned)
    tensors = ("x", "packed_weight", *(["bias"] if spec.bias else []), "y")
    boxes = plan.family.boxes(sizes)
    described = dict(zip(tensors, ("x_desc", "w_desc") if boxes else (), strict=False))
    operands = [described.get(tensor, tensor) for tensor in tensors]
    launch_sizes = names.launch_sizes(arguments)
    tile, packed = plan.tile, packed_grouping(plan)
    lanes = "1" if packed is None else _value(sizes.lanes)
    stages = f"_num_stages({tile.num_stages})" if kernel.unpipelined else str(tile.num_stages)
    options = () if plan.tuned else (f"num_warps={tile.num_warps}", f"num_stages={stages}")
    return WrapperContext(
        input_shape=_tuple((spec.batch, spec.in_channels, *spec.spatial)),
        weight_shape=_tuple(_weight_shape(spec)),
        stride=_tuple(spec.stride),
        padding=_tuple(spec.padding),
        output_padding=_tuple(spec.output_padding),
        dilation=_tuple(spec.dilation),
        groups=spec.groups,
        raw_weight=plan.reads_raw_weight,
        lanes=lanes,
        own_format=f"memory_format=torch.{MEMORY_FORMATS[spec.rank]}" if channels_last else "",
        shape_names=names.launch_names(arguments),
        check_names=check_lines,
        check_reads_output=any("= output" in line for line in check_lines),
        checks=checks,
        grid=grid,
        launch=call_text(
            f"{'' if plan.tuned or plan.prefix else 'compiled = '}{kernel.name}[grid]",
            (*operands, *launch_sizes, *options, "enable_fp_fusion=True"),
            indent=8,
        ),
        addresses=_addresses(tensors[:-1]),
        descriptors=_descriptors(plan, boxes, names.printer) if boxes else (),
        again=", ".join(
            [*(described.get(each, _address(each)) for each in tensors[:-1]), "y.data_ptr()"]
        ),
        launch_sizes=_tuple(launch_sizes) if launch_sizes else "",
        aligned=f"({' | '.join(map(_address, tensors[:-1]))}) % 16 == 0",
        torch_before=tuple(_torch_line("input", stage) for stage in spec.before),
        torch_after=tuple(_torch_line("output", stage) for stage in spec.after[:-1]),
        torch_result=_torch_text("output", spec.after[-1]) if spec.after else None,
        has_stages=bool(spec.before or spec.after),
    )


def _address(tensor: str) -> str:
    """Return the name of a tensor's address, the same as the kernel's parameter."""
    return {"packed_weight": "w_ptr"}.get(tensor, f"{tensor}_ptr")


def _addresses(tensors: tuple[str, ...]) -> tuple[str, ...]:
    """Return the lines that assign the addresses of `tensors`."""
    return tuple(f"{_address(tensor)} = {tensor}.data_ptr()" for tensor in tensors)


def _descriptors(
    plan: KernelPlan, boxes: Boxes, printer: HostPrinter
) -> tuple[DescriptorText, ...]:
    """Return the descriptors of the channels_last input and of the packed weight as a matrix."""
    spec = plan.spec
    assert spec.in_channels is not None
    assert spec.out_channels is not None
    inputs = [*map(str, spec.spatial), str(spec.in_channels)]
    depth = spec.in_channels // spec.groups
    steps = [*(" * ".join(inputs[axis:]) for axis in range(len(inputs))), "1"]
    return (
        DescriptorText(
            name="x_desc",
            tensor="x",
            shape=f"[x.shape[0], {', '.join(inputs)}]",
            strides=f"[{', '.join(steps)}]",
            box=_box(printer, boxes.input),
        ),
        DescriptorText(
            name="w_desc",
            tensor="packed_weight",
            shape=f"[{math.prod(spec.kernel_size)} * {spec.out_channels}, {depth}]",
            strides=f"[{depth}, 1]",
            box=_box(printer, boxes.weight),
        ),
    )


def _box(printer: HostPrinter, extents: tuple[Expr, ...]) -> str:
    """Return the extents of a box, as a Python list."""
    return f"[{', '.join(map(printer.text, extents))}]"


def _value(size: Expr) -> str:
    return "1" if size == 1 else f"{size}.value"


def _tuple(values: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, values))}{',' if len(values) == 1 else ''})"


def _weight_shape(spec: ConvTransposeSpec) -> tuple[int | None, ...]:
    per_group = spec.out_channels and spec.out_channels // spec.groups
    return (spec.in_channels, per_group, *spec.kernel_size)


def _torch_line(variable: str, stage: Stage) -> str:
    return f"{variable} = {_torch_text(variable, stage)}"


def _torch_text(variable: str, stage: Stage) -> str:
    return stage.text(stage.row.torch, variable)
