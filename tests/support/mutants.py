"""Put slips into the code, one at a time, and tell which of them the tests do not see; no test.

    python tests/support/mutants.py [ID ...] [--list] [--jobs N]

The slips are in mutants/*.toml, each with the tests that should fail for it. Every one gets a copy
of the checkout of its own in a temporary folder, where only these tests run; the comparison of
generated/ byte by byte is left out, as its remedy is to generate the files again. It exits 1 if a
slip lives, if its text is not found exactly once, or if its tests fail without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DRIFT = "tests/rendering/test_generated.py::test_there_is_no_drift"
SECONDS = 900  # for the tests of one slip
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # what pytest exits with; the last as it cannot read a test


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A slip.

    Attributes:
        id: its name, for the command line.
        slip: what is wrong with it, in words.
        file: the file it is in, from the root of the checkout.
        old: the text that it replaces, which the file has exactly once.
        new: what it puts there.
        tests: what should see it, as pytest takes it; at least one of them has to fail.
        needs: "gpu" where the tests see it on a GPU only, "cpu" where only without one.
    """

    id: str
    slip: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs: str = ""


def listed() -> list[Mutant]:
    """Return the slips of all files, in the order of the files; ids are unique."""
    rows = [
        row
        for path in sorted((ROOT / "tests" / "mutants").glob("*.toml"))
        for row in tomllib.loads(path.read_text("utf-8"))["mutant"]
    ]
    mutants = [Mutant(**row | {"tests": tuple(row["tests"])}) for row in rows]
    for number, mutant in enumerate(mutants):
        if mutant.id in {before.id for before in mutants[:number]}:
            sys.exit(f"{mutant.id} is the id of two slips")
        if mutant.needs not in ("", "gpu", "cpu"):
            sys.exit(f"{mutant.id} needs {mutant.needs!r}: it is gpu or cpu")
    return mutants


def copied(folder: Path) -> Path:
    """Copy the checkout, without what git ignores, into `folder`; return its root there.

    The package is at `folder`/site, for PYTHONPATH, before any that is installed.
    """
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    checkout = folder / "checkout"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, checkout / name)
    (folder / "site").mkdir()
    (folder / "site" / "convgen").symlink_to(checkout / "codegen")
    (checkout / "codegen" / "templates").symlink_to(checkout / "templates")
    return checkout


def tested(checkout: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run tests of a copy; return pytest's exit code, 124 if they take too long, and its text."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout.parent / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(checkout.parent),  # else runs side by side clear away each other's folders
    }
    where = "import convgen, convgen.templates as t; print(convgen.__file__, t.__file__)"
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--deselect={DRIFT}"]
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if found.stdout.count(str(checkout.parent)) != 2:
        return INTERRUPTED, found.stdout + found.stderr
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 124, f"longer than {SECONDS} s"
    return done.returncode, done.stdout


def tried(mutant: Mutant) -> str:
    """Return what is wrong, empty if a test sees the slip."""
    with tempfile.TemporaryDirectory(prefix="convgen-mutant-") as folder:
        checkout = copied(Path(folder).resolve())
        path = checkout / mutant.file
        text = path.read_text("utf-8") if path.is_file() else ""
        if (count := text.count(mutant.old)) != 1:
            return f"{mutant.file} has its text {count} times, not once"
        path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
        code, said = tested(checkout, mutant.tests)
    if code == PASSED:
        return f"LIVES: {mutant.slip}"
    return "" if code == FAILED else f"its tests do not run:\n{said[-2000:]}"


def fails_without(mutants: list[Mutant]) -> str:
    """Return what the tests of all say where there is no slip, empty if they pass."""
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    if not tests:
        return ""
    with tempfile.TemporaryDirectory(prefix="convgen-mutant-") as folder:
        code, said = tested(copied(Path(folder).resolve()), tuple(tests))
    return "" if code == PASSED else said[-4000:]


def main() -> None:
    """Try the slips asked for, all by default; report, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", metavar="ID", help="slips to try; all by default")
    parser.add_argument("--list", action="store_true", help="say what there is, and try nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    given = parser.parse_args()
    mutants = listed()
    if unknown := sorted({*given.ids} - {mutant.id for mutant in mutants}):
        parser.error(f"no slip is called {', '.join(unknown)}; --list says what there is")
    asked = [mutant for mutant in mutants if not given.ids or mutant.id in given.ids]
    if given.list:
        for mutant in asked:
            on = f" [{mutant.needs}]" if mutant.needs else ""
            print(f"{mutant.id:6} {mutant.file}: {mutant.slip}{on}")
        return
    sys.exit(report(asked, given.jobs))


def report(asked: list[Mutant], jobs: int) -> int:
    """Try slips, `jobs` at a time, and print what is found; return the exit code."""
    here = "gpu" if torch.cuda.is_available() else "cpu"
    able = [mutant for mutant in asked if mutant.needs in ("", here)]
    for mutant in asked:
        if mutant not in able:
            print(f"{mutant.id:6} left out: it needs a {mutant.needs}")
    bad = 0
    with ThreadPoolExecutor(jobs) as pool:
        without = pool.submit(fails_without, able)
        for mutant, wrong in zip(able, pool.map(tried, able), strict=True):
            print(f"{mutant.id:6} {wrong or 'seen'}", flush=True)
            bad += bool(wrong)
    print(f"{len(able) - bad} of {len(able)} seen")
    if said := without.result():
        print(f"this tells nothing: the tests fail without any slip\n{said}")
    return 1 if bad or said else 0


if __name__ == "__main__":
    main()
