"""The compiler: five stages from a description to the text of a file.

    1. parse      text, flags or a module      -> ConvTransposeSpec   language/
    2. decompose  ConvTransposeSpec            -> phases              geometry/
    3. index      phases and sizes             -> accesses            symbolic/
    4. plan       spec, phases and GpuTarget   -> KernelPlan          planning/ (given families/)
    5. render     KernelPlan                   -> KernelSource        kernels/, rendering/

Stage 3 runs inside stage 4 (extents of the launch grid) and stage 5 (the kernel's lines). No stage
imports torch or triton, or reads a clock, an environment variable or a device. README.md in this
folder is a tour.
"""

from __future__ import annotations

from .families.registry import FAMILIES
from .geometry.phases import decompose
from .geometry.tile import Tile
from .language.spec import ConvTransposeSpec
from .planning.choices import Choices
from .planning.family import Family
from .planning.plan import KernelPlan
from .planning.planner import plan_kernel
from .rendering.render import KernelSource, render
from .tables.targets import DEFAULT_TARGET, GpuTarget, find_target


def plan(
    spec: ConvTransposeSpec,
    target: GpuTarget | None = None,
    tile: Tile | tuple[Tile, ...] | None = None,
    choices: Choices | None = None,
    families: tuple[Family, ...] = FAMILIES,
) -> KernelPlan:
    """Return the plan of `spec`.

    Args:
        spec: the layer.
        target: the GPU; None means the spec's own, or the default.
        tile: the tile to use, or one for each layout; None lets the planner choose.
        choices: measured tiles, preferred to those of the package.
        families: the kernel families to rank.

    Raises:
        SpecError: no launch grid can hold the spec's programs.
    """
    chosen = target or find_target(spec.target or DEFAULT_TARGET)
    return plan_kernel(spec, decompose(spec), chosen, families, tile, choices)


def compile_kernel(
    spec: ConvTransposeSpec,
    target: GpuTarget | None = None,
    tile: Tile | tuple[Tile, ...] | None = None,
    choices: Choices | None = None,
    families: tuple[Family, ...] = FAMILIES,
    *,
    precompiled: bool = False,
    shared: bool = False,
) -> KernelSource:
    """Return the emitted file of `spec`; arguments and errors as `plan`.

    With `precompiled` the file loads the machine code that a project's build puts beside it; with
    `shared` it takes what files have in common from `_runtime.py`, which the build puts there too.
    """
    chosen = plan(spec, target, tile, choices, families)
    return render(chosen, precompiled=precompiled, shared=shared)
