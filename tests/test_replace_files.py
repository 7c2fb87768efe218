"""The files that `convgen.replace_layers` writes: where, when, and what finds them again.

What would break it: a file for each layer, a file written over somebody's work, a class under a
name that nothing can import, a folder that stays when the process ends.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import convgen
from convgen import SpecError
from convgen.files import EditedError

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
    with pytest.raises(SpecError, match=r"^cannot write .* is a file, not a folder"):
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
