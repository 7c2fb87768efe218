"""The tuner: finds the fastest of a spec's candidate tiles on this machine's GPU.

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
from ..language.spec import ConvTransposeSpec
from ..planning.candidates import rank_tiles
from ..planning.choices import Choices, key_of, read_choices, rows_of, shipped, text_of
from ..planning.plan import Candidate, Measured, MeasuredGradient
from ..tables.targets import TARGETS, GpuTarget, find_target

OF_GRADIENT = {family.name for family in FAMILIES if family.gradient_refusal() is None}
MOST_SPILLS = 16  # bytes per thread; more are spilled inside the loop
MOST_ERROR = 1e-2  # relative; a wrong kernel has far more, rounding far less
FINALISTS = 4  # fastest tiles, which are timed again for longer
Row = dict[str, Any]


def tuning_target(name: str | None) -> GpuTarget:
    """Return the target to tune for: that of this machine's GPU, or `name`.

    Raises:
        MachineError: there is no GPU.
        SpecError: `name` has another architecture than the GPU.
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
    """Return an executor with one process per GPU that torch sees, and their number."""
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
    """Return up to `count` tiles: the model's best overall and of every form, then random ones.

    The best tile is mostly among the model's first few. The random ones come from the better half
    of the ranking, to find errors of the model.
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
    """Measure each spec that `output` does not have yet; write and yield its row when it is done.

    Args:
        specs: what to tune; sizes left open stand at nominal values.
        target: what the kernels are compiled for; the executor's GPUs should be such.
        output: the file of choices, made or added to; a stream gets them when all are measured.
        executor: runs `measure`; its workers have one GPU each.
        count: candidates a spec.
        gpus: workers of `executor`: so far ahead of its measuring each one compiles.
        known: tiles that the package has measured are candidates too.
        force: overwrite `output` if it is no file of choices.

    Raises:
        SpecError: `output` is no file of choices, or of another target or device, or cannot be
            written; no candidate of a spec runs.
    """
    check_output(output, lambda text: None, force=force)  # what it holds is checked by `_read`
    streams = is_stream(output)
    rows, measured = ([], None) if streams else _read(output, target, force=force)
    done = {row["spec"] for row in rows}
    keys = [key for key in dict.fromkeys(map(key_of, specs)) if key not in done]
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
    """Return for each spec the spec that its worker measures next, if there is one."""
    return [tuple(keys[at + gpus : at + gpus + 1]) for at in range(len(keys))]


def _read(
    output: Path, target: GpuTarget, *, force: bool
) -> tuple[list[Row], dict[str, str] | None]:
    """Return the rows a file has already; none if there is no file, or one that `force` is for."""
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
    """Return the row of one spec: its best tile, its time, and where that was measured.

    `first_ms` is the time of the model's first choice, None if that does not run: how well the
    model ranks is the ratio of the two.
    Where a kernel could give the gradient of the input, the row has its best tile as well, with its
    time and torch's.

    A job for a worker with a GPU: arguments and result can be pickled. The candidates of the specs
    `ahead` are compiled while those of this one are measured, if the worker may have processes.
    """
    import torch
    import triton

    spec, target = parse(text), find_target(target_name)
    back = () if gradient_refusal(spec) else (str(input_gradient(spec)),)
    soon = ahead if _may_have_children() else ()
    jobs = {each: _compiling(each, target_name, count, known) for each in (text, *back, *soon)}
    if not _may_have_children():  # a thread that compiles takes Triton's driver from this one
        wait([fits for tiles in jobs.values() for _, fits in tiles])
    best, tile, tried, first = _fastest(spec, target, jobs[text])
    row = {"spec": text, "tile": asdict(tile), "ms": best, "first_ms": first, "tried": tried}
    for each in back:
        # The gradient's launch makes no copy.
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
    """Return the time of the fastest tile of those that are being compiled, it, and how many ran.

    Last comes the time of the model's first choice, None if that does not run.

    Raises:
        SpecError: none of them runs.
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


def _gradient_times(
    spec: ConvTransposeSpec, target: GpuTarget, tile: Tile, back_tile: Tile
) -> tuple[float, float]:
    """Return the times of the input's gradient, by its kernel with `back_tile` and by torch.

    The kernel's has the packing of the weight, which a step of training changes.
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
    used = Measured(tile, 0.0, 1, "", MeasuredGradient(back_tile, 0.0, 1.0))  # whatever the times
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
    """Raise RuntimeError if the error of an output exceeds rounding."""
    error = float((output - wanted).norm() / wanted.norm())
    if not error <= MOST_ERROR:
        raise RuntimeError(f"{name} is wrong: relative error {error:.2e}")


class _Timer:
    """Times the tiles of one spec on the same data."""

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
        """Return the median time of `tile` in ms, over `repeat` ms; None if it cannot run."""
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
    """Start to compile a spec's candidates; return them, and whether each fits without spills.

    Triton's cache has them when that is known. What the package has measured on a card of this
    architecture is among them if `known`, so that another search finds none that is slower.
    """
    spec, target = parse(text), find_target(target_name)
    tiles = shortlist(rank_tiles(spec, decompose(spec), target, FAMILIES), count)
    same = [shipped(each.name, FAMILIES).of(spec) for each in TARGETS if each.arch == target.arch]
    measured = [each.tile for each in same if known and each is not None]
    tiles += [tile for tile in dict.fromkeys(measured) if tile not in tiles]
    return [(tile, _compilers().submit(_fits, text, target_name, tile)) for tile in tiles]


@functools.cache
def _compilers() -> Executor:
    """Return this process' compilers: a process for each core but the one that measures."""
    from ..execution.cubin import compilers

    if not _may_have_children():
        return ThreadPoolExecutor(1)
    workers = compilers(1)
    # A process waits for its children before its executors end, so these are told to end,
    # before the queue that tells them is closed (priority 10).
    multiprocessing.util.Finalize(None, workers.shutdown, exitpriority=100)
    return workers


def _may_have_children() -> bool:
    """Whether this process may start others: daemonic processes may not."""
    return not multiprocessing.current_process().daemon


def _fits(text: str, target_name: str, tile: Tile) -> bool:
    """Compile a tile; return whether it fits the target without spills."""
    from ..execution.cubin import compile_for

    target = find_target(target_name)
    binary = compile_for(compile_kernel(parse(text), target, tile), target)
    return binary.spills <= MOST_SPILLS and binary.shared <= target.shared_per_block
