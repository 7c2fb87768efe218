"""Processes that convgen starts, in a folder of somebody else's: nothing that lies there is run.

What would break it: a process that has the current folder on its path, as Python's own `-m`, `-c`
and multiprocessing have it, from before the first line of the program.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import convgen
from convgen.execution.cubin import compilers
from convgen.measuring import bench
from convgen.measuring.cases import CEILINGS
from convgen.measuring.tune import gpu_executor
from running import SMALL

# What starting processes and every command import; a file of each name lies in the folder.
IMPORTED = (
    *("base64", "click", "concurrent", "ctypes", "datetime", "faulthandler", "hashlib", "jinja2"),
    *("json", "multiprocessing", "numpy", "pickle", "platform", "queue", "random", "runpy"),
    *("selectors", "shutil", "signal", "socket", "statistics", "struct", "subprocess", "sympy"),
    *("tempfile", "threading", "tomllib", "torch", "triton", "sitecustomize", "usercustomize"),
)
# What `import convgen` itself imports, before it has a say, and what would pass for it.
EARLY = (
    *("ast", "collections", "copy", "copyreg", "dataclasses", "difflib", "enum", "functools"),
    *("inspect", "keyword", "linecache", "re", "textwrap", "typing", "warnings", "weakref"),
    "convgen",
)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder whose modules leave a file that says who was imported; return that file."""
    folder, sprung = tmp_path / "theirs", tmp_path / "sprung"
    folder.mkdir()
    for name in (*IMPORTED, *EARLY):
        (folder / f"{name}.py").write_text(f"open({str(sprung)!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return sprung


def ended(*command: object) -> subprocess.CompletedProcess[str]:
    line = [str(word) for word in command]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)


def test_the_trap_springs(trap):
    """Else the tests below show nothing."""
    ended(sys.executable, "-c", "import json, pickle")
    assert trap.read_text().split() == ["json", "pickle"]


def test_bench_s_worker(trap):
    """Without a GPU it answers so; with one it measures: either way it has imported torch."""
    (answer,) = bench.answers([{"way": CEILINGS, "dtypes": []}])
    assert "device" in answer or "needs a CUDA GPU" in answer["failed"]
    assert not trap.exists()


def test_what_a_worker_starts_itself(trap):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import json'])"
    list(bench.answers([{}], (sys.executable, "-P", "-c", code)))
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["compilers", "GPUs"])
def test_workers_of_multiprocessing(trap, monkeypatch, kind):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    workers = compilers() if kind == "compilers" else gpu_executor()[0]
    with workers:
        found = workers.submit(len, "four").result()
    assert found == 4
    assert not trap.exists()


COMMAND = Path(sysconfig.get_path("scripts"), "convgen")
INSTALLED = [str(COMMAND)]
SAFE = [sys.executable, "-P", "-m", "convgen"]


@pytest.mark.skipif(not COMMAND.exists(), reason="the command is not installed")
@pytest.mark.parametrize(
    ("start", "command"), [(INSTALLED, "verify"), (INSTALLED, "bench"), (SAFE, "emit")]
)
def test_commands_import_nothing_of_the_folder(trap, start, command):
    done = ended(*start, command, SMALL)
    assert "internal error" not in done.stderr
    assert done.stdout or "needs a CUDA GPU" in done.stderr
    assert not trap.exists()


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_python_m_drops_the_folder_as_soon_as_it_can(trap, command):
    """Modules that `import convgen` needs are looked up before; python's own `-P` is for that."""
    for name in EARLY:
        Path(f"{name}.py").unlink()
    done = ended(sys.executable, "-m", "convgen", command, SMALL)
    assert "internal error" not in done.stderr
    assert done.stdout or "needs a CUDA GPU" in done.stderr
    assert not trap.exists(), trap.read_text()


def test_every_process_is_started_so():
    """A new place that starts processes: start them as workers.py says, and test them above."""
    found = {}
    for path in sorted(Path(convgen.__file__).parent.rglob("*.py")):
        text = path.read_text("utf-8")
        calls = re.findall(r"subprocess\.(?:run|Popen)|get_context|ProcessPoolExecutor\(", text)
        if calls:
            found[path.name] = calls
    assert found == {
        "bench.py": ["subprocess.Popen"],
        "cubin.py": ["ProcessPoolExecutor(", "subprocess.run"],  # the latter: cuobjdump
        "precompile.py": ["subprocess.run"],  # with -P
        "tune.py": ["ProcessPoolExecutor("],
        "workers.py": ["get_context"],
    }
    assert bench.WORKER[1] == "-P"
