"""Files on disk: read whole, written atomically.

Beside the stages. Input: paths and text; output: files, or an error that names the path.

There are two ways to write. `write_text` is for files that convgen names itself, in a project or an
output folder: it replaces an existing file or link of that name. `check_output`, then
`write_output`, is for a path that the user gave, by `-o` for example: links are followed, devices
and pipes are written into, and only a file that the same command wrote is overwritten.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .errors import MachineError, ProjectError

_TEMPORARY = r"\.(.+)\.[0-9a-f]{8}\.pyc"  # the name of a file while it is written (`_temporary`)
_MOST = 1 << 26  # characters read of an existing file to tell whether convgen wrote it
MAX_FILE = 4 * 2**20  # bytes read of a table, choices or cases file; real ones have about 100 KB
_SHOWN = 4096  # characters of a path in an error message: no system opens a longer path


def on_disk(path: Path) -> str:
    """Return the text of any file, bytes that are not UTF-8 replaced; raises ProjectError."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path, most: int = MAX_FILE) -> str:
    """Return the text of a UTF-8 file, its line endings made newlines.

    Only a regular file of at most `most` bytes is read: a pipe could block, a device fill the
    memory.

    Raises:
        ProjectError: the file cannot be read; the message names it.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(most + 1) if regular else b""
        reason = "" if regular else "it is a pipe or a device, not a regular file"
        if len(content) > most:
            reason = f"it is longer than {most // 1024} KB"
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8"
    if reason:
        raise ProjectError(f"cannot read {str(path)[:_SHOWN]}: {reason}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking, even a pipe that has no writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def bytes_on_disk(path: Path) -> bytes:
    """Return the bytes of a file; raises ProjectError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Remove a file if it exists; raises ProjectError naming it."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ProjectError(f"cannot remove {path}: {error.strerror}") from None


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other build writes into `folder`; remove temporary files of killed builds.

    On systems that cannot lock a folder, builds do not wait, and nothing is removed.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no permission: reported when a file is written
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(_locked(folder)):
                _clear(folder)
        yield


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder; yield whether it is held, False without locks."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(ImportError, OSError):  # no locks, or it is held elsewhere
            import fcntl

            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held


def _clear(folder: Path, of: str | None = None) -> None:
    """Remove temporary files of killed processes: those `of` a file's name, else all."""
    for name in os.listdir(folder):
        found = re.fullmatch(_TEMPORARY, name)
        if found and of in (None, found[1]) and is_regular(folder / name):
            with _locked(folder / name, wait=False) as abandoned:
                if abandoned:
                    (folder / name).unlink(missing_ok=True)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode(), private=private)


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file atomically.

    An existing file keeps its mode. A new file gets the mode that the umask leaves; if `private`,
    only its owner may write to it, as `check_private` demands.

    Raises:
        MachineError: the file cannot be written; the message names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # a folder that cannot be listed can be written to
            _clear(path.parent, path.name)
        kept = stat.S_IMODE(path.lstat().st_mode) if is_regular(path) else None
        new = 0o644 if private else 0o666
        with _temporary(path, new if kept is None else kept) as (temporary, file):
            if kept is not None:  # the umask may have cleared some of its bits
                os.chmod(temporary, kept)
            with file:
                file.write(content)
            os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, _in_the_way(path) or error.strerror) from None


@contextlib.contextmanager
def _temporary(path: Path, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """Make a file beside `path`, locked so that no other build removes it; remove it at the end."""
    with contextlib.ExitStack() as stack:
        while True:
            # Build backends leave out .pyc files: another build may pack the folder at this moment.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.pyc")
            file = stack.enter_context(open(temporary, "xb", opener=partial(os.open, mode=mode)))
            stack.callback(temporary.unlink, missing_ok=True)
            stack.enter_context(_locked(temporary))
            if temporary.exists():  # else a build removed it before it was locked
                break
        yield temporary, file


def is_stream(path: Path) -> bool:
    """Whether `path` is written as a stream: a device, a pipe, /dev/fd/N of an open file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _is_open_file(path)


def _is_open_file(path: Path) -> bool:
    """Whether `path` is an open file of a process, such as /dev/stdout or /proc/self/fd/1."""
    pointed = path.parent / os.readlink(path) if path.is_symlink() else path  # /dev/stdout
    folders = [os.path.realpath(each.parent) for each in (path, pointed)]
    return any(folder.startswith(("/proc/", "/dev/fd")) for folder in folders)


def check_output(path: Path, refusal: Callable[[str], str | None], *, force: bool) -> None:
    """Check that `write_output` can and may write to `path`.

    Args:
        path: the path that the user gave.
        refusal: returns why a file with the given text must not be overwritten, None if it may
            be. Not called for streams, which are never read.
        force: overwrite any file, and create the target of a dangling link.

    Raises:
        MachineError: `path` cannot be written.
        ProjectError: `path` must not be written without `force`.
    """
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise _unwritable(path, "Permission denied")
        return
    real = Path(os.path.realpath(path))
    check_writable(real)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink() and not force:
            said = f"{path} is a link to {real}, which does not exist; --force creates it"
            raise ProjectError(said) from None
        return
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    if stat.S_ISDIR(mode):
        raise _unwritable(path, "it is a folder")
    reason = None if force else refusal(_start_of(real))
    if reason is not None:
        raise ProjectError(f"{path} {reason}; --force overwrites it")


def _start_of(path: Path) -> str:
    """Return the start of a file: all of it if convgen wrote the file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def write_output(path: Path, text: str) -> None:
    """Write the output of a command to `path`, after `check_output` has allowed it."""
    if not is_stream(path):
        write_text(Path(os.path.realpath(path)), text)
        return
    try:
        # Append: if a shell's >> opened a regular file, its content must stay. Pipes and devices
        # are not affected.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
            file.write(text.encode())
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def check_writable(path: Path) -> None:
    """Raise MachineError if `path` cannot be written: called before the work, not after it."""
    reason = _in_the_way(path)
    if reason is not None:
        raise _unwritable(path, reason)
    folder = next((each for each in path.parents if os.path.exists(each)), Path())
    if not os.access(folder, os.W_OK):
        raise _unwritable(path, f"no permission to write to {folder}")


def make_folder(path: Path) -> None:
    """Make a folder, if missing, that only its owner may write to; raises MachineError."""
    try:
        path.mkdir(0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, _in_the_way(path / "file") or error.strerror) from None


def check_private(path: Path) -> None:
    """Raise ProjectError if a user other than root can change a file, or the files of a folder.

    The folders above count too: who can write to one of them can replace the folder below it. In a
    folder with the sticky bit, such as /tmp, others can add files but not change existing ones, so
    a file in it needs a check of its own.
    """
    for each in (path, *path.absolute().parents):
        _check_mode(each, whose=each == path)


def _check_mode(path: Path, *, whose: bool) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None
    if not hasattr(os, "geteuid"):  # a system without users and modes
        return
    if whose and found.st_uid not in (os.geteuid(), 0):
        raise ProjectError(f"{path} belongs to another user: use a folder of your own")
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    shared = found.st_mode & stat.S_IWGRP and not _has_one_member(found.st_gid, found.st_uid)
    if (shared or found.st_mode & stat.S_IWOTH) and not sticky:
        raise ProjectError(f"others may write to {path}; use a folder of your own, or chmod go-w")


def _has_one_member(group: int, user: int) -> bool:
    """Whether a group has one member only: many systems give each user a private group."""
    import grp
    import pwd

    try:
        found, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
    except KeyError:
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


def _unwritable(path: Path, reason: str | None) -> MachineError:
    return MachineError(f"cannot write {str(path)[:_SHOWN]}: {reason}")


def _in_the_way(path: Path) -> str | None:
    """Return an error text if a parent of `path` is a file, None if all are folders."""
    # Not Path.is_file: it raises for a name too long and for a folder that may not be read.
    files = [each for each in path.parents if os.path.isfile(each)]
    return f"{files[0]} is a file, not a folder" if files else None
