"""Triton's interpreter without what it computes for nothing.

It works out again, in int64, whether each sum and product of integers overflows; the assert that
would read it is made in debug mode alone. Without that, tests take half of the time.
"""

from __future__ import annotations

from dataclasses import replace


def leave_out_overflow_checks() -> None:
    """Have the interpreter in this process compute no checks that nobody reads."""
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
