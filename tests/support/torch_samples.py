"""Torch's own samples for its transposed convolutions, and emitted files that serve them.

Run as a script it writes the samples of OpInfo and ModuleInfo to a file: importing torch's testing
modules forbids, in that process and for good, setting the flags of `torch.backends`.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from convgen import ConvTransposeSpec
from convgen.compiler import compile_kernel, plan
from convgen.execution.loading import load_module

FILE = "samples.pt"
DTYPES = ("float32", "float16", "bfloat16", "float64")
COUNTS = {1: 10, 2: 12, 3: 10}  # OpInfo's samples of conv_transpose{1,2,3}d, of each dtype
GEOMETRY = ("stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of `torch.nn.functional.conv_transpose{rank}d`."""

    rank: int
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    geometry: dict[str, Any]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Input, weight and bias, or None."""
        return self.input, self.weight, self.bias

    def leaves(self, device: str) -> list[torch.Tensor | None]:
        """Return copies that want gradients, None where there is no bias."""
        return [t if t is None else t.to(device, copy=True).requires_grad_() for t in self.tensors]

    def torch(self, *tensors: torch.Tensor | None) -> torch.Tensor:
        """Call torch's function with the sample's geometry."""
        return getattr(F, f"conv_transpose{self.rank}d")(*tensors, **self.geometry)

    def spec(self) -> ConvTransposeSpec:
        """Return the spec of the sample, sizes left to run time."""
        c_in, per_group, *kernel = self.weight.shape
        # In torch a tuple of one entry serves every axis.
        per_axis = {
            name: value[0] if isinstance(value, tuple) and len(value) == 1 else value
            for name, value in self.geometry.items()
        }
        return ConvTransposeSpec(
            rank=self.rank,
            in_channels=c_in,
            out_channels=per_group * self.geometry.get("groups", 1),
            kernel_size=tuple(kernel),
            bias=self.bias is not None,
            dtype=str(self.input.dtype).removeprefix("torch."),
            **per_axis,
        )


class Emitter:
    """Emitted files by their specs, each written and imported once."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device, self.count = folder, device, itertools.count()
        self.load: Callable[[ConvTransposeSpec], ModuleType] = functools.cache(self._load)

    def _load(self, spec: ConvTransposeSpec) -> ModuleType:
        tile = plan(spec).tile
        if self.device == "cpu":
            # The interpreter takes a program's time whatever its size: fewer programs, less time.
            tile = replace(tile, block_m=1024 if prod(spec.kernel_size) > 100 else 512)
        text = compile_kernel(spec, tile=tile).text
        return load_module(text, f"torch_suite_{next(self.count)}", self.folder)

    def function(self, sample: Sample) -> Callable[..., torch.Tensor]:
        """Return the emitted function that serves `sample`."""
        return getattr(self.load(sample.spec()), f"conv_transpose{sample.rank}d")


def collect(folder: Path) -> None:
    """Write torch's samples into `folder`, in a process of its own."""
    subprocess.run([sys.executable, "-W", "ignore", __file__, str(folder / FILE)], check=True)


def read(folder: Path) -> dict[str, Any]:
    """Return torch's samples: "op", {(rank, dtype): [Sample]}, and "module", {name: [inputs]}.

    An input of a module is (positional arguments, keywords, input in float64).
    """
    written = torch.load(folder / FILE)
    written["op"] = {
        key: [Sample(key[0], *tensors, geometry) for *tensors, geometry in calls]
        for key, calls in written["op"].items()
    }
    return written


def write(path: str) -> None:
    """Write what `read` reads."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    torch.manual_seed(0)
    calls = {}
    for op in op_db:
        if op.name.startswith("nn.functional.conv_transpose"):
            rank = int(op.name[-2])
            for dtype in DTYPES:
                found = op.sample_inputs("cpu", getattr(torch, dtype), requires_grad=True)
                calls[rank, dtype] = [_call(sample) for sample in found]
    modules = {}
    for info in module_db:
        if "ConvTranspose" in info.name:
            made = info.module_inputs_func(info, "cpu", torch.float64, True, training=True)
            modules[info.name.removeprefix("nn.")] = [_module_input(one) for one in made]
    torch.save({"op": calls, "module": modules}, path)


def _call(sample: Any) -> tuple[Any, ...]:
    weight, bias = sample.args
    assert set(sample.kwargs) <= set(GEOMETRY)
    tensors = (t if t is None else t.detach() for t in (sample.input, weight, bias))
    return *tensors, dict(sample.kwargs)


def _module_input(one: Any) -> tuple[Any, ...]:
    (x,) = one.forward_input.args
    assert not one.forward_input.kwargs
    return one.constructor_input.args, one.constructor_input.kwargs, x.detach()


if __name__ == "__main__":
    write(sys.argv[1])
