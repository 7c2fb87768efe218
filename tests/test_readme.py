"""The README: every command it shows prints what it shows.

What would break it: a changed message, header, kernel or report that the README still shows as it
was. A line `…` in the README stands for any lines.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convgen.project.build import generate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
TABLES = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
FILES = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_shown_output_is_real(block: str, tmp_path: Path) -> None:
    command, _, shown = block.partition("\n")
    words = shlex.split(command.removeprefix("$ "))
    assert words[0] == "convgen"
    for name, text in FILES:  # that commands read
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "convgen", *words[1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "error"},
        check=False,
    )
    # Part of a line, or a line of its own for several.
    lines = ["(.*\n)*" if line == "…\n" else _pattern(line) for line in shown.splitlines(True)]
    assert re.fullmatch("".join(lines), done.stdout + done.stderr), done.stdout + done.stderr


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("…"))


@pytest.mark.parametrize("block", TABLES, ids=range(len(TABLES)))
def test_shown_tables_are_read(block: str, tmp_path: Path) -> None:
    """A newcomer copies them."""
    (tmp_path / "pyproject.toml").write_text(block)
    (tmp_path / "kernels.convgen").write_text("up = ConvTranspose1d(4, 2, 4)\n")
    assert generate(tmp_path).texts


def test_the_report_is_real(tmp_path: Path) -> None:
    """It is printed by the blocks that replace a model's layers and call them."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
    printed = [i for i, (kind, _) in enumerate(blocks) if kind == "text"]
    at = next(i - 1 for i in printed if "convgen.report(" in blocks[i - 1][1])
    (_, replaces), (_, calls), (kind, shown) = blocks[at - 1 : at + 2]
    assert kind == "text"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{replaces}{calls}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.stdout == shown, done.stderr


def test_there_is_something_to_check() -> None:
    """A README whose blocks are no longer found would pass every test."""
    assert len(BLOCKS) >= 5
    assert len(TABLES) == 2
    assert len(FILES) == 1
