"""Models with emitted layers that are saved: another process loads them, or a warning says why not.

What would break it: a class that only this process has, a copy that emits its file again, a warning
that comes where nothing is saved. The other processes get torch's own results to compare with.
"""

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
from torch._dynamo.testing import CompileCounter

import convgen
import spawned
from convgen.network import saving
from interpreting import skip_where_it_fails

pytestmark = pytest.mark.interpreter


def up(device="cpu"):
    return nn.ConvTranspose2d(4, 4, 3, 2, 1, device=device, dtype=torch.float64)


@pytest.fixture
def x(device):
    torch.manual_seed(2)
    return torch.randn(2, 4, 5, 3, device=device, dtype=torch.float64)


def other_process(code, folder, *paths):
    """Return the words that Python prints in a folder, with warnings as errors."""
    variables = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-W", "error", "-c", code]
    options = {"cwd": folder, "env": os.environ | variables, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LOADS = """if True:
    import pickle, torch, convgen
    model, x, want = torch.load("model.pt", weights_only=False)
    model = pickle.loads(pickle.dumps(model))
    print(torch.allclose(model(x), want), *(r.kernel_calls for r in convgen.report(model).layers))
    convgen.restore_layers(model)
    print(type(model[0]).__name__, torch.allclose(model(x), want))
"""

MINE = "import torch.nn as nn\n\nclass Mine(nn.ConvTranspose2d):\n    pass\n"


@pytest.mark.parametrize("kept", [False, True], ids=["no folder", "folder"])
@pytest.mark.parametrize("name", ["ConvTranspose2d", "Mine"])
def test_a_model_is_loaded_by_another_process(name, kept, x, device, tmp_path, monkeypatch):
    """With its kernel, whether its file is still there or is emitted again."""
    (tmp_path / "saved_layers.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    layer = up(device)
    if name == "Mine":
        layer.__class__ = importlib.import_module("saved_layers").Mine
    model = nn.Sequential(layer)
    want = model(x).detach()
    convgen.replace_layers(model, folder=tmp_path if kept else None)
    torch.save((model, x, want), tmp_path / "model.pt")
    assert other_process(LOADS, tmp_path, tmp_path) == ["True", "1", name, "True"]
    monkeypatch.delitem(sys.modules, "saved_layers", raising=False)


def test_a_folder_that_is_given_once_stays(x, device, tmp_path, monkeypatch):
    """A second call without it finds the layers as they should be, and changes nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(up(device))
    want = model(x).detach()
    convgen.replace_layers(model, folder=tmp_path)
    convgen.replace_layers(model)
    torch.save((model, x, want), tmp_path / "model.pt")
    (path,) = (path for path in tmp_path.glob("conv_*.py"))
    path.unlink()
    code = "import torch; torch.load('model.pt', weights_only=False)"
    with pytest.raises(AssertionError, match=f"No module named '{path.stem}'"):
        other_process(code, tmp_path, tmp_path)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copy_says_nothing_and_emits_nothing(way, x, device, monkeypatch):
    model = up(device)
    convgen.replace_layers(model)
    monkeypatch.setattr(saving, "compile_kernel", None)
    other = way(model)
    assert type(other) is type(model)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kept", [False, True], ids=["no folder", "folder"])
def test_spawned_processes_get_the_model(kept, tmp_path, monkeypatch):
    skip_where_it_fails()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = nn.Sequential(up()).requires_grad_(False)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    want, results = model(x), torch.zeros(1).share_memory_()
    convgen.replace_layers(model, folder=tmp_path if kept else None)
    mp.spawn(spawned.compute, (model, x, want, results), nprocs=1)
    assert results.tolist() == [2]


# ---- programs ----


def exported(model, x, path):
    torch.export.save(torch.export.export(model, (x,)), path)


def traced(model, x, path):
    torch.jit.save(torch.jit.trace(model, (x,)), path)


LOADED = {
    exported: "torch.export.load('program.pt2').module()",
    traced: "torch.jit.load('program.pt2')",
}
OLD = "ignore:`torch.jit.:DeprecationWarning"
# What torch itself does when it loads: by jit, and by torch 2.11's export.
QUIET = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable")"""


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("save", LOADED)
def test_a_program_that_cannot_be_loaded_is_warned_of(save, x, device, tmp_path):
    model = nn.Sequential(up(device)).requires_grad_(False)
    convgen.replace_layers(model)
    message = r"^the file of conv_transpose2d_4_4_\S* goes when this process ends, .*restore_layers"
    with pytest.warns(UserWarning, match=message):
        save(model, x, tmp_path / "program.pt2")


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("save", LOADED)
def test_a_program_is_loaded_where_its_file_is_imported(save, x, device, tmp_path, monkeypatch):
    """Whoever gave a folder is not warned, even if the model had its file without one before."""
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(up(device)).requires_grad_(False)
    want = model(x)
    convgen.replace_layers(model)
    convgen.replace_layers(model, folder=tmp_path)
    save(model, x, tmp_path / "program.pt2")
    torch.save((x, want), tmp_path / "data.pt")
    code = f"""if True:{QUIET}
        import torch
        import {type(model[0]).__module__}
        x, want = torch.load("data.pt")
        print(torch.allclose({LOADED[save]}(x), want))"""
    assert other_process(code, tmp_path, tmp_path) == ["True"]


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("save", LOADED)
def test_a_restored_model_is_loaded_anywhere(save, x, device, tmp_path):
    model = nn.Sequential(up(device)).requires_grad_(False)
    convgen.replace_layers(model)
    convgen.restore_layers(model)
    want = model(x)
    save(model, x, tmp_path / "program.pt2")
    torch.save((x, want), tmp_path / "data.pt")
    code = f"""if True:{QUIET}
        import sys
        import torch
        x, want = torch.load("data.pt")
        print(torch.allclose({LOADED[save]}(x), want), "convgen" in sys.modules)"""
    assert other_process(code, tmp_path) == ["True", "False"]


def test_compiling_says_nothing(x, device):
    """A graph in memory needs no file that outlives the process, and a copy changes none."""
    torch._dynamo.reset()
    model = up(device)
    convgen.replace_layers(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.allclose(compiled(x), model(x))
        copy.deepcopy(model)
    assert counter.frame_count == 1
