"""Time the packing of a weight on the GPU, beside `weight.clone()`; no test.

    python tests/support/pack_times.py [--target NAME] [--json FILE]

Both sides launch 200 times without a pause, on the same weight, contiguous and in channels_last:
in a CUDA graph, and in a stream behind a kernel that keeps the GPU busy until the host has launched
all. The time of the host is in neither. The sides take turns, and each figure is the median of all
rounds, in microseconds a launch. It exits 1 if packing takes more in a graph than MOST times the
clone and more than the clone and SLACK microseconds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import timing
from convgen import parse
from convgen.execution.loading import laid_out
from layers import in_layouts

MOST, SLACK = 1.33, 1.0
LAUNCHES, ROUNDS = 200, 31
BUSY = 10**7  # cycles of the kernel in front: some 5 ms, longer than 200 launches take the host

LAYERS = [
    "ConvTranspose2d(64, 64, 3, stride=1, bias=False)",
    "ConvTranspose2d(64, 64, 3, stride=1, bias=False, input=(8, 64, 1024, 1024))",
    "ConvTranspose2d(1024, 512, 4, stride=2, padding=1)",
    "ConvTranspose2d(512, 256, 4, stride=2, padding=1, dtype=float16)",
    "ConvTranspose2d(1024, 512, 2, stride=2)",
    "ConvTranspose3d(64, 64, 5)",
    "ConvTranspose2d(128, 128, 4, stride=2, groups=4)",
    "ConvTranspose1d(512, 256, 16, stride=8, padding=4)",
    "ConvTranspose2d(64, 3, 7)",
    "ConvTranspose2d(128, 100, 3)",
    "ConvTranspose2d(256, 1, 5, stride=2)",
    "ConvTranspose3d(32, 3, 3, stride=2)",
]

Ways = dict[str, Callable[[], object]]


def main() -> None:
    """Time every layer in every layout, report."""
    given = timing.arguments_of(__doc__)
    print(f"{'':76}{'in a graph':>24}{'in a stream':>24}")
    print(f"{'':76}" + f"{'clone':>8}{'pack':>8}{'ratio':>8}" * 2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spec, file in timing.loaded(LAYERS, given.target, Path(folder)).items():
            if not any(name.endswith("_pack_kernel") for name in vars(file)):
                print(f"{spec}: its kernel reads the weight as it is")
                continue
            for each in in_layouts(parse(spec)):
                rows.append({"spec": spec, "weight": each.layout} | row_of(file, spec, each.layout))
                print_row(rows[-1])
    timing.write_json(given.json, given.target, rows)
    bad = sum(not row["good"] for row in rows)
    print(f"{bad} of {len(rows)} take more than {MOST} times the clone and {SLACK} us more")
    sys.exit(1 if bad else 0)


def row_of(file: ModuleType, spec: str, layout: str) -> dict[str, Any]:
    """Return the times of one weight, and how many bytes it has before and after."""
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = torch.randn(file.WEIGHT_SHAPE, device="cuda", generator=generator)
    weight = laid_out(drawn.to(getattr(torch, parse(spec).dtype)), layout)
    plan = [file.PLANS[0]] if hasattr(file, "PLANS") else []  # of files with several kernels
    packed = file._pack(*plan, weight)
    ways: Ways = {"clone": weight.clone, "pack": lambda: file._pack(*plan, weight)}
    graph = medians({name: in_graph(way) for name, way in ways.items()})
    return {
        "weight_bytes": weight.nbytes,
        "packed_bytes": packed.nbytes,
        "graph_us": graph,
        "stream_us": medians({name: in_stream(way) for name, way in ways.items()}),
        "good": graph["pack"] <= max(MOST * graph["clone"], graph["clone"] + SLACK),
    }


def in_graph(way: Callable[[], object]) -> Callable[[], object]:
    """Return what launches `way` LAUNCHES times from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_stream(way)()
    return graph.replay


def in_stream(way: Callable[[], object]) -> Callable[[], object]:
    """Return what launches `way` LAUNCHES times, one after another."""

    def launch() -> None:
        for _ in range(LAUNCHES):
            way()

    return launch


def medians(ways: Ways) -> dict[str, float]:
    """Return microseconds a launch of each way; they take turns, after a round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            samples[name].append(1000 * milliseconds(way) / LAUNCHES)
    return {name: statistics.median(each[1:]) for name, each in samples.items()}


def milliseconds(way: Callable[[], object]) -> float:
    """Return what the GPU takes for all launches of a way."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in (BUSY, 4 * BUSY, 16 * BUSY):  # a slow host needs longer for its launches
        torch.cuda._sleep(cycles)
        start.record()
        way()
        end.record()
        waited = start.query()
        end.synchronize()
        if not waited:
            return start.elapsed_time(end)
    raise RuntimeError(f"the GPU waited for the host: {16 * BUSY} cycles are too few")


def print_row(row: dict[str, Any]) -> None:
    """Print the times of one weight."""
    line = f"{row['spec'].removeprefix('ConvTranspose'):61.61} {row['weight']:14}"
    for times in (row["graph_us"], row["stream_us"]):
        line += f"{times['clone']:8.2f}{times['pack']:8.2f}{times['pack'] / times['clone']:8.2f}"
    print(line + ("" if row["good"] else "  too slow"), flush=True)


if __name__ == "__main__":
    main()
