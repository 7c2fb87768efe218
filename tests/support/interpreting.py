"""Triton's interpreter: without what it computes for nothing, and only where it works.

It works out again, in int64, whether each sum and product of integers overflows; the assert that
would read it is made in debug mode alone. Without that, tests take half of the time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from packaging.version import Version


def leave_out_overflow_checks() -> None:
    """Have the interpreter in this process compute no checks that nobody reads."""
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def skip_where_it_fails() -> None:
    """Skip a test that runs the interpreter even beside a GPU, if the versions do not fit.

    Before 3.7.1 Triton takes arrays of one element for numbers, which numpy refuses since 2.4.
    """
    import triton

    if Version(triton.__version__) < Version("3.7.1") and Version(np.__version__) >= Version("2.4"):
        versions = f"Triton {triton.__version__} with numpy {np.__version__}"
        pytest.skip(f"the interpreter of {versions} fails in loops; Triton 3.7.1's works")
