"""The sizes of a layer, with nominal values for sizes that its spec leaves to run time.

Stage 2, decompose. Input: a spec and its phases; output: a `Problem`, all integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..language.spec import ConvTransposeSpec
from .phases import AxisPhases

# Nominal values of sizes left to run time, used when a tile is chosen.
NOMINAL_BATCH = 16
NOMINAL_CHANNELS = 64
NOMINAL_SPATIAL = {1: 8192, 2: 128, 3: 32}


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


def problem_of(spec: ConvTransposeSpec, phases: tuple[AxisPhases, ...]) -> Problem:
    """Return the sizes of `spec`; nominal channels are a multiple of the groups."""
    nominal_channels = -(-NOMINAL_CHANNELS // spec.groups) * spec.groups
    extents, positions, outputs = [], [], []
    for size, axis in zip(spec.spatial, phases, strict=True):
        smallest = max(1, -axis.extent_growth + 1)  # at least one output
        extent = size or max(NOMINAL_SPATIAL[spec.rank], smallest)
        extents.append(extent)
        positions.append(extent + axis.extent_growth)
        outputs.append((extent - 1) * axis.stride + axis.growth)
    known = (spec.batch, spec.in_channels, spec.out_channels, *spec.spatial)
    return Problem(
        batch=spec.batch or NOMINAL_BATCH,
        in_channels=spec.in_channels or nominal_channels,
        out_channels=spec.out_channels or nominal_channels,
        extents=tuple(extents),
        output_extents=tuple(outputs),
        phase_extents=tuple(positions),
        nominal=None in known,
    )
