"""Compile emitted files for Hopper and print what they do to registers that products read, as JSON.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines,
each a list of `[spec, target, tile, settled]`, the tile null for the planned one; where not
`settled`, the file's waits for its products are taken out. Prints for each line a list: for each
file the kernels' numbers of matrix products, and the instructions that write a register which a
product that may be running reads.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.cubin import compile_text, read_launches
from convgen.geometry.tile import Tile

SM_90 = 90
PRODUCT = re.compile(r"HGMMA\S* R\d+, (?:R(\d+)|gdesc)")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
BRANCH = re.compile(r"BRA 0x([0-9a-f]+)")
WRITE = re.compile(r"(?:@!?U?P\d+ )?([A-Z0-9_.]+) R(\d+)\b")
READERS = ("ST", "RED", "BAR", "SYNCS", "UTMA", "R2UR", "ISETP", "FSETP")  # write no such register
FRAGMENT = 4  # registers of a product's operand
INSTRUCTION = 16  # bytes


def instructions(cubins: list[bytes]) -> list[list[tuple[int, str]]]:
    """Return the addresses and texts of each cubin's instructions.

    Of all in one go, as one code: the disassembler takes half a second to start. So a cubin's
    addresses, and with them what it branches to, begin where the one before it ends.
    """
    codes = [_machine_code(cubin) for cubin in cubins]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [str(tool), "--binary", "SM90a", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", text)
    lines = iter((int(address, 16), line) for address, line in found)
    return [list(itertools.islice(lines, len(code) // INSTRUCTION)) for code in codes]


def _machine_code(cubin: bytes) -> bytes:
    """Return the one section of an ELF file that has its kernel's instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + n * size) for n in range(count)]
    (code,) = (
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    )
    return code


def overwritten(code: list[tuple[int, str]]) -> list[str]:
    """Return instructions of loops that write a register which a running product may read.

    A product runs from its issue to a wait that leaves fewer groups of them running than were
    issued after it: that is what PTX promises, of `wgmma.wait_group`.
    """
    places = {address: place for place, (address, _) in enumerate(code)}
    found: list[str] = []
    for place, (address, line) in enumerate(code):
        branch = BRANCH.search(line)
        start = int(branch[1], 16) if branch else address
        if start < address and start in places:
            body = [line for _, line in code[places[start] : place + 1]]
            found += _of_loop(body)
    return found


def _of_loop(body: list[str]) -> list[str]:
    """Go through a loop twice; return the writes to what products of that time read."""
    groups: list[set[int]] = []  # registers that committed products read, the oldest first
    group: set[int] = set()
    found = []
    for line in body * 2:
        product, wait, write = PRODUCT.search(line), WAIT.search(line), WRITE.match(line)
        if product:
            group |= _registers(product[1], FRAGMENT) if product[1] else set()
            if "gsb0" in line:
                groups, group = [*groups, group], set()
        elif wait:
            groups = groups[max(0, len(groups) - int(wait[1], 16)) :]
        elif write and not write[1].startswith(READERS):
            written = _registers(write[2], _width(write[1]))
            found += [line] * bool(written & group.union(*groups))
    return found


def _registers(first: str, count: int) -> set[int]:
    return set(range(int(first), int(first) + count))


def _width(name: str) -> int:
    """Return the registers that an instruction writes."""
    if name.endswith(".M88.4") or ".128" in name:
        return 4
    return 2 if ".64" in name or "WIDE" in name else 1


def compiled(spec: str, target: str, tile: dict[str, Any] | None, settled: bool) -> list[bytes]:
    """Return the cubins of a file's kernels for Hopper."""
    planned = Tile(**tile) if tile else None
    text = compile_kernel(parse(spec), find_target(target), planned).text
    if not settled:
        text = re.sub(r"settle\((tl\.dot\(.*\))\)\n", r"\1\n", text)
        text = text.replace("_num_stages(", "_planned_stages(")  # as for its own card
    dtype = parse(spec).dtype
    return [
        compile_text(text, dtype, "file.py", SM_90, number).cubin
        for number, launch in enumerate(read_launches(text))
        # Where the text has no product, as that of a packing kernel, neither has the code.
        if "tl.dot(" in text and "_pack" not in launch.kernel
    ]


def main() -> None:
    for line in sys.stdin:
        files = [compiled(*job) for job in json.loads(line)]
        cubins = list(dict.fromkeys(cubin for file in files for cubin in file))
        found = {
            cubin: (sum("HGMMA" in line for _, line in code), overwritten(code))
            for cubin, code in zip(cubins, instructions(cubins), strict=True)
        }
        rows = [
            [[found[c][0] for c in file], [line for c in file for line in found[c][1]]]
            for file in files
        ]
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
