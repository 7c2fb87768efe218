"""Compile emitted files to machine code and print what they take, as JSON.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[spec, target]`, of a tile `[spec, target, tile]`, without the kernels that pack weights
`[spec, target, tile, false]`; the tile may be null for the planned one. Prints a JSON line for
each: registers of each kernel, the most of the others, "tensor" being columns of tensor memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.cubin import compile_for, read_launches
from convgen.geometry.tile import Tile
from planned import tensor_columns


def taken(
    text: str, name: str, tile: dict[str, Any] | None = None, packs: bool = True
) -> dict[str, Any]:
    """Return what the kernels of a layer's file take."""
    target = find_target(name)
    source = compile_kernel(parse(text), target, Tile(**tile) if tile else None)
    binaries = [
        compile_for(source, target, number)
        for number, launch in enumerate(read_launches(source.text))
        if packs or "_pack" not in launch.kernel
    ]
    return {
        "registers": [binary.registers for binary in binaries],
        "spills": max(binary.spills for binary in binaries),
        "shared": max(binary.shared for binary in binaries),
        "tensor": max(tensor_columns(binary) for binary in binaries),
    }


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(taken(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
