"""Compare emitted kernels with torch for many layers, on this machine's GPU.

    python examples/compare_with_torch.py CASES.json [--dtypes float32,float16] [--json FILE]

CASES.json holds `{"cases": [{"id", "rank", "batch", "in_channels", "out_channels", "input",
"kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "bias"}, …]}`, with
sizes as in torch; `input` has the spatial sizes only. Errors are relative to a scatter in float64,
which uses none of torch's convolutions. torch runs with its default flags.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from convgen import ConvTransposeSpec, SpecError, emit
from convgen.execution.loading import load_module
from convgen.execution.local_gpu import local_target
from convgen.execution.torch_oracle import scatter
from convgen.measuring.cases import spec_of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--dtypes", default="float32,float16,bfloat16,float64")
    parser.add_argument("--only", default="", help="only cases whose id contains this text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp())
    target = local_target()
    rows = []
    print(f"{'case':20} {'dtype':9} {'torch ms':>9} {'convgen':>9} {'times':>6} {'errors':>19}")
    for case in json.loads(options.cases.read_text())["cases"]:
        for dtype in options.dtypes.split(","):
            if options.only in case["id"]:
                spec = spec_of(case, dtype)
                module = load_module(emit(spec, target), f"{case['id']}_{dtype}", folder)
                rows.append({"case": case["id"], "dtype": dtype, **measure(spec, module)})
                print(line_of(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measure(spec: ConvTransposeSpec, module: Any) -> dict[str, float]:
    """Return times (medians, in milliseconds) and relative errors of torch and convgen."""
    import torch
    from triton.testing import do_bench

    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x = draw(*spec.input)
    weight = draw(spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    bias = draw(spec.out_channels) if spec.bias else None
    torch_function = getattr(torch.nn.functional, f"conv_transpose{spec.rank}d")
    geometry = (spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation)
    packed = module.pack_weight(weight)
    packed_function = getattr(module, f"conv_transpose{spec.rank}d_packed")
    ways = {
        "torch": lambda: torch_function(x, weight, bias, *geometry),
        "convgen": lambda: packed_function(x, packed, bias),
    }
    reference = scatter(spec, x[:2], weight, bias)
    row: dict[str, float] = {}
    for name, way in ways.items():
        error = (way()[:2].double() - reference).norm() / reference.norm()
        row[f"{name}_error"] = float(error)
        row[f"{name}_ms"] = do_bench(way, warmup=10, rep=50, return_mode="median")
    return row


def line_of(row: dict[str, Any]) -> str:
    """Return the line of the printed table for a case."""
    faster = row["torch_ms"] / row["convgen_ms"]
    return (
        f"{row['case'][-20:]:20} {row['dtype']:9} {row['torch_ms']:9.3f} {row['convgen_ms']:9.3f} "
        f"{faster:5.2f}x {row['torch_error']:9.2e} {row['convgen_error']:9.2e}"
    )


if __name__ == "__main__":
    try:
        main()
    except SpecError as error:
        sys.exit(f"error: {error}")
