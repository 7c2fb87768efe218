"""The sizes of a layer, with nominal values for sizes that its spec leaves to run time.

Stage 2, decompose. Input: a spec and its phases; output: a `Problem`, all integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..language.spec import ConvTransposeSpec
from .phases import AxisPhases


@dataclass(frozen=True, slots=True)
class Nominal:
    """Values of sizes left to run time, used when a tile is chosen.

    Attributes:
        batch: images.
        extents: extents of 1, 2 and 3 axes.
        channels: channels.
    """

    batch: int
    extents: tuple[tuple[int], tuple[int, int], tuple[int, int, int]]
    channels: int = 64


NOMINAL = Nominal(16, ((8192,), (128, 128), (32, 32, 32)))
# Some 1000 positions, in images so small that they share tiles: any smaller ones then do, too.
SMALL_INPUTS = Nominal(28, ((36,), (6, 6), (3, 3, 4)))


def one_image(power: int) -> Nominal:
    """Return one image of 2**power positions, with about as many along each axis."""
    halves = 2 ** (power // 2), 2 ** (power - power // 2)
    first, rest = power // 3, power - power // 3
    thirds = 2**first, 2 ** (rest // 2), 2 ** (rest - rest // 2)
    return Nominal(1, ((2**power,), halves, thirds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The sizes that a cost is computed for; sizes left to run time have nominal values.

    Attributes:
        batch: images.
        in_channels, out_channels: channels, of all groups together.
        extents, output_extents: inputs and outputs along each axis.
        phase_extents: positions of a phase along each axis.
        nominal: whether any size is nominal.
    """

    batch: int
    in_channels: int
    out_channels: int
    extents: tuple[int, ...]
    output_extents: tuple[int, ...]
    phase_extents: tuple[int, ...]
    nominal: bool

    @property
    def inputs(self) -> int:
        """Number of inputs per channel and image."""
        return math.prod(self.extents)

    @property
    def outputs(self) -> int:
        """Number of outputs per channel and image."""
        return math.prod(self.output_extents)


def problem_of(
    spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...], nominal: Nominal = NOMINAL
) -> Problem:
    """Return the sizes of `spec`; nominal channels are a multiple of the groups."""
    nominal_channels = -(-nominal.channels // spec.groups) * spec.groups
    extents, positions, outputs = [], [], []
    named = zip(spec.spatial, nominal.extents[spec.rank - 1], phases, strict=True)
    for size, assumed, axis in named:
        smallest = max(1, -axis.extent_growth + 1)  # at least one output
        extent = size or max(assumed, smallest)
        extents.append(extent)
        positions.append(extent + axis.extent_growth)
        outputs.append((extent - 1) * axis.stride + axis.growth)
    known = (spec.batch, spec.in_channels, spec.out_channels, *spec.spatial)
    return Problem(
        batch=spec.batch or nominal.batch,
        in_channels=spec.in_channels or nominal_channels,
        out_channels=spec.out_channels or nominal_channels,
        extents=tuple(extents),
        output_extents=tuple(outputs),
        phase_extents=tuple(positions),
        nominal=None in known,
    )
