"""The files beside the kernels: the package that picks among targets, and the manifest.

What would break it: a choice at import, a file that the device cannot hold, weights that two files
do not share, a manifest that tells of other files than those that lie there.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from jinja2 import meta

import convgen
from convgen import parse
from convgen.errors import ProjectError
from convgen.execution import oracle
from convgen.project.build import files, generate
from convgen.project.package import MANIFEST, SCHEMA
from convgen.project.table import read_table
from convgen.rendering.header import is_as_generated
from convgen.rendering.render import environment
from linting import ruff
from running import make_project, rows, run

SPEC = "ConvTranspose1d(4, 2, 4, stride=2)"
ROW = f'[[tool.convgen.kernel]]\nname = "up"\nspec = "{SPEC}"\nclass-name = "Up"\n'
SEVERAL = f'output = "kernels"\ntarget = ["a100", "h100"]\n{ROW}'
ONE = f'output = "kernels"\n{ROW}'


def imported(folder: Path, table: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Build a project and import its package, under a name of its own."""
    assert run("build", make_project(folder, table)).exit_code == 0
    name = f"kernels_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    (folder / "kernels").rename(folder / name)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)


def scattered(x: torch.Tensor, layer: torch.nn.Module) -> np.ndarray:
    """Return the layer's output by the definition."""
    tensors = (x, layer.weight, layer.bias)
    return oracle.scatter(parse(SPEC), *(tensor.detach().cpu().numpy() for tensor in tensors))


# ---- the package ----


def test_the_template_uses_the_names_it_is_given() -> None:
    loader = environment().loader
    assert loader is not None
    source = loader.get_source(environment(), "package.py.jinja")[0]
    names = meta.find_undeclared_variables(environment().parse(source))
    assert names == {"summary", "several", "kernels", "names"}


@pytest.mark.parametrize("table", [SEVERAL, ONE])
def test_the_package_is_clean_text_with_an_intact_header(tmp_path: Path, table: str) -> None:
    """By the header a later build knows it for its own; users' linters read it too."""
    build = generate(make_project(tmp_path, table))
    text = build.texts[build.output / "__init__.py"]
    assert is_as_generated(text)
    assert max(map(len, text.splitlines())) <= 100
    done = ruff("format", "--check", "--line-length=100", "-", input=text)
    assert done.returncode == 0, done.stderr


@pytest.mark.interpreter
def test_the_package_s_layer_and_function_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A tracer's proxies have no device by which a file could be chosen."""
    package = imported(tmp_path, SEVERAL, monkeypatch)
    layer = package.Up(device=device).requires_grad_(False)
    x = torch.randint(-2, 3, (3, 4, 9), device=device).float()
    weights = layer.weight, layer.bias
    torch.testing.assert_close(torch.fx.symbolic_trace(torch.nn.Sequential(layer))(x), layer(x))
    function = torch.fx.symbolic_trace(lambda x, w, b: package.up(x, w, b))
    torch.testing.assert_close(function(x, *weights), layer(x))


def test_no_package_where_none_is_needed(tmp_path: Path) -> None:
    """The folder may be one of the user's own packages, with an `__init__.py` by hand."""
    assert "__init__.py" not in {path.name for path in generate_rows(tmp_path)}


def generate_rows(folder: Path) -> list[Path]:
    return list(generate(make_project(folder, rows("one"))).texts)


@pytest.mark.interpreter
@pytest.mark.parametrize("table", [SEVERAL, ONE])
def test_the_package_s_layer_and_function_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, table: str
) -> None:
    package = imported(tmp_path, table, monkeypatch)
    torch.manual_seed(5)
    layer = package.Up().to(device)
    torch.manual_seed(5)
    assert torch.equal(layer.weight.cpu(), torch.nn.ConvTranspose1d(4, 2, 4, 2).weight)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randint(-2, 3, (3, 4, 9), device=device).float()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
        exact = scattered(x, layer)
        assert np.array_equal(layer(x).cpu().numpy(), exact)
        if table == SEVERAL:
            assert np.array_equal(package.up(x, layer.weight, layer.bias).cpu().numpy(), exact)
        # What is packed belongs to the weight as it was.
        layer.weight += 1
        exact = scattered(x, layer)
        assert np.array_equal(layer(x).cpu().numpy(), exact)


@pytest.mark.interpreter
def test_the_package_s_layer_is_a_module_like_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Copies, pickles and parametrizations must not meet the files' own state."""
    package = imported(tmp_path, SEVERAL, monkeypatch)
    layer, x = package.Up().to(device), torch.randn(1, 4, 5, device=device)
    with torch.no_grad():
        first = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), first)
            other.weight.mul_(2)
            assert not torch.equal(other(x), first)
        assert torch.equal(layer(x), first)
        layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})
        assert torch.allclose(layer(x), 2 * first)
        layer.freeze()
        assert torch.allclose(layer(x), 2 * first)
    normed = torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(layer))
    normed(x).sum().backward()
    assert normed.parametrizations.weight.original0.grad is not None
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
@pytest.mark.interpreter
def test_the_package_s_layer_follows_its_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """They may change after the first call; a replica of the layer has weights of its own."""
    package = imported(tmp_path, SEVERAL, monkeypatch)
    layer, x = package.Up().to(device), torch.randn(1, 4, 5, device=device)
    torch_layer = torch.nn.ConvTranspose1d(4, 2, 4, stride=2).to(device)
    torch_layer.load_state_dict(layer.state_dict())
    assert isinstance(layer, torch.nn.ConvTranspose1d)
    assert repr(layer) == repr(torch_layer)
    with torch.no_grad():
        layer(x)
        layer.stride = torch_layer.stride = (1,)
        with pytest.warns(UserWarning, match="computed by torch") as caught:
            assert torch.allclose(layer(x), torch_layer(x))
        assert caught[0].filename == __file__
        layer(x)  # and one warning is enough
    assert torch.allclose(torch.jit.script(layer)(x), torch_layer(x))
    assert layer._replicate_for_data_parallel()._layers is not layer._layers
    for each in (layer, torch_layer):
        torch.manual_seed(7)
        each.reset_parameters()
    assert torch.equal(layer.weight, torch_layer.weight)


@pytest.mark.interpreter
def test_a_report_has_the_calls_of_the_package_s_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """It hands each call to the layer of the file that is nearest to the input's device."""
    package = imported(tmp_path, SEVERAL, monkeypatch)
    layer, x = package.Up().to(device), torch.randn(1, 4, 5, device=device)
    (row,) = convgen.report(layer).layers
    assert (row.kernel_calls, row.torch_calls) == (0, {})
    layer(x), layer(x)
    with pytest.warns(UserWarning, match="^computed by torch: "):
        layer.double()(x.double())
    (row,) = convgen.report(layer).layers
    assert row.spec == "ConvTranspose1d(4, 2, kernel_size=4, stride=2)"
    assert (row.kernel_calls, [*row.torch_calls.values()]) == (2, [1])
    (row,) = convgen.report(copy.deepcopy(layer)).layers
    assert (row.kernel_calls, row.torch_calls) == (0, {})
    assert convgen.restore_layers(layer) == []


def test_the_file_is_chosen_at_the_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import must ask no device, and load no kernel."""
    package = imported(tmp_path, SEVERAL, monkeypatch)
    assert not any(name.startswith(f"{package.__name__}.") for name in sys.modules)


def properties(major: int, minor: int, sms: int, shared: int) -> SimpleNamespace:
    return SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=sms,
        shared_memory_per_block_optin=shared * 1024,
    )


CARDS = {  # what the driver says of a card, and the file that should serve it
    "A100 40GB": (properties(8, 0, 108, 163), "up_a100"),
    "H100 PCIe": (properties(9, 0, 114, 227), "up_h100"),
    "H200": (properties(9, 0, 132, 227), "up_h200"),
    "B200": (properties(10, 0, 148, 227), "up_h200"),
    "RTX 4090": (properties(8, 9, 128, 99), "up_l40s"),
    "RTX 5090": (properties(12, 0, 170, 99), "up_l40s"),
}


@pytest.mark.parametrize("card", CARDS)
def test_the_nearest_file_that_fits_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str
) -> None:
    """A tile for more shared memory than the card has does not launch at all."""
    table = SEVERAL.replace('"a100", "h100"', '"a100", "h100", "h200", "l40s"')
    package = imported(tmp_path, table, monkeypatch)
    found, wanted = CARDS[card]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    # H100 and H200 differ in neither compute capability nor SMs: the first in order serves both.
    wanted = wanted.replace("h200", "h100")
    assert package._nearest(package.FILES["up"], torch.device("cuda", 0)) == wanted
    assert package._nearest(package.FILES["up"], torch.device("cpu")) == "up_a100"


# ---- names ----

WRONG = {
    'class-name = "3D"': "a name must be an ASCII identifier",
    'class-name = "up"': "class-name up is taken",
    'class-name = "torch"': "the name torch is taken",
    'class-name = "super"': "class-name super is taken",
    'class-name = "up_a100"': "class-name up_a100 is taken",
    "class-name = 3": "class-name must be a string, got 3",
    'class = "Up"': "class-name",
}


CLASHES = {
    "another layer": 'name = "up"\nspec = "ConvTranspose2d(4, 2, 4)"\ntarget = "b200"',
    "another class": f'name = "up"\nspec = "{SPEC}"\ntarget = "b200"\nclass-name = "Other"',
    "a file's name": f'name = "up_a100"\nspec = "{SPEC}"',
    "a builtin": f'name = "min"\nspec = "{SPEC}"',
    "a class": f'name = "Up"\nspec = "{SPEC}"',
}


@pytest.mark.parametrize("clash", CLASHES)
def test_a_name_hides_no_other(tmp_path: Path, clash: str) -> None:
    """A module would take a function's place at its first call, one layer another's."""
    table = f"{SEVERAL}[[tool.convgen.kernel]]\n{CLASHES[clash]}\n"
    with pytest.raises(ProjectError, match=r"is taken|two kernels are called"):
        read_table(make_project(tmp_path, table))


def test_names_differ_in_more_than_case(tmp_path: Path) -> None:
    """Some systems would write both to one file."""
    with pytest.raises(ProjectError, match="called UP and up, which are one"):
        read_table(make_project(tmp_path, rows("up", "UP")))


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_class_name_is_told_with_its_row(tmp_path: Path, line: str) -> None:
    table = SEVERAL.replace('class-name = "Up"', line)
    with pytest.raises(ProjectError, match=WRONG[line]) as caught:
        read_table(make_project(tmp_path, table))
    assert "up" in str(caught.value)


def test_two_kernels_cannot_share_a_class(tmp_path: Path) -> None:
    other = ROW.replace('"up"', '"down"')
    with pytest.raises(ProjectError, match="class-name Up is taken"):
        read_table(make_project(tmp_path, f'output = "kernels"\n{ROW}{other}'))


# ---- licence and manifest ----


def test_the_licence_is_the_second_line_of_every_file(tmp_path: Path) -> None:
    build = generate(make_project(tmp_path, f'license = "MIT OR Apache-2.0"\n{SEVERAL}'))
    for path, text in build.texts.items():
        if path.name != MANIFEST:
            assert text.splitlines()[1] == "# SPDX-License-Identifier: MIT OR Apache-2.0"
            assert is_as_generated(text)


@pytest.mark.parametrize("value", ['""', '"a\\nb"', "3", '"é"'])
def test_a_licence_is_one_line_of_an_spdx_expression(tmp_path: Path, value: str) -> None:
    """A line break would put user text into the file as code."""
    with pytest.raises(ProjectError, match=r"license of .* must be an SPDX expression"):
        read_table(make_project(tmp_path, f"license = {value}\n{SEVERAL}"))


def test_the_manifest_tells_what_lies_there(tmp_path: Path) -> None:
    root = make_project(tmp_path, SEVERAL)
    assert run("build", root).exit_code == 0
    manifest = json.loads((root / "kernels" / MANIFEST).read_text("utf-8"))
    assert manifest["schema"] == SCHEMA
    told = {row["file"]: row for row in manifest["kernels"]}
    assert sorted([*told, "__init__.py", MANIFEST]) == sorted(
        path.name for path in (root / "kernels").iterdir()
    )
    for name, row in told.items():
        assert row["sha256"] == hashlib.sha256((root / "kernels" / name).read_bytes()).hexdigest()
        assert (row["name"], row["spec"]) == ("up", str(parse(SPEC)))
        assert name == f"up_{row['target']}.py"


@pytest.mark.parametrize("text", ["{}", "mine", '{"schema": 1, "sha256": "0"}', "[]"])
def test_a_manifest_in_the_way_is_kept(tmp_path: Path, text: str) -> None:
    root = make_project(tmp_path, rows("one"))
    (root / "kernels").mkdir()
    (root / "kernels" / MANIFEST).write_text(text)
    done = run("build", root)
    assert done.exit_code == 1
    assert "manifest.json was not generated, or was edited since" in done.stderr
    assert [path.name for path in (root / "kernels").iterdir()] == [MANIFEST]
    assert (root / "kernels" / MANIFEST).read_text() == text


def test_an_edited_manifest_is_seen(tmp_path: Path) -> None:
    root = make_project(tmp_path, rows("one"))
    run("build", root)
    path = root / "kernels" / MANIFEST
    path.write_text(path.read_text().replace("one.py", "two.py"))
    assert run("build", root, "--check").exit_code == 1
    assert run("build", root).exit_code == 1
    assert run("build", root, "--force").exit_code == 0


@pytest.mark.parametrize("table", [SEVERAL, ONE, rows("a", "b")])
def test_files_are_known_before_they_are_compiled(tmp_path: Path, table: str) -> None:
    """Build systems ask for their names first."""
    root = make_project(tmp_path, table)
    assert files(read_table(root)) == sorted(generate(root).texts)
