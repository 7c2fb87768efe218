"""A worker of `tune` whose compilers are at work: run as a script, it ends when they do."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def compile_something() -> int:
    """Start the compilers of this process, as measuring does."""
    from convgen.measuring.tune import _compilers

    return _compilers().submit(int, "3").result()


if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        assert workers.submit(compile_something).result() == 3
