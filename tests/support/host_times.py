"""Time what an eager call of a tiny layer takes on the host, beside torch's; no test.

    python tests/support/host_times.py [--target NAME] [--json FILE]

Kinds of call: of a layer whose kernel reads the weight as it is (raw), of one that packs it at
every call (packing), of that after `freeze()` (frozen), of one from a file of several kernels that
packs (several), all four beside `F.conv_transposeNd` without gradients; and of a layer that records
gradients (recorded), beside torch's layer. Both sides make CALLS calls in turns, on one core; what
the GPU has left to do then is waited for outside the time. Times are medians of all rounds, in
microseconds a call; the ratio is the median of the rounds' ratios, as a host may take half as long
again a second later. It exits 1 if a ratio is above its kind's bound.
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import timing
from convgen import ConvTransposeSpec, parse
from convgen.execution.loading import laid_out

CALLS, ROUNDS = 200, 100
SIZE = 8  # of the input, along each axis

RAW = [
    "ConvTranspose1d(8, 8, 3, groups=8)",
    "ConvTranspose2d(8, 8, 3, groups=8)",
    "ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8, input=(1, 8, 8, 8))",
    "ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8, layout=channels_last)",
    "ConvTranspose3d(8, 8, 3, groups=8)",
]
PACKING = [
    "ConvTranspose1d(8, 8, 4, stride=2, padding=1)",
    "ConvTranspose2d(8, 8, 3)",
    "ConvTranspose2d(8, 8, 4, stride=2, padding=1, dtype=float16)",
    "ConvTranspose2d(8, 8, 4, stride=2, padding=1, layout=channels_last)",
    "ConvTranspose2d(8, 8, 4, stride=2, padding=1, layout=channels_last, input=(1, 8, 8, 8))",
    "ConvTranspose3d(8, 8, 3)",
]
SEVERAL = [
    "ConvTranspose2d(8, 8, 3, layout=any)",
    "ConvTranspose2d(8, 8, 4, stride=2, padding=1, rungs=((1, 8, 8, 8),), layout=any)",
    "ConvTranspose3d(8, 8, 3, layout=any)",
]
KINDS = {  # layers, and the most times what torch takes
    "raw": (RAW, 1.25),
    "packing": (PACKING, 1.4),
    "frozen": (PACKING, 1.05),
    "recorded": (RAW + PACKING, 1.6),
    "several": (SEVERAL, 1.4),
}

Call = Callable[[], torch.Tensor]


def main() -> None:
    """Time every layer of every kind, report."""
    given = timing.arguments_of(__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = timing.loaded(RAW + PACKING + SEVERAL, given.target, Path(folder))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(f"{'':10}{'':84}{'torch':>8}{'convgen':>8}{'ratio':>8}")
        for kind, (specs, most) in KINDS.items():
            for spec in specs:
                rows.append({"kind": kind, "spec": spec} | row_of(files[spec], spec, kind, most))
                print_row(rows[-1])
    timing.write_json(given.json, given.target, rows)
    bad = sum(not row["good"] for row in rows)
    print(f"{bad} of {len(rows)} are above " + ", ".join(f"{m} {k}" for k, (_, m) in KINDS.items()))
    sys.exit(1 if bad else 0)


def row_of(file: ModuleType, spec: str, kind: str, most: float) -> dict[str, Any]:
    """Return the times of one layer."""
    with torch.set_grad_enabled(kind == "recorded"):
        of_torch, of_file = calls_of(file, parse(spec), kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one says that torch computes for convgen
            torch.testing.assert_close(of_file(), of_torch(), rtol=0.01, atol=0.01)
        times, ratio = compared({"torch": of_torch, "convgen": of_file})
    return {"us": times, "ratio": ratio, "good": ratio <= most}


def calls_of(file: ModuleType, spec: ConvTransposeSpec, kind: str) -> tuple[Call, Call]:
    """Return a call of torch's and one of the file's layer with the same numbers."""
    torch.manual_seed(0)
    layer = file.ModelNew(device="cuda")
    layer.weight.data = laid_out(layer.weight.data, spec.layout)
    x = torch.randn(
        1, layer.in_channels, *[SIZE] * spec.rank, device="cuda", dtype=layer.weight.dtype
    )
    x = laid_out(x, spec.layout)
    geometry = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    if kind == "recorded":
        x.requires_grad_()
        return functools.partial(twin_of(layer, spec.rank), x), functools.partial(layer, x)
    if kind == "frozen":
        layer.freeze()
    function = getattr(F, f"conv_transpose{spec.rank}d")
    arguments = x, layer.weight, layer.bias, *geometry
    return functools.partial(function, *arguments), functools.partial(layer, x)


def twin_of(layer: nn.Module, rank: int) -> nn.Module:
    """Return torch's own layer with the parameters of a file's."""
    own = getattr(nn, f"ConvTranspose{rank}d")
    twin = own.__new__(own)
    twin.__dict__.update(layer.__getstate__())
    return twin


def compared(calls: dict[str, Call]) -> tuple[dict[str, float], float]:
    """Return microseconds a call of both sides, and how many times the first's the second takes.

    They take turns, and turns at being first, after a round to warm up.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    sides = list(calls.items())
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS + 1):
        for name, call in sides:
            samples[name].append(microseconds(call))
        sides.reverse()
    gc.enable()
    first, second = (each[1:] for each in samples.values())
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return {name: statistics.median(each[1:]) for name, each in samples.items()}, ratio


def microseconds(call: Call) -> float:
    """Return what the host takes for one of CALLS calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def print_row(row: dict[str, Any]) -> None:
    """Print the times of one layer."""
    times = "".join(f"{row['us'][side]:8.2f}" for side in ("torch", "convgen"))
    line = f"{row['kind']:10}{row['spec'].removeprefix('ConvTranspose'):84}{times}"
    print(f"{line}{row['ratio']:8.2f}" + ("" if row["good"] else "  too slow"), flush=True)


if __name__ == "__main__":
    main()
