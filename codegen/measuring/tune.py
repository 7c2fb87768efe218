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
from ..planning.choices import key_of, read_choices, rows_of, shipped, text_of
from ..planning.plan import Candidate
from ..tables.targets import TARGETS, GpuTarget, find_target
from .tile_times import TileTimer, gradient_times, torch_times

# Families whose kernels can compute the input gradient.
OF_GRADIENT = {family.name for family in FAMILIES if family.gradient_refusal() is None}
MOST_SPILLS = 16  # bytes per thread; tiles that spill more spill inside the loop
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
    row["torch"] = asdict(torch_times(spec, "cuda"))
    for each in back:
        # The launch of the gradient's kernel cannot copy its input.
        plain = [job for job in jobs[each] if not job[0].relayout and job[0].family in OF_GRADIENT]
        found = _fastest(parse(each), target, plain)[1]
        ms, torch_ms = gradient_times(spec, target, tile, found, "cuda")
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
    timer = TileTimer(spec, target)
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
