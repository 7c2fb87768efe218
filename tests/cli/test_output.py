"""Where `-o` may point: files, links, devices, pipes, and what other people wrote.

What would break it: a device that is replaced by a file, a pipe that is read and waits for ever, a
link that is lost, a file of somebody's that a mistyped name overwrites.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import pytest

import convgen
from convgen.files import check_output, write_output
from running import SMALL, run, start

WANTED = convgen.emit(SMALL).encode()
force = pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])


def anything(text):
    """Refuse to overwrite whatever is there."""
    return "is somebody's"


class Reader:
    """Reads a pipe beside the test, from its name."""

    def __init__(self, path):
        self.path, self.content = path, b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        self.content = self.path.read_bytes()

    def all(self):
        self.thread.join(20)
        return self.content


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@pytest.fixture
def null(tmp_path):
    """A null device of the test's own: a failure must not take the system's."""
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.write_bytes(b"")
    except OSError:
        pytest.skip("may not make devices here")
    return path


# ---- what is no file ----


@force
def test_a_pipe_gets_the_file_and_is_not_read(pipe, force):
    """To read it first would wait for a writer that never comes."""
    reader = Reader(pipe)
    done = start("emit", SMALL, "-o", pipe, *force, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")
    assert reader.all() == WANTED
    assert pipe.is_fifo()


@force
def test_a_device_stays_one(null, force):
    """As root nothing but convgen itself protects it."""
    assert run("emit", SMALL, "-o", null, *force).exit_code == 0
    assert null.is_char_device()
    assert [path.name for path in null.parent.iterdir()] == ["null"]


def test_the_name_of_stdout_is_stdout(tmp_path):
    """A pipe, or a file, which must not be replaced: the shell's has the old one open."""
    done = start("emit", SMALL, "-o", "/dev/stdout", timeout=60)
    assert (done.returncode, done.stdout) == (0, WANTED)
    command = [sys.executable, "-m", "convgen", "emit", SMALL, "-o", "/dev/stdout"]
    with (tmp_path / "out").open("w+b") as out:
        out.write(b"before\n")
        out.flush()
        inode = os.fstat(out.fileno()).st_ino
        subprocess.run(command, check=True, stdout=out, stderr=subprocess.DEVNULL, timeout=60)
    assert (tmp_path / "out").read_bytes() == b"before\n" + WANTED
    assert (tmp_path / "out").stat().st_ino == inode


def test_a_shell_s_process_substitution(tmp_path):
    """`-o >(cmd)` is the number of an open pipe."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reading, os.fdopen(write, "wb") as writing:
        name = f"/dev/fd/{writing.fileno()}"
        done = start("emit", SMALL, "-o", name, pass_fds=[writing.fileno()], timeout=60)
        writing.close()
        assert (done.returncode, reading.read()) == (0, WANTED)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_stream_that_takes_nothing_is_told_by_its_name():
    done = run("emit", SMALL, "-o", "/dev/full")
    assert done.exit_code == 2
    assert done.stderr == "error: cannot write /dev/full: No space left on device\n"


def test_nobody_is_asked_about_a_stream(null):
    check_output(null, anything, force=False)


# ---- links ----


def test_a_link_stays_one(tmp_path):
    """And the file that it points to is rewritten in its own folder."""
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "up.py", tmp_path / "link.py"
    target.write_text(convgen.emit(f"relu | {SMALL}"))
    link.symlink_to("there/up.py")
    assert run("emit", SMALL, "-o", link).exit_code == 0
    assert os.readlink(link) == "there/up.py"
    assert target.read_bytes() == WANTED
    target.write_text("mine\n")
    assert run("emit", SMALL, "-o", link).exit_code == 2
    assert target.read_text() == "mine\n"


def test_a_link_to_nothing_is_followed_only_with_force(tmp_path):
    """It may point anywhere, and somebody else may have put it there."""
    target, link = tmp_path / "there" / "up.py", tmp_path / "link.py"
    link.symlink_to(target)
    done = run("emit", SMALL, "-o", link)
    assert done.exit_code == 2
    assert f"{link} is a link to {target}, which does not exist; --force creates it" in done.stderr
    assert not target.parent.exists()
    assert run("emit", SMALL, "-o", link, "--force").exit_code == 0
    assert link.is_symlink()
    assert target.read_bytes() == WANTED


@force
def test_a_link_to_itself_is_no_bug(tmp_path, force):
    link = tmp_path / "link.py"
    link.symlink_to(link)
    done = run("emit", SMALL, "-o", link, *force)
    assert done.exit_code == 2
    assert f"cannot write {link}: Too many levels of symbolic links" in done.stderr
    assert link.is_symlink()


# ---- files ----


def test_a_folder_in_the_way_is_told(tmp_path):
    (tmp_path / "one.convgen").write_text(f"up = {SMALL}\n")
    (tmp_path / "up.py").mkdir()
    for more in ((), ("--force",)):
        done = run("emit", tmp_path / "one.convgen", "-o", tmp_path, *more)
        assert done.exit_code == 2
        assert f"cannot write {tmp_path / 'up.py'}: it is a folder" in done.stderr


def test_a_file_keeps_its_mode(tmp_path):
    path = tmp_path / "up.py"
    path.write_text("")
    path.chmod(0o640)
    write_output(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
