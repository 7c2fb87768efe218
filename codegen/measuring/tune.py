"""The tuner: times the candidate tiles of specs on this machine's GPUs, and keeps the fastest.

Beside the stages; needs torch and triton. Input: specs, a target and an executor of
`concurrent.futures`; output: a choices file (choices.py), written after each spec, so that a rerun
resumes an interrupted run. A job is one spec on one GPU: its candidates are compiled in parallel
processes, then timed one by one.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import multiprocessing.util
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compiler import compile_kernel
from ..errors import ConvgenError, MachineError, SpecError
from ..execution.workers import spawn_context
from ..families.registry import FAMILIES
from ..files import check_output, is_stream, write_output
from ..geometry.gradient import gradient_refusal, input_gradient
from ..geometry.phases import decompose
from ..geometry.tile import Tile
from ..language.parser import parse
from ..language.spec import LAYOUTS, MEMORY_FORMATS, ConvTransposeSpec
from ..planning.candidates import rank_tiles
from ..planning.choices import Choices, key_of, read_choices, rows_of, shipped, text_of
from ..planning.plan import Candidate, Measured, MeasuredGradient, MeasuredTorch
from ..tables.targets import TARGETS, GpuTarget, find_target

# Families whose kernels can compute the input gradient.
OF_GRADIENT = {family.name for family in FAMILIES if family.gradient_refusal() is None}
MOST_SPILLS = 16  # bytes per thread; tiles that spill more spill inside the loop
MOST_ERROR = 1e-2  # relative; rounding errors are far below it, those of wrong kernels far above
FINALISTS = 4  # number of fastest tiles that are timed again, for longer
Row = dict[str, Any]


def tuning_target(name: str | None) -> GpuTarget:
    """Return the target to tune for: `name`, or that of this machine's GPU if `name` is None.

    Raises:
        MachineError: torch sees no CUDA GPU.
        SpecError: `name` is unknown, or its architecture is not the GPU's.
    """
    import torch

    from ..execution.local_gpu import local_target

    if not torch.cuda.is_available():
        raise MachineError("tune needs a CUDA GPU, and torch sees none")
    local = local_target()
    target = local if name is None else find_target(name)
    if target.arch != local.arch:
        device = torch.cuda.get_device_name()
        raise SpecError(f"--target: {target.name} is {target.arch}, {device} is not", "target")
    return target


def gpu_executor() -> tuple[Executor, int]:
    """Return an executor with one process per GPU that torch sees, and the number of GPUs."""
    import torch

    context = spawn_context()
    numbers, gpus = context.SimpleQueue(), torch.cuda.device_count()
    for number in range(gpus):
        numbers.put(number)
    workers = ProcessPoolExecutor(
        gpus, mp_context=context, initializer=_take_gpu, initargs=(numbers,)
    )
    return workers, gpus


def _take_gpu(gpus: Any) -> None:
    """Make one of the parent process's GPUs the only one that this worker sees."""
    number = gpus.get()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = allowed.split(",")[number] if allowed else str(number)


def shortlist(ranking: Sequence[Candidate], count: int, seed: int = 0) -> list[Tile]:
    """Return up to `count` tiles to time: the cost model's best ones, then random ones.

    The first are the model's best overall and its best of each form: the fastest tile is usually
    among them. The random ones, from the better half of the ranking, reveal errors of the model.
    """
    forms: dict[tuple[str, int, int, bool], list[Tile]] = {}
    for candidate in ranking:
        tile = candidate.tile
        kind = tile.family, tile.span, tile.rows, tile.relayout
        forms.setdefault(kind, []).append(tile)
    share = max(1, count // (2 * len(forms)))
    chosen = [candidate.tile for candidate in ranking[: count // 4]]
    chosen += [tile for tiles in forms.values() for tile in tiles[:share]]
    chosen = list(dict.fromkeys(chosen))
    better = [c.tile for c in ranking[: len(ranking) // 2] if c.tile not in chosen]
    random.Random(seed).shuffle(better)
    return [*chosen, *better][:count]


def tune(
    specs: Sequence[ConvTransposeSpec],
    target: GpuTarget,
    output: Path,
    executor: Executor,
    count: int,
    gpus: int = 1,
    *,
    known: bool = True,
    force: bool = False,
) -> Iterator[Row]:
    """Measure each spec that is not in `output` yet; write and yield its row once it is measured.

    Args:
        specs: the layers to tune, each layout and rung of them by itself; nominal values replace
            run-time sizes.
        target: the GPU to compile for; the executor's GPUs should be of this kind.
        output: the choices file, created or extended. A stream is written once, at the end.
        executor: runs `measure`; each of its workers has one GPU.
        count: number of candidate tiles per spec.
        gpus: number of workers of `executor`. Each compiles the spec that is `gpus` places further
            in the list, its next one, while it measures.
        known: whether the measured tiles that ship with convgen are candidates too.
        force: overwrite `output` even if it is not a choices file.

    Raises:
        SpecError: `output` is not a choices file, or is one of another target or device.
        MachineError: `output` cannot be written, or no candidate of a spec runs.
    """
    check_output(output, lambda text: None, force=force)  # `_read` checks the content
    streams = is_stream(output)
    rows, measured = ([], None) if streams else _read(output, target, force=force)
    done = {row["spec"] for row in rows}
    parts = [part for spec in specs for part in spec.parts]
    keys = [key for key in dict.fromkeys(map(key_of, parts)) if key not in done]
    futures: list[Future[Row]] = [
        executor.submit(measure, key, target.name, count, ahead, known=known)
        for key, ahead in zip(keys, _ahead(keys, gpus), strict=True)
    ]
    for future in as_completed(futures):
        row = future.result()
        where = row.pop("measured")
        if measured is not None and measured["device"] != where["device"]:
            raise SpecError(
                f"{output} was measured on {measured['device']}, this is {where['device']}",
                "output",
            )
        measured = where
        rows.append(row)
        if not streams:
            write_output(output, text_of(target.name, measured, rows))
        yield row
    if streams and measured is not None:
        write_output(output, text_of(target.name, measured, rows))


def _ahead(keys: Sequence[str], gpus: int) -> list[tuple[str, ...]]:
    """Return for each spec a tuple of the spec that its worker measures next, () for the last."""
    return [tuple(keys[at + gpus : at + gpus + 1]) for at in range(len(keys))]


def _read(
    output: Path, target: GpuTarget, *, force: bool
) -> tuple[list[Row], dict[str, str] | None]:
    """Return the rows of a choices file, and the device and versions that they were measured with.

    Returns [], None if there is no file, or with `force` if it is not a choices file.

    Raises:
        SpecError: the file is not a choices file, or is one of another target.
    """
    if not output.exists():
        return [], None
    try:
        found = read_choices(output, FAMILIES)
    except ConvgenError as error:
        if force:
            return [], None
        raise SpecError(f"{error}; --force overwrites it", "output") from None
    if found.target != target.name:
        raise SpecError(f"{output} has choices for {found.target}, not {target.name}", "output")
    return rows_of(output, FAMILIES)


def measure(
    text: str, target_name: str, count: int, ahead: tuple[str, ...] = (), *, known: bool = True
) -> Row:
    """Return the row of one spec in a choices file, measured on this process's GPU.

    The job of a worker, so arguments and result can be pickled.

    Args:
        text: the spec.
        target_name: the target to compile for.
        count: number of candidate tiles.
        ahead: specs whose candidates are compiled while this one's are timed, if this process may
            start others.
        known: whether the measured tiles that ship with convgen are candidates too.

    Returns:
        The fastest tile (`tile`), its time (`ms`), the time of the cost model's first choice
        (`first_ms`, None if it does not run; the ratio of the two shows how well the model ranks),
        the number of candidates that ran (`tried`), the times of torch's operator (`torch`, a
        `MeasuredTorch`), and device, versions and date (`measured`). If
        a kernel could compute the input gradient, also the fastest tile of that kernel, its time
        and torch's (`input_gradient`). Times are in milliseconds.

    Raises:
        MachineError: no candidate runs.
    """
    import torch
    import triton

    spec, target = parse(text), find_target(target_name)
    back = () if gradient_refusal(spec) else (str(input_gradient(spec)),)
    soon = ahead if _may_have_children() else ()
    jobs = {each: _compiling(each, target_name, count, known) for each in (text, *back, *soon)}
    if not _may_have_children():  # compiled in a thread, which replaces Triton's driver meanwhile
        wait([fits for tiles in jobs.values() for _, fits in tiles])
    best, tile, tried, first = _fastest(spec, target, jobs[text])
    row = {"spec": text, "tile": asdict(tile), "ms": best, "first_ms": first, "tried": tried}
    row["torch"] = asdict(_torch_times(spec, "cuda"))
    for each in back:
        # The launch of the gradient's kernel cannot copy its input.
        plain = [job for job in jobs[each] if not job[0].relayout and job[0].family in OF_GRADIENT]
        found = _fastest(parse(each), target, plain)[1]
        ms, torch_ms = _gradient_times(spec, target, tile, found)
        row["input_gradient"] = {"tile": asdict(found), "ms": ms, "torch_ms": torch_ms}
    return row | {
        "measured": {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
    }


def _fastest(
    spec: ConvTransposeSpec, target: GpuTarget, jobs: list[tuple[Tile, Future[bool]]]
) -> tuple[float, Tile, int, float | None]:
    """Time the tiles of `jobs` once they are compiled.

    Returns:
        The time of the fastest tile in milliseconds, that tile, the number of tiles that ran, and
        the time of the first tile, the cost model's choice; None if that one does not run.

    Raises:
        MachineError: none of the tiles runs.
    """
    import torch

    tiles = [tile for tile, fits in jobs if fits.result()]
    timer = _Timer(spec, target)
    times = [(timer.milliseconds(tile, 20), tile) for tile in tiles]
    finalists = sorted((t for t in times if t[0] is not None), key=lambda timed: timed[0])
    if not finalists:
        raise MachineError(f"no candidate of {spec} runs on {torch.cuda.get_device_name()}")
    first = jobs[0][0]
    known = first in [tile for _, tile in finalists]
    last = dict.fromkeys([tile for _, tile in finalists[:FINALISTS]] + [first] * known)
    again = {tile: float(f"{timer.milliseconds(tile, 80):.4g}") for tile in last}
    tile = min(again, key=lambda tile: again[tile])
    return again[tile], tile, len(finalists), again[first] if known else None


def _torch_times(spec: ConvTransposeSpec, device: str) -> MeasuredTorch:
    """Return the times of torch's operator on a device, in TF32 only if the spec's precision is."""
    from torch.backends import cudnn
    from triton.testing import do_bench

    from ..execution.loading import laid_out
    from ..execution.standin import concrete
    from .cases import Way
    from .worker import draw, torch_call

    sized = concrete(spec, small=False)
    x, *others = draw(sized, device)
    x = laid_out(x, spec.layout)
    times: dict[str, float] = {}
    for layout in LAYOUTS if spec.rank in MEMORY_FORMATS else (spec.layout,):
        way = Way(name=layout, channels_last=layout == "channels_last")
        call = torch_call(sized, way, x, *others)
        with cudnn.flags(enabled=True, allow_tf32=spec.precision == "tf32"):
            times[layout] = do_bench(call, warmup=5, rep=80, return_mode="median")
        if layout != spec.layout:
            turn = functools.partial(laid_out, x, layout)
            times[layout] += do_bench(turn, warmup=5, rep=40, return_mode="median")
    own, best = times[spec.layout], min(times.values())
    return MeasuredTorch(float(f"{own:.4g}"), float(f"{best:.4g}"))


def _gradient_times(
    spec: ConvTransposeSpec, target: GpuTarget, tile: Tile, back_tile: Tile
) -> tuple[float, float]:
    """Return the times of the input gradient in milliseconds: the kernel's and torch's.

    The kernel has the tile `back_tile`. Its time includes packing the weight, as each training step
    needs it: the optimizer changes the weight.
    """
    import torch
    from triton.testing import do_bench

    from ..execution.cubin import module_name
    from ..execution.loading import laid_out, load_module
    from ..execution.standin import concrete
    from .worker import draw, flipped

    layer = concrete(spec, small=False)
    back = input_gradient(layer)
    grad, turned, _ = draw(back, "cuda")
    weight, x = flipped(back, turned), grad.new_empty(layer.input)
    grad, x = laid_out(grad, spec.layout), laid_out(x, spec.layout)
    # Times by which the gradient's kernel is faster than torch, so that the file has that kernel.
    used = Measured(tile, 0.0, 1, "", MeasuredGradient(back_tile, 0.0, 1.0))
    choices = Choices(target.name, {key_of(spec): used})
    source = compile_kernel(spec, target, choices=choices)
    geometry = (layer.stride, layer.padding, layer.dilation, True, layer.output_padding)
    with tempfile.TemporaryDirectory() as folder:
        module = load_module(source.text, module_name(source), Path(folder))
        calls = (
            lambda: module._input_gradient(grad, weight),
            lambda: torch.ops.aten.convolution_backward(
                grad, x, weight, None, *geometry, layer.groups, (True, False, False)
            )[0],
        )
        _check(calls[0](), calls[1](), f"the gradient's {back_tile} of {spec}")
        times = [do_bench(call, warmup=5, rep=80, return_mode="median") for call in calls]
    return float(f"{times[0]:.4g}"), float(f"{times[1]:.4g}")


def _check(output: Any, wanted: Any, name: str) -> None:
    """Raise RuntimeError if the relative error of `output` exceeds MOST_ERROR."""
    error = float((output - wanted).norm() / wanted.norm())
    if not error <= MOST_ERROR:
        raise RuntimeError(f"{name} is wrong: relative error {error:.2e}")


class _Timer:
    """Times the tiles of one spec, all on the same data."""

    def __init__(self, spec: ConvTransposeSpec, target: GpuTarget) -> None:
        from ..execution.loading import laid_out
        from ..execution.standin import concrete
        from .cases import WAYS
        from .worker import draw, torch_call

        self.spec, self.target = spec, target
        self.folder = tempfile.TemporaryDirectory()
        sized = concrete(spec, small=False)
        self.x, self.weight, self.bias = draw(sized, "cuda")
        self.wanted = torch_call(sized, WAYS["default"], self.x, self.weight, self.bias)()
        self.x = laid_out(self.x, spec.layout)

    def milliseconds(self, tile: Tile, repeat: int) -> Any:
        """Return the median time of `tile` in ms, None if the GPU lacks resources to run it.

        `repeat` is the time in ms for which the kernel is called repeatedly. Raises RuntimeError if
        the output is wrong.
        """
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        from ..execution.cubin import module_name
        from ..execution.loading import load_module

        source = compile_kernel(self.spec, self.target, tile)
        module = load_module(source.text, module_name(source), Path(self.folder.name))
        packed = module.pack_weight(self.weight)
        try:
            output = module._launch(self.x, packed, self.bias)
        except OutOfResources:
            return None
        _check(output, self.wanted, f"{tile} of {self.spec}")
        return do_bench(
            # Skip the public function's checks: they can take longer than a tiny layer's kernel.
            lambda: module._launch(self.x, packed, self.bias),
            warmup=5,
            rep=repeat,
            return_mode="median",
        )


@functools.cache
def _compiling(
    text: str, target_name: str, count: int, known: bool
) -> list[tuple[Tile, Future[bool]]]:
    """Start compiling a spec's candidate tiles; return each with whether it fits without spills.

    The compiled kernels are in Triton's cache when the result of a future is known. If `known`, the
    measured tiles that ship with convgen for this architecture are candidates too, so that a new
    run finds none that is slower than these.
    """
    spec, target = parse(text), find_target(target_name)
    tiles = shortlist(rank_tiles(spec, decompose(spec), target, FAMILIES), count)
    same = [shipped(each.name, FAMILIES).of(spec) for each in TARGETS if each.arch == target.arch]
    measured = [each.tile for each in same if known and each is not None]
    tiles += [tile for tile in dict.fromkeys(measured) if tile not in tiles]
    return [(tile, _compilers().submit(_fits, text, target_name, tile)) for tile in tiles]


@functools.cache
def _compilers() -> Executor:
    """Return an executor that compiles: a process for each core but one, which is for measuring.

    A single thread if this process may not start others.
    """
    from ..execution.cubin import compilers

    if not _may_have_children():
        return ThreadPoolExecutor(1)
    workers = compilers(1)
    # At exit, multiprocessing joins child processes before executors shut down, so the workers
    # would never stop. This shutdown runs first, also before the queues are closed (priority 10).
    multiprocessing.util.Finalize(None, workers.shutdown, exitpriority=100)
    return workers


def _may_have_children() -> bool:
    """Whether this process may start others: daemonic processes may not."""
    return not multiprocessing.current_process().daemon


def _fits(text: str, target_name: str, tile: Tile) -> bool:
    """Compile a tile; return whether it fits the target's shared memory and hardly spills."""
    from ..execution.cubin import compile_for

    target = find_target(target_name)
    binary = compile_for(compile_kernel(parse(text), target, tile), target)
    return binary.spills <= MOST_SPILLS and binary.shared <= target.shared_per_block
