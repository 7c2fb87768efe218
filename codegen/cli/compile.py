"""The resources of a statement's compiled kernels, for `convgen compile`.

Part of the command line; needs triton. Input: a statement; output: one row per kernel, for a table
or JSON.
"""

from __future__ import annotations

from typing import Any

from ..compiler import compile_kernel
from ..execution.cubin import KERNEL, Binary, compile_for, read_launches
from ..planning.choices import Choices
from ..planning.resources import resident
from ..project.statements import Statement
from ..tables.targets import GpuTarget


def resources_of(statement: Statement, choices: Choices | None) -> list[dict[str, Any]]:
    """Compile a statement's kernels for its target; return their resources as JSON objects."""
    target = statement.target
    source = compile_kernel(statement.spec, target, choices=choices)
    op = f"conv_transpose{statement.spec.rank}d"
    kernels = [launch.kernel for launch in read_launches(source.text)]
    names = [_name(statement.name or op, kernel.removeprefix(op)) for kernel in kernels]
    binaries = [compile_for(source, target, number) for number in range(len(names))]
    return [_row(*pair, target) for pair in zip(names, binaries, strict=True)]


def _name(layer: str, kernel: str) -> str:
    """Return a kernel's name in the report: the layer's, and what the kernel is for."""
    purpose = kernel.removesuffix(KERNEL).removeprefix("_")
    return f"{layer}_{purpose}" if purpose else layer


def _row(name: str, binary: Binary, target: GpuTarget) -> dict[str, Any]:
    return {
        "name": name,
        "target": target.name,
        "registers": binary.registers,
        "spills": binary.spills,
        "shared": binary.shared,
        "occupancy": resident(target, binary.num_warps, binary.registers, binary.shared),
    }
