"""Measuring convgen's files beside torch: every way in a process of its own, one report.

The driver of bench. Input: `Case`s and `Way`s; output: the report, as a dictionary of JSON's types.
Stages: cases and ways (cases.py), measuring (worker.py, in the processes started here),
figures and table (report.py), plot (plot.py). This process never imports torch, so that
it takes no memory of the GPU.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..errors import MachineError, SpecError
from ..execution.workers import PYTHON, environment
from ..files import is_stream, write_output
from ..version import __version__
from .cases import CEILINGS, Case, Way
from .report import finished, judged, row_of

WORKER = (*PYTHON, "-m", "convgen.measuring.worker")
MESSAGE = 300  # characters of a dead worker's last words
_REPORT = re.compile(r'\s*\{\s*"schema":\s*\d+,\s*"command":\s*"bench",')  # how a report begins


def require(*modules: str, extra: str) -> None:
    """Raise SpecError if one of `modules`, which `extra` brings, is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise MachineError(f"bench needs {module}, of convgen's extra '{extra}'")


def run(
    cases: list[Case], ways: list[Way], output: Path | None = None, choices: Path | None = None
) -> dict[str, Any]:
    """Measure every way on every case and return the report.

    Args:
        cases: the layers.
        ways: what to compare, in the order in which they run.
        output: the file to write the report to, first empty and then anew after each way: an
            interrupted run leaves what it measured. A stream gets the last one alone.
        choices: measured tiles for convgen's files, which come before the package's own.

    Raises:
        SpecError: torch or triton is missing, there is no GPU, or `output` cannot be written.
    """
    require("torch", "triton", extra="torch")
    dtypes = list(dict.fromkeys(case.spec.dtype for case in cases))
    (facts,) = answers([{"way": CEILINGS, "dtypes": dtypes}])
    if "failed" in facts:
        raise SpecError(facts["failed"])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    given = None if choices is None else str(choices)
    head = {"schema": 1, "command": "bench", "date": now, "convgen": __version__, **facts}
    job = {"target": facts["target"], "choices": given}
    rows = [row_of(case, facts) for case in cases]
    report = _saved(finished(head, rows, complete=not ways), output)
    with _progress(len(cases) * len(ways)) as advance:
        for index, way in enumerate(ways, 1):
            measure(way, cases, rows, job, advance)
            report = _saved(finished(head, rows, complete=index == len(ways)), output)
    return report


def _saved(report: dict[str, Any], output: Path | None) -> dict[str, Any]:
    if output is not None and (report["complete"] or not is_stream(output)):
        write_output(output, json.dumps(report) + "\n")
    return report


def not_a_report(text: str) -> str | None:
    """Return why a report must not take the place of a file of `text`, None of another report."""
    return None if _REPORT.match(text) else "is no report of convgen bench"


def measure(
    way: Way,
    cases: list[Case],
    rows: list[dict[str, Any]],
    job: dict[str, Any],
    advance: Callable[[str], None],
) -> None:
    """Put what one way takes into the `ways` of every case's row; `job` is common to its jobs."""
    fit = []
    for case, row in zip(cases, rows, strict=True):
        reason = way.unfit(case.spec)
        if reason is None:
            fit.append((case, row))
        else:
            row["ways"][way.name] = {"not_applicable": reason}
            advance(way.name)
    jobs = [{**job, "way": way.name, "spec": str(case.spec)} for case, _ in fit]
    for (case, row), answer in zip(fit, answers(jobs), strict=True):
        row["ways"][way.name] = judged(answer, row["floor_ms"])
        advance(f"{way.name} {case.id}")


def answers(
    jobs: list[dict[str, Any]], command: tuple[str, ...] = WORKER
) -> Iterator[dict[str, Any]]:
    """Yield the answer to each job in turn; a worker that dies is replaced after its job."""
    done = 0
    while done < len(jobs):
        before = done
        with tempfile.TemporaryDirectory() as folder:
            lines = [json.dumps(job) + "\n" for job in jobs[done:]]
            Path(folder, "jobs").write_text("".join(lines), "utf-8")
            said = Path(folder, "messages")
            with said.open("wb") as messages:
                worker = subprocess.Popen(
                    [*command, folder],
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    env=environment(),
                )
            with worker:
                try:
                    assert worker.stdout is not None
                    for line in worker.stdout:
                        if line.endswith("\n"):  # not if it died while it wrote
                            yield json.loads(line)
                            done += 1
                    code = worker.wait()
                finally:
                    worker.kill()
            # Code 0 with jobs left: the last one answered spoilt the process, no other is at fault.
            if done < len(jobs) and (code or done == before):
                yield {"failed": f"{_ended(code)}: {said.read_text('utf-8', 'replace')[-MESSAGE:]}"}
                done += 1


def _ended(code: int) -> str:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return f"the worker ended with {name}"


@contextmanager
def _progress(length: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that moves a bar on stderr by one; without a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda item: None
        return
    with click.progressbar(
        length=length, label="bench", file=sys.stderr, item_show_func=lambda item: item
    ) as bar:
        yield lambda item: bar.update(1, item)
