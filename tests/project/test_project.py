"""`convgen build`: what it writes, what it leaves alone, and which target wins.

A build runs often and beside people's own files: it must touch only what differs, never leave half
a file, and never lose what somebody wrote.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import convgen
from convgen import ConvgenError
from convgen.files import only_writer, write_text
from convgen.planning.choices import text_of
from convgen.project.build import generate, write
from convgen.project.table import has_table, read_table
from running import SMALL, make_project, rows, run

LONG_AGO = 10**18  # nanoseconds


def contents(folder: Path) -> dict[str, str]:
    """Return name to text of everything in `folder` but the manifest, hidden files too."""
    paths = (path for path in folder.iterdir() if path.name != "manifest.json")
    return {path.name: path.read_text("utf-8") for path in paths}


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Open a folder as another process would: locks of this one's are not its own."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def built(folder: Path, *names: str) -> Path:
    """Return the output folder of a project that was just built."""
    make_project(folder, rows(*names))
    assert run("build", folder).exit_code == 0
    return folder / "kernels"


# ---- what is written ----


def test_a_build_writes_each_kernel_under_its_name(tmp_path):
    document = f"two = {SMALL}\nthree = relu | {SMALL}\n"
    table = 'specs = ["other.convgen"]\n' + rows("one")
    folder = make_project(tmp_path, table, other=document) / "kernels"
    done = run("build", tmp_path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert contents(folder) == {
        "one.py": convgen.emit(SMALL),
        "two.py": convgen.emit(SMALL),
        "three.py": convgen.emit(f"relu | {SMALL}"),
    }


@pytest.fixture
def umask():
    """Return a function that sets the umask until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask, mask, mode):
    """A temporary file is private by default; installed packages are read by other users."""
    umask(mask)
    path = built(tmp_path, "one") / "one.py"
    assert path.stat().st_mode & 0o777 == mode
    assert b"\r" not in path.read_bytes()


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o444])
def test_a_file_that_is_written_anew_keeps_its_mode(tmp_path, mode):
    path = built(tmp_path, "one") / "one.py"
    path.chmod(mode)
    make_project(tmp_path, rows("one", spec=f"relu | {SMALL}"))
    assert run("build", tmp_path).exit_code == 0
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_text("utf-8") == convgen.emit(f"relu | {SMALL}")


def test_only_what_changed_is_written(tmp_path):
    """A new time on an unchanged file makes everything that depends on it build again."""
    folder = built(tmp_path, "one", "two")
    for name in ("one.py", "two.py"):
        os.utime(folder / name, ns=(LONG_AGO, LONG_AGO))
    make_project(tmp_path, rows("one") + rows("two", spec=f"relu | {SMALL}").partition("\n")[2])
    done = run("build", tmp_path)
    assert done.stderr.splitlines() == [
        f"rewrite {folder / 'two.py'}",
        f"rewrite {folder / 'manifest.json'}",
        "3 files, 2 brought up to date",
    ]
    assert (folder / "one.py").stat().st_mtime_ns == LONG_AGO
    assert (folder / "two.py").stat().st_mtime_ns != LONG_AGO


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["os.replace", "os.chmod"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fault, function):
    """A full disk or Ctrl-C in the middle leaves neither half a file nor a temporary one."""
    folder = built(tmp_path, "one")
    old = contents(folder)
    make_project(tmp_path, rows("one", spec=f"relu | {SMALL}"))
    build = generate(tmp_path)

    def failing(*_):
        raise fault

    monkeypatch.setattr(function, failing)
    with pytest.raises((ConvgenError, KeyboardInterrupt)):
        write(build)
    monkeypatch.undo()
    assert contents(folder) == old
    write(build)
    assert list(contents(folder)) == ["one.py"]


def test_a_link_is_replaced_not_followed(tmp_path):
    """A link out of the output folder must not carry a write out of the project."""
    folder = built(tmp_path, "one")
    outside = tmp_path / "outside.py"
    (folder / "one.py").rename(outside)
    (folder / "one.py").symlink_to(outside)
    make_project(tmp_path, rows("one", spec=f"relu | {SMALL}"))
    assert run("build", tmp_path).exit_code == 0
    assert not (folder / "one.py").is_symlink()
    assert outside.read_text("utf-8") == convgen.emit(SMALL)


@pytest.mark.parametrize("there", [True, False], ids=["somebody's", "nothing"])
def test_a_link_to_what_no_build_made_stops_the_whole_build(tmp_path, there):
    """It was put there for a reason; --force replaces the link and not what it leads to."""
    folder = built(tmp_path, "one", "two")
    (folder / "one.py").unlink()
    (folder / "one.py").symlink_to("../secret")
    if there:
        (tmp_path / "secret").write_text("mine\n")
    done = run("build", tmp_path)
    assert done.exit_code == 1
    assert f"{folder / 'one.py'} was not generated" in done.stderr
    assert os.readlink(folder / "one.py") == "../secret"
    assert run("build", tmp_path, "--force").exit_code == 0
    assert (folder / "one.py").is_file()
    assert not (folder / "one.py").is_symlink()
    assert (tmp_path / "secret").exists() is there
    assert not there or (tmp_path / "secret").read_text() == "mine\n"


@pytest.mark.parametrize("name", ["one.py", "manifest.json", "__init__.py", "old.py"])
def test_what_a_link_leads_to_is_not_shown(tmp_path, name):
    """A report of CI would publish it; a link that no kernel names is ignored."""
    secret = tmp_path / "secret"
    secret.write_text(convgen.emit(SMALL) + "password = 1\n")
    table = rows("one").replace('name = "one"', 'name = "one"\nclass-name = "One"')
    project = make_project(tmp_path / "project", table)
    assert run("build", project).exit_code == 0
    link = project / "kernels" / name
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    done = run("build", project, "--diff")
    assert done.stdout == (f"a link, not a file: {link}\n" if name != "old.py" else "")
    assert done.exit_code == (name != "old.py")
    assert "password" not in run("build", project, "--diff", "--json").output
    assert "password" not in run("build", project, "--check").output


def test_a_link_to_the_very_file_differs(tmp_path):
    """The package would be shipped without what the link leads to."""
    folder = built(tmp_path, "one")
    (folder / "one.py").rename(tmp_path / "one.py")
    (folder / "one.py").symlink_to("../one.py")
    done = run("build", tmp_path, "--check")
    assert (done.exit_code, done.stderr.splitlines()[0]) == (1, f"changed {folder / 'one.py'}")


# ---- what is removed and what is kept ----


def test_a_kernel_that_is_gone_takes_its_file_along(tmp_path):
    """A stale kernel would be imported and shipped for ever; other people's files are kept."""
    folder = built(tmp_path, "one", "two")
    (folder / "__init__.py").write_text("from .one import ModelNew\n")
    (folder / "binary.py").write_bytes(b"\xff\xfe")
    (folder / "package.py").mkdir()
    make_project(tmp_path, rows("one"))
    done = run("build", tmp_path)
    assert f"remove {folder / 'two.py'}" in done.stderr
    left = ["__init__.py", "binary.py", "manifest.json", "one.py", "package.py"]
    assert sorted(path.name for path in folder.iterdir()) == left


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("place", ["\n# target", "\n\n", "\nimport torch\n"])
def test_a_stale_file_that_was_edited_is_kept_and_reported(tmp_path, force, place):
    """Somebody works on it: it goes only by hand, and the report says that it is still there."""
    folder = built(tmp_path, "one", "two")
    edited = contents(folder)["two.py"].replace(place, f"\n# my work{place}", 1)
    (folder / "two.py").write_text(edited)
    make_project(tmp_path, rows("one"))
    done = run("build", tmp_path, *force)
    assert done.exit_code == 1
    kept = f"kept (edited, no kernel names it) {folder / 'two.py'}"
    assert kept in done.stderr.splitlines()
    assert "2 files, 1 brought up to date" in done.stderr
    assert contents(folder)["two.py"] == edited
    assert run("build", tmp_path, "--check").exit_code == 1


@pytest.mark.parametrize(
    "text",
    [
        b"mine\n",
        b"",
        b"\xff\xfe",
        b"# Code generated by convgen 0.0.1. DO NOT EDIT.\n# body sha256: 0\n\nmine\n",
        convgen.emit(SMALL).replace("\n\n", "\nimport mine\n\n", 1).encode(),
        convgen.emit(SMALL).replace("\n# target", "\n# mine\n# target").encode(),
    ],
    ids=["foreign", "empty", "binary", "edited", "edited below the header", "edited header"],
)
def test_a_file_in_the_way_stops_the_whole_build(tmp_path, text):
    """Half a build would be a folder of two versions; --force is the way through."""
    make_project(tmp_path, rows("a", "b", "c"))
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "b.py").write_bytes(text)
    stale = convgen.emit(SMALL)
    (folder / "stale.py").write_text(stale)
    done = run("build", tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert (
        f"{folder / 'b.py'} was not generated, or was edited since; `convgen build --force`"
        in done.stderr
    )
    assert sorted(path.name for path in folder.iterdir()) == ["b.py", "stale.py"]
    assert (folder / "b.py").read_bytes() == text

    assert run("build", tmp_path, "--diff").exit_code == 1
    assert (folder / "b.py").read_bytes() == text
    assert run("build", tmp_path, "--force").exit_code == 0
    assert contents(folder) == dict.fromkeys(("a.py", "b.py", "c.py"), stale)


def test_a_folder_in_the_way_stops_the_whole_build(tmp_path):
    """Before anything is written: half a build would be a folder of two versions."""
    make_project(tmp_path, rows("a", "b"))
    (tmp_path / "kernels" / "manifest.json").mkdir(parents=True)
    done = run("build", tmp_path, "--force")
    assert done.exit_code == 2
    assert "manifest.json is a folder" in done.stderr
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["manifest.json"]


def test_a_pipe_in_the_way_stops_the_whole_build(tmp_path):
    """To read it would wait for ever."""
    folder = make_project(tmp_path, rows("a", "b")) / "kernels"
    folder.mkdir()
    os.mkfifo(folder / "b.py")
    os.mkfifo(folder / "old.py")
    for more in ((), ("--force",)):
        done = run("build", tmp_path, *more)
        assert done.exit_code == 2
        assert f"{folder / 'b.py'} is a device or a pipe, but a generated file " in done.stderr
    assert run("build", tmp_path, "--diff").exit_code == 1
    assert sorted(path.name for path in folder.iterdir()) == ["b.py", "old.py"]


@pytest.mark.parametrize("command", [("build",), ("build", "--check")])
def test_a_folder_that_cannot_be_read_is_no_bug(tmp_path, monkeypatch, command):
    """Permissions do not bind root, so that the system's answer stands in for them."""
    make_project(tmp_path, rows("a"))

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    done = run(command[0], tmp_path, *command[1:])
    assert done.exit_code == 2
    assert f"cannot read {tmp_path / 'kernels'}: Permission denied" in done.stderr


@pytest.mark.parametrize("key", ["output", "specs", "choices"])
def test_a_project_stays_inside_its_folder(tmp_path, key):
    """A table copied from elsewhere must not write into, or read from, the folder next door."""
    (tmp_path / "next_door").mkdir()
    (tmp_path / "next_door" / "a.convgen").write_text(f"up = {SMALL}\n")
    (tmp_path / "next_door" / "a.json").write_text(text_of("rtx4090", {"device": "a card"}, []))
    (tmp_path / "downstream").mkdir()
    (tmp_path / "downstream" / "link").symlink_to(tmp_path / "next_door")
    for place in ("../next_door", str(tmp_path / "next_door"), "link", "a/../../next_door"):
        value = {
            "output": f'"{place}"',
            "specs": f'["{place}/a.convgen"]',
            "choices": f'"{place}/a.json"',
        }[key]
        table = {"output": '"kernels"', "specs": "[]"} | {key: value}
        text = "\n".join(f"{name} = {value}" for name, value in table.items())
        done = run("build", make_project(tmp_path / "downstream", text))
        assert done.exit_code == 2
        assert f"{key} must stay inside the project" in done.stderr
        if place == "link" and key == "output":
            assert f"which is {tmp_path / 'next_door'}" in done.stderr
    names = {path.name for path in (tmp_path / "next_door").iterdir()}
    assert names == {"a.convgen", "a.json"}


def test_a_build_waits_for_another_one(tmp_path):
    """Else it takes the file that the other is writing for one that a killed build left."""
    fcntl = pytest.importorskip("fcntl")
    folder = make_project(tmp_path, rows("a")) / "kernels"
    folder.mkdir()
    half = folder / ".b.py.abcd1234.pyc"
    half.write_text("half a ker")
    build = generate(tmp_path)
    second = threading.Thread(target=write, args=(build,), daemon=True)
    with open_folder(folder) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second.start()
        second.join(0.3)  # what it has to write takes it some milliseconds
        assert second.is_alive()
        assert contents(folder) == {half.name: "half a ker"}
    second.join(60)
    assert contents(folder) == {"a.py": build.texts[folder / "a.py"]}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'[tool.convgen]\noutput = "k"\n', True),
        (b'\xef\xbb\xbf[tool.convgen]\r\noutput = "k"\r\n', True),
        (b"[tool.other]\nconvgen = 1\n", False),
        (b'[project]\ndependencies = ["convgen"]\n', False),
        (b"tool = 3 # convgen\n", False),
        (b"[tool.convgen", False),
        (b"\xff convgen", False),
        (None, False),
    ],
)
def test_builds_of_other_projects_are_none_of_ours(tmp_path, text, found):
    """The entry point of setuptools asks this in every build."""
    if text is not None:
        (tmp_path / "pyproject.toml").write_bytes(text)
    assert has_table(tmp_path) is found


# ---- targets ----

LAYER = "ConvTranspose2d(4, 2, 3)"
FOR_H100 = "ConvTranspose2d(4, 2, 3, target=h100)"


@pytest.mark.parametrize(
    ("table", "row", "spec", "winner"),
    [
        (None, None, LAYER, "rtx4090"),
        ("a100", None, LAYER, "a100"),
        ("a100", "l40s", LAYER, "l40s"),
        ("a100", "l40s", FOR_H100, "h100"),
        ("a100", None, FOR_H100, "h100"),
    ],
    ids=["the default", "the table", "the row", "the spec", "the spec over the table"],
)
def test_the_nearest_target_wins(tmp_path, table, row, spec, winner):
    """From far to near: the default, the table, the kernel's row, the argument in the spec."""
    text = f'target = "{table}"\n' * (table is not None) + rows("up", spec=spec)
    text += f'target = "{row}"\n' * (row is not None)
    (kernel,) = read_table(make_project(tmp_path, text)).kernels
    assert (kernel.path.name, kernel.target) == ("up.py", winner)
    assert f"# target: {winner} (" in generate(tmp_path).texts[kernel.path]


@pytest.mark.parametrize(
    ("table", "document", "winner"),
    [
        ('target = "a100"\n', "", "a100"),
        ('target = "a100"\n', "target = l40s\n", "l40s"),
        ("", "target = l40s\n", "l40s"),
    ],
)
def test_a_document_s_target_is_nearer_than_the_table_s(tmp_path, table, document, winner):
    """It counts for every statement of its file but those that name their own."""
    table += 'output = "kernels"\nspecs = ["all.convgen"]'
    document += f"far = {LAYER}\nnear = {FOR_H100}\n"
    kernels = read_table(make_project(tmp_path, table, all=document)).kernels
    assert {k.path.name: k.target for k in kernels} == {"far.py": winner, "near.py": "h100"}


@pytest.mark.parametrize(
    ("arguments", "spec", "winner"),
    [
        ((), LAYER, "rtx4090"),
        ((), f"target = a100\nup = {LAYER}", "a100"),
        ((), f"target = a100\nup = {FOR_H100}", "h100"),
        (("--target", "b200"), f"target = a100\nup = {FOR_H100}", "b200"),
    ],
)
def test_the_command_line_s_target_is_the_nearest(tmp_path, arguments, spec, winner):
    (tmp_path / "up.convgen").write_text(spec)
    for given in (spec, tmp_path / "up.convgen"):
        assert f"# target: {winner} (" in run("emit", given, *arguments).stdout


def test_several_targets_make_a_file_each(tmp_path):
    """A kernel that names its own target is built for that one only, under the same pattern."""
    document = f"far = {LAYER}\nnear = {FOR_H100}\n"
    table = 'output = "kernels"\ntarget = ["a100", "b200"]\nspecs = ["all.convgen"]'
    make_project(tmp_path, table, all=document)
    assert run("build", tmp_path).exit_code == 0
    texts = contents(tmp_path / "kernels")
    assert set(texts) == {"__init__.py", "far_a100.py", "far_b200.py", "near_h100.py"}
    del texts["__init__.py"]
    for name, text in texts.items():
        assert f"# target: {Path(name).stem.partition('_')[2]} (" in text


def test_one_target_in_a_list_is_still_a_list(tmp_path):
    """So that a second target, added later, renames nothing."""
    make_project(tmp_path, 'target = ["a100"]\n' + rows("up"))
    assert str(tmp_path / "kernels" / "up_a100.py") in run("list-files", tmp_path).stdout


KILLED = """
import os, pathlib, sys
from convgen.files import write_text
os.replace = lambda *_: os.kill(os.getpid(), 9)
write_text(pathlib.Path(sys.argv[1]), "half a ker")
"""


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    """A file that was being written has no use; nothing else is touched."""
    project = make_project(tmp_path, rows("up"))
    folder = project / "kernels"
    subprocess.run([sys.executable, "-c", KILLED, folder / "up.py"], check=False)
    assert [path.suffix for path in folder.iterdir()] == [".pyc"]
    (folder / ".mine.pyc").write_text("mine")
    (folder / ".link.py.01234567.pyc").symlink_to(".mine.pyc")
    assert run("build", project).exit_code == 0
    left = [".link.py.01234567.pyc", ".mine.pyc", "manifest.json", "up.py"]
    assert sorted(path.name for path in folder.iterdir()) == left


def test_a_file_that_is_written_again_clears_what_was_left_of_it(tmp_path):
    """`emit -o` has no folder of its own to clear: what is another file's stays."""
    path = tmp_path / "up.py"
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    (tmp_path / ".up.py.01234567.py.01234567.pyc").write_text("another file's")
    write_text(path, "whole")
    assert contents(tmp_path) == {
        "up.py": "whole",
        ".up.py.01234567.py.01234567.pyc": "another file's",
    }


@pytest.mark.parametrize("moment", ["os.chmod", "os.replace"])
def test_what_is_being_written_is_not_cleared_away(tmp_path, monkeypatch, moment):
    """Another build may begin while `emit -o` or `replace_layers` writes into its folder."""
    path = tmp_path / "kernels" / "up.py"
    write_text(path, "old")
    real = getattr(os, moment.removeprefix("os."))

    def meanwhile(*arguments):
        with only_writer(path.parent):
            return real(*arguments)

    monkeypatch.setattr(moment, meanwhile)
    write_text(path, "new")
    assert contents(path.parent) == {"up.py": "new"}


def test_a_hook_can_fail_when_a_file_changed(tmp_path):
    """pre-commit sees only what is tracked: a new file, say, would pass without a word."""
    make_project(tmp_path, rows("up"))
    strict = ("build", tmp_path, "--exit-non-zero-on-change")
    assert [run(*strict).exit_code for _ in range(2)] == [1, 0]
    (tmp_path / "kernels" / "up.py").unlink()
    assert [run(*strict).exit_code for _ in range(2)] == [1, 0]


def test_what_the_files_are_made_of_is_listed(tmp_path):
    """Build systems build again when one of these changes."""
    table = f'output = "kernels"\nspecs = ["small.convgen"]\n{rows("up").partition(chr(10))[2]}'
    make_project(tmp_path, table, small=f"down = {SMALL}\n")
    listed = run("list-files", "--sources", tmp_path).stdout.split()
    assert listed == [str(tmp_path / "pyproject.toml"), str(tmp_path / "small.convgen")]


def test_a_name_that_no_system_has_is_told_shortly(tmp_path):
    make_project(tmp_path, rows("up").replace('"kernels"', f'"{"a" * 5000}"'))
    done = run("build", tmp_path)
    assert done.exit_code == 2
    assert "cannot use output, 'aaa" in done.stderr
    assert len(done.stderr) < 1000
