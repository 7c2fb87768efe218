"""Python processes that never import from the current folder.

Beside the stages; bench.py, tune.py and cubin.py start such processes. With `-m` and `-c`, and in
multiprocessing, Python puts the current folder first on the import path before the program runs: a
file `pickle.py` in it would run instead of Python's.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import SpawnContext

PYTHON = (sys.executable, "-P")  # start of such a process's command
SAFE = "PYTHONSAFEPATH"  # the same as -P, inherited by child processes


def environment() -> dict[str, str]:
    """Return the environment for a process that is started now."""
    return {**os.environ, SAFE: "1"}


def spawn_context() -> SpawnContext:
    """Return the multiprocessing context that spawns workers.

    It sets SAFE in this process for good: an executor may start a worker at any time.
    """
    os.environ[SAFE] = "1"
    return multiprocessing.get_context("spawn")
