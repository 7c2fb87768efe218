"""The files that `convgen.replace_layers` writes: where, when, and what finds them again.

What would break it: a file for each layer, a file written over somebody's work, a class under a
name that nothing can import, a folder that stays when the process ends.
"""

import importlib.util
import linecache
import os
import py_compile
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import convgen
from convgen import ConvgenError
from convgen.errors import EditedError, ProjectError
from convgen.execution import loading
from convgen.files import check_private

pytestmark = pytest.mark.interpreter


def up(device, bias=True):
    """Return a layer in float64: it agrees closely with torch's."""
    return nn.ConvTranspose2d(4, 4, 3, 2, 1, bias=bias, device=device, dtype=torch.float64)


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 5, 3, device=device, dtype=torch.float64)


def test_a_folder_gets_a_file_for_each_spec(tmp_path, device):
    """Files that are written again, or under another name, would be compiled again."""
    models = [nn.Sequential(up(device), up(device), up(device, bias=False)) for _ in range(2)]
    kernels = tmp_path / "not" / "there"
    convgen.replace_layers(models[0], folder=kernels)
    files = {path: path.stat().st_mtime_ns for path in kernels.glob("*.py")}
    assert len(files) == 2
    assert all(path.name.startswith("conv_transpose2d_4_4_k3_s2_float64_") for path in files)
    convgen.replace_layers(models[1], folder=str(kernels))
    assert {path: path.stat().st_mtime_ns for path in kernels.glob("*.py")} == files
    assert type(models[0][0]) is type(models[1][0])


def test_an_edited_file_is_not_overwritten(tmp_path, device):
    convgen.replace_layers(up(device), folder=tmp_path)
    (path,) = (path for path in tmp_path.iterdir() if path.suffix == ".py")
    path.write_text("# mine")
    model = up(device)
    with pytest.raises(EditedError, match=f"^{path} was edited: move it"):
        convgen.replace_layers(model, folder=tmp_path)
    assert type(model) is nn.ConvTranspose2d
    assert path.read_text() == "# mine"
    with pytest.raises(ConvgenError, match=r"^cannot write .* is a file, not a folder"):
        convgen.replace_layers(model, folder=path / "below")


def child(code, folder, **variables):
    """Return the words that Python prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    options = {"cwd": folder, "env": os.environ | variables, "text": True}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **options).stdout.split()


@pytest.mark.parametrize("below", ["", "kernels"])
def test_a_pickled_model_is_loaded_where_its_folder_can_be_imported(
    below, x, tmp_path, device, monkeypatch
):
    """Under a name that another process cannot import, the class of a pickle is lost."""
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(up(device))
    want = model(x)
    convgen.replace_layers(model, folder=tmp_path / below)
    torch.save((model, x, want), tmp_path / "model.pt")
    code = """if True:
        import sys, torch
        model, x, want = torch.load("model.pt", weights_only=False)
        print(torch.allclose(model(x), want), "convgen" in sys.modules)"""
    assert child(code, tmp_path, PYTHONPATH=str(tmp_path)) == ["True", "False"]


PLANTED = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"


def planted_bytecode(path):
    """Put code of somebody else's where Python expects that of `path`; return where."""
    evil = path.with_name("evil.py")
    evil.write_text(PLANTED)
    where = Path(importlib.util.cache_from_source(path))
    py_compile.compile(evil, where, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    evil.unlink()
    return where


def written(folder):
    return next(path for path in folder.iterdir() if path.suffix == ".py")


def fresh(folder, monkeypatch):
    """Let the next call load the files of a folder again."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            monkeypatch.delitem(sys.modules, name)


def test_what_runs_is_the_text_that_was_compared(tmp_path, x, device, monkeypatch):
    """Not bytecode from beside it, nor what stands in the file a moment later."""
    convgen.replace_layers(up(device), folder=tmp_path)
    path = written(tmp_path)
    planted_bytecode(path)
    fresh(tmp_path, monkeypatch)
    model = nn.Sequential(up(device))
    want = model(x)
    real = loading.on_disk

    def then_swapped(name):
        text = real(name)
        name.write_text(PLANTED)
        return text

    monkeypatch.setattr(loading, "on_disk", then_swapped)
    convgen.replace_layers(model, folder=tmp_path)
    assert path.read_text() == PLANTED
    linecache.checkcache()
    assert torch.allclose(model(x), want)  # Triton reads the kernel's lines at its first call
    assert not (tmp_path / "ran").exists()


def test_planted_bytecode_would_run_if_it_were_imported(tmp_path, device, monkeypatch):
    """Else the test above proves nothing."""
    convgen.replace_layers(up(device), folder=tmp_path)
    planted_bytecode(written(tmp_path))
    child(f"import {written(tmp_path).stem}", tmp_path, PYTHONPATH=str(tmp_path))
    assert (tmp_path / "ran").exists() or (tmp_path / "__pycache__" / "ran").exists()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, device, monkeypatch, mode):
    """Whatever they put there would be imported, by a pickle at the latest."""
    monkeypatch.setattr("convgen.files._has_one_member", lambda group, user: False)
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(mode)
    model = up(device)
    with pytest.raises(
        ProjectError, match=f"^others may write to {folder}; use a folder of your own"
    ):
        convgen.replace_layers(model, folder=folder)
    assert type(model) is nn.ConvTranspose2d
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_somebody_else_is_refused(tmp_path, device, what):
    convgen.replace_layers(up(device), folder=tmp_path)
    path = tmp_path if what == "folder" else written(tmp_path)
    os.chown(path, 12345, -1)
    with pytest.raises(ProjectError, match=f"^{path} belongs to another user"):
        convgen.replace_layers(up(device), folder=tmp_path)


def test_a_folder_like_tmp_serves_for_files_of_one_s_own(tmp_path, device, monkeypatch):
    """Others may add files there, but not change any of ours; ours may not be open to them."""
    monkeypatch.setattr("convgen.files._has_one_member", lambda group, user: False)
    tmp_path.chmod(0o1777)
    before = os.umask(0)
    try:
        convgen.replace_layers(up(device), folder=tmp_path)
    finally:
        os.umask(before)
    path = written(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o666)
    with pytest.raises(ProjectError, match=f"^others may write to {path};"):
        convgen.replace_layers(up(device), folder=tmp_path)


@pytest.mark.parametrize("members", [[], ["me"], ["me", "you"]])
def test_a_group_of_one_is_no_others(tmp_path, monkeypatch, members):
    """Many systems give each user such a group, and a umask that lets it write."""
    monkeypatch.setattr("pwd.getpwuid", lambda user: SimpleNamespace(pw_name="me"))
    for name in ("me", "us"):
        group = SimpleNamespace(gr_name=name, gr_mem=members)
        monkeypatch.setattr("grp.getgrgid", lambda number, group=group: group)
        tmp_path.chmod(0o770)
        if name == "me" and "you" not in members:
            check_private(tmp_path)
        else:
            with pytest.raises(ProjectError, match="others may write"):
                check_private(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_not_read(tmp_path, device, kind):
    convgen.replace_layers(up(device), folder=tmp_path)
    path = written(tmp_path)
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.rename(tmp_path / "there")
        path.symlink_to("there")
    with pytest.raises(EditedError, match=f"^{path} was edited"):
        convgen.replace_layers(up(device), folder=tmp_path)


FORK = """if True:
    import inspect, os, pathlib, sys, torch, convgen

    def replaced(channels):
        model = torch.nn.ConvTranspose1d(channels, 2, 3)
        convgen.replace_layers(model)
        return pathlib.Path(inspect.getfile(type(model)))

    mine = replaced(1)
    child = os.fork()
    if child == 0:
        other = replaced(2)
        print(other.parent != mine.parent, other.exists(), other.parent.stat().st_mode & 0o77)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    print(mine.exists(), replaced(3).parent == mine.parent)
    import shutil
    shutil.rmtree(mine.parent)
    again = replaced(4)
    print(again.parent != mine.parent, again.exists(), again.parent.stat().st_mode & 0o77)
"""


def test_a_forked_process_leaves_its_parent_s_folder(tmp_path):
    """And has one of its own; one that is gone is not made again under the known name."""
    # Without a GPU: CUDA cannot be used in a process that is forked after its start.
    said = child(FORK, tmp_path, TMPDIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert said == ["True", "True", "0", "True", "True", "True", "True", "0"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith("convgen_")] == []


def test_the_own_folder_goes_with_the_process(tmp_path):
    """And importing convgen imports nothing that only a call needs."""
    code = """if True:
        import sys, convgen
        print(len({"torch", "triton", "sympy", "jinja2"} & set(sys.modules)))
        import inspect, torch
        model = torch.nn.ConvTranspose1d(2, 2, 3)
        convgen.replace_layers(model)
        print(inspect.getfile(type(model)))"""
    count, file = child(code, tmp_path, TMPDIR=str(tmp_path))
    assert count == "0"
    assert Path(file).is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["circle", "no UTF-8", "surrogate", "bytes", "below a shared one"])
def test_a_folder_that_cannot_be_one_is_refused(tmp_path, kind):
    """By a message, not by what the system or Triton says of it later."""
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    folders = {
        "circle": tmp_path / "circle",
        "no UTF-8": f"{tmp_path}/\udcff",
        "surrogate": f"{tmp_path}/\ud800",
        "bytes": bytes(tmp_path),
        "below a shared one": tmp_path / "shared" / "own",
    }
    with pytest.raises(ConvgenError, match=r"folder must|cannot write|others may write"):
        convgen.replace_layers(nn.ConvTranspose1d(2, 2, 2), folder=folders[kind])
