"""Compile an emitted file as its own wrapper launches it, and as `compile_text` reads that launch.

A process of its own: once Triton is imported for interpreting it cannot compile. Reads JSON lines
`[spec, target]`, or with a tile, prints for each the keys of Triton's cache that the two have.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from convgen import find_target, parse
from convgen.compiler import compile_kernel
from convgen.execution.cubin import capability_of, compile_text
from convgen.execution.loading import load_module
from convgen.geometry.problem import problem_of
from convgen.geometry.tile import Tile
from convgen.rendering.render import KernelSource


class Recorder:
    """Takes the kernel's place in the wrapper: remembers the launch."""

    def __getitem__(self, grid: Any) -> Any:
        self.grid = grid
        return self.take

    def take(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


class Stub:
    """A driver that knows its target and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def recorded(module: ModuleType) -> dict[str, tuple[Any, Recorder]]:
    """Let recorders take the places of a file's kernels; return these with their recorders."""
    kernels = {name: each for name, each in vars(module).items() if name.endswith("_kernel")}
    pairs = {name: (kernel, Recorder()) for name, kernel in kernels.items()}
    for name, (_, recorder) in pairs.items():
        setattr(module, name, recorder)
    return pairs


def launched(source: KernelSource, capability: int, folder: Path) -> str:
    """Return the key of what the wrapper launches for tensors of nominal sizes."""
    spec, problem = source.plan.spec, problem_of(source.plan.spec, source.plan.phases)
    module = load_module(source.text, f"by_wrapper_{source.sha256[:8]}", folder)
    kernel, recorder = recorded(module)[f"conv_transpose{spec.rank}d_kernel"]
    element = {"dtype": getattr(torch, spec.dtype), "device": "meta"}
    x = torch.empty((problem.batch, problem.in_channels, *problem.extents), **element)
    if spec.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    shape = (problem.in_channels, problem.out_channels // spec.groups, *spec.kernel_size)
    bias = torch.empty(problem.out_channels, **element) if spec.bias else None
    module._launch(x, module.pack_weight(torch.empty(shape, **element)), bias)
    if source.plan.tuned:
        options = recorder.options | kernel.configs[0].all_kwargs()
        kernel = kernel.fn
    else:
        options = recorder.options
    triton.runtime.driver.set_active(Stub(capability))
    return kernel.warmup(*recorder.arguments, grid=(1,), **options).hash


def main() -> None:
    torch.cuda.is_current_stream_capturing = lambda: False  # which a torch without CUDA cannot say
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            text, target, *tiles = json.loads(line)
            tile = Tile(**tiles[0]) if tiles else None
            source = compile_kernel(parse(text), find_target(target), tile)
            if source.plan.others:  # of a ladder, the kernel for any size
                source = compile_kernel(parse(text), find_target(target), source.plan.tile)
            capability = capability_of(find_target(target).arch)
            read = compile_text(source.text, source.plan.spec.dtype, "read.py", capability).key
            print(json.dumps([launched(source, capability, Path(folder)), read]), flush=True)


if __name__ == "__main__":
    main()
