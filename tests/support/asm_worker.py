"""Compile emitted files and print what Triton, LLVM and ptxas made of them on the way.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[text, dtype, capability]`, prints for each its TTGIR, LLVM IR, PTX and SASS.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from convgen.execution import cubin


def disassembled(code: bytes) -> str:
    """Return the SASS of a cubin, by the nvdisasm that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([tool, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    cubin._binary = lambda compiled, triton: compiled.asm
    for line in sys.stdin:
        text, dtype, capability = json.loads(line)
        code = cubin.compile_text(text, dtype, "file.py", capability)
        texts = {name: code[name] for name in ("ttgir", "llir", "ptx")}
        texts["sass"] = disassembled(code["cubin"])
        print(json.dumps(texts), flush=True)


if __name__ == "__main__":
    main()
