"""ruff, run by tests on texts that convgen emits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest


def ruff(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ruff and return what it printed.

    Where it is not installed the test is skipped, but not in CI, which says so by the variable CI.

    Args:
        arguments: those of ruff.
        options: those of `subprocess.run`, as `cwd` or `input`.
    """
    if importlib.util.find_spec("ruff") is None and not os.environ.get("CI"):
        pytest.skip("ruff is not installed: pip install 'convgen[test]'")
    command = [sys.executable, "-m", "ruff", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, **options)
