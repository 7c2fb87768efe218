"""Processes of Python that convgen starts: none of them imports from the current folder.

Beside the stages; bench.py, tune.py and cubin.py start such. Python puts that folder first on the
path of `-m` and `-c`, before any line of the program runs, and so does multiprocessing: a file
`pickle.py` that lies there would be run in place of Python's.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import SpawnContext

PYTHON = (sys.executable, "-P")  # in front of the arguments of such a process
SAFE = "PYTHONSAFEPATH"  # what says the same to the processes that such a process starts


def environment() -> dict[str, str]:
    """Return the environment for a process that is started now."""
    return {**os.environ, SAFE: "1"}


def spawn_context() -> SpawnContext:
    """Return what starts workers afresh.

    The environment of this process says from here on what theirs has to: executors start workers
    whenever they like.
    """
    os.environ[SAFE] = "1"
    return multiprocessing.get_context("spawn")
