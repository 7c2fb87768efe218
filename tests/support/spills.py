"""Compile every layer of layers.py, as the planner plans it, and report what spills; no test.

    python tests/support/spills.py [--targets a,b] [--dtypes a,b] [--drawn N] [--only TEXT]
        [--sample N [--seed N]] [--json FILE]

Layers, layouts, dtypes and targets are multiplied out, kernels compiled on every core, equal ones
once; the measured tiles of the package are left aside. It exits 1 if a kernel spills that
planned.py's reasons leave out, or takes more shared or tensor memory than its target has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import layers
from convgen import TARGETS, ConvTransposeSpec, find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.cubin import capability_of, compile_text, compilers, module_name
from convgen.planning.choices import MODEL_ALONE
from planned import TENSOR_COLUMNS, reason_for, tensor_columns

ROOT = Path(__file__).parents[2]


def variants(drawn: int, dtypes: list[str]) -> Iterator[ConvTransposeSpec]:
    """Yield every layer in every layout and dtype, and those of the table as they are."""
    yield from layers.listed_layers(ROOT)
    for spec in layers.real_layers():
        for each, dtype in itertools.product(layers.in_layouts(spec), dtypes):
            yield layers.in_dtype(each, dtype)
    for spec, dtype in itertools.product(layers.drawn_layers(drawn), dtypes):
        yield layers.in_dtype(spec, dtype)


def planned(spec: str, target_name: str) -> dict[str, Any]:
    """Return a layer's tile and its file's text; a job for a process of its own."""
    target = find_target(target_name)
    source = compile_kernel(parse(spec), target, choices=MODEL_ALONE)
    return {
        "spec": spec,
        "target": target_name,
        "tile": f"{source.plan.family}, {source.plan.tile}",
        "dtype": source.plan.spec.dtype,
        "capability": capability_of(target.arch),
        "name": f"{module_name(source)}.py",
        "text": source.text,
    }


def compiled(text: str, dtype: str, name: str, capability: int) -> dict[str, Any]:
    """Return what a file's kernel takes; a job for a process of its own."""
    try:
        binary = compile_text(text, dtype, name, capability)
    except Exception as error:  # the report has it; the others should be compiled all the same
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    row = {each: getattr(binary, each) for each in ("registers", "spills", "shared")}
    return row | {"tensor": tensor_columns(binary)}


def main() -> None:
    """Plan, compile, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(target.name for target in TARGETS))
    parser.add_argument("--dtypes", default=",".join(layers.DTYPES))
    parser.add_argument("--drawn", type=int, default=60)
    parser.add_argument("--only", default="", help="specs that have this text")
    parser.add_argument("--sample", type=int, help="that many plans, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--json", type=Path, help="file for all rows")
    given = parser.parse_args()
    specs = dict.fromkeys(str(spec) for spec in variants(given.drawn, given.dtypes.split(",")))
    jobs = [
        (spec, target)
        for spec, target in itertools.product(specs, given.targets.split(","))
        if given.only in spec
    ]
    if given.sample is not None:
        random.Random(given.seed).shuffle(jobs)
        jobs = jobs[: given.sample]
    with compilers() as pool:
        rows = list(pool.map(planned, *zip(*jobs, strict=True), chunksize=8))
        keys = [(row["name"], row["capability"]) for row in rows]
        kernels = {}
        for key, row in dict(zip(keys, rows, strict=True)).items():
            name, capability = key
            kernels[key] = pool.submit(compiled, row["text"], row["dtype"], name, capability)
        print(f"{len(rows)} plans, {len(kernels)} kernels", flush=True)
        for number, _ in enumerate(as_completed(kernels.values()), 1):
            if number % 100 == 0:
                print(f"{number} compiled", flush=True)
        for key, row in zip(keys, rows, strict=True):
            row |= kernels[key].result()
            del row["text"]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), "utf-8")
    sys.exit(report(rows))


def report(rows: list[dict[str, Any]]) -> int:
    """Print what does not fit, and how many spill for which reason; return the exit code."""
    reasons: Counter[str] = Counter()
    bad = 0
    for row in rows:
        most = find_target(row["target"]).shared_per_block
        fits = "failed" not in row and row["shared"] <= most and row["tensor"] <= TENSOR_COLUMNS
        if fits and not row["spills"]:
            continue
        reason = None
        if fits:
            reason = reason_for(row["target"], row["registers"], row["spills"])
        if reason is not None:
            reasons[reason] += 1
            continue
        bad += 1
        takes = row.get("failed") or (
            f"{row['registers']} registers, {row['spills']} bytes, {row['shared']} shared, "
            f"{row['tensor']} columns of tensor memory"
        )
        print(f"{row['target']:8} {takes}: {row['tile']}\n    {row['spec']}")
    for reason, count in reasons.items():
        print(f"{count} spill: {reason}")
    print(f"{bad} of {len(rows)} should not be so")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
