"""The compiler: five stages from a description to the text of a file.

    1. parse      text, flags or a module      -> ConvTransposeSpec   language/
    2. decompose  ConvTransposeSpec            -> phases              geometry/
    3. index      phases and sizes             -> accesses            symbolic/
    4. plan       spec, phases and GpuTarget   -> KernelPlan          planning/, handed families/
    5. render     KernelPlan                   -> KernelSource        kernels/, rendering/

Stage 3 runs inside 4 (extents of the launch grid) and 5 (the kernel's lines). Nothing here imports
torch or triton, or reads a clock, an environment or a device. README.md in this folder is a tour.
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
    tile: Tile | None = None,
    choices: Choices | None = None,
    families: tuple[Family, ...] = FAMILIES,
) -> KernelPlan:
    """Return the plan of `spec`.

    Args:
        spec: the layer.
        target: the GPU; None is the spec's own, or the default.
        tile: a tile in place of a choice.
        choices: measured ones, which come before the package's own.
        families: the ways of computing it that are ranked.

    Raises:
        SpecError: no launch grid can hold the spec's programs.
    """
    chosen = target or find_target(spec.target or DEFAULT_TARGET)
    return plan_kernel(spec, decompose(spec), chosen, families, tile, choices)


def compile_kernel(
    spec: ConvTransposeSpec,
    target: GpuTarget | None = None,
    tile: Tile | None = None,
    choices: Choices | None = None,
    families: tuple[Family, ...] = FAMILIES,
    *,
    precompiled: bool = False,
) -> KernelSource:
    """Return the emitted file of `spec`; arguments and errors as `plan`.

    With `precompiled` it uses machine code that lies beside it, as a project's build puts it there.
    """
    return render(plan(spec, target, tile, choices, families), precompiled=precompiled)
