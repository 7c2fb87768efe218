"""Compile emitted files and print what Triton and LLVM made of them on the way.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[text, dtype, capability]`, prints for each its TTGIR, LLVM IR and PTX.
"""

from __future__ import annotations

import json
import sys

from convgen import cubin


def main() -> None:
    cubin._binary = lambda compiled, triton: compiled.asm
    for line in sys.stdin:
        text, dtype, capability = json.loads(line)
        code = cubin.compile_text(text, dtype, "file.py", capability)
        print(json.dumps({name: code[name] for name in ("ttgir", "llir", "ptx")}), flush=True)


if __name__ == "__main__":
    main()
