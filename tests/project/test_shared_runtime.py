"""`runtime = "shared"`: files that take what they have in common from one `_runtime.py`.

What would break it: another kernel than in a standalone file, a branch of the runtime that no flag
of a kernel's file takes, an operator that torch forgets, a build, a check or a wheel without the
file, machine code under a key that Triton does not ask for.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from convgen import parse
from convgen.compiler import compile_kernel
from convgen.errors import ProjectError
from convgen.execution import oracle
from convgen.project.build import files, generate
from convgen.project.shared_runtime import runtime_source
from convgen.project.statements import read_document
from convgen.project.table import read_table
from convgen.rendering.header import is_as_generated
from convgen.rendering.render import RUNTIME
from convgen.tables.targets import find_target
from linting import ruff
from running import make_project, rows, run
from test_gradient import H100, choices_of

# One of each kind: what starts a kernel, packs, copies, checks, or stands around the layer.
LAYERS = {
    "open": "ConvTranspose2d(kernel_size=3, stride=2, padding=1, output_padding=1)",
    "known": "ConvTranspose2d(8, 6, 3, input=(2, 8, 5, 6))",
    "one_axis": "ConvTranspose1d(4, 2, 4, stride=2)",
    "three_axes": "ConvTranspose3d(4, 2, 3, stride=2, padding=1, bias=False)",
    "half": "ConvTranspose2d(8, 8, 2, stride=2, dtype=bfloat16)",
    "last": "ConvTranspose2d(8, 8, 4, stride=2, padding=1, layout=channels_last)",
    "boxes": "ConvTranspose2d(16, 16, 3, layout=channels_last, input=(2, 16, 8, 8), target=h100)",
    "raw": "ConvTranspose2d(6, 6, 4, stride=2, groups=6)",
    "grouped": "ConvTranspose1d(8, 8, 4, stride=2, groups=2)",
    "tuned": "ConvTranspose2d(8, 4, 3, autotune=blocks)",
    "both": "ConvTranspose2d(8, 4, 2, stride=2, layout=any)",
    "both_raw": "ConvTranspose3d(4, 4, 2, groups=4, bias=False, layout=any)",
    "rungs": "ConvTranspose2d(8, 4, 4, stride=2, rungs=((2, 8, 5, 6), (2, 8, 4, 4)))",
    "both_rungs": "ConvTranspose2d(8, 4, 4, stride=2, rungs=((2, 8, 5, 6),), layout=any)",
    "large": "ConvTranspose2d(16, 8, 3, dtype=float16, target=h100)",
    "small": "ConvTranspose1d(512, 8, 16, stride=8, padding=4, bias=False, target=h100)",
    "both_large": "ConvTranspose3d(16, 16, 3, rungs=((2, 16, 5, 6, 4),), layout=any, target=h100)",
    "staged": "relu | ConvTranspose1d(4, 6, 3) | leaky_relu(0.5)",
}
SHARED = 'runtime = "shared"\n'


def table_of(names: list[str], output: str = "kernels") -> str:
    row = '[[tool.convgen.kernel]]\nname = "{}"\nspec = "{}"\n'
    return f'output = "{output}"\n{SHARED}' + "".join(row.format(n, LAYERS[n]) for n in names)


def package(folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Build a project of those layers and make its package importable; return its name."""
    name = f"kernels_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    assert run("build", make_project(folder, table_of(names, name))).exit_code == 0
    monkeypatch.syspath_prepend(folder)
    return name


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a package of all layers."""
    with pytest.MonkeyPatch.context() as patch:
        yield package(tmp_path_factory.mktemp("everything"), list(LAYERS), patch)


def layer_of(module: ModuleType, device: str) -> torch.nn.Module:
    """Return a layer of a file with small whole numbers in it."""
    given = (4, 6) if module.WEIGHT_SHAPE[0] is None else ()
    layer = module.ModelNew(*given, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return layer


def input_for(module: ModuleType, layer: torch.nn.Module, device: str) -> torch.Tensor:
    extents = (2, 4, 5, 6, 4)
    shape = [size or extents[axis] for axis, size in enumerate(module.INPUT_SHAPE)]
    shape[1] = layer.in_channels
    x = torch.randint(-2, 3, shape, device=device).to(module.DTYPE)
    if module.LAYOUT == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def scattered(text: str, x: torch.Tensor, layer: torch.nn.Module) -> np.ndarray:
    """Return the layer's output by the definition, with its stages."""
    tensors = (x, layer.weight, layer.bias)
    wide = [None if t is None else t.detach().cpu().double().numpy() for t in tensors]
    if text != LAYERS["staged"]:
        return oracle.scatter(parse(text), *wide)
    output = oracle.scatter(parse(text), np.maximum(wide[0], 0), *wide[1:])
    return np.where(output < 0, 0.5 * output, output)


# ---- what is computed ----


@pytest.mark.interpreter
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with others"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes(
    name: str,
    alone: bool,
    everything: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """Alone its runtime has no branch that it does not take; beside all others it has each."""
    folder = package(tmp_path, [name], monkeypatch) if alone else everything
    module = importlib.import_module(f"{folder}.{name}")
    layer = layer_of(module, device)
    x = input_for(module, layer, device)
    exact = scattered(LAYERS[name], x, layer)
    with torch.no_grad():
        assert np.array_equal(layer(x).cpu().double().numpy(), exact)
        assert np.array_equal(layer.freeze()(x).cpu().double().numpy(), exact)
        if "large" in name:
            assert module.PLAN.large is not None
            module.PLAN.least = 1
            assert np.array_equal(layer(x).cpu().double().numpy(), exact)
        if name == "small":
            assert module.PLAN.small is not None
            module.PLAN.most = 0
            assert np.array_equal(layer(x).cpu().double().numpy(), exact)
        function = getattr(module, f"conv_transpose{x.dim() - 2}d")
        assert np.array_equal(function(x, layer.weight, layer.bias).cpu().double().numpy(), exact)
        others = [x] if hasattr(module, "PLANS") else []
        packed = module.pack_weight(layer.weight, *others)
        split = getattr(module, f"conv_transpose{x.dim() - 2}d_packed")
        assert np.array_equal(split(x, packed, layer.bias).cpu().double().numpy(), exact)
        if module.LAYOUT == "any":
            last = (torch.channels_last, torch.channels_last_3d)[x.dim() - 4]
            for each in (layer, layer.unfreeze(), function):
                given = [layer.weight, layer.bias] * (each is function)
                output = each(x.contiguous(memory_format=last), *given)
                assert np.array_equal(output.cpu().double().numpy(), exact)
                assert output.is_contiguous(memory_format=last)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.interpreter
def test_the_input_s_gradient_has_its_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The package's own choices have no such layer of a size that the interpreter can do."""
    text = "ConvTranspose2d(4, 6, 3, bias=False)"
    source = compile_kernel(parse(text), H100, choices=choices_of(text, None), shared=True)
    assert source.plan.gradient is not None
    (tmp_path / "grad.py").write_text(source.text)
    (tmp_path / RUNTIME).write_text(runtime_source([source], precompiled=False))
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path.parent)
    module = importlib.import_module(f"{tmp_path.name}.grad")
    layer = layer_of(module, device)
    x = torch.randint(-2, 3, (2, 4, 5, 6), device=device).float().requires_grad_()
    output = layer(x)
    grad = torch.randint(-2, 3, output.shape, device=device).float()
    output.backward(grad)
    weight = layer.weight.detach().cpu().double()
    exact = torch.nn.functional.conv2d(grad.cpu().double(), weight)
    assert torch.equal(x.grad.cpu().double(), exact)


@pytest.mark.interpreter
def test_operators_live_on_and_layers_are_their_file_s(everything: str, device: str) -> None:
    """An operator whose library is gone is forgotten; pickle finds a class by its module."""
    name = everything
    module = importlib.import_module(f"{name}.known")
    other = importlib.import_module(f"{name}.one_axis")
    gc.collect()
    layer = layer_of(module, device)
    x = input_for(module, layer, device)
    exact = scattered(LAYERS["known"], x, layer)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert np.array_equal(compiled(x).cpu().numpy(), exact)
        again = pickle.loads(pickle.dumps(layer))
        assert type(again) is module.ModelNew
        assert np.array_equal(again(x).cpu().numpy(), exact)
    assert module.NAMESPACE != other.NAMESPACE
    assert other.ModelNew.__module__ == f"{name}.one_axis"


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
def test_files_may_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Notebooks do: the operators of loaded kernels stay, an edited kernel has a new one."""
    if device != "cpu":
        pytest.skip(
            "the edit is of what Triton's launch does, and a GPU repeats launches without it"
        )
    text = (
        "ConvTranspose2d(4, 3, 2, input=(2, 4, 5, 6))"  # of no other package: they share operators
    )
    monkeypatch.setitem(LAYERS, "known", text)
    name = package(tmp_path, ["known"], monkeypatch)
    module = importlib.import_module(f"{name}.known")
    x = input_for(module, layer_of(module, device), device)
    importlib.reload(importlib.import_module(f"{name}._runtime"))
    gc.collect()
    layer = layer_of(module, device)
    exact = scattered(LAYERS["known"], x, layer)
    traced = torch.jit.trace(layer.requires_grad_(False), (x,))
    assert np.array_equal(traced(x).cpu().numpy(), exact)
    path = tmp_path / name / "known.py"
    head, _, tail = path.read_text().partition("    return compiled, grid, ()")
    path.write_text(f"{head}    y += 1\n    return compiled, grid, (){tail}")
    importlib.reload(module)
    again = module.ModelNew(device=device).requires_grad_(False)
    again.load_state_dict(layer.state_dict())
    for call in (again, torch.jit.trace(again, (x,))):
        assert np.array_equal(call(x).cpu().numpy(), exact + 1)


def test_functions_are_their_file_s(everything: str) -> None:
    module = importlib.import_module(f"{everything}.one_axis")
    for each in (module.conv_transpose1d, module.conv_transpose1d_packed, module.pack_weight):
        assert pickle.loads(pickle.dumps(each)) is each


def test_a_layer_of_open_channels_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"{package(tmp_path, ['open'], monkeypatch)}.open")
    with pytest.raises(TypeError, match="ConvTranspose2d needs in_channels and out_channels"):
        module.ModelNew()


def test_nothing_of_convgen_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = package(tmp_path, list(LAYERS), monkeypatch)
    modules = ", ".join(f"{name}.{each}" for each in LAYERS)
    code = f"import sys; sys.modules['convgen'] = None; sys.path.insert(0, '.'); import {modules}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# ---- the texts ----


def kernels_of(text: str) -> dict[str, str]:
    """Return the kernels of a file, by name, without their comments."""
    return {
        node.name: ast.dump(node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_those_of_standalone_files(name: str) -> None:
    spec = parse(LAYERS[name])
    standalone = kernels_of(compile_kernel(spec).text)
    assert standalone
    assert kernels_of(compile_kernel(spec, shared=True).text) == standalone


def test_ten_kernels_are_less_than_5200_lines() -> None:
    """Those of KernelBench that the H100 has most lines of: 10300 as standalone files."""
    numbers = (57, 58, 61, 64, 65, 68, 69, 70, 71, 72)
    statements, _ = read_document(Path(__file__).parents[2] / "generated" / "kernelbench.convgen")
    wanted = {f"kernelbench_{number}_h100" for number in numbers}
    specs = [each.spec for each in statements if each.name in wanted]
    assert len(specs) == len(numbers)
    sources = [compile_kernel(spec, find_target("h100"), shared=True) for spec in specs]
    texts = [*(each.text for each in sources), runtime_source(sources, precompiled=False)]
    assert sum(len(text.splitlines()) for text in texts) <= 5200


@pytest.mark.parametrize("names", [["known"], ["raw"], list(LAYERS)], ids=["known", "raw", "all"])
def test_the_texts_are_clean(names: list[str], tmp_path: Path) -> None:
    """Users' linters read them too: no name that is not defined, none that nobody reads."""
    build = generate(make_project(tmp_path, table_of(names)))
    assert build.output / RUNTIME in build.texts
    texts = [text for path, text in build.texts.items() if path.suffix == ".py"]
    assert all(map(is_as_generated, texts))
    for text in texts:
        done = ruff("check", "--isolated", "--select=E4,E7,E9,F", "-", input=text)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "names",
    [
        *(["known", "large"], ["known", "large", "small"], ["both", "both_large"]),
        *(["one_axis"], ["raw", "half"], ["tuned"], ["staged", "open"], ["rungs"]),
    ],
    ids=" ".join,
)
def test_some_flags_may_differ_and_others_be_the_same(names: list[str], tmp_path: Path) -> None:
    """A line of the runtime may read both kinds; in a package of everything all flags differ.

    Nothing is given a value that no line reads.
    """
    build = generate(make_project(tmp_path, table_of(names)))
    for text in (text for path, text in build.texts.items() if path.suffix == ".py"):
        done = ruff("check", "--isolated", "--select=E9,F,RUF059", "-", input=text)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- builds ----


def test_a_project_lists_builds_and_checks_it(tmp_path: Path) -> None:
    project = make_project(tmp_path, table_of(["known", "one_axis"]))
    build = generate(project)
    assert files(read_table(project)) == sorted(build.contents)
    assert run("build", project).exit_code == 0
    runtime = project / "kernels" / RUNTIME
    manifest = json.loads((project / "kernels" / "manifest.json").read_text())
    digest = hashlib.sha256(runtime.read_bytes()).hexdigest()
    assert manifest["runtime"] == {"file": RUNTIME, "sha256": digest}
    assert RUNTIME in run("list-files", project).output
    assert run("build", project, "--check").exit_code == 0
    runtime.write_text(runtime.read_text() + "# mine\n")
    assert run("build", project, "--check").exit_code == 1
    assert "was edited since" in run("build", project).output
    assert runtime.read_text().endswith("# mine\n")
    assert run("build", project, "--force").exit_code == 0
    assert run("build", project, "--check").exit_code == 0


def test_it_goes_with_the_word(tmp_path: Path) -> None:
    """A later build of standalone files removes the runtime that none of them reads."""
    project = make_project(tmp_path, table_of(["known"]))
    assert run("build", project).exit_code == 0
    make_project(tmp_path, table_of(["known"]).replace(SHARED, 'runtime = "standalone"\n'))
    assert run("build", project).exit_code == 0
    assert sorted(path.name for path in (project / "kernels").iterdir()) == [
        "known.py",
        "manifest.json",
    ]


@pytest.mark.parametrize("value", ['"share"', "true", '""'])
def test_another_word_is_refused(value: str, tmp_path: Path) -> None:
    project = make_project(tmp_path, f"runtime = {value}\n" + rows("one"))
    with pytest.raises(ProjectError, match="must be standalone or shared, got") as caught:
        read_table(project)
    assert caught.value.argument == "runtime"


def test_it_has_the_project_s_licence(tmp_path: Path) -> None:
    build = generate(make_project(tmp_path, 'license = "MIT"\n' + table_of(["known"])))
    assert "# SPDX-License-Identifier: MIT\n" in build.texts[build.output / RUNTIME]
