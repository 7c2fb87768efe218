"""Compile emitted files to machine code and print what they take, as JSON.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[spec, target]`, or with a tile, prints a JSON line for each: registers of each kernel, the most of
the others, "tensor" being columns of tensor memory.
"""

from __future__ import annotations

import json
import sys

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.cubin import compile_for, read_launches
from convgen.geometry.tile import Tile
from planned import tensor_columns


def main() -> None:
    for line in sys.stdin:
        text, name, *tiles = json.loads(line)
        target, tile = find_target(name), Tile(**tiles[0]) if tiles else None
        source = compile_kernel(parse(text), target, tile)
        kernels = len(read_launches(source.text))
        binaries = [compile_for(source, target, number) for number in range(kernels)]
        row = {
            "registers": [binary.registers for binary in binaries],
            "spills": max(binary.spills for binary in binaries),
            "shared": max(binary.shared for binary in binaries),
            "tensor": max(tensor_columns(binary) for binary in binaries),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
