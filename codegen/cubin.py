"""Compiling an emitted file to machine code, with no GPU.

Used by tests and reports; needs torch and triton, which the compiler does not. Input: a
`KernelSource` and a compute capability; output: registers, spills and shared memory as ptxas and
Triton report them. Signature, constants and attributes are those of the file's own launch: its
wrapper is run on meta tensors, and the launch it makes is compiled instead of run.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .choices import Choices
from .compiler import compile_kernel
from .loading import load_module
from .plan import problem_of
from .render import KernelSource
from .resources import resident
from .sources import Statement
from .spec import ConvTransposeSpec
from .targets import GpuTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """What the machine code of one kernel takes.

    Attributes:
        registers: registers a thread.
        spills: bytes a thread keeps in local memory.
        shared: bytes of shared memory a program.
        num_warps: warps a program.
        ptx: the PTX it was assembled from.
    """

    registers: int
    spills: int
    shared: int
    num_warps: int
    ptx: str


def argument_shapes(spec: ConvTransposeSpec, source: KernelSource) -> dict[str, tuple[int, ...]]:
    """Return shapes of input, weight and bias for `spec`, nominal where it leaves them open."""
    problem = problem_of(spec, source.plan.phases)
    return {
        "input": (problem.batch, problem.in_channels, *problem.extents),
        "weight": (problem.in_channels, problem.out_channels // spec.groups, *spec.kernel_size),
        "bias": (problem.out_channels,),
    }


def module_name(source: KernelSource) -> str:
    """Return the name to load a file under: Triton's cache knows a kernel by its module's name."""
    return f"convgen_{source.body_sha256[:16]}"


def compile_source(source: KernelSource, capability: int) -> Binary:
    """Compile the kernel of `source` for a compute capability such as 89.

    Clears TRITON_INTERPRET for this process, so triton must not be imported yet where it is set.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Stub:
        """A driver that knows its target and launches nothing."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    spec = source.plan.spec
    with tempfile.TemporaryDirectory() as folder:
        module = load_module(source.text, module_name(source), Path(folder))
        kernel_name = f"conv_transpose{spec.rank}d_kernel"
        launch = _Launch()
        kernel = getattr(module, kernel_name)
        setattr(module, kernel_name, launch)
        dtype = getattr(torch, spec.dtype)
        shapes = argument_shapes(spec, source)
        tensors = {k: torch.empty(s, dtype=dtype, device="meta") for k, s in shapes.items()}
        if spec.layout == "channels_last":
            last = {2: torch.channels_last, 3: torch.channels_last_3d}[spec.rank]
            tensors["input"] = tensors["input"].contiguous(memory_format=last)
        weight = module.pack_weight(tensors["weight"])
        module._launch(tensors["input"], weight, tensors["bias"] if spec.bias else None)
        triton.runtime.driver.set_active(Stub())
        jit = getattr(kernel, "fn", kernel) if source.plan.tuned else kernel
        options = dict(launch.options)
        if source.plan.tuned:
            options |= kernel.configs[0].all_kwargs()
        try:
            compiled = jit.warmup(*launch.arguments, grid=launch.grid_of(options), **options)
        finally:
            if torch.cuda.is_available():  # else there is no other driver to go back to
                triton.runtime.driver.reset_active()
        return _binary(compiled, Path(folder), triton)


def compile_for(source: KernelSource, target: GpuTarget) -> Binary:
    """Compile the kernel of `source` for a target."""
    return compile_source(source, int(target.arch.removeprefix("sm_")))


def compilers(spared: int = 0) -> ProcessPoolExecutor:
    """Return an executor with a process for each core but `spared`, at least one.

    They start afresh: a process that has Triton for interpreting cannot compile.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(1, cores - spared), mp_context=context)


def resources_of(statement: Statement, choices: Choices | None) -> dict[str, Any]:
    """Return what the machine code of a statement's kernel takes on its target, as JSON has it."""
    target = statement.target
    source = compile_kernel(statement.spec, target, choices=choices)
    binary = compile_for(source, target)
    return {
        "name": statement.name or f"conv_transpose{statement.spec.rank}d",
        "target": target.name,
        "registers": binary.registers,
        "spills": binary.spills,
        "shared": binary.shared,
        "occupancy": resident(target, binary.num_warps, binary.registers, binary.shared),
    }


class _Launch:
    """Stands for the kernel in the wrapper: remembers the launch."""

    def __getitem__(self, grid: Any) -> Any:
        self.grid = grid
        return self._take

    def _take(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def grid_of(self, options: dict[str, Any]) -> Any:
        return self.grid(options) if callable(self.grid) else self.grid


def _binary(compiled: Any, folder: Path, triton: Any) -> Binary:
    """Read the resources of a compiled kernel with the cuobjdump that Triton ships."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Binary(
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        ptx=compiled.asm["ptx"],
    )
