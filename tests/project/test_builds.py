"""Packages with kernels, built by real backends in environments that have neither torch nor triton.

What would break it: a hook that a backend does not call, files that are generated but not shipped,
a build that needs what a downstream project does not have, or one that leaves half its files.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import building
from building import (
    DOCUMENT,
    GENERATED,
    KERNELS,
    LAYER,
    TABLE,
    WAYS,
    Builder,
    Way,
    inside,
    lend_torch,
    make_package,
    tree,
)
from convgen import parse
from convgen.execution import oracle
from convgen.files import write_text
from convgen.project.build import generate
from convgen.project.hooks import generate_into
from running import rows, run

pytestmark = pytest.mark.build

SUPPORT = Path(building.__file__).parent

every_way = pytest.mark.parametrize("name", WAYS)


# ---- what is shipped ----


def test_build_environments_have_no_torch(builder, build_python):
    """Everything below proves that builds do without it only as long as there is none to find."""
    names = {path.name.partition("-")[0] for path in builder.wheels.iterdir()}
    assert {"convgen", "sympy", "hatchling", "flit_core"} <= names
    assert not names & {"torch", "triton", "numpy"}
    for module in ("torch", "triton", "numpy"):
        assert builder.run(build_python, "-c", f"import {module}").returncode == 1


@every_way
def test_wheels_ship_the_generated_files(tmp_path, builder, name):
    """From the tree and from an sdist, in other folders: the same files and the same wheel."""
    project = make_package(tmp_path / "tree", WAYS[name])
    wheel = builder.wheel(project, "--wheel")
    listed = run("list-files", project).stdout.splitlines()
    assert sorted(Path(path).name for path in listed) == GENERATED
    shipped = inside(wheel, "small_up/_kernels")
    assert sorted(shipped) == GENERATED
    texts = generate(project).texts
    assert shipped == {path.name: text.encode() for path, text in texts.items()}
    assert shipped == tree(project / KERNELS)

    elsewhere = make_package(tmp_path / "elsewhere" / "again", WAYS[name])
    assert builder.wheel(elsewhere) == wheel
    one, other = (next((folder / "dist").glob("*.whl")) for folder in (project, elsewhere))
    assert one.read_bytes() == other.read_bytes()


# ---- what is installed ----

RUN = """
import sys, warnings
sys.modules["convgen"] = None  # an import of it fails
import numpy, torch
import small_up._kernels
from small_up._kernels import after, up
warnings.simplefilter("error")  # a layer that torch computes warns
numbers = numpy.load(sys.argv[1])
for made in (small_up._kernels.Up(), after.ModelNew()):
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(numbers["weight"]))
        made.bias.copy_(torch.from_numpy(numbers["bias"]))
        y = made(torch.from_numpy(numbers["x"]))
        numpy.save(f"{sys.argv[1]}.{type(made).__module__}.npy", y)
print(up.__file__)
"""


def outputs(builder: Builder, python: Path, folder: Path) -> tuple[Path, float, float]:
    """Run both layers of an installed package.

    Returns:
        The file of the first, and how far each is from a scatter and from the scatter's relu.
    """
    random = np.random.default_rng(57)
    x, weight, bias = (random.standard_normal(s) for s in ((3, 4, 7), (4, 2, 4), (2,)))
    np.savez(folder / "in.npz", x=x, weight=weight, bias=bias)
    lend_torch(python)
    done = builder.run(python, "-c", RUN, folder / "in.npz", cwd=folder)
    assert done.returncode == 0, done.stdout
    wanted = oracle.scatter(parse(LAYER), x, weight, bias)
    up, after = (
        np.load(folder / f"in.npz.small_up._kernels.{name}.npy") for name in ("up", "after")
    )
    differences = np.abs(up - wanted).max(), np.abs(after - np.maximum(wanted, 0)).max()
    return Path(done.stdout.splitlines()[-1]), *differences


@every_way
def test_an_installed_package_computes_without_convgen(tmp_path, builder, name):
    project = make_package(tmp_path / "project", WAYS[name])
    python = builder.install(tmp_path / "environment", project)
    shutil.rmtree(project)
    path, up, after = outputs(builder, python, tmp_path)
    assert path.is_relative_to(tmp_path / "environment")
    assert up < 1e-12
    assert after < 1e-12


FOUND = """
import sys
from importlib.util import find_spec, module_from_spec
kernels = "small_up._kernels"
sys.modules[kernels] = module_from_spec(find_spec(kernels))  # which is not run: it needs torch
for name in ("up", "after"):
    print(find_spec(f"{kernels}.{name}").origin)
"""


@every_way
def test_an_editable_package_has_what_convgen_build_writes(tmp_path, builder, name):
    """The files are those of the project: a frozen copy would ignore every later build.

    A wheel ships the same texts, of which the test above has the numbers.
    """
    project = make_package(tmp_path / "project", WAYS[name])
    (project / "small.convgen").write_text("after = ConvTranspose1d(4, 2, 4)\n")
    python = builder.install(tmp_path / "environment", "--editable", project)
    assert sorted(tree(project / KERNELS)) == GENERATED
    (project / "small.convgen").write_text(DOCUMENT)
    assert f"rewrite {project / KERNELS / 'after.py'}" in run("build", project).stderr
    texts = generate(project).texts
    assert tree(project / KERNELS) == {path.name: text.encode() for path, text in texts.items()}
    found = builder.run(python, "-c", FOUND, cwd=tmp_path).stdout.split()
    assert found == [str(project / KERNELS / f"{name}.py") for name in ("up", "after")]


# ---- what goes wrong ----


HOOKS = """
import json, sys
import %s as backend
messages = []
for hook in (backend.build_wheel, backend.build_sdist, backend.build_editable):
    try:
        hook(sys.argv[1])
    except SystemExit as ended:  # with a message: Python prints it, alone, and exits with 1
        messages.append(ended.code)
print(json.dumps(messages))
"""


@every_way
def test_a_wrong_table_fails_the_build_with_its_message(tmp_path, builder, build_python, name):
    """Whoever builds reads what is wrong and nothing else, and no file has changed."""
    table = TABLE.replace("stride=2", "stride=0")
    project = make_package(tmp_path / "project", WAYS[name], table)
    before = tree(project)
    done = builder.run(build_python, "-c", HOOKS % WAYS[name].backend, tmp_path, cwd=project)
    assert done.returncode == 0, done.stdout
    messages = json.loads(done.stdout)
    assert len(messages) == 3
    for message in messages:
        assert message.startswith("convgen: error: [[tool.convgen.kernel]] 'up': stride")
    assert tree(project) == before


def test_frontends_show_the_message(tmp_path, builder):
    project = make_package(tmp_path / "project", WAYS["hatchling"], TABLE.replace("=2", "=0"))
    done = builder.build(project, "--wheel")
    assert done.returncode == 1
    assert "\nconvgen: error: [[tool.convgen.kernel]] 'up': stride" in done.stdout
    assert not (project / KERNELS).exists()


def test_an_edited_file_stops_the_build(tmp_path):
    """A build must not overwrite somebody's work, nor ship it as generated."""
    project = make_package(tmp_path, WAYS["setuptools"])
    generate_into(project)
    path = project / KERNELS / "up.py"
    path.write_text(path.read_text() + "# mine\n")
    before = tree(project)
    with pytest.raises(SystemExit, match=re.escape(f"convgen: error: {path} was not generated")):
        generate_into(project)
    assert tree(project) == before


@pytest.mark.parametrize("name", WAYS)
def test_a_file_that_another_build_is_writing_is_not_shipped(tmp_path, builder, monkeypatch, name):
    """Flit packs all that lies in the package, and another build may be half way."""
    names = []
    monkeypatch.setattr("os.replace", lambda source, _: names.append(Path(source).name))
    write_text(tmp_path / "up.py", "half a ker")
    monkeypatch.undo()
    project = make_package(tmp_path / "project", WAYS[name])
    (project / KERNELS).mkdir()
    (project / KERNELS / names[0]).write_text("half a ker")
    assert not [file for file in builder.wheel(project, "--wheel") if names[0] in file]


def test_ten_kernels_cost_a_build_little(tmp_path, builder, build_python, capsys):
    seconds = {}
    for name, settings in (("with", WAYS["hatchling"].settings), ("without", "")):
        way = Way('"hatchling"', "hatchling.build", settings)
        layers = (
            f"ConvTranspose2d({32 * i}, {16 * i}, 4, stride=2, padding=1)" for i in range(1, 11)
        )
        table = "".join(
            rows(f"up{i}", spec=layer).partition("\n")[2] for i, layer in enumerate(layers)
        )
        output = f'[tool.convgen]\noutput = "{KERNELS}"\n'
        project = make_package(tmp_path / name, way, output + table)
        start = time.perf_counter()
        done = builder.call(build_python, project, "hatchling.build", "build_wheel", tmp_path)
        seconds[name] = time.perf_counter() - start
        assert done.returncode == 0, done.stdout
    assert len(tree(tmp_path / "with" / KERNELS)) == 11
    assert not (tmp_path / "without" / KERNELS).exists()
    difference = seconds["with"] - seconds["without"]
    with capsys.disabled():
        print(f"\nten kernels add {difference:.2f} s to a build of {seconds['without']:.2f} s")
    assert difference < 6


# ---- the examples ----

EXAMPLES = {
    "downstream_hatch": """
from unet_decoder import UNetDecoder
decoder, sizes = UNetDecoder(classes=2), ((64, 16), (128, 8), (256, 4), (512, 2))
skips = [torch.rand(1, channels, size, size) for channels, size in sizes]
print(tuple(decoder(torch.rand(1, 1024, 1, 1), skips).shape))
""",
    "downstream_setuptools": """
from hifigan_upsampler import Upsampler
print(tuple(Upsampler()(torch.rand(1, 80, 2)).shape))
""",
}
SHAPES = {"downstream_hatch": "(1, 2, 16, 16)", "downstream_setuptools": "(1, 1, 512)"}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(tmp_path, root, builder, name):
    """As its README says, but without a GPU: in Triton's interpreter, no layer left to torch."""
    project = tmp_path / "project"
    shutil.copytree(root / "examples" / name, project, ignore=shutil.ignore_patterns("_kernels"))
    python = builder.install(tmp_path / "environment", "--no-deps", project)
    lend_torch(python)
    code = f"import sys, warnings\nsys.modules['convgen'] = None\nsys.path += [{str(SUPPORT)!r}]\n"
    code += "import torch, interpreting\ninterpreting.prepare()\n"
    code += "warnings.simplefilter('error')\ntorch.set_grad_enabled(False)\n" + EXAMPLES[name]
    done = builder.run(python, "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == [SHAPES[name]], done.stdout
