"""Measure the networks of KernelBench's levels 2 and 3 that have a transposed convolution.

    python examples/run_kernelbench_networks.py CHECKOUT -o ROWS.jsonl [--only 2/61,3/45]
        [--prefer kernel]

CHECKOUT is a clone of https://github.com/ScalingIntelligence/KernelBench. Ways to run a network:

    torch              as the problem has it
    compiled           torch.compile
    replaced           convgen.replace_layers, for inputs of any size
    examples           the same with example_inputs, the problem's own
    replaced-compiled  replaced, then torch.compile
    examples-compiled  examples, then torch.compile
    backend            torch.compile(backend="convgen")

Each problem is a process of `kernelbench_problem.py`, which says how numbers are checked and what
the times are. ROWS.jsonl gets a line as soon as a problem ends; a further run measures the problems
that have no line without failures yet, and then reports on all. Of two lines the last one counts.
With `--workers 6` six processes compile side by side but take turns on the GPU, which must have
memory for all of them; they share the host's cores, so `wall_ms` is best measured with one worker.
`--seconds` limits the run: no problem starts later than that.

The report compares medians on the GPU, and names all problems that a way makes slower, by a ratio
below 0.97; `off` is the largest error of a problem's ways, as a part of what is allowed. The script
exits 1 if a number is off, a way failed, lines come from different machines, or in a way of
convgen's no kernel ran that it did not leave to torch as measured to be slower; `--prefer kernel`
leaves none. With `--device cpu` kernels run in Triton's interpreter and `wall_ms` is compared,
which measures no speed; it takes networks far smaller than KernelBench's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Row = dict[str, Any]

WAYS = (
    *("torch", "compiled", "replaced", "examples"),
    *("replaced-compiled", "examples-compiled", "backend"),
)
OURS = WAYS[2:]
COMPARISONS = (
    ("torch", "replaced"),
    ("torch", "examples"),
    ("torch", "compiled"),
    ("compiled", "replaced-compiled"),
    ("compiled", "examples-compiled"),
    ("compiled", "backend"),
)
SLOWER = 0.97  # problems with a ratio below it are named
LEVELS = (2, 3)
LIMIT_S = 1800  # for a process, its waiting included: a hang must not stop the others
LAYER = re.compile(r"\bConvTranspose[123]d\b")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.monotonic()
    end_last_line(options.output)
    done = read(options.output)
    found = problems(options.checkout, options.only)
    left = [key for key in found if not is_complete(done.get(key), options.ways)]
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(options.workers) as pool,
        options.output.open("a", encoding="utf-8") as rows,
    ):

        def measured(key: str) -> Row | None:
            if time.monotonic() - began > options.seconds:
                return None
            return measure(key, found[key], Path(folder) / "lock", options)

        for future in as_completed([pool.submit(measured, key) for key in left]):
            row = future.result()
            if row is not None:
                rows.write(json.dumps(row) + "\n")
                rows.flush()
                print(f"{time.monotonic() - began:5.0f} s  {line_of(row)}", flush=True)
    known = read(options.output)
    sys.exit(report({key: known[key] for key in found if key in known}, len(found), options.ways))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--only", default="", help="problems, as 2/61,3/45; by default all")
    parser.add_argument("--ways", default=",".join(WAYS), help="by default all")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prefer", choices=("fastest", "kernel"), default="fastest")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its plans")
    options = parser.parse_args(arguments)
    options.ways = options.ways.split(",")
    if not set(options.ways) <= set(WAYS):
        parser.error(f"--ways: choose from {', '.join(WAYS)}")
    return options


def problems(checkout: Path, only: str = "") -> dict[str, Path]:
    """Return the files with a transposed convolution, by "level/number", in their order."""
    found: dict[tuple[int, int], Path] = {}
    for level in LEVELS:
        for path in (checkout / "KernelBench" / f"level{level}").glob("*.py"):
            if LAYER.search(path.read_text("utf-8")):
                found[level, int(path.name.partition("_")[0])] = path
    named = {f"{level}/{number}": found[level, number] for level, number in sorted(found)}
    wanted = [key for key in only.split(",") if key] or list(named)
    if not named or not set(wanted) <= set(named):
        sys.exit(f"no such problem in {checkout / 'KernelBench'}; it has {', '.join(named)}")
    return {key: path for key, path in named.items() if key in wanted}


def read(path: Path) -> dict[str, Row]:
    """Return the last row of each problem; a line that was cut off counts for nothing."""
    rows: dict[str, Row] = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["problem"]] = row
    return rows


def end_last_line(path: Path) -> None:
    """Create a file; after a run that was cut off in a line, have the next line begin anew."""
    with path.open("a+", encoding="utf-8") as rows:
        rows.seek(0)
        text = rows.read()
        if text and not text.endswith("\n"):
            rows.write("\n")


def is_complete(row: Row | None, ways: list[str]) -> bool:
    """Whether a row has all that a run would measure."""
    return row is not None and all("ms" in row["ways"].get(way, {}) for way in ways)


# ---- measuring ----


def measure(key: str, path: Path, lock: Path, options: argparse.Namespace) -> Row:
    """Measure a problem; after a way that fails or crashes, a new process measures the others."""
    row: Row = {"problem": key, "name": path.stem, "ways": {}}
    left = list(options.ways)
    while left:
        answers, how_it_ended = answers_of(path, left, lock, options)
        for answer in answers:
            row["ways"][answer.pop("way")] = answer
            row |= {name: answer.pop(name) for name in ("machine", "layers") if name in answer}
            if "failed" not in answer:
                answer["ms"] = answer["gpu_ms" if options.device == "cuda" else "wall_ms"]
        if not any("failed" in answer for answer in answers) and len(answers) < len(left):
            row["ways"][left[len(answers)]] = {"failed": how_it_ended}
        left = [way for way in left if way not in row["ways"]]
    return row


def answers_of(
    path: Path, ways: list[str], lock: Path, options: argparse.Namespace
) -> tuple[list[Row], str]:
    """Return what a process answered, and how it ended."""
    worker = Path(__file__).with_name("kernelbench_problem.py")
    command = [sys.executable, str(worker), str(path), "--ways", ",".join(ways)]
    command += ["--device", options.device, "--prefer", options.prefer, "--lock", str(lock)]
    command += ["--cudnn-benchmark"] * options.cudnn_benchmark
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        log.seek(0)
        ended = f"the process ended with {process.returncode}: {log.read()[-300:]}"
    return [json.loads(line) for line in output.splitlines()], ended


# ---- the report ----


def line_of(row: Row) -> str:
    """Return a problem's line: milliseconds of each way, marked if its numbers are off."""
    cells = []
    for way in WAYS:
        answer = row["ways"].get(way, {})
        failed = "failed" if "failed" in answer else "-"
        text = f"{answer['ms']:.3f}" if "ms" in answer else failed
        cells.append(f"{text}{' ' if answer.get('right', True) else '!'}".rjust(18))
    return f"{row['problem']:6}" + "".join(cells) + f"{off(row):7.2f}"


def off(row: Row) -> float:
    """Return the largest error of a problem, as a part of the allowed one; NaN if one is NaN."""
    parts = [0.0]
    for answer in row["ways"].values():
        if "allowed" in answer:
            found = (answer["error"], answer["worst"])
            parts += [one / most for one, most in zip(found, answer["allowed"], strict=True)]
    return float("nan") if any(part != part for part in parts) else max(parts)


def report(rows: dict[str, Row], number: int, ways: list[str]) -> int:
    """Print the table, what is wrong, and the comparisons; return the exit status.

    Args:
        rows: those of the problems that were asked for, as far as there are any.
        number: of the problems that were asked for.
        ways: that were asked for.
    """
    machines = sorted({json.dumps(row["machine"]) for row in rows.values() if "machine" in row})
    print("\n".join(["", *machines]))
    if any('"cpu' in machine for machine in machines):
        print("in Triton's interpreter: no measurement of speed")
    print(f"{'ms':6}" + "".join(f"{way:>17} " for way in WAYS) + "    off")
    for row in rows.values():
        print(line_of(row))
    wrong = [line for row in rows.values() for line in complaints(row, ways)]
    if len(machines) > 1:
        wrong.append("lines come from different machines: their times are not comparable")
    print("\n".join(wrong))
    left = [f"{key} {way}" for key, row in rows.items() for way in ways if is_left(row, way)]
    print(f"a layer left to torch, as measured to be faster: {', '.join(left) or 'none'}")
    for level in LEVELS:
        of_level = [row for key, row in rows.items() if key.startswith(f"{level}/")]
        for one, other in COMPARISONS:
            if one in ways and other in ways and of_level:
                print(f"level {level}  {comparison(of_level, one, other)}")
    right = sum(not complaints(row, ways) for row in rows.values())
    print(f"{number} problems, {len(rows)} measured, {right} of them right in every way")
    return 1 if wrong else 0


def is_left(row: Row, way: str) -> bool:
    """Whether convgen left a layer to torch."""
    return bool(row["ways"].get(way, {}).get("left"))


def complaints(row: Row, ways: list[str]) -> list[str]:
    """Return what is wrong with a problem's ways."""
    found = []
    for way in ways:
        answer = row["ways"].get(way, {"failed": "not measured"})
        of = f"{row['problem']} {way}:"
        if "failed" in answer:
            found.append(f"{of} failed: {answer['failed']}")
        elif not answer["right"]:
            error, worst = answer["error"], answer["worst"]
            allowed, allowed_worst = answer["allowed"]
            found.append(
                f"{of} numbers are off: relative error {error:.1e} (allowed {allowed:.1e}), "
                f"largest {worst:.1e} (allowed {allowed_worst:.1e})"
            )
        elif way in OURS and not answer["convgen_launches"] and not is_left(row, way):
            found.append(f"{of} no kernel of convgen's ran")
    return found


def comparison(rows: list[Row], one: str, other: str) -> str:
    """Return geometric mean and lowest of one way's times over another's, and what is slower."""
    faster = {}
    for row in rows:
        answers = [row["ways"].get(way, {}) for way in (one, other)]
        if all(answer.get("right") for answer in answers):
            faster[row["problem"]] = answers[0]["ms"] / answers[1]["ms"]
    if not faster:
        return f"{one} / {other}: none to compare"
    mean = statistics.geometric_mean(faster.values())
    ranked = sorted(faster, key=faster.__getitem__)
    slower = [f"{key} {faster[key]:.3f}x" for key in ranked if faster[key] < SLOWER]
    return (
        f"{one} / {other}: geometric mean {mean:.2f}x of {len(faster)}, "
        f"lowest {faster[ranked[0]]:.2f}x ({ranked[0]}), "
        f"{len(slower)} below {SLOWER}" + (f": {', '.join(slower)}" if slower else "")
    )


if __name__ == "__main__":
    main()
