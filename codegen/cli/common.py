"""Helpers of all commands: error messages and exit codes, progress bars, JSON output.

Part of the command line. Input: a command's function; output: its messages and exit code. Exit
codes: 0 success; 1 drift, a verification that failed or ran out of time, an exception of the user's
model, or output that cannot be written; 2 usage or spec error; 123 internal error.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import ConvgenError, EditedError, MachineError, ModelError, visible, visible_lines

T = TypeVar("T")
INTERNAL_ERROR = 123
# Errors of stdout when it is full or closed; files.py reports those of files, with their names.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
# Of the commands that call a user's model.
inputs_option = click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE",
    help="Shape of a positional argument of forward, such as 4,3,256,256 or 1,80,100:float16 "
    "(float32); once for each argument.",
)
choices_option = click.option(
    "--choices",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of measured tiles from `convgen tune`, preferred to the package's own and to the "
    "cost model. `none` uses the cost model alone.",
)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return `command` with its errors turned into one message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except ConvgenError as error:
            click.echo(f"error: {visible_lines(str(error))}", err=True)
            sys.exit(1 if isinstance(error, (EditedError, ModelError)) else 2)
        except (click.ClickException, click.exceptions.Exit, SystemExit, BrokenPipeError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                click.echo(f"error: cannot write the output: {error.strerror}", err=True)
                _discard_output()
                sys.exit(1)
            given = options.get("spec") or {k: str(v) for k, v in options.items() if v is not None}
            click.echo(
                f"internal error: {type(error).__name__}: {visible(str(error), 500)}\n"
                f"  for: {visible(str(given), 2000)}\n"
                "  this is a bug in convgen, not in the spec; please report it with this text",
                err=True,
            )
            sys.exit(INTERNAL_ERROR)

    return run


def _discard_output() -> None:
    """Discard what stdout has buffered: Python would try to write it at exit, and exit with 120."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def open_output() -> None:
    """Give a process that was started without stdout one that refuses what is written to it.

    Python and click discard it silently.
    """
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")


def progress(items: Sequence[T]) -> AbstractContextManager[Iterable[T]]:
    """Return `items` with a progress bar, if stderr is a terminal and there are several."""
    if len(items) < 2 or not sys.stderr.isatty():
        return contextlib.nullcontext(items)
    return click.progressbar(items, file=sys.stderr, show_pos=True)


@contextlib.contextmanager
def torch_for(command: str) -> Iterator[None]:
    """Turn an ImportError in the block into a message that names the missing package."""
    try:
        yield
    except ImportError as error:
        raise MachineError(f"{command} needs {error.name}, of convgen's extra 'torch'") from None


def print_json(command: str, data: dict[str, Any]) -> None:
    """Print a command's JSON object, with its schema version."""
    click.echo(json.dumps({"schema": 1, "command": command, **data}, indent=2))
