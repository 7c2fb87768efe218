"""Compile an emitted file for sm_90; print what LLVM made of its index math that turns out wrong.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[text]`, prints for each the vectors of differences that LLVM takes for never negative, and the
additions of a constant to a pair of which one half is never set, which ptxas loses.
"""

from __future__ import annotations

import json
import re
import sys

from convgen import cubin

FLAGGED = re.compile(r"= sub nuw [^<]*<\d+ x i\d+>.*")
SET = re.compile(r"^\s*(?:@!?%p\d+ )?[a-z][\w.:]*\s+\{?([^;]*?)[,}] ", re.MULTILINE)
PAIR = re.compile(r"mov\.b32\s+(%r\d+), \{(%rs\d+), (%rs\d+)\};")
CONSTANT = re.compile(r"mov\.b32\s+(%r\d+), -?\d+;")
SUM = re.compile(r"add\.s16x2\s+%r\d+, (%r\d+), (%r\d+);")


def unread(ptx: str) -> list[str]:
    """Return the sums of a constant and a pair of which one half is never set."""
    known = {name for names in SET.findall(ptx) for name in re.findall(r"%rs\d+", names)}
    pairs = {pair for pair, *halves in PAIR.findall(ptx) if not known.issuperset(halves)}
    constants = set(CONSTANT.findall(ptx))
    sums = ((match.group(), set(match.groups())) for match in SUM.finditer(ptx))
    return [text for text, terms in sums if terms & pairs and terms & constants]


def main() -> None:
    cubin._binary = lambda compiled, triton: compiled.asm
    for line in sys.stdin:
        (text,) = json.loads(line)
        code = cubin.compile_text(text, "float32", "found.py", 90)
        row = {"flagged": FLAGGED.findall(code["llir"]), "unread": unread(code["ptx"])}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
