"""Run KernelBench's transposed convolutions by KernelBench's own evaluation, on the GPU at hand.

    python examples/run_kernelbench.py CHECKOUT [--problems 57,58] [-o FOLDER] [--json FILE]

CHECKOUT is a clone of https://github.com/ScalingIntelligence/KernelBench whose requirements are
installed. Of each level 1 problem with a transposed convolution, the layer inside the reference
`Model` becomes a spec; the emitted file, with a `ModelNew` that takes the problem's arguments, is
what KernelBench compiles, checks at its own tolerance and times. `--only-write` leaves it at that.
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

# The emitted ModelNew has its arguments as defaults; a problem's own come in an order of their own.
ADAPTER = '''

class ModelNew(ModelNew):
    """The layer, built from whatever the problem's get_init_inputs() returns."""

    def __init__(self, *init_inputs):
        super().__init__()
'''


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--problems", default="", help="numbers; all that have such a layer")
    parser.add_argument("--target", help="the GPU to plan for; the one at hand")
    parser.add_argument("--only-write", action="store_true", help="evaluate nothing")
    parser.add_argument("-o", "--output", type=Path, help="folder for the files handed over")
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
        if options.json:  # after each, so that a run cut short leaves what it has
            options.json.write_text(json.dumps(rows, indent=2))
    if not options.only_write:
        print(last_line(rows))


def _local_target() -> GpuTarget:
    from convgen.execution.local_gpu import local_target

    return local_target()


def problems(checkout: Path, chosen: str = "") -> list[tuple[int, Path]]:
    """Return number and file of the level 1 problems that have a transposed convolution."""
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

    Nothing is allocated: model and input are made on torch's meta device. cuDNN computes grouped
    layers in float32 and all others in TF32 (torch 2.11, H100), so that KernelBench's tolerance of
    1e-4 asks for tf32x3 there.
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
    """Return what KernelBench says of `source`: compiled, correct, and mean times.

    It times torch only where it looks for an excessive speedup, hence that check without a limit:
    some layers are more than its default of ten times as fast.
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
    """Return what is printed of a problem."""
    line = f"{row['problem']:3}  {row['spec']}"
    if "correct" not in row:
        return line
    if not row["correct"] or row["convgen_ms"] <= 0:
        return f"{line}\n     not correct or not timed: {row['metadata']}"
    faster = row["torch_ms"] / row["convgen_ms"]
    times = f"torch {row['torch_ms']} ms  convgen {row['convgen_ms']} ms  {faster:.2f}x"
    return f"{line}\n     correct  {times}"


def last_line(rows: list[dict[str, Any]]) -> str:
    """Return how many problems are correct, and the geometric mean over those that were timed."""
    correct = [row for row in rows if row["correct"]]
    faster = [row["torch_ms"] / row["convgen_ms"] for row in correct if row["convgen_ms"] > 0]
    line = f"{len(correct)} of {len(rows)} correct"
    return f"{line}, geometric mean {statistics.geometric_mean(faster):.2f}x" if faster else line


if __name__ == "__main__":
    try:
        main()
    except SpecError as error:
        sys.exit(f"error: {error}")
