"""Compile emitted files to machine code and print what they take, as JSON.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[spec, target]`, prints a JSON line for each.
"""

from __future__ import annotations

import json
import sys

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.cubin import compile_for


def main() -> None:
    for line in sys.stdin:
        text, name = json.loads(line)
        target = find_target(name)
        binary = compile_for(compile_kernel(parse(text), target), target)
        row = {"registers": binary.registers, "spills": binary.spills, "shared": binary.shared}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
