"""`convgen init`: a table at the end of a pyproject.toml, and not a byte elsewhere.

What would break it: a file of the user's that changes beyond the table, a table that `build` does
not read, a step that is forgotten.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from convgen.project.build import generate
from convgen.project.table import read_table
from running import run

SETUPTOOLS = """[build-system]
requires = ["setuptools"]  # ours
build-backend = "setuptools.build_meta"

[project]
name = "My-Net"
version = "1"
"""
HATCH = SETUPTOOLS.replace("setuptools.build_meta", "hatchling.build").replace(
    '"setuptools"', '"hatchling"'
)
FLIT = HATCH.replace("hatchling.build", "flit_core.buildapi")
STEPS = {
    SETUPTOOLS: ['add "convgen" to requires'],
    HATCH: ['add "convgen" to requires'],
    HATCH.replace('["hatchling"]', '["hatchling", "Convgen>=0.1"]'): [],
    HATCH.replace('["hatchling"]', '["convgen-plugin"]'): ['add "convgen" to requires'],
    FLIT: ['add "convgen" to requires', 'set build-backend of [build-system] to "convgen.pep517"'],
    "": ["add [build-system] with requires"],
    'project = "x"\nbuild-system = "x"\n': ["add [build-system] with requires"],
    "[build-system]\nrequires = 3\n": ['add "convgen" to requires'],
}


@pytest.mark.parametrize("text", STEPS)
def test_the_table_is_added_and_the_steps_are_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(text)
    done = run("init", tmp_path, "--json")
    assert done.exit_code == 0
    assert path.read_text().startswith(text)
    steps = json.loads(done.stdout)["steps"]
    assert len(steps) == len(STEPS[text]) + 1
    assert all(step.startswith(wanted) for step, wanted in zip(steps, STEPS[text], strict=False))
    hooks = tomllib.loads(path.read_text())["tool"].get("hatch")
    assert hooks == ({"build": {"hooks": {"convgen": {}}}} if "hatchling.build" in text else None)
    names = {made.relative_to(tmp_path).as_posix() for made in generate(tmp_path).texts}
    folder = "src/my_net" if "My-Net" in text else "src/package"
    assert names == {f"{folder}/_kernels/up.py", f"{folder}/_kernels/manifest.json"}


def test_a_flat_package_keeps_its_kernels_inside(tmp_path: Path) -> None:
    (tmp_path / "my_net").mkdir()
    (tmp_path / "pyproject.toml").write_text(SETUPTOOLS)
    assert run("init", tmp_path).exit_code == 0
    listed = run("list-files", tmp_path).stdout.splitlines()
    assert listed[0] == str(tmp_path / "my_net" / "_kernels" / "manifest.json")


@pytest.mark.parametrize(
    "text",
    [SETUPTOOLS.replace("\n", "\r\n"), SETUPTOOLS.rstrip(), f"\ufeff{SETUPTOOLS}"],
    ids=["CRLF", "no last newline", "byte order mark"],
)
def test_the_file_s_own_ways_are_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_bytes(text.encode())
    assert run("init", tmp_path).exit_code == 0
    after = path.read_bytes().decode()
    assert after.startswith(text)
    assert after.count("\r\n") == (after.count("\n") if "\r\n" in text else 0)
    assert run("build", tmp_path).exit_code == 0


def test_the_backend_that_stood_there_builds_after_convgen(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(FLIT)
    assert run("init", tmp_path).exit_code == 0
    assert read_table(tmp_path).build_backend == "flit_core.buildapi"


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    """The table belongs into the file that the link leads to."""
    real, path = tmp_path / "real.toml", tmp_path / "pyproject.toml"
    real.write_text(SETUPTOOLS)
    real.chmod(0o600)
    path.symlink_to(real)
    assert run("init", tmp_path).exit_code == 0
    assert path.is_symlink()
    assert "[tool.convgen]" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o600


WRONG = {
    "[tool.convgen]\n": "already has a table [tool.convgen]",
    "tool = 3\n": "does not fit at the end of",
    "tool = {other = {}}\n": "does not fit at the end of",
    "[project\n": "cannot read",
    "\xff": "cannot read",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_started_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_bytes(text.encode("latin-1"))
    done = run("init", tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert WRONG[text] in done.stderr
    assert path.read_bytes() == text.encode("latin-1")


def test_without_a_project_it_says_so(tmp_path: Path) -> None:
    done = run("init", tmp_path)
    assert done.exit_code == 2
    assert "there is no " in done.stderr
    assert list(tmp_path.iterdir()) == []
