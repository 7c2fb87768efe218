"""The window family: implicit GEMM, output-stationary, whose operands are loaded in boxes.

Stages 3 and 5. Input: a `KernelPlan` and its `Sizes`; output: the `GemmContext` of the template. A
program computes a box of neighbouring outputs of one phase (geometry/boxes.py), so that the inputs
of a tap are a box of a channels_last tensor, with BLOCK_K channels at each position. The tensor
memory accelerator (TMA) of Hopper and later GPUs moves such boxes to shared memory: the kernel
computes one start per tap and box, and no address or mask per element. Elements outside the tensor
read as zero, which provides the padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from sympy import Expr, Integer, Symbol

from ..geometry.boxes import tiles_of
from ..geometry.phases import AxisPhases
from ..geometry.problem import Problem
from ..geometry.tile import Tile
from ..kernels.builder import Kernel, Positions, define_lane
from ..kernels.coordinates import bias_coordinates, input_index, output_at
from ..kernels.gemm import GemmContext, WeightText, channel_lanes, input_tiles
from ..kernels.outline import define_outline
from ..kernels.stores import single_result, stores
from ..kernels.texts import AccessText, LoadText
from ..language.spec import ConvTransposeSpec
from ..planning.candidates import WORTH_UNMEASURED
from ..planning.family import Boxes, Form
from ..planning.forms import single_outputs
from ..planning.grid import axis_coordinate, image_coordinate
from ..planning.input_copy import relayout_refusal
from ..planning.plan import KernelPlan
from ..symbolic.access import TensorIndex, unflatten
from ..symbolic.lines import WIDTH
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import AXES, Sizes
from ..tables.targets import GpuTarget
from .matrix import MatrixFamily
from .matrix_registers import boxes_fit

VECTOR = 16  # bytes; strides of a tensor descriptor must be multiples of this
MOST_COORDINATE = 2**31 - 1


def window_refusal(spec: ConvTransposeSpec) -> str | None:
    """Return why the family cannot serve `spec`, None if it can.

    A layer in channels_first needs a channels_last copy of the input in addition.
    """
    if spec.autotune != "none":
        return "autotune: a tensor descriptor fixes the block sizes of one tile"
    if spec.in_channels is None or spec.out_channels is None:
        return "the channels are left to run time"
    if not (spec.element.itemsize == 2 or (spec.product is not None and spec.product.rounds)):
        return f"{spec.dtype} in this precision does not run as a single tensor-core product"
    group = spec.in_channels // spec.groups
    if group * spec.element.itemsize % VECTOR:
        return f"the {group} channels of a group are not a multiple of {VECTOR} bytes"
    if not all(stage.row.keeps_zero for stage in spec.before):
        return "a stage before the layer maps 0 to a non-zero value, but boxes pad with 0"
    if math.prod(spec.kernel_size) * spec.out_channels > MOST_COORDINATE:
        return "the packed weight has more rows than a 32-bit coordinate can count"
    return None


def window_context(plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
    """Return the template's context; `scribe.used` then holds the sizes the kernel reads."""
    kernel = Kernel(plan, sizes, scribe)
    outline = define_outline(kernel)
    step, group = outline.lines.step, kernel.coordinate("group")
    co = outline.co_start + define_lane(kernel, "co", "BLOCK_N")
    starts, at = _positions(kernel, outline.lines.position)
    channel = group * sizes.group_in + outline.steps.channel
    channel = scribe.define(step, "x_channel", channel, None)
    w_start = outline.tap * sizes.named("C_OUT") + group * sizes.group_out + outline.co_start
    w_start = scribe.define(step, "w_start", w_start, None)
    shifts = list(outline.shifts)
    for number, letter, _ in kernel.axes:
        if not sizes.is_blocked(number):
            first = starts[number + 1] + shifts[number]
            starts[number + 1] = scribe.define(step, f"from_{letter}", first, None)
            shifts[number] = Integer(0)

    def box(row: int) -> list[Expr]:
        """Return the start of the input box; in a row block, that of input row `row`."""
        axes = enumerate(zip(starts[1:], shifts, strict=True))
        first = [input_index(kernel, number, start, row) + by for number, (start, by) in axes]
        return [starts[0], *first, channel]

    def outputs(row: int) -> TensorIndex:
        return output_at(kernel, at, co, outline.phase.residues, row)

    result = single_result(kernel)
    scribe.used |= described_sizes(sizes)
    rows = [0] if plan.block is None else list(plan.block.inputs)
    y_text, output_texts = stores(kernel, outputs, result)
    return GemmContext(
        outline=outline.text(),
        lane_lines=channel_lanes(kernel, "co"),
        x=_boxes("x_desc"),
        w=_boxes("w_desc"),
        y=y_text,
        bias=kernel.access("bias", bias_coordinates(kernel, co), ("co",)),
        inputs=input_tiles(
            outline,
            [_input(kernel, box(row)) for row in rows],
            _weights(kernel, w_start, outline.steps.channel),
            suffix=".T",
        ),
        outputs=output_texts,
        acc_shape=result.shape,
        bias_lanes="co",
    )


def described_sizes(sizes: Sizes) -> set[Symbol]:
    """Return the sizes that the comments on the descriptors mention."""
    axes = [(sizes.input(axis), sizes.kernel(axis)) for axis in range(sizes.rank)]
    return {sizes.named("C_IN"), sizes.named("C_OUT"), sizes.group_in, *sum(axes, start=())}


def _positions(kernel: Kernel, lines: list[str]) -> tuple[list[Expr], Positions]:
    """Define the lanes; return the start of the tile (image, then axes) and its positions.

    Along an axis where the box has one position, both are the same coordinate of the program.
    """
    sizes, scribe, rank = kernel.sizes, kernel.scribe, kernel.plan.spec.rank
    block = sizes.named("BLOCK_M")
    scribe.used.add(block)
    lines.append(f"position = tl.arange(0, {block})")
    lane = scribe.name("position", 0, block - 1, "position")
    letters = ["n", *AXES[rank]]
    boxed = [number for number, extent in enumerate(sizes.box) if extent > 1]
    radices = [sizes.named(f"BOX_{letters[number].upper()}") for number in boxed]
    scribe.used |= set(radices)
    digits = dict(zip(boxed[::-1], unflatten(lane, radices[::-1]), strict=True))
    coordinates = [image_coordinate(sizes), *(axis_coordinate(sizes, n) for n in range(rank))]
    starts, positions = [], []
    for number, (letter, coordinate) in enumerate(zip(letters, coordinates, strict=True)):
        start = kernel.coordinate(coordinate.name)
        if number not in digits:
            starts.append(start)
            positions.append(start)
            continue
        extent = sizes.named(f"BOX_{letter.upper()}")
        most = coordinate.extent * extent - 1
        start = scribe.define(lines, f"start_{letter}", start * extent, (0, most - extent + 1))
        starts.append(start)
        if number == 0:  # two symbols: the lane part of the offset, within a tile, fits int32
            bounds = (0, extent - 1)
            positions.append(start + scribe.define(lines, "next_image", digits[0], bounds))
        else:
            at = start + digits[number]
            positions.append(scribe.define(lines, f"q_{letter}", at, (0, most)))
    image, *axes = positions
    return starts, Positions(image, axes, Integer(0))


def _boxes(descriptor: str) -> AccessText:
    """Return the access of a tensor that is read in boxes."""
    return AccessText(None, (), (), (), "", False, descriptor, "", boxed=True)


def _input(kernel: Kernel, start: list[Expr]) -> LoadText:
    """Return the load of an input box at `start`, reshaped to [BLOCK_M, BLOCK_K]."""
    blocks = [kernel.sizes.named(block) for block in ("BLOCK_M", "BLOCK_K")]
    kernel.scribe.used |= set(blocks)
    load, shape = _load(kernel, start), ", ".join(map(str, blocks))
    line = f"{load}.reshape({shape})"
    if len(f"        x = x_desc{line}") > WIDTH:  # as ruff breaks it
        line = f"{load}.reshape(\n    {shape}\n)"
    return LoadText(line, masked=False, mask_lines=())


def _weights(kernel: Kernel, row: Expr, channel: Expr) -> tuple[WeightText, ...]:
    """Return the weight tiles of a step; in a row block, one for each kernel row.

    `row` and `channel` are the first row and column of the tile in the packed weight.
    """
    block = kernel.plan.block
    way = kernel.sizes.kernel(kernel.plan.spec.rank - 1) * kernel.sizes.named("C_OUT")
    names = ["w"] if block is None else [f"w_{index}" for index in range(block.axis.kernel)]
    return tuple(
        WeightText(_load(kernel, [row + index * way, channel]), False, (), name, ())
        for index, name in enumerate(names)
    )


def _load(kernel: Kernel, start: list[Expr]) -> str:
    """Return the call that loads the box at `start`."""
    return f".load([{', '.join(map(kernel.scribe.text, start))}])"


class Window(MatrixFamily):
    """Serves layers of known channels on GPUs that have a tensor memory accelerator."""

    name = "window"
    method = (
        "implicit GEMM over neighbours in a row: a tap's inputs are a box that the tensor "
        "memory accelerator loads, without an address or a mask for an element"
    )
    serves = "known channels, in channels_last or with a copy, on GPUs since Hopper"
    template = "kernels/gemm.py.jinja"
    context_type = GemmContext

    def refusal(self, spec: ConvTransposeSpec) -> str | None:
        """Return why it cannot serve `spec`, None if it can."""
        return window_refusal(spec)

    def forms(
        self, spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], problem: Problem
    ) -> Iterator[Form]:
        """Yield the form of a channels_last input, and the form with an input copy."""
        form = dataclasses.replace(
            single_outputs(self, spec, phases, problem),
            positions=math.prod(problem.phase_extents),
            extents=(problem.batch, *problem.phase_extents),
        )
        last = spec.layout == "channels_last"
        if last:
            yield form
        if (last or spec.stride[-1] == 1) and relayout_refusal(spec) is None:
            yield dataclasses.replace(form, relayout=True)

    def worth(self, target: GpuTarget) -> float:
        """Return the factor by which a tile must beat others in predicted time.

        It is above 1 except on Hopper, the only target on which the cost of boxes was measured.
        """
        return 1.0 if target.is_hopper else WORTH_UNMEASURED

    def limits(
        self, spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget
    ) -> str | None:
        """Return why `tile` cannot run on `target`, None if it can."""
        if boxes_fit(spec, tile, target):
            return super().limits(spec, form, tile, target)
        return "boxes need Hopper or later, channels of a single group, and 16 positions per warp"

    def folds_batch(self, problem: Problem, form: Form, tile: Tile) -> bool:
        """Return False: images are an axis of the box."""
        return False

    def tiles(self, spec: ConvTransposeSpec, problem: Problem, form: Form, tile: Tile) -> int:
        """Return the number of boxes that cover the positions of all images."""
        return tiles_of(form.extents, form.box(tile))

    def boxes(self, sizes: Sizes) -> Boxes:
        """Return the extents of the input box and the weight box that a step loads."""
        block_n, block_k = sizes.named("BLOCK_N"), sizes.named("BLOCK_K")
        return Boxes((*sizes.box_extents, block_k), (block_n, block_k))

    def gradient_refusal(self) -> str:
        """Return why it cannot compute the gradient: that launch makes no tensor descriptors."""
        return "the kernel of the input's gradient does not read boxes"

    def context(self, plan: KernelPlan, sizes: Sizes, scribe: Scribe) -> GemmContext:
        """Return the names in its template; `scribe.used` then holds the sizes the kernel reads."""
        return window_context(plan, sizes, scribe)


WINDOW = Window()
