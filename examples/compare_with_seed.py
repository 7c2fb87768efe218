"""Compare the emitted kernel with torch and with a hand-written kernel, on this machine's GPU.

    python examples/compare_with_seed.py BRIEF [--sm89] [--json FILE]

The hand-written kernel is the one that convgen started from, the "seed"; BRIEF is a text file with
its source in a ```python block. The layer is problem 57 of KernelBench level 1:
ConvTranspose2d(64, 64, 3) on 8 images of 64 x 1024 x 1024. Seed, emitted kernel and torch run in
one process on the same random data.

`--sm89` compiles both Triton kernels for the RTX 4090's architecture and runs that code on this
GPU: PTX is forward compatible, so a wrapper script around ptxas assembles it for this GPU. This
runs the code that a 4090 would run, but does not measure the time that it would take there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from convgen.errors import SpecError
from convgen.execution.local_gpu import local_target

SPEC = "ConvTranspose2d(64, 64, 3, stride=1, bias=False, input=(8, 64, 1024, 1024))"
PTXAS = """#!/bin/sh
for argument do
    shift
    set -- "$@" "$(echo "$argument" | sed s/sm_89/sm_{capability}/)"
done
exec {real} "$@"
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("brief", type=Path)
    parser.add_argument("--sm89", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.sm89 and "TRITON_OVERRIDE_ARCH" not in os.environ:
        sys.exit(run_as_sm89(sys.argv[1:] if arguments is None else arguments))
    result = measure(options.brief, "rtx4090" if options.sm89 else local_target().name)
    for name, value in result.items():
        print(f"{name:24} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def run_as_sm89(arguments: list[str]) -> int:
    """Run this script again with Triton compiling for sm_89; return its exit code."""
    import torch
    import triton

    if not torch.cuda.is_available():
        sys.exit("error: this needs a CUDA GPU, and torch sees none")
    real = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        ptxas = Path(folder) / "ptxas"
        ptxas.write_text(PTXAS.format(capability=10 * major + minor, real=real))
        ptxas.chmod(0o755)
        settings = {
            "TRITON_OVERRIDE_ARCH": "sm89",
            "TRITON_PTXAS_PATH": str(ptxas),
            "TRITON_CACHE_DIR": str(Path(folder) / "cache"),
        }
        command = [sys.executable, __file__, *arguments]
        return subprocess.run(command, env=os.environ | settings, check=False).returncode


def measure(brief: Path, target: str) -> dict[str, object]:
    """Return errors and times of the seed kernel, the emitted one and torch; medians, in ms."""
    import torch
    import triton

    from convgen import emit, find_target, parse
    from convgen.execution.loading import load_module

    spec = parse(SPEC)
    code = brief.read_text().split("```python")[1].split("```")[0]
    folder = Path(tempfile.mkdtemp())
    seed = load_module(code, "seed", folder)
    emitted = load_module(emit(spec, find_target(target)), "emitted", folder)
    if target == "rtx4090":  # compiled for sm_89: no workaround for a Hopper GPU
        emitted._num_stages = lambda planned: planned
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(spec.input, device="cuda", generator=generator)
    weight = torch.randn(64, 64, 3, 3, device="cuda", generator=generator)
    packed = emitted.pack_weight(weight)
    ways = {
        "torch": lambda: torch.nn.functional.conv_transpose2d(x, weight),
        "seed": lambda: seed.triton_conv_transpose2d_full(x, weight, None),
        "convgen": lambda: emitted.conv_transpose2d_packed(x, packed),
    }
    reference = torch.nn.functional.conv_transpose2d(x[:1].double(), weight.double())
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "target": target,
        "code": os.environ.get("TRITON_OVERRIDE_ARCH", "native"),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for name, way in ways.items():
        error = (way()[:1].double() - reference).norm() / reference.norm()
        result[f"{name} relative error"] = float(error)
        result[f"{name} ms"] = triton.testing.do_bench(way, return_mode="median")
    for name in ("seed", "torch"):
        result[f"times faster than {name}"] = result[f"{name} ms"] / result["convgen ms"]
    return result


if __name__ == "__main__":
    try:
        main()
    except SpecError as error:
        sys.exit(f"error: {error}")
