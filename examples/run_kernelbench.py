"""Evaluate emitted kernels with KernelBench, on this machine's GPU.

    python examples/run_kernelbench.py CHECKOUT [--problems 57,58] [-o FOLDER] [--json FILE]

CHECKOUT is a clone of https://github.com/ScalingIntelligence/KernelBench whose requirements are
installed. For each level 1 problem with a transposed convolution, the layer inside the reference
`Model` becomes a spec. KernelBench compiles the file emitted for it, with a `ModelNew` that accepts
the problem's arguments, checks it at KernelBench's tolerance and times it. With `--only-write` the
files are written to FOLDER and not evaluated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from convgen import ConvTransposeSpec, GpuTarget, SpecError, emit, find_target

# The emitted ModelNew needs no arguments: the spec's are its defaults. A problem passes arguments
# in its own order, so they are ignored.
ADAPTER = '''

class ModelNew(ModelNew):
    """The layer; ignores its arguments, which are those of the problem's get_init_inputs()."""

    def __init__(self, *init_inputs):
        super().__init__()
'''


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--problems", default="", help="numbers; by default all with such a layer")
    parser.add_argument("--target", help="the GPU to plan for; by default this machine's")
    parser.add_argument("--only-write", action="store_true", help="do not evaluate the files")
    parser.add_argument("-o", "--output", type=Path, help="folder to write the emitted files to")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    target = find_target(options.target) if options.target else _local_target()
    rows: list[dict[str, Any]] = []
    for number, path in problems(options.checkout, options.problems):
        spec = spec_of(path)
        source = emit(spec, target) + ADAPTER
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"{path.stem}.py").write_text(source, encoding="utf-8")
        rows.append({"problem": number, "spec": str(spec)})
        if not options.only_write:
            rows[-1] |= evaluate(options.checkout, path, source)
        print(line_of(rows[-1]), flush=True)
        if options.json:  # after each problem, so that an interrupted run keeps its results
            options.json.write_text(json.dumps(rows, indent=2))
    if not options.only_write:
        print(last_line(rows))


def _local_target() -> GpuTarget:
    from convgen.execution.local_gpu import local_target

    return local_target()


def problems(checkout: Path, chosen: str = "") -> list[tuple[int, Path]]:
    """Return number and file of the level 1 problems to evaluate, sorted by number.

    These are the problems that `chosen` lists, else all with a transposed convolution.
    """
    numbers = {int(number) for number in chosen.split(",") if number}
    found = []
    for path in (checkout / "KernelBench" / "level1").glob("*.py"):
        number = int(path.name.partition("_")[0])
        wanted = number in numbers if numbers else "ConvTranspose" in path.read_text("utf-8")
        if wanted:
            found.append((number, path))
    if not found:
        sys.exit(f"no such problem in {checkout / 'KernelBench' / 'level1'}")
    return sorted(found)


def spec_of(path: Path) -> ConvTransposeSpec:
    """Return the spec of the layer inside a problem's Model, for the problem's input.

    Model and input are on torch's meta device, so they take no memory. Grouped layers get precision
    tf32x3, because the reference, cuDNN, computes them in float32 (all others in TF32; torch 2.11,
    H100) and KernelBench's tolerance is 1e-4.
    """
    import torch

    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.read_text("utf-8"), path.name, "exec"), names)
    with torch.device("meta"):
        model = names["Model"](*names["get_init_inputs"]())
        (x,) = names["get_inputs"]()
    layers = [m for m in model.modules() if re.match("ConvTranspose", type(m).__name__)]
    if len(layers) != 1:
        sys.exit(f"{path.name} has {len(layers)} transposed convolutions, not one")
    spec = ConvTransposeSpec.from_module(layers[0], tuple(x.shape))
    return dataclasses.replace(spec, precision="tf32x3" if spec.groups > 1 else "tf32")


def evaluate(checkout: Path, path: Path, source: str) -> dict[str, Any]:
    """Return KernelBench's result for `source`: compiled, correct, and mean times in milliseconds.

    KernelBench times torch only if it checks for an excessive speedup. That check is on, but with
    an infinite threshold: some layers exceed its default, ten times as fast as torch.
    """
    import torch

    sys.path.insert(0, str(checkout / "src"))
    from kernelbench.eval import eval_kernel_against_ref

    result = eval_kernel_against_ref(
        path.read_text("utf-8"),
        source,
        num_correct_trials=5,
        num_perf_trials=100,
        measure_performance=True,
        backend="triton",
        precision=torch.float32,
        check_for_excessive_speedup=True,
        excessive_speedup_threshold=math.inf,
    )
    return {
        "compiled": result.compiled,
        "correct": result.correctness,
        "torch_ms": result.ref_runtime,
        "convgen_ms": result.runtime,  # -1 if it was not timed
        "metadata": str(result.metadata),
    }


def line_of(row: dict[str, Any]) -> str:
    """Return the lines printed for a problem."""
    line = f"{row['problem']:3}  {row['spec']}"
    if "correct" not in row:
        return line
    if not row["correct"] or row["convgen_ms"] <= 0:
        return f"{line}\n     not correct or not timed: {row['metadata']}"
    faster = row["torch_ms"] / row["convgen_ms"]
    times = f"torch {row['torch_ms']} ms  convgen {row['convgen_ms']} ms  {faster:.2f}x"
    return f"{line}\n     correct  {times}"


def last_line(rows: list[dict[str, Any]]) -> str:
    """Return the summary: correct problems, and the geometric mean speedup of those timed."""
    correct = [row for row in rows if row["correct"]]
    faster = [row["torch_ms"] / row["convgen_ms"] for row in correct if row["convgen_ms"] > 0]
    line = f"{len(correct)} of {len(rows)} correct"
    return f"{line}, geometric mean {statistics.geometric_mean(faster):.2f}x" if faster else line


if __name__ == "__main__":
    try:
        main()
    except SpecError as error:
        sys.exit(f"error: {error}")
