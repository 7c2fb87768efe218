"""Time layers of open sizes beside the same layers of known sizes, and torch's; no test.

    python tests/support/open_times.py PROBLEM.py ... [--target NAME] [--json FILE]

The problems are files of https://github.com/ScalingIntelligence/KernelBench, such as level2/*.py;
those without a transposed convolution are left out. The layers have the inputs that they get there,
in both layouts. Tiles are the model's, as no file of open sizes has measured ones. Times are GPU
times of the layer alone, packing included: medians of rounds in which the three take turns. It
exits 1 if the geometric mean of open over known is above BOUND in a layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import timing
from convgen import ConvTransposeSpec
from convgen.execution.loading import laid_out
from convgen.execution.local_gpu import local_target
from convgen.planning.choices import MODEL_ALONE

BOUND = 1.12
ROUNDS = 3
LAYOUTS = ("channels_first", "channels_last")
LAYER = re.compile(r"\bConvTranspose[123]d\b")
KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def main() -> None:
    """Time every layer, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", type=Path, nargs="+")
    parser.add_argument("--target", help="that of this machine's GPU by default")
    parser.add_argument("--json", type=Path, help="file for all rows")
    given = parser.parse_args()
    target = given.target or local_target().name
    chosen = [path for path in given.problems if LAYER.search(path.read_text("utf-8"))]
    known = [spec for path in chosen for spec in layers_of(path)]
    specs = [dataclasses.replace(spec, layout=layout) for layout in LAYOUTS for spec in known]
    texts = list(dict.fromkeys(str(each) for spec in specs for each in (spec, opened(spec))))
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = timing.loaded(texts, target, Path(folder), MODEL_ALONE)
        timed: dict[str, dict[str, Any]] = {}
        for spec in specs:
            if str(spec) not in timed:
                timed[str(spec)] = row_of(spec, files[str(spec)], files[str(opened(spec))])
                print_row(timed[str(spec)])
            rows.append(timed[str(spec)])
    timing.write_json(given.json, target, rows)
    sys.exit(report(rows))


def layers_of(path: Path) -> Iterator[ConvTransposeSpec]:
    """Yield the layers of a problem with the inputs that they get; nothing is computed."""
    loader = importlib.util.spec_from_file_location("problem", path)
    assert loader is not None
    assert loader.loader is not None
    problem = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(problem)
    found: list[ConvTransposeSpec] = []

    def seen(layer: Any, args: Any) -> None:
        spec = ConvTransposeSpec.from_module(layer)
        found.append(dataclasses.replace(spec, input=tuple(args[0].shape)))

    with torch.device("meta"):
        model = problem.Model(*problem.get_init_inputs())
        for layer in model.modules():
            if isinstance(layer, KINDS):
                layer.register_forward_pre_hook(seen)
        model(*problem.get_inputs())
    yield from found


def opened(spec: ConvTransposeSpec) -> ConvTransposeSpec:
    """Return the layer for inputs of any size."""
    return dataclasses.replace(spec, input=None)


def row_of(spec: ConvTransposeSpec, known: ModuleType, any_size: ModuleType) -> dict[str, Any]:
    """Return the times of a layer in milliseconds, and how far the two outputs are apart."""
    from triton.testing import do_bench

    torch.manual_seed(0)
    layer = known.ModelNew(device="cuda")
    other = any_size.ModelNew(device="cuda")
    other.load_state_dict(layer.state_dict())
    x = laid_out(torch.randn(spec.input, device="cuda"), spec.layout)
    y = layer(x)
    apart = float((y - other(x)).norm() / y.norm())
    del y
    plain = type(layer).__bases__[0].forward
    calls = {
        "known_ms": lambda: layer(x),
        "open_ms": lambda: other(x),
        "torch_ms": lambda: plain(layer, x),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(do_bench(call, warmup=4, rep=15, return_mode="median"))
    times = {name: statistics.median(each) for name, each in samples.items()}
    ratio = times["open_ms"] / times["known_ms"]
    return {"spec": str(spec), "layout": spec.layout, **times, "ratio": ratio, "apart": apart}


def print_row(row: dict[str, Any]) -> None:
    """Print the times of one layer."""
    line = "{known_ms:9.3f}{open_ms:9.3f}{torch_ms:9.3f}{ratio:7.2f}  {apart:.0e}  {spec}"
    print(line.format(**row), flush=True)


def report(rows: list[dict[str, Any]]) -> int:
    """Print the geometric mean of each layout, each layer counted as often as it occurs."""
    means = {}
    for layout in LAYOUTS:
        ratios = [math.log(row["ratio"]) for row in rows if row["layout"] == layout]
        means[layout] = math.exp(statistics.mean(ratios))
        print(f"{layout}: open sizes take {means[layout]:.3f} times the time of known ones")
    return int(max(means.values()) > BOUND)


if __name__ == "__main__":
    main()
