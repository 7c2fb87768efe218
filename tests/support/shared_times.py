"""Time an eager call's host side with a shared runtime, beside that of standalone files; no test.

    python tests/support/shared_times.py [--target NAME] [--json FILE]

The layers of host_times.py are emitted as standalone files and as packages with one `_runtime.py`:
one of all, and one of those whose files have one kernel, so that its runtime needs no records. Both
are called in turns, with and without `freeze()`. It exits 1 if a package's time is above BOUND
times the other.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import timing
from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.loading import laid_out
from convgen.project.shared_runtime import runtime_source
from convgen.rendering.render import RUNTIME, KernelSource
from host_times import PACKING, RAW, SIZE, compared

BOUND = 1.03
SPECS = list(dict.fromkeys(RAW + PACKING))


def main() -> None:
    """Time every layer, report."""
    given = timing.arguments_of(__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        alone = timing.loaded(SPECS, given.target, Path(folder))
        shared = packages(given.target, Path(folder))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        for (of, spec), file in shared.items():
            for frozen in (False, True):
                rows.append({"package": of} | row_of(spec, (alone[spec], file), frozen))
                print("{package:6}{spec:90}{frozen!s:6}{ratio:8.3f}".format(**rows[-1]), flush=True)
    timing.write_json(given.json, given.target, rows)
    bad = sum(row["ratio"] > BOUND for row in rows)
    print(f"{bad} of {len(rows)} are above {BOUND}")
    sys.exit(1 if bad else 0)


def packages(target: str, folder: Path) -> dict[tuple[str, str], Any]:
    """Return the modules of the packages, by the package's name and the layer."""
    sources = {
        spec: compile_kernel(parse(spec), find_target(target), shared=True) for spec in SPECS
    }
    single = {spec: each for spec, each in sources.items() if not each.glue.file["SEVERAL"]}
    return package("all", sources, folder) | package("single", single, folder)


def package(
    name: str, sources: dict[str, KernelSource], folder: Path
) -> dict[tuple[str, str], Any]:
    """Return the modules of a package of those files."""
    home = folder / f"shared_times_{name}"
    home.mkdir()
    for number, source in enumerate(sources.values()):
        (home / f"layer_{number}.py").write_text(source.text, "utf-8")
    text = runtime_source(list(sources.values()), precompiled=False)
    (home / RUNTIME).write_text(text, "utf-8")
    sys.path.insert(0, str(folder))
    names = [f"{home.name}.layer_{number}" for number in range(len(sources))]
    modules = map(importlib.import_module, names)
    return {(name, spec): module for spec, module in zip(sources, modules, strict=True)}


def row_of(text: str, files: tuple[Any, Any], frozen: bool) -> dict[str, Any]:
    """Return the times of one layer."""
    spec = parse(text)
    layers = [file.ModelNew(device="cuda").requires_grad_(False) for file in files]
    layers[1].load_state_dict(layers[0].state_dict())
    dtype = layers[0].weight.dtype
    x = torch.randn(1, layers[0].in_channels, *[SIZE] * spec.rank, device="cuda", dtype=dtype)
    x = laid_out(x, spec.layout)
    for layer in layers:
        if frozen:
            layer.freeze()
    assert torch.equal(*(layer(x) for layer in layers))
    calls = {
        name: functools.partial(layer, x)
        for name, layer in zip(("alone", "shared"), layers, strict=True)
    }
    times, ratio = compared(calls)
    return {"spec": text, "frozen": frozen, "us": times, "ratio": ratio}


if __name__ == "__main__":
    main()
