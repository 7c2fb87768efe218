"""Files on disk: read whole, written whole or not at all.

Beside the stages. Input: paths and text; output: files, or an error that names the path.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .spec import SpecError

# What mkstemp calls a file that is being written, below.
_TEMPORARY = r"\..+\.[a-z0-9_]{8}\.pyc"
_SHOWN = 4096  # characters of a path that an error shows: no system opens a longer one


class ProjectError(SpecError):
    """A project that cannot be built: its table, a file it names, or a folder in the way."""


class EditedError(ProjectError):
    """A file that a build would overwrite is somebody's work; a command exits with 1, as drift."""


def on_disk(path: Path) -> str:
    """Return the text of a file that may be anybody's; raises ProjectError if it has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Return the text of a file that should be UTF-8; raises ProjectError naming it."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ProjectError(f"cannot read {str(path)[:_SHOWN]}: {reason}") from None


def bytes_on_disk(path: Path) -> bytes:
    """Return what is in a file; raises ProjectError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Remove a file that may be gone by now; raises ProjectError naming it."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ProjectError(f"cannot remove {path}: {error.strerror}") from None


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other build writes into `folder`; clear away what killed ones left there.

    Where the system has no locks for folders, builds do not wait, and nothing is cleared away.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # no lock, or no right to write: told later
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            for name in os.listdir(folder):
                if re.fullmatch(_TEMPORARY, name):
                    Path(folder, name).unlink(missing_ok=True)
        yield


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode(), mode)


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all; raises ProjectError if the folder does not allow it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An ending that build backends leave out: another build may pack the folder now.
        handle, temporary = tempfile.mkstemp(".pyc", f".{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, mode)  # mkstemp's own is 0600
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # it was moved by then
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _unwritable(path, _in_the_way(path) or error.strerror) from None


def check_writable(path: Path) -> None:
    """Raise ProjectError if `path` cannot be written, before there is something to write."""
    reason = _in_the_way(path)
    if reason is not None:
        raise _unwritable(path, reason)
    folder = next((each for each in path.parents if os.path.exists(each)), Path())
    if not os.access(folder, os.W_OK):
        raise _unwritable(path, f"{folder} does not allow it")


def _unwritable(path: Path, reason: str | None) -> ProjectError:
    return ProjectError(f"cannot write {str(path)[:_SHOWN]}: {reason}")


def _in_the_way(path: Path) -> str | None:
    """Say which file stands where a folder of `path` should, None if there is none."""
    # Not Path.is_file, which raises where a name is too long or a folder may not be read.
    files = [each for each in path.parents if os.path.isfile(each)]
    return f"{files[0]} is a file, not a folder" if files else None
