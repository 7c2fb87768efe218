"""Running the command line in the tests: in this process, or in one of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from convgen.cli.commands import main

SMALL = "ConvTranspose1d(4, 2, 4, stride=2, input=(1, 4, 9))"


def run(*arguments: object) -> Result:
    """Run the command in this process; an exception that it lets out fails the test."""
    return CliRunner().invoke(main, [str(word) for word in arguments], catch_exceptions=False)


def start(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "convgen", *(str(word) for word in arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


def make_project(folder: Path, table: str, **documents: str) -> Path:
    """Write a pyproject.toml with `table` under [tool.convgen], and NAME.convgen files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f'[project]\nname = "downstream"\n\n[tool.convgen]\n{table}\n'
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    for name, document in documents.items():
        (folder / f"{name}.convgen").write_text(document, encoding="utf-8")
    return folder


def rows(*names: str, spec: str = SMALL) -> str:
    """Return the table's `output` and one row a name."""
    row = '[[tool.convgen.kernel]]\nname = "{}"\nspec = "{}"\n'
    return 'output = "kernels"\n' + "".join(row.format(name, spec) for name in names)


def worked(name: str, jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Return what a worker beside this file, a process of its own, prints for each job.

    The process stays for later jobs of this one's tests: to start it, with Triton, takes longer
    than to compile most kernels.
    """
    return [_worker(name).do(job) for job in jobs]


@functools.cache
def _worker(name: str) -> Worker:
    return Worker(name)


class Worker:
    """A script beside this file that prints a line of JSON for each that it reads.

    It ends when its input does, at the latest with this process. Its messages are among those that
    pytest shows of a test that fails.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        )
        atexit.register(self.process.__exit__, None, None, None)

    def do(self, job: tuple[Any, ...]) -> Any:
        """Return what it prints for a job; one that it dies of fails the test."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            _worker.cache_clear()  # the next test starts another
        assert line, f"{self.name} ended with {self.process.wait()} at {job}"
        return json.loads(line)
