"""The compiler gives the same bytes everywhere, from nothing but its input, and starts fast.

What would break it: iterating over a set, reading the locale, the clock, the user or the folder,
asking the local GPU, and an import at module level that is needed by one command only.
"""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
from sympy.core.cache import clear_cache

from convgen import emit
from running import make_project

# Every stage that could depend on an order: phases, masks, run-time sizes, autotuning, pipelines.
KERNELS = """\
# Un fichier en français: it is UTF-8 whatever the locale says.
target = a100
plain = ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 1024, 1024), target=rtx4090)
audio = leaky_relu(0.1) | ConvTranspose1d(512, 256, 16, stride=8, padding=4)
volume = ConvTranspose3d(8, 6, (1, 2, 3), (2, 1, 3), groups=2, dtype=bfloat16, layout=channels_last)
tuned = sigmoid | ConvTranspose2d(kernel_size=(3, 5), stride=2, dilation=3, autotune=blocks) | tanh
"""
HERE = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
ELSEWHERE = {
    "hash seed 0": {"PYTHONHASHSEED": "0"},
    "hash seed 1": {"PYTHONHASHSEED": "1"},
    "hash seed 4242": {"PYTHONHASHSEED": "4242"},
    "another user": {"HOME": "/nonexistent", "USER": "nobody", "TZ": "Pacific/Kiritimati"},
    "Turkish": {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"},
    "ASCII only": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no environment": None,
}


COMMANDS = """
import sys
from convgen.cli.commands import main
for arguments in (
    ["emit", sys.argv[1], "-o", "emitted"],
    ["build", sys.argv[2]],
    ["explain", sys.argv[1], "--json"],
):
    try:
        main(arguments)
    except SystemExit as done:
        assert not done.code, arguments
"""


def output(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return the hashes of what emit, build and explain make of KERNELS, run in `folder`."""
    project = folder / "project"
    make_project(project, 'output = "built"\nspecs = ["all.convgen"]', all=KERNELS)
    document = os.path.relpath(project / "all.convgen", folder)
    command = [sys.executable, "-c", COMMANDS, document, str(project)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {"explain --json": done.stdout}
    for place in ("emitted", "project/built"):
        made |= {f"{place}/{path.name}": path.read_bytes() for path in (folder / place).iterdir()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The hashes here, with whatever hash seed this process would get."""
    return output(tmp_path_factory.mktemp("here"), HERE)


@pytest.mark.parametrize("place", ELSEWHERE)
def test_the_same_bytes_everywhere(tmp_path, expected, place):
    """Another folder, and one thing of the environment changed."""
    changes = ELSEWHERE[place]
    environment = {} if changes is None else HERE | changes
    assert len(expected) == 10  # an explanation, four kernels emitted and built, a manifest
    assert output(tmp_path, environment) == expected


def test_emit_and_build_agree(expected):
    """The driver for many kernels and the command for one must be the same compiler."""
    for name in ("plain", "audio", "volume", "tuned"):
        assert expected[f"emitted/{name}.py"] == expected[f"project/built/{name}.py"]


# ---- what is imported, and how long it takes ----

IMPORTED = """
import sys
from convgen.cli.commands import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    """Return the modules that a command has imported when it is done."""
    command = [sys.executable, "-c", IMPORTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("emit", "--k", "3", "--stride", "1"),
        ("emit", "tanh | ConvTranspose3d(8, 4, 3, 2, dtype=bfloat16, autotune=launch)"),
        ("explain", "--k", "3", "--json"),
        ("build", "--check"),
    ],
)
def test_the_compiler_needs_no_torch(root, arguments):
    """Build machines have no GPU stack, and its import alone takes seconds."""
    where = (str(root),) if arguments[0] == "build" else ()
    modules = imported(*arguments, *where)
    assert "convgen.compiler" in modules
    assert modules & {"torch", "triton", "numpy", "convgen.execution.verify"} == set()


@pytest.mark.parametrize("arguments", [("--help",), ("emit", "--help"), ("--version",)])
def test_help_imports_no_compiler(arguments):
    assert imported(*arguments) & {"sympy", "jinja2", "convgen.compiler"} == set()


def fastest(*command: object) -> float:
    """Return the seconds of the best of three cold processes, as the processor counts them.

    Other work on the machine makes a clock on the wall run on, but not the processor's.
    """
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *map(str, command)], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(seconds)


def test_it_starts_fast():
    """0.1 s for --help; 0.7 s for a kernel, of which importing sympy is 0.3 s (Python 3.11).

    A machine where that import takes longer than 0.5 s may take longer for the rest too.
    """
    sympy = fastest("-c", "import sympy")
    assert fastest("-m", "convgen", "--help") < max(0.3, 0.6 * sympy)
    assert fastest("-m", "convgen", "emit", "--k", "3", "--stride", "1") < max(1.5, 3 * sympy)


# Of the layers that were measured, those that take longest: blocks of rows, whose inputs and
# outputs have lines of their own, with a kernel for the gradient; layers with many tiles to choose
# from, as nothing was measured for that card.
LONGEST = [
    ("3d(48, 24, 3, bias=False, input=(8, 48, 96, 96, 96), dtype=float16)", "h100"),
    ("2d(128, 128, 3, padding=1, groups=4, bias=False, input=(8, 128, 128, 128))", "h100"),
    ("3d(32, 64, (3, 5, 5), bias=False, input=(16, 32, 64, 64, 64))", "h100"),
    ("2d(256, 256, 2, 2, bias=False, input=(100, 256, 14, 14))", "rtx4090"),
]


# Python functions that are called for one file, and what that takes on a processor that imports
# sympy in 0.3 s: counted, as the same calls take 70 to 140 ms beside other work.
MOST_CALLS = 200_000


def calls_of_emission(layer: str, target: str) -> int:
    """Return how many Python functions are called for a file in a process that has emitted it.

    What sympy remembers of it is forgotten.
    """
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    emit(f"ConvTranspose{layer}", target)
    clear_cache()
    sys.setprofile(count)
    try:
        emit(f"ConvTranspose{layer}", target)
    finally:
        sys.setprofile(None)
    return calls


def test_a_warm_process_emits_a_file_in_about_50_ms():
    """Breaks if what was proved is proved again, line by line, or if all tiles are ranked for one.

    Both were so, and took up to three times as long.
    """
    calls = {layer: calls_of_emission(layer, target) for layer, target in LONGEST}
    assert {layer: count for layer, count in calls.items() if count > MOST_CALLS} == {}
