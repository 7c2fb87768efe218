"""Compile emitted files to machine code and print what they take, as JSON.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[spec, target, capability]`, prints a JSON line for each.
"""

from __future__ import annotations

import json
import sys

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.cubin import compile_source


def main() -> None:
    for line in sys.stdin:
        text, target, capability = json.loads(line)
        binary = compile_source(compile_kernel(parse(text), find_target(target)), capability)
        row = {"registers": binary.registers, "spills": binary.spills, "shared": binary.shared}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
