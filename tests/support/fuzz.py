"""Fuzzing for as long as one likes: drawn specs, emitted and run against the oracle.

    python tests/support/fuzz.py --specs 5000 --seed 1 --json out.json
    python tests/support/fuzz.py --seed 1 --only 17

Spec i of a seed is the same in every run, alone or among others. A spec whose numbers are wrong, or
that raises, is printed with the command that runs it again; the exit status is then 1. Runs in
Triton's interpreter, or with `--device cuda` on a GPU, whose tiles it then takes. It lies beside
the tests because it needs their generator; a layer of one's own is a case for `convgen verify`.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def try_spec(number: int, seed: int, device: str) -> Row:
    """Draw spec `number` of `seed` and run it; return what came of it."""
    import torch

    from interpreting import prepare
    from trials import compiled, draw_trial, problem

    if device == "cpu":
        prepare()
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN: no output is left out
    folder = Path(tempfile.mkdtemp())
    row: Row = {"number": number, "form": None, "problem": None, "trial": None}
    start = time.perf_counter()
    try:
        trial = draw_trial(random.Random(f"{seed} {number}"), target_of(device))
        row["trial"] = str(trial)
        source = compiled(trial)
        tile = source.plan.tile
        row["form"] = f"{tile.family} {tile.span}" + f" rows {tile.rows}" * (tile.rows > 1)
        row["problem"] = problem(trial, source, f"fuzzed_{seed}_{number}", folder, device)
    except Exception:
        row["problem"] = traceback.format_exc()
    finally:
        shutil.rmtree(folder)
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def target_of(device: str) -> str | None:
    """Return the GPU at hand, whose limits tiles must keep; in the interpreter there is none."""
    from convgen.execution.local_gpu import local_target

    return local_target().name if device == "cuda" else None


def take_one_core() -> None:
    """Keep torch in this worker from taking the others' cores."""
    import torch

    torch.set_num_threads(1)


def rows_of(numbers: Iterable[int], seed: int, device: str, processes: int) -> Iterator[Row]:
    """Yield what came of each spec."""
    job = functools.partial(try_spec, seed=seed, device=device)
    if processes == 1:
        yield from map(job, numbers)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=take_one_core) as workers:
        yield from workers.map(job, numbers)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--specs", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one spec to run")
    parser.add_argument("--json", type=Path, help="a file for the result")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the specs; return the exit status."""
    given = parsed(arguments)
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    numbers = range(given.specs) if given.only is None else (given.only,)
    forms: Counter[str] = Counter()
    failed: list[Row] = []
    start = time.perf_counter()
    for row in rows_of(numbers, given.seed, given.device, given.processes):
        forms[row["form"] or "none"] += 1
        if row["problem"]:
            failed.append(row)
            again = f"python tests/support/fuzz.py --seed {given.seed} --only {row['number']}"
            again += f" --device {given.device}"
            print(
                f"FAILED {row['number']}: {row['problem']}\n{row['trial']}\n  again: {again}",
                flush=True,
            )
        elif given.only is not None:
            print(f"passed {row['number']}: {row['form']}\n{row['trial']}")
        done = forms.total()
        if done % 100 == 0:
            print(f"{done} specs, {len(failed)} failed", file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - start, 1)
    met = dict(sorted(forms.items()))
    print(f"{forms.total()} specs, {len(failed)} failed, {seconds} s; {met}")
    if given.json:
        report = {"seed": given.seed, "device": given.device, "seconds": seconds}
        report |= {"specs": forms.total(), "failed": failed, "forms": met}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
