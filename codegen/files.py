"""Files on disk: read whole, written whole or not at all.

Beside the stages. Input: paths and text; output: files, or an error that names the path.

Two kinds of writing. A file of a project or of a folder goes to its name (`write_text`): what has
that name is replaced, a link too. What a command was told to write, by `-o` say, goes where the
user points (`check_output`, then `write_output`): a link stays one, a device or a pipe is written
into, and only what the same command wrote before is overwritten.
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

_TEMPORARY = r"\..+\.[0-9a-f]{8}\.pyc"  # the name of a file that is being written, below
_MOST = 1 << 26  # characters of a file in the way that are read to tell whose it is
MAX_FILE = 4 * 2**20  # bytes of a table, of choices, of cases; real ones have some 100 KB
_SHOWN = 4096  # characters of a path that an error shows: no system opens a longer one


def on_disk(path: Path) -> str:
    """Return the text of a file that may be anybody's; raises ProjectError if it has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path, most: int = MAX_FILE) -> str:
    """Return the text of a file that should be UTF-8; raises ProjectError naming it.

    A pipe could keep a command waiting, a device fill the memory: only a regular file is read, and
    none of more than `most` bytes.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(most + 1) if regular else b""
        reason = "" if regular else "it is a pipe or a device, not a regular file"
        if len(content) > most:
            reason = f"it is longer than {most // 1024} KB"
        text = content.decode("utf-8-sig")  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8"
    if reason:
        raise ProjectError(f"cannot read {str(path)[:_SHOWN]}: {reason}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to, too, at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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


def is_regular(path: Path) -> bool:
    """Whether a file lies at `path` itself, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other build writes into `folder`; clear away what killed ones left there.

    Where the system has no locks for folders, builds do not wait, and nothing is cleared away.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no right to write: told later
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(_locked(folder)):
                for name in os.listdir(folder):
                    if re.fullmatch(_TEMPORARY, name) and is_regular(folder / name):
                        _clear(folder / name)
        yield


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder; yield whether it is held, False if there are no locks."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(ImportError, OSError):  # no locks here, or another has this one
            import fcntl

            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held


def _clear(path: Path) -> None:
    """Remove a file that was being written, unless somebody still writes it."""
    with _locked(path, wait=False) as abandoned:
        if abandoned:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode(), private=private)


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file whole or not at all; raises ProjectError if the folder does not allow it.

    It keeps the mode of the file that it replaces; a new one has what the umask leaves, and a new
    `private` one may be changed by nobody else, as `check_private` wants it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = stat.S_IMODE(path.lstat().st_mode) if is_regular(path) else None
        new = 0o644 if private else 0o666
        with _temporary(path, new if kept is None else kept) as (temporary, file):
            if kept is not None:  # the umask may have taken some of it
                os.chmod(temporary, kept)
            with file:
                file.write(content)
            os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, _in_the_way(path) or error.strerror) from None


@contextlib.contextmanager
def _temporary(path: Path, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """Make a file beside `path`, locked so that no build clears it away; remove it after."""
    with contextlib.ExitStack() as stack:
        while True:
            # An ending that build backends leave out: another build may pack the folder now.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.pyc")
            file = stack.enter_context(open(temporary, "xb", opener=partial(os.open, mode=mode)))
            stack.callback(temporary.unlink, missing_ok=True)
            stack.enter_context(_locked(temporary))
            if temporary.exists():  # else a build cleared it away before it was locked
                break
        yield temporary, file


def is_stream(path: Path) -> bool:
    """Whether `path` takes what is written into it: a device, a pipe, an open file's /dev/fd/N."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _is_open_file(path)


def _is_open_file(path: Path) -> bool:
    """Whether `path` names a file by the number under which a process has it open."""
    pointed = path.parent / os.readlink(path) if path.is_symlink() else path  # /dev/stdout
    folders = [os.path.realpath(each.parent) for each in (path, pointed)]
    return any(folder.startswith(("/proc/", "/dev/fd")) for folder in folders)


def check_output(path: Path, refusal: Callable[[str], str | None], *, force: bool) -> None:
    """Raise ProjectError if `write_output` cannot or must not write to `path`.

    Args:
        path: where a user points.
        refusal: why a file of this text must not be overwritten, None if it may be; it is not
            asked about streams, which are never read.
        force: any file may be overwritten, and a link to nothing made one to a file.
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
            said = f"{path} is a link to {real}, which is not there; --force makes it"
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
    """Return the text of a file that may be anybody's, as far as a file of convgen's could go."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None


def write_output(path: Path, text: str) -> None:
    """Write what a command was told to write to `path`, which `check_output` has allowed."""
    if not is_stream(path):
        write_text(Path(os.path.realpath(path)), text)
        return
    try:
        # To append, as a shell's >> asks for; pipes and devices do so anyway.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
            file.write(text.encode())
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def check_writable(path: Path) -> None:
    """Raise ProjectError if `path` cannot be written, before there is something to write."""
    reason = _in_the_way(path)
    if reason is not None:
        raise _unwritable(path, reason)
    folder = next((each for each in path.parents if os.path.exists(each)), Path())
    if not os.access(folder, os.W_OK):
        raise _unwritable(path, f"{folder} does not allow it")


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there, into which others may not write; raises ProjectError."""
    try:
        path.mkdir(0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, _in_the_way(path / "file") or error.strerror) from None


def check_private(path: Path) -> None:
    """Raise ProjectError if others than root may change a file, or what lies in a folder.

    To a folder with the sticky bit, as /tmp has it, others may add files, but not change those of
    somebody else: a file in one needs a check of its own. Who may write to a folder above could put
    another in its place.
    """
    for each in (path, *path.absolute().parents):
        _check_mode(each, whose=each == path)


def _check_mode(path: Path, *, whose: bool) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise ProjectError(f"cannot read {path}: {error.strerror}") from None
    if not hasattr(os, "geteuid"):  # no modes here
        return
    if whose and found.st_uid not in (os.geteuid(), 0):
        raise ProjectError(f"{path} belongs to another user; use a place of your own")
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    shared = found.st_mode & stat.S_IWGRP and not _has_one_member(found.st_gid, found.st_uid)
    if (shared or found.st_mode & stat.S_IWOTH) and not sticky:
        raise ProjectError(f"others may write to {path}; use a place of your own, or chmod go-w it")


def _has_one_member(group: int, user: int) -> bool:
    """Whether a group is the user's private one, as many systems give to each."""
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
    """Say which file stands where a folder of `path` should, None if there is none."""
    # Not Path.is_file, which raises where a name is too long or a folder may not be read.
    files = [each for each in path.parents if os.path.isfile(each)]
    return f"{files[0]} is a file, not a folder" if files else None
