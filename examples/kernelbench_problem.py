"""Measure one KernelBench problem in several ways: a JSON line on stdout for each way.

    python examples/kernelbench_problem.py PROBLEM.py [--ways torch,replaced] [--prefer kernel]

`run_kernelbench_networks.py` starts it for each problem, and says what the ways are. All ways run
in one process. torch keeps the first cuDNN plan of a shape, so ways with different flags of cuDNN
would need a process each; here none changes them (`--cudnn-benchmark` sets one for all), so each
way gets the plan that it would get alone. In return float64 computes the network once, and ratios
are of times measured within seconds. After a way that fails the process ends, since a CUDA error
spoils all that follow.

**Numbers.** The whole output of each way, for the whole batch, is compared with that of the same
model in float64 by torch without cuDNN. The model is in the mode in which the problem builds it
(training), so batch norm has the statistics of the same batch. If the batch does not fit in memory,
float64 computes a part of it at a time, but only if the model gives images the same numbers in
another batch; else the way fails. What is allowed follows from the model: FACTOR times the error
that float64 itself makes when the inputs and weights of its convolutions are cut off to TF32, as
tensor cores do to numbers that nobody has rounded. Two errors count: the norm of the difference
over the norm of the output, and the largest difference over the root mean square of the output,
which shows a single wrong number.

**Times.** `gpu_ms` is the median by CUDA events, the L2 cache cleared before each call; `wall_ms`
the median from the call, on an idle GPU, to the end of its last kernel. With `--lock FILE`
processes take turns on the GPU; each gives its turn away only while torch.compile compiles.

**Launches** are those that torch.profiler lists for one call; convgen's by name. `left` is true if
convgen left a layer to torch, as measured to be faster: in the model, or in a graph of Inductor's.

With `--device cpu` emitted kernels run in Triton's interpreter: times mean nothing then.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import fcntl
import functools
import json
import logging
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import convgen

# Of each way: the backend of torch.compile, and whether replace_layers is called, with examples.
WAYS: dict[str, tuple[str | None, bool, bool]] = {
    "torch": (None, False, False),
    "compiled": ("inductor", False, False),
    "replaced": (None, True, False),
    "examples": (None, True, True),
    "replaced-compiled": ("inductor", True, False),
    "examples-compiled": ("inductor", True, True),
    "backend": ("convgen", False, False),
}
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
TRANSPOSED = CONVOLUTIONS[3:]
TF32_BITS = 11  # of a significand, with the implicit one
FACTOR = 4
FLOORS = (1e-5, 1e-4)  # of the two errors, for what float32 itself does
PIECE = 2**26  # numbers that are compared at a time
KERNEL = re.compile(r"conv_transpose[123]d_\w+")
SAMPLES_MS = {"cuda": 200.0, "cpu": 0.0}  # for each median; at least LEAST calls
LEAST = {"cuda": 10, "cpu": 1}


class UncheckedError(Exception):
    """The output cannot be computed in float64."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the output of a way is compared with.

    Attributes:
        output: the output in float64.
        allowed: the largest errors allowed, as `errors` returns them.
        images: the part of the batch that float64 computed at a time.
    """

    output: torch.Tensor
    allowed: tuple[float, float]
    images: int


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", type=Path)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prefer", choices=("fastest", "kernel"), default="fastest")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.add_argument("--lock", type=Path, help="a file; who locks it may use the GPU")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        tell_profiler_of_interpreter()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps what libraries print apart from the answers
    turn = Turn(options.lock)
    turn.take()
    with torch.no_grad():
        problem = Problem(options.problem, options.device, options.prefer, turn)
        # Whatever the profiler leaves behind is there before the first way is timed.
        launches(lambda: None, options.device, problem.finish)
        for way in options.ways.split(","):
            try:
                answer = problem.measure(way)
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            print(json.dumps({"way": way, **answer}), file=answers, flush=True)
            if "failed" in answer:
                return


class Turn:
    """The use of the GPU, which processes take in turns; without a file there are no others."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a") if path else None

    def take(self) -> None:
        """Wait for the turn, unless this process has it."""
        if self._file:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def give(self) -> None:
        """Let others use the GPU, and the memory that this process holds but does not need."""
        if self._file:
            free_memory()
            fcntl.flock(self._file, fcntl.LOCK_UN)


class LeftInGraphs(logging.Handler):
    """Notes whether torch's convolution took the place of a kernel in a graph of Inductor's."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        log = logging.getLogger("convgen")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found = self.found or "torch's convolution" in record.getMessage()


class Problem:
    """A problem's model and inputs; the same numbers in every process."""

    def __init__(self, path: Path, device: str, prefer: str, turn: Turn) -> None:
        names: dict[str, Any] = {"__name__": path.stem}
        exec(compile(path.read_text("utf-8"), str(path), "exec"), names)
        self.device, self.prefer, self.turn = device, prefer, turn
        self.left = LeftInGraphs()
        torch.manual_seed(0)
        self.model = names["Model"](*names["get_init_inputs"]()).to(device)
        with torch.device(device):
            given = names["get_inputs"]()
        self.inputs = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in given)

    @functools.cached_property
    def expected(self) -> Expected:
        """The reference, computed once, after the first way ran in free memory."""
        output, images = exact_output(self.model, self.inputs)
        cut_off, _ = exact_output(cutting_off_to_tf32(self.model), self.inputs)
        made = zip(errors(cut_off, output), FLOORS, strict=True)
        error, worst = (FACTOR * each + floor for each, floor in made)
        free_memory()
        return Expected(output, (error, worst), images)

    def measure(self, way: str) -> dict[str, Any]:
        """Return errors, times and launches of a way."""
        self.left.found = False
        call = self.call_of(way)
        began = time.perf_counter()
        output = call()
        self.turn.take()
        self.finish()
        answer: dict[str, Any] = {"first_call_s": round(time.perf_counter() - began, 2)}
        error, worst = errors(output, self.expected.output)
        del output
        free_memory()
        allowed, allowed_worst = self.expected.allowed
        answer |= {
            "error": error,
            "worst": worst,
            "allowed": [allowed, allowed_worst],
            "right": error <= allowed and worst <= allowed_worst,  # not if they are NaN
            "images_at_a_time": self.expected.images,
            "wall_ms": self.wall_ms(call),
        }
        if self.device == "cuda":
            answer["gpu_ms"] = gpu_ms(call)
        answer |= launches(call, self.device, self.finish)
        layers = sum(isinstance(each, TRANSPOSED) for each in self.model.modules())
        others = {"left": self.left.found, "layers": layers}
        return answer | others | {"machine": machine(self.device, self.prefer)}

    def call_of(self, way: str) -> Callable[[], Any]:
        """Return a function that runs the model in a way."""
        backend, replaced, examples = WAYS[way]
        model = copy.deepcopy(self.model)
        if replaced:
            given = self.inputs if examples else None
            convgen.replace_layers(model, example_inputs=given, prefer=self.prefer)
            self.left.found = any(each.reason for each in convgen.report(model).layers)
        if backend is None:
            return lambda: model(*self.inputs)
        torch.compiler.reset()
        compiler = torch._dynamo.lookup_backend(backend)
        if backend == "convgen":
            compiler = functools.partial(compiler, options={"prefer": self.prefer})

        def compile_graph(graph: Any, inputs: list[Any]) -> Any:
            made = compiler(graph, inputs)
            self.turn.take()  # from here on it runs
            return made

        compiled = torch.compile(model, backend=compile_graph)
        self.turn.give()
        return lambda: compiled(*self.inputs)

    def finish(self) -> None:
        """Wait for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def wall_ms(self, call: Callable[[], Any]) -> float:
        """Return the median time from a call to its last kernel's end."""
        samples: list[float] = []
        while len(samples) < LEAST[self.device] or sum(samples) < SAMPLES_MS[self.device]:
            self.finish()
            began = time.perf_counter()
            call()
            self.finish()
            samples.append(1e3 * (time.perf_counter() - began))
        return statistics.median(samples)


# ---- numbers ----


def exact_output(model: Any, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, int]:
    """Return a model's output in float64, and how many images were computed at a time.

    Args:
        model: it stays as it is.
        inputs: the first is a tensor [N, …].

    Raises:
        UncheckedError: the whole batch does not fit, and a part of it would give other numbers.
    """
    exact = copy.deepcopy(model).double()
    images = batch = len(inputs[0])
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            starts = range(0, batch, images)
            return torch.cat([part_of(exact, inputs, at, at + images) for at in starts]), images
        free_memory()
        if images == batch and mixes_images(exact, inputs):
            raise UncheckedError("float64 does not fit in memory, and its layers mix the batch")
        if images == 1:
            raise UncheckedError("an image does not fit in memory in float64")
        images //= 2


def part_of(exact: Any, inputs: tuple[Any, ...], start: int, stop: int) -> torch.Tensor:
    """Return the output of a model in float64 for some images."""
    batch = len(inputs[0])

    def given(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return (x[start:stop] if x.dim() and len(x) == batch else x).double()

    with torch.backends.cudnn.flags(enabled=False):
        return exact(*map(given, inputs))


def mixes_images(exact: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether two images get other numbers beside two more; batch norm does that, for example."""
    if len(inputs[0]) < 3:
        return True  # nothing to see it by
    few, more = (part_of(exact, inputs, 0, images) for images in (2, 4))
    return len(few) != 2 or errors(more[:2], few)[0] > 1e-9


def cutting_off_to_tf32(model: Any) -> Any:
    """Return a copy of a model whose convolutions cut off their input and weight to TF32."""

    def cut_off(x: torch.Tensor) -> torch.Tensor:
        significand, exponent = torch.frexp(x)
        return torch.ldexp(torch.trunc(significand * 2**TF32_BITS), exponent - TF32_BITS)

    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, CONVOLUTIONS):
            layer.weight.copy_(cut_off(layer.weight))
            layer.register_forward_pre_hook(lambda _, given: tuple(map(cut_off, given)))
    return model


def errors(output: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Return norm and largest part of the difference, over norm and root mean square of `exact`."""
    if output.shape != exact.shape:
        raise ArithmeticError(f"shape {tuple(output.shape)}, in float64 {tuple(exact.shape)}")
    squares = exact_squares = worst = 0.0
    pieces = (each.reshape(-1).split(PIECE) for each in (output, exact))
    for got, want in zip(*pieces, strict=True):
        difference = got.double() - want
        squares += float(difference.square().sum())
        exact_squares += float(want.square().sum())
        largest = float(difference.abs().max())
        worst = largest if largest != largest else max(worst, largest)
    tiny = sys.float_info.min
    root = (exact_squares / exact.numel()) ** 0.5
    return (squares / max(exact_squares, tiny)) ** 0.5, worst / max(root, tiny)


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---- times and launches ----


def gpu_ms(call: Callable[[], Any]) -> float:
    """Return the median time on the GPU, at least ten samples of whatever is slow."""
    from triton.testing import do_bench

    once = do_bench(call, warmup=1, rep=1, return_mode="median")
    time_ms = max(SAMPLES_MS["cuda"], LEAST["cuda"] * once)
    return do_bench(call, warmup=25, rep=time_ms, return_mode="median")


def launches(call: Callable[[], Any], device: str, finish: Callable[[], None]) -> dict[str, Any]:
    """Return the number of all kernels of a call, and of convgen's by name."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities, acc_events=True) as seen:  # torch 2.11 warns without it
        call()
        finish()
    events = [each for each in seen.events() if on_gpu == (each.device_type == DeviceType.CUDA)]
    names = [each.name for each in events if not (on_gpu and each.is_user_annotation)]
    ours = collections.Counter(name for name in names if KERNEL.fullmatch(name))
    return {"convgen_launches": dict(ours), "kernels": len(names) if on_gpu else None}


def tell_profiler_of_interpreter() -> None:
    """Have torch.profiler list the launches of Triton's interpreter, by the kernels' names."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def named(self: Any, *arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(self.fn.__name__):
            return run(self, *arguments, **options)

    InterpretedFunction.run = named


@functools.cache
def machine(device: str, prefer: str) -> dict[str, Any]:
    """Return what figures depend on; those of different machines are not compared."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "convgen": convgen.__version__,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "prefer": prefer,
    }


if __name__ == "__main__":
    main()
