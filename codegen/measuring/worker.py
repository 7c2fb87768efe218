"""The worker of bench: a process that measures one way on many cases.

    python -P -m convgen.measuring.worker FOLDER

Stage 2 of bench; needs torch, triton and a CUDA GPU. Input: FOLDER/jobs, one JSON line per job;
output: one JSON line per answer, on stdout. Each way has a separate process, because torch keeps
the first cuDNN plan of a shape, however it was chosen, and so that a crash loses one row only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..compiler import compile_kernel
from ..errors import ConvgenError, MachineError
from ..execution.cubin import compile_for, compilers, module_name
from ..execution.loading import laid_out, load_module
from ..execution.local_gpu import local_target
from ..execution.torch_oracle import reference, staged
from ..families.registry import FAMILIES
from ..language.parser import parse
from ..language.spec import ConvTransposeSpec
from ..planning.choices import choices_at
from ..rendering.render import KernelSource
from ..tables.targets import find_target
from .cases import CEILINGS, CONVGEN, WAYS, Way

SECONDS = 600  # time limit per job: a hang must not stop the other jobs
MATMUL = 8192
COPIED = 2**30
WARMUP_MS, REPEAT_MS, LEAST_SAMPLES = 25, 100, 20


def main() -> None:
    """Answer the jobs in the folder that the command line names, in order."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep the output of libraries apart from the answers
    lines = (folder / "jobs").read_text("utf-8").splitlines()
    compile_ahead(lines)
    for line in lines:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(json.dumps(answer(line, folder)), file=answers, flush=True)
        if not _released():
            os._exit(0)  # no orderly exit: CUDA's teardown would fail too


def compile_ahead(lines: list[str]) -> None:
    """Compile the jobs' files in parallel into Triton's cache, before anything is timed."""
    emitting = [line for line in lines if CONVGEN in line]
    if len(emitting) > 1:
        with compilers() as pool:
            list(pool.map(_compile, emitting))


def _compile(line: str) -> None:
    with contextlib.suppress(Exception):  # the job itself reports the error
        job = json.loads(line)
        source = compile_job(parse(job["spec"]), WAYS[job["way"]], job)
        compile_for(source, find_target(job["target"]))


def answer(line: str, folder: Path) -> dict[str, Any]:
    """Return the answer to a job, or `failed` with the error message."""
    try:
        job = json.loads(line)
        if job["way"] == CEILINGS:
            return ceilings(job["dtypes"])
        return measure(job, folder, "cuda")
    except ConvgenError as error:
        return {"failed": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}


def _released() -> bool:
    """Free the job's memory; return False if the job broke the CUDA context."""
    torch = sys.modules.get("torch")
    gc.collect()
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def measure(job: dict[str, Any], folder: Path, device: str) -> dict[str, Any]:
    """Return median and samples (ms), relative error and, for convgen, the tile of a job's way."""
    import torch

    spec, way = parse(job["spec"]), WAYS[job["way"]]
    torch.backends.cudnn.benchmark = way.benchmark
    tensors = draw(spec, device)
    row: dict[str, Any] = {}
    if way.emitted:
        source = compile_job(spec, way, job)
        row["tile"] = f"{source.plan.family}, {source.plan.tile}"
        call = emitted_call(source, way, folder, *tensors)
    else:
        call = torch_call(spec, way, *tensors)
    output = call()[:2].double()  # first, while there is free memory for cuDNN's workspaces
    exact = reference(spec, tensors[0][:2], *tensors[1:])
    error = float((output - exact).norm() / exact.norm())
    if not math.isfinite(error):
        raise ArithmeticError("the output is not finite")
    del output, exact
    samples = samples_of(call)
    ms = statistics.median(samples)
    return {"ms": ms, "relative_error": error, **row, "samples": samples}


def draw(spec: ConvTransposeSpec, device: str) -> tuple[Any, Any, Any]:
    """Return normally distributed input, weight and bias, the same in every process."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int | None) -> Any:
        numbers = torch.randn(shape, device=device, generator=generator)
        return numbers.to(getattr(torch, spec.dtype))

    assert spec.input is not None
    assert spec.out_channels is not None
    x = normal(*spec.input)
    weight = normal(spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    return x, weight, normal(spec.out_channels) if spec.bias else None


def torch_call(
    spec: ConvTransposeSpec, way: Way, x: Any, weight: Any, bias: Any
) -> Callable[[], Any]:
    """Return a function that computes `spec` by torch; its arguments are prepared before."""
    import torch

    functional = torch.nn.functional
    geometry: tuple[Any, ...]
    if way.flip:
        function = getattr(functional, f"conv{spec.rank}d")
        weight = flipped(spec, weight)
        axes = zip(spec.dilation, spec.kernel_size, spec.padding, strict=True)
        geometry = (1, tuple(d * (k - 1) - p for d, k, p in axes), spec.dilation, spec.groups)
    else:
        function = getattr(functional, f"conv_transpose{spec.rank}d")
        geometry = (spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation)
    x, weight = laid_out(x, way.layout), laid_out(weight, way.layout)

    def call(x: Any, weight: Any, bias: Any) -> Any:
        return staged(function(staged(x, spec.before), weight, bias, *geometry), spec.after)

    if way.compiled:
        torch.compiler.reset()  # after a few shapes of a function torch would run it uncompiled
        call = torch.compile(call, dynamic=False)
    return lambda: call(x, weight, bias)


def flipped(spec: ConvTransposeSpec, weight: Any) -> Any:
    """Return the weight of the convolution equal to `spec`: taps flipped, channels swapped."""
    grouped = weight.reshape(spec.groups, -1, *weight.shape[1:]).transpose(1, 2)
    swapped = grouped.reshape(spec.out_channels, -1, *spec.kernel_size)
    return swapped.flip(tuple(range(2, 2 + spec.rank))).contiguous()


def compile_job(spec: ConvTransposeSpec, way: Way, job: dict[str, Any]) -> KernelSource:
    """Return the file that convgen emits for a job."""
    choices = choices_at(Path(job["choices"]), FAMILIES) if job["choices"] else None
    spec = dataclasses.replace(spec, layout=way.layout)
    return compile_kernel(spec, find_target(job["target"]), choices=choices)


def emitted_call(
    source: KernelSource, way: Way, folder: Path, x: Any, weight: Any, bias: Any
) -> Callable[[], Any]:
    """Return a function that calls an emitted file; the weight is packed before."""
    module = load_module(source.text, module_name(source), folder)
    function = getattr(module, f"conv_transpose{source.plan.spec.rank}d_packed")
    x, packed = laid_out(x, way.layout), module.pack_weight(weight)
    return lambda: function(x, packed, bias)


def samples_of(call: Callable[[], Any]) -> list[float]:
    """Return the milliseconds of every run of `call`, the L2 cache cleared before each."""
    from triton.testing import do_bench

    once = do_bench(call, warmup=0, rep=1, return_mode="median")
    repeat = max(REPEAT_MS, LEAST_SAMPLES * once)
    times = do_bench(call, warmup=WARMUP_MS, rep=repeat, return_mode="all")
    return [round(float(ms), 6) for ms in times]


def ceilings(dtypes: list[str]) -> dict[str, Any]:
    """Return device, versions, and the measured rates of a copy, a matrix product and a launch.

    Floors do not include the launch: a time near `launch_ms` is mostly the launch.
    """
    import torch
    import triton

    if not torch.cuda.is_available():
        raise MachineError("bench needs a CUDA GPU, and torch sees none")
    torch.backends.cuda.matmul.allow_tf32 = True
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    copy_ms = statistics.median(samples_of(functools.partial(copy.copy_, source)))
    one = torch.zeros(1, device="cuda")
    launch_ms = statistics.median(samples_of(functools.partial(one.add_, 1.0)))
    rates = {}
    for name in dtypes:
        a, b = (torch.randn((MATMUL, MATMUL), device="cuda") for _ in range(2))
        a, b = (matrix.to(getattr(torch, name)) for matrix in (a, b))
        ms = statistics.median(samples_of(functools.partial(torch.mm, a, b)))
        rates[name] = 2 * MATMUL**3 / ms / 1e9
    return {
        "device": torch.cuda.get_device_name(),
        "target": local_target().name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "copy_gbps": 2 * COPIED / copy_ms / 1e6,
        "matmul_tflops": rates,
        "launch_ms": launch_ms,
    }


if __name__ == "__main__":
    main()
