"""What pack_times.py and host_times.py have in common: emitted files ready to run, and reports.

Input: specs as text and the name of a target; output: modules whose kernels lie in Triton's cache,
and a JSON file that names card and versions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.cubin import compile_for, compilers, module_name, read_launches
from convgen.execution.loading import load_module
from convgen.execution.local_gpu import local_target
from convgen.planning.choices import Choices


def arguments_of(doc: str) -> argparse.Namespace:
    """Read the command line: a target, that of this machine's GPU by default, and a JSON file."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--target", help="that of this machine's GPU by default")
    parser.add_argument("--json", type=Path, help="file for all rows")
    given = parser.parse_args()
    given.target = given.target or local_target().name
    return given


def loaded(
    specs: list[str], target: str, folder: Path, choices: Choices | None = None
) -> dict[str, ModuleType]:
    """Return the emitted file of each spec; the kernels of all are compiled first, in parallel."""
    with compilers() as pool:
        pairs = pool.map(_compiled, specs, [target] * len(specs), [choices] * len(specs))
        found = dict(zip(specs, pairs, strict=True))
    return {spec: load_module(text, name, folder) for spec, (name, text) in found.items()}


def _compiled(spec: str, target: str, choices: Choices | None) -> tuple[str, str]:
    """Compile each kernel of a file; return the file's name and text."""
    source = compile_kernel(parse(spec), find_target(target), choices=choices)
    for number, _ in enumerate(read_launches(source.text)):
        compile_for(source, find_target(target), number)
    return module_name(source), source.text


def write_json(path: Path | None, target: str, rows: list[dict[str, Any]]) -> None:
    """Write rows beside the card and the versions that they were measured with; print these."""
    machine = {
        "device": torch.cuda.get_device_name(),
        "target": target,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if path is not None:
        path.write_text(json.dumps(machine | {"rows": rows}, indent=1), "utf-8")
