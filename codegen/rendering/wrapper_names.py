"""The names of the emitted launch and its wrapper, as text.

Stage 5, render. Input: a `KernelPlan`, its `Sizes` and the `KernelText`; output: a
`WrapperContext`. Sizes print here as Python variables of the wrapper.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr

from ..language.spec import ConvTransposeSpec
from ..planning.family import Boxes
from ..planning.plan import KernelPlan
from ..symbolic.lines import call_text, tuple_text
from ..symbolic.sizes import BLOCKS, Sizes
from ..tables.pointwise import Stage
from .host_printer import HostPrinter
from .host_sizes import Check, HostNames, grid_text
from .kernel_names import KernelText


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperContext:
    """What a file was generated for.

    Attributes:
        input_shape, weight_shape: shapes that the file supports, as text; None for any extent.
        stride, padding, output_padding, dilation, groups: the geometry, as Python text.
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
    torch_before: tuple[str, ...]
    torch_after: tuple[str, ...]
    torch_result: str | None
    has_stages: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchText:
    """The names of `parts/launch.jinja`, `parts/gradient.jinja` and what stands beside them.

    Attributes:
        suffix: what the names of the functions end in.
        inputs: words for the inputs that the kernel is for; empty for a file's first.
        shape_names: lines that assign the sizes which the grid and the launch read.
        check_names, checks: conditions on run-time sizes, and the lines that name those.
        grid: line that defines the launch grid.
        launch: lines of the launch.
        descriptors: lines that make the descriptors of the operands, from which the kernel loads
            boxes; empty if it takes pointers.
        descriptor_names: lines that assign the sizes which the descriptors read.
        launch_sizes: sizes that the launch passes, as a tuple in text.
    """

    suffix: str
    inputs: str
    shape_names: tuple[str, ...]
    check_names: tuple[str, ...]
    checks: tuple[Check, ...]
    grid: str
    launch: str
    descriptors: tuple[str, ...]
    descriptor_names: tuple[str, ...]
    launch_sizes: str


def wrapper_context(spec: ConvTransposeSpec) -> WrapperContext:
    """Return the names in the templates that say what a file of `spec` was generated for."""
    return WrapperContext(
        input_shape=tuple_text((spec.batch, spec.in_channels, *spec.spatial)),
        weight_shape=tuple_text(_weight_shape(spec)),
        stride=tuple_text(spec.stride),
        padding=tuple_text(spec.padding),
        output_padding=tuple_text(spec.output_padding),
        dilation=tuple_text(spec.dilation),
        groups=spec.groups,
        torch_before=tuple(_torch_line("input", stage) for stage in spec.before),
        torch_after=tuple(_torch_line("output", stage) for stage in spec.after[:-1]),
        torch_result=_torch_text("output", spec.after[-1]) if spec.after else None,
        has_stages=bool(spec.before or spec.after),
    )


def launch_text(plan: KernelPlan, sizes: Sizes, kernel: KernelText) -> LaunchText:
    """Return the names in the templates that launch the kernel of `plan`."""
    arguments = kernel.arguments
    spec = plan.spec
    least = {block: min(getattr(tile, block.lower()) for tile in plan.tiles) for block in BLOCKS}
    names, box_names = HostNames(plan, sizes), HostNames(plan, sizes)
    check_names = HostNames(plan, sizes, least)
    checks = check_names.checks()
    check_lines = check_names.shape_lines("shape", "output") if checks else ()
    tuned = any(size.name in BLOCKS and size.value is None for size in sizes.table)
    grid = grid_text([names.extent(axis) for axis in plan.grid], tuned)
    tensors = ("x", "packed_weight", *(["bias"] if spec.bias else []), "y")
    boxes = plan.family.boxes(sizes)
    described = dict(zip(tensors, ("x_desc", "w_desc") if boxes else (), strict=False))
    operands = [described.get(tensor, tensor) for tensor in tensors]
    launch_sizes = names.launch_sizes(arguments)
    tile = plan.tile
    stages = f"_num_stages({tile.num_stages})" if kernel.unpipelined else str(tile.num_stages)
    options = () if plan.tuned else (f"num_warps={tile.num_warps}", f"num_stages={stages}")
    return LaunchText(
        suffix=plan.suffix,
        inputs=plan.inputs_text,
        shape_names=names.launch_names(arguments),
        check_names=check_lines,
        checks=checks,
        grid=grid,
        launch=call_text(
            f"{'' if plan.tuned else 'compiled = '}{kernel.name}[grid]",
            (*operands, *launch_sizes, *options, "enable_fp_fusion=True"),
            indent=8,
        ),
        descriptors=_descriptors(boxes, box_names) if boxes else (),
        descriptor_names=box_names.shape_lines("x.shape", "y.shape"),
        launch_sizes=tuple_text(launch_sizes),
    )


def _descriptors(boxes: Boxes, names: HostNames) -> tuple[str, ...]:
    """Return lines that describe the channels_last input, and the packed weight as a matrix.

    A descriptor has a tensor, its extents, its strides in elements, and the extents of a box.
    """
    sizes = names.sizes
    axes = [sizes.input(axis) for axis in range(sizes.rank)]
    batch, *inputs = map(names.printer.text, (sizes.named("BATCH"), *axes, sizes.named("C_IN")))
    steps = [*(" * ".join(inputs[axis:]) for axis in range(len(inputs))), "1"]
    x = "x", f"[{batch}, {', '.join(inputs)}]", f"[{', '.join(steps)}]"
    weight = "packed_weight", "[taps * rows, columns]", "[columns, 1]"
    return (
        call_text("x_desc = TensorDescriptor", (*x, _box(names.printer, boxes.input)), 4),
        "taps, rows, columns = packed_weight.shape",
        call_text("w_desc = TensorDescriptor", (*weight, _box(names.printer, boxes.weight)), 4),
    )


def _box(printer: HostPrinter, extents: tuple[Expr, ...]) -> str:
    """Return the extents of a box, as a Python list."""
    return f"[{', '.join(map(printer.text, extents))}]"


def _weight_shape(spec: ConvTransposeSpec) -> tuple[int | None, ...]:
    per_group = spec.out_channels and spec.out_channels // spec.groups
    return (spec.in_channels, per_group, *spec.kernel_size)


def _torch_line(variable: str, stage: Stage) -> str:
    return f"{variable} = {_torch_text(variable, stage)}"


def _torch_text(variable: str, stage: Stage) -> str:
    return stage.text(stage.row.torch, variable)
