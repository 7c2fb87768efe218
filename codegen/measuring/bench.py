"""The driver of bench: measures convgen's files against torch, each way in a separate process.

Input: `Case`s and `Way`s; output: the report, a dictionary of JSON types. Stages: cases and ways
(cases.py), measuring (worker.py, in processes started here), figures and table (report.py), plot
(plot.py). This process never imports torch, so that it uses no GPU memory.
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
MESSAGE = 300  # characters of a dead worker's last output
_REPORT = r'\s*\{{\s*"schema":\s*\d+,\s*"command":\s*"{}",'  # start of a command's report


def require(*modules: str, extra: str) -> None:
    """Raise MachineError if one of `modules`, which are in `extra`, is not installed."""
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
        output: file for the report; written at the start and after each way, so that an interrupted
            run keeps what it measured. A stream gets only the last report.
        choices: choices file for convgen's files, preferred to the package's own.

    Raises:
        MachineError: torch or triton is missing, or `output` cannot be written.
        SpecError: the worker failed to measure the GPU, for example because there is none.
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
    with progress("bench", len(cases) * len(ways)) as advance:
        for index, way in enumerate(ways, 1):
            measure(way, cases, rows, job, advance)
            report = _saved(finished(head, rows, complete=index == len(ways)), output)
    return report


def _saved(report: dict[str, Any], output: Path | None) -> dict[str, Any]:
    if output is not None and (report["complete"] or not is_stream(output)):
        write_output(output, json.dumps(report) + "\n")
    return report


def not_a_report(text: str, command: str = "bench") -> str | None:
    """Return why a report must not overwrite a file with this text, None if it is a report."""
    return None if re.match(_REPORT.format(command), text) else f"is no report of convgen {command}"


def measure(
    way: Way,
    cases: list[Case],
    rows: list[dict[str, Any]],
    job: dict[str, Any],
    advance: Callable[[str], None],
) -> None:
    """Measure one way; put its answers into the rows. `job` is common to its jobs."""
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
    """Yield the answer to each job in order; if a worker dies, a new one does the rest."""
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
            # Exit code 0 with jobs left: the last answered job broke the process; no job failed.
            if done < len(jobs) and (code or done == before):
                yield {"failed": f"{_ended(code)}: {said.read_text('utf-8', 'replace')[-MESSAGE:]}"}
                done += 1


def _ended(code: int) -> str:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return f"the worker ended with {name}"


@contextmanager
def progress(label: str, length: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that advances a progress bar; without a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda item: None
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, item_show_func=lambda item: item
    ) as bar:
        yield lambda item: bar.update(1, item)
