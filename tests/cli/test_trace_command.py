"""`convgen trace`: from a model that a user names to a document that the other commands take.

What would break it: output of the model in the document, a traceback for a mistyped name or for an
exception of the user's own, and a document that `emit` or `build` does not read.
"""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from dataclasses import asdict

import pytest

from convgen import find_target, parse
from convgen.compiler import plan
from convgen.planning.choices import key_of, text_of
from running import make_project, run, start

NUMBERS = itertools.count()
NETS = """
import torch
from torch import nn


class Up(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.up = nn.ConvTranspose1d(width, 2, 4, 2)
        self.spare = nn.ConvTranspose1d(2, 2, 4, 2)

    def forward(self, x, token=None):
        print("in forward")
        if token is not None:
            x = x + self.embed(token).transpose(1, 2)
        return self.up(x)

    @classmethod
    def wide(cls):
        return cls(8)


class Holder:
    tiny = Up


model = Up()
number = 3
layer = nn.Conv1d(4, 2, 3)
print("imported")


def needs(depth, *, width):
    return Up(width)


def gives_none():
    return None


def raises():
    raise RuntimeError("no weights here\\nnor \\033[31mthere")


def leaves():
    raise SystemExit(3)


def odd():
    class Wider(nn.ConvTranspose1d):
        def forward(self, x):
            return super().forward(x)

    return Wider(4, 2, 4)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The name of a module in the current folder."""
    name = f"nets_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


SPEC = "ConvTranspose1d(4, 2, kernel_size=4, stride=2, input=(1, 4, 9))"


def traced(*words):
    done = run("trace", *words)
    assert done.exit_code == 0, done.stderr
    return done


@pytest.mark.parametrize("factory", ["Up", "model", "Holder.tiny"])
def test_stdout_is_the_document_alone(nets, factory):
    """Prints of the model would make it unreadable."""
    path = list(sys.path)
    done = traced(f"{nets}:{factory}", "--input", "1,4,9")
    assert done.stdout.endswith(f"\n\n# up\nup = {SPEC}\n\n# never called: spare\n")
    assert done.stderr == "imported\nin forward\nnever called: spare\n"
    assert sys.path == path


def test_options_reach_the_document_and_its_command_makes_it_again(nets):
    words = (f"{nets}:Up.wide", "--input", "1,8,9:float16", "--open", "batch")
    words += ("--dtype", "bfloat16", "--target", "h100")
    text = traced(*words).stdout
    spec = "ConvTranspose1d(8, 2, kernel_size=4, stride=2, input=(None, 8, 9), dtype=bfloat16)"
    assert f"target = h100\n\n# up\nup = {spec}\n" in text
    (command,) = (line for line in text.splitlines() if line.startswith("# regenerate: "))
    assert run(*command.removeprefix("# regenerate: convgen ").split()).stdout == text


def chosen(folder, torch_ms, target="rtx4090"):
    """Write a choices file, as tune does, in which the layer's kernel takes 0.5 ms."""
    tile = asdict(plan(parse(SPEC), find_target(target)).tile)
    row = {"spec": key_of(parse(SPEC)), "tile": tile, "ms": 0.5, "tried": 3}
    row |= {"torch": {"ms": torch_ms, "best_ms": 0.25}}
    (folder / "choices.json").write_text(text_of(target, {"device": "a card"}, [row]))


@pytest.mark.parametrize(("torch_ms", "slower"), [(0.375, True), (0.75, False)])
def test_kernels_slower_than_torch_are_told(nets, tmp_path, torch_ms, slower):
    """In the document for whoever reads it later, and in a message; with the numbers."""
    chosen(tmp_path, torch_ms)
    words = (f"{nets}:Up", "--input", "1,4,9", "--choices", "choices.json")
    done = traced(*words)
    said = (
        "at (1, 4, 9) in channels_first torch's operator takes 0.3750 ms (0.2500 ms in the better "
        "layout), the kernel for rtx4090 0.5000 ms (a card; choices.json)"
    )
    comment = "\n".join(
        line.removeprefix("# ") for line in done.stdout.partition("# up\n")[2].splitlines()
    )
    assert (f"Torch was measured to be faster: {said}." in comment.replace("\n", " ")) is slower
    assert (f"\nslower than torch: up: {said}\n" in done.stderr) is slower
    (command,) = (line for line in done.stdout.splitlines() if line.startswith("# regenerate: "))
    assert run(*command.removeprefix("# regenerate: convgen ").split()).stdout == done.stdout
    (kernel,) = json.loads(traced(*words, "--json").stdout)["kernels"]
    assert (kernel["slower"] or {"torch_ms": None})["torch_ms"] == (torch_ms if slower else None)
    assert traced(*words, "--open", "batch").stderr == "in forward\nnever called: spare\n"


def test_choices_of_a_trace_are_for_its_target(nets, tmp_path):
    chosen(tmp_path, 0.375, "h100")
    words = ("trace", f"{nets}:Up", "--input", "1,4,9", "--choices", "choices.json")
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "choices.json has choices for h100, not for rtx4090" in done.stderr
    assert "Torch was measured to be faster" in run(*words, "--target", "h100").stdout


def test_each_input_has_its_dtype(nets):
    done = traced(f"{nets}:Up", "--input", "2,4,9", "--input", " 2, 9 : int64")
    assert "input=(2, 4, 9))" in done.stdout


def test_json(nets, tmp_path):
    done = traced(f"{nets}:Up", "--input", "1,4,9", "-o", tmp_path / "k.convgen", "--json")
    assert json.loads(done.stdout) == {
        "schema": 1,
        "command": "trace",
        "kernels": [{"name": "up", "spec": SPEC, "layers": ["up"], "slower": None}],
        "left": [],
        "uncalled": ["spare"],
        "path": str(tmp_path / "k.convgen"),
        "text": (tmp_path / "k.convgen").read_text(),
    }


def test_a_project_builds_from_the_document(nets, tmp_path):
    make_project(tmp_path, 'output = "kernels"\ntarget = ["a100", "h100"]\nspecs = ["k.convgen"]')
    done = traced(f"{nets}:Up", "--input", "1,4,9", "-o", "k.convgen")
    assert (done.stdout, done.stderr[-16:]) == ("", "wrote k.convgen\n")
    assert run("build", tmp_path).exit_code == 0
    assert {"up_a100.py", "up_h100.py"} <= {path.name for path in (tmp_path / "kernels").iterdir()}


def test_an_edited_document_is_overwritten_only_with_force(nets, tmp_path):
    """Somebody added a stage to a traced layer."""
    words, path = (f"{nets}:Up", "--input", "1,4,9", "-o", "k.convgen"), tmp_path / "k.convgen"
    traced(*words), traced(*words)
    for edited, reason in (
        (path.read_text().replace("))", ")) | relu"), "was edited since convgen made it"),
        ("mine = ConvTranspose1d(1, 1, 3)\n", "was not made by `convgen trace`"),
    ):
        path.write_text(edited)
        done = run("trace", *words)
        said = f"error: k.convgen {reason}; --force overwrites it\n"
        assert (done.exit_code, done.stdout, done.stderr) == (2, "", said)
        assert path.read_text() == edited
    traced(*words, "--force")
    assert "relu" not in path.read_text()


def test_a_process_of_its_own_finds_modules_of_its_folder(nets, tmp_path):
    done = start("trace", f"{nets}:Up", "--input", "1,4,9", cwd=tmp_path)
    assert (done.returncode, SPEC.encode() in done.stdout) == (0, True)


# ---- wrong input ----

UNKNOWN = {
    "{}": "MODEL must be MODULE:FACTORY, names of Python such as nets:UNet, got '{}'",
    "": "MODEL must be MODULE:FACTORY",
    "{}:": "MODEL must be MODULE:FACTORY",
    ":Up": "MODEL must be MODULE:FACTORY",
    "folder/{}.py:Up": "MODEL must be MODULE:FACTORY",
    "{}:Up()": "MODEL must be MODULE:FACTORY",
    "{}x:Up": "there is no module {}x (did you mean {}",
    "torch.nnn:Linear": "there is no module torch.nnn (did you mean nn",
    "{}.py:Up": "module {} has no module py: it is no package; leave out the suffix .py",
    "__main__.x:Up": "no module",
    "{}:Upp": "{} has no Upp (did you mean Up",
    "{}:Holder.tinny": "{}:Holder has no tinny (did you mean tiny?)",
    "{}:number": "{}:number is 3, neither a torch.nn.Module nor a function that makes one",
    "{}:needs": "{}:needs needs arguments (depth, width); name a function that needs none",
    "{}:gives_none": "{}:gives_none must return a torch.nn.Module, got None",
    "{}:layer": "{}:layer: no transposed convolution that was called has a spec\n",
    "{}:odd": "left to torch: the model itself: its class Wider overrides forward",
}


def refused(*words):
    """Return the message of a command that must fail as a user's mistake."""
    done = run("trace", *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("rror: ") == 1
    return done.stderr


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_that_is_none(nets, name):
    message = refused(name.format(nets), "--input", "1,4,9", "-o", "k.convgen")
    assert UNKNOWN[name].replace("{}", nets) in message


OPTIONS = [
    (["--input", ""], "--input: must be sizes such as 4,3,256,256 or 1,80:float16, got ''"),
    (["--input", "1,,2"], "--input: must be sizes"),
    (["--input", "1,x"], "--input: must be sizes"),
    (["--input", "1,-4,9"], "--input: must be sizes"),
    (["--input", "\N{FULLWIDTH DIGIT ONE},4,9"], "--input: must be sizes"),
    (["--input", "1,0,9"], "--input: a size must be an integer from 1"),
    (["--input", "1," + "9" * 29], "--input: a size must be an integer from 1"),
    (["--input", "1,1099511627776,1099511627776"], "--input: "),
    (["--input", "1,4,9:float"], "--input: dtype must be one of float32, "),
    (["--input", "1,4,9:"], "--input: dtype must be one of float32, "),
    ([], "--input: forward(x, token=None) does not take 0 inputs"),
    (["--input", "1", "--input", "1", "--input", "1"], "does not take 3 inputs: too many"),
    (["--input", "1,4,9", "--target", "h10"], "--target: target must be one of"),
    (["--input", "1,4,9", "--open", "width"], "Invalid value for '--open'"),
    (["--input", "1,4,9", "--dtype", "float64"], "Invalid value for '--dtype'"),
    (["--input", "1,4,9", "--device", "tpu"], "Invalid value for '--device'"),
    (["--input", "1,4,9", "--zap"], "No such option '--zap'"),
    (["--input", "1,4,9", "-o", "/dev/null/k.convgen"], "cannot write"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[" ".join(w)[:30] for w, _ in OPTIONS])
def test_a_wrong_option(nets, words, message):
    assert message in refused(f"{nets}:Up", *words)


def test_a_gpu_that_is_not_there(nets, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees none" in refused(f"{nets}:Up", "--input", "1,4,9", "--device", "cuda")


def test_torch_that_is_not_there(nets, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "trace needs torch, of convgen's extra 'torch'" in refused(f"{nets}:Up")


BROKEN = {
    "import missing_module_x": "No module named 'missing_module_x'",
    "def f(:": "SyntaxError: ",
    "1 / 0": "ZeroDivisionError: division by zero",
    "import argparse; argparse.ArgumentParser().parse_args(['--zap'])": "SystemExit: 2",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_module_that_fails_fails_by_its_own_fault(nets, tmp_path, line):
    """As `there is no module` it would send the reader to the wrong place."""
    name = f"{nets}_broken"
    (tmp_path / f"{name}.py").write_text(f"x = 1\n{line}\n")
    done = run("trace", f"{name}:Up")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"error: importing {name} failed" in done.stderr
    assert BROKEN[line] in done.stderr
    assert f"{name}.py" in done.stderr
    assert "line 2" in done.stderr or f"{name}.py:2 in <module>\n  {line}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_fails_shows_its_own_line(nets, tmp_path):
    file = tmp_path / f"{nets}.py"
    line = NETS.split("\n").index("    raise SystemExit(3)") + 1
    done = run("trace", f"{nets}:leaves")
    said = f"error: {nets}:leaves failed, at {file}:{line} in leaves\n  raise SystemExit(3)\n"
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"imported\n{said}  SystemExit: 3\n"

    done = run("trace", f"{nets}:raises")
    assert done.exit_code == 1
    assert done.stderr.endswith("  RuntimeError: no weights here\n  nor \\x1b[31mthere\n")

    done = run("trace", f"{nets}:Up", "--input", "1,5,9", "-o", "k.convgen")
    line = NETS.split("\n").index("        return self.up(x)") + 1
    assert done.exit_code == 1
    assert f"error: the model's forward failed, at {file}:{line} in forward\n" in done.stderr
    assert "\n  return self.up(x)\n  RuntimeError: Given transposed=1" in done.stderr
    assert not (tmp_path / "k.convgen").exists()


def test_an_attribute_that_raises(nets, tmp_path):
    name = f"{nets}_lazy"
    text = """
    def __getattr__(name):
        raise {}("not now")
    """
    for kind, code in (("OSError", 1), ("AttributeError", 2)):
        (tmp_path / f"{name}_{code}.py").write_text(textwrap.dedent(text).format(kind))
        done = run("trace", f"{name}_{code}:Up")
        assert (done.exit_code, "Traceback" in done.stderr) == (code, False)
        assert ("OSError: not now" in done.stderr) == (code == 1)
