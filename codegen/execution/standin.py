"""Stand-ins: smaller layers of the same kind, which the oracle and the interpreter can compute.

Beside the stages, part of verification. Input: a spec of any size; output: a `StandIn` whose work
and memory are bounded before anything runs.

Sizes are reduced first. If the geometry alone needs too much, it is reduced in two steps: dilation,
and padding beyond the kernel's reach, by multiples of the stride, so that every output keeps its
phase; then kernel, stride, dilation and padding of an axis by a common factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..compiler import plan
from ..errors import SpecError
from ..families.registry import FAMILIES
from ..geometry.phases import decompose
from ..geometry.problem import problem_of
from ..geometry.tile import Tile
from ..language.spec import MAX_CHANNELS, MAX_SIZE, ConvTransposeSpec
from ..planning.choices import Choices
from ..planning.costs import layer_flops, work_of
from ..planning.family import Family
from ..planning.forms import form_of
from ..planning.plan import KernelPlan
from ..tables.targets import GpuTarget


class Most(NamedTuple):
    """Upper limits: extent of an axis, channels of a group, groups, images."""

    spatial: int
    channels: int
    groups: int
    batch: int


WHOLE = Most(MAX_SIZE, MAX_CHANNELS, MAX_CHANNELS, MAX_SIZE)
# Limits tried in turn on a GPU, which can compute every size that the oracle can.
LARGE = (
    WHOLE,
    Most(1024, MAX_CHANNELS, MAX_CHANNELS, 8),
    Most(256, MAX_CHANNELS, MAX_CHANNELS, 4),
    Most(64, 64, 64, 2),
    Most(32, 64, 16, 2),
    Most(16, 64, 16, 2),
    Most(4, 32, 4, 1),
)
# Limits by rank for the interpreter, which takes milliseconds per program.
SMALL = {
    1: (Most(70, 20, 3, 2), Most(35, 20, 3, 2), Most(17, 20, 3, 1)),
    2: (Most(13, 20, 3, 2), Most(6, 20, 3, 2), Most(3, 20, 3, 1)),
    3: (Most(6, 20, 3, 2), Most(3, 20, 3, 2), Most(2, 20, 3, 1)),
}
# A family may need whole vectors: reduced channels and last extents, if known, keep their size
# modulo this.
VECTOR = 8
# Limits of a stand-in. On one core (2026) the interpreter takes 1 to 7 ms per step, and runs twice.
# The oracle takes 6 ns per product in long double and 17 us per channel and tap, times the products
# of the precision. Intermediate results take about 100 bytes per element.
MOST_STEPS = 2000
STEP_ELEMENTS = 16384  # elements of a tile whose step takes twice as long
MOST_PRODUCTS = 500_000_000
MOST_CHANNEL_TAPS = 300_000
MOST_ELEMENTS = 8_000_000
GEOMETRY = ("kernel_size", "stride", "padding", "output_padding", "dilation")
# Least value of a reduced dilation, which also stays at least the stride.
LEAST_DILATION = 4


@dataclass(frozen=True, slots=True)
class StandIn:
    """The layer that runs instead of the one to verify.

    Attributes:
        sized: the stand-in with every size known.
        emitted: the stand-in with the layer's unknown sizes left to run time; it is under test.
        tiles: the layer's tile for each of its layouts; if the geometry is reduced, for that.
        reduced: whether sizes differ from the layer's.
        geometry: whether the geometry differs from the layer's.
    """

    sized: ConvTransposeSpec
    emitted: ConvTransposeSpec
    tiles: tuple[Tile, ...]
    reduced: bool
    geometry: bool


def stand_in(
    spec: ConvTransposeSpec,
    target: GpuTarget | None,
    choices: Choices | None,
    families: tuple[Family, ...] = FAMILIES,
    tile: Tile | None = None,
    *,
    small: bool,
) -> StandIn:
    """Return the largest stand-in of `spec` within the limits, with its kernels for any size.

    Args:
        spec: the layer.
        target: the GPU to plan for; None means the spec's own, or the default.
        choices: measured tiles, as for `plan`.
        families: the kernel families, as for `plan`.
        tile: the tile of the kernel to run, as for `plan`.
        small: whether it runs in the interpreter.
    """
    problem = problem_of(spec, decompose(spec))
    whole = (problem.batch, problem.in_channels, *problem.extents, problem.out_channels)
    found: StandIn | None = None
    for geometry in _geometries(spec):
        made: KernelPlan | None = None
        for most in SMALL[spec.rank] if small else LARGE:
            try:
                sized = _sized(geometry, spec, most)
            except SpecError:  # nominal and known sizes together can exceed the largest tensor
                continue
            if not _affordable(sized, small=small):
                continue
            emitted = _opened(spec, sized)
            if made is None:  # this tile mostly suits smaller sizes too
                made = plan(spec if geometry is spec else emitted, target, tile, choices, families)
            if not all(_serves(kernel, emitted, sized, families) for kernel in _of_any(made)):
                made = plan(emitted, target, None, choices, families)
            reduced = (*(sized.input or ()), sized.out_channels) != whole
            tiles = tuple(kernel.tile for kernel in _of_any(made))
            found = StandIn(sized, emitted, tiles, reduced, geometry is not spec)
            if not small or sum(_steps(found, kernel) for kernel in _of_any(made)) <= MOST_STEPS:
                return found
    assert found is not None  # the last geometry has two taps an axis
    return found


def _of_any(made: KernelPlan) -> tuple[KernelPlan, ...]:
    """Return the kernels of a file that are for any size: one for each of its layouts."""
    return tuple(kernel for kernel in made.kernels if kernel.is_for_any)


def concrete(spec: ConvTransposeSpec, *, small: bool) -> ConvTransposeSpec:
    """Return `spec` with every size known, reduced to the interpreter's limits if `small`."""
    return _sized(spec, spec, SMALL[spec.rank][0] if small else WHOLE)


def _opened(spec: ConvTransposeSpec, sized: ConvTransposeSpec) -> ConvTransposeSpec:
    """Return `sized` with the sizes left open that `spec` leaves open."""
    open_in, open_out = spec.in_channels is None, spec.out_channels is None
    sizes = (spec.batch, None, *spec.spatial)
    shape = tuple(None if s is None else v for s, v in zip(sizes, sized.input or (), strict=True))
    return dataclasses.replace(
        sized,
        in_channels=None if open_in else sized.in_channels,
        out_channels=None if open_out else sized.out_channels,
        input=shape,
    )


def _sized(geometry: ConvTransposeSpec, spec: ConvTransposeSpec, most: Most) -> ConvTransposeSpec:
    """Return `geometry` with the sizes of `spec` (nominal if unknown), limited to `most`."""
    problem = problem_of(spec, decompose(spec))
    group_in, group_out = problem.in_channels // spec.groups, problem.out_channels // spec.groups
    extents = []
    for number, axis in enumerate(decompose(geometry)):
        known = number == spec.rank - 1 and spec.spatial[number] is not None
        least = max(1, 1 - axis.extent_growth)  # an output must be left
        extents.append(_small(problem.extents[number], most.spatial, known=known, least=least))
    groups = min(spec.groups, most.groups)
    group_in = _small(group_in, most.channels, known=spec.in_channels is not None)
    group_out = _small(group_out, most.channels, known=spec.out_channels is not None)
    return dataclasses.replace(
        geometry,
        groups=groups,
        in_channels=groups * group_in,
        out_channels=groups * group_out,
        input=(min(problem.batch, most.batch), groups * group_in, *extents),
    )


def _small(size: int, most: int, *, known: bool, least: int = 1) -> int:
    """Return `size` limited to about `most`; a `known` size keeps its value modulo VECTOR."""
    small = max(least, min(size, most))
    if known:
        small -= (small - size) % VECTOR
    return small if small >= least else small + VECTOR


# ---- limits ----


def _affordable(sized: ConvTransposeSpec, *, small: bool) -> bool:
    """Whether `sized` is within the oracle's limits, and its phases within MOST_STEPS."""
    problem, taps = problem_of(sized, decompose(sized)), math.prod(sized.kernel_size)
    group_in, group_out = problem.in_channels // sized.groups, problem.out_channels // sized.groups
    elements = problem.batch * (
        problem.in_channels * problem.inputs + problem.out_channels * problem.outputs
    )
    products = sized.product.products if sized.product else 1
    phases = math.prod(map(min, sized.stride, problem.output_extents))
    return (
        layer_flops(sized, problem) // 2 <= MOST_PRODUCTS
        and taps * group_in * products <= MOST_CHANNEL_TAPS
        and elements + taps * problem.in_channels * group_out <= MOST_ELEMENTS
        and not (small and phases > MOST_STEPS)
    )


def _serves(
    kernel: KernelPlan,
    emitted: ConvTransposeSpec,
    sized: ConvTransposeSpec,
    families: tuple[Family, ...],
) -> bool:
    """Whether the variant of a kernel serves a stand-in."""
    phases = decompose(sized)
    emitted = dataclasses.replace(emitted, layout=kernel.spec.layout)
    try:
        form_of(emitted, phases, problem_of(sized, phases), kernel.tile, families)
    except SpecError:
        return False
    return True


def _steps(found: StandIn, made: KernelPlan) -> float:
    """Return the interpreter's steps of all programs; the end of a program counts as a step.

    A step counts as several if its tile is large or its operands are split.
    """
    spec, phases = found.emitted, decompose(found.sized)
    spec = dataclasses.replace(spec, layout=made.spec.layout)
    problem = problem_of(found.sized, phases)
    form = form_of(spec, phases, problem, made.tile, made.families)
    work = work_of(spec, problem, form, made.tile, made.target)
    size = form.rows * made.tile.block_m * form.columns(made.tile)
    split = spec.product.products if spec.product and spec.product.interpreted else 1
    return work.programs * (1 + work.steps) * ((1 + split) / 2 + size / STEP_ELEMENTS)


# ---- smaller geometries ----


def _geometries(spec: ConvTransposeSpec) -> Iterator[ConvTransposeSpec]:
    """Yield `spec`, then ever smaller geometries of its kind, with all sizes left to run time."""
    yield spec
    columns = zip(*(getattr(spec, name) for name in GEOMETRY), strict=True)
    axes = [_folded(_Axis(*values)) for values in columns]
    factors = [1] * spec.rank
    while True:
        smaller = [axis.divided(factor) for axis, factor in zip(axes, factors, strict=True)]
        columns = zip(*map(dataclasses.astuple, smaller), strict=True)
        geometry: dict[str, Any] = dict(zip(GEOMETRY, columns, strict=True))
        if any(getattr(spec, name) != values for name, values in geometry.items()):
            yield dataclasses.replace(spec, **geometry, input=None)
        widest = max(range(spec.rank), key=lambda n: smaller[n].width)
        if smaller[widest].width <= 2:
            return
        factors[widest] *= 2


@dataclass(frozen=True, slots=True)
class _Axis:
    """The geometry of an axis; fields in the order of `GEOMETRY`."""

    kernel: int
    stride: int
    padding: int
    output_padding: int
    dilation: int

    @property
    def reach(self) -> int:
        """Distance between the outputs of an input's first and last tap."""
        return self.dilation * (self.kernel - 1)

    @property
    def width(self) -> int:
        """Largest of the numbers that make a layer expensive."""
        return max(self.kernel, self.stride, self.dilation if self.kernel > 1 else 1)

    def divided(self, factor: int) -> _Axis:
        """Return the axis with its numbers divided by `factor`; those above 1 stay above 1."""
        kernel, stride, dilation = (
            max(min(n, 2), -(-n // factor)) for n in (self.kernel, self.stride, self.dilation)
        )
        most = max(stride, dilation) - 1
        return _Axis(
            kernel=kernel,
            stride=stride,
            padding=max(min(self.padding, 1), self.padding // factor),
            output_padding=min(most, -(-self.output_padding // factor)),
            dilation=dilation,
        )


def _folded(axis: _Axis) -> _Axis:
    """Return an axis with a small dilation, and padding not far above the kernel's reach.

    Both change by multiples of the stride: every output keeps its phase and reads the same taps.
    """
    s, reach = axis.stride, axis.reach
    least = max(s, LEAST_DILATION)
    dilation = axis.dilation - max(0, axis.dilation - least) // s * s
    shorter = dataclasses.replace(axis, dilation=dilation)
    padding = axis.padding - max(0, axis.padding - reach - 1) // s * s
    if shorter.reach < reach:
        part = padding * shorter.reach // reach
        padding = part + (padding - part) % s
    output_padding = min(axis.output_padding, max(s, dilation) - 1)
    return dataclasses.replace(shorter, padding=padding, output_padding=output_padding)
