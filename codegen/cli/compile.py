"""The resources of a statement's compiled kernels, for `convgen compile`.

Part of the command line; needs triton. Input: a statement; output: one row per kernel, for a table
or JSON.
"""

from __future__ import annotations

from typing import Any

from ..compiler import compile_kernel
from ..execution.cubin import Binary, compile_for
from ..planning.choices import Choices
from ..planning.input_copy import copy_name
from ..planning.resources import resident
from ..project.statements import Statement
from ..tables.targets import GpuTarget


def resources_of(statement: Statement, choices: Choices | None) -> list[dict[str, Any]]:
    """Compile a statement's kernels for its target; return their resources as JSON objects."""
    target = statement.target
    source = compile_kernel(statement.spec, target, choices=choices)
    name = statement.name or f"conv_transpose{statement.spec.rank}d"
    names = [name, *[f"{name}_input_gradient"] * (source.plan.gradient is not None)]
    plans = [source.plan, *filter(None, [source.plan.gradient])]
    ends = ("pack", "pack_for_gradient")
    packs = [end for end, each in zip(ends, plans, strict=False) if not each.reads_raw_weight]
    names += [f"{name}_{end}" for end in packs]
    names += [f"{name}_{copy_name(statement.spec)}"] * source.plan.tile.relayout
    binaries = [compile_for(source, target, number) for number in range(len(names))]
    return [_row(*pair, target) for pair in zip(names, binaries, strict=True)]


def _row(name: str, binary: Binary, target: GpuTarget) -> dict[str, Any]:
    return {
        "name": name,
        "target": target.name,
        "registers": binary.registers,
        "spills": binary.spills,
        "shared": binary.shared,
        "occupancy": resident(target, binary.num_warps, binary.registers, binary.shared),
    }
