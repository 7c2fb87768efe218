"""What the build hooks leave alone, what setuptools' settings do to them, whom the wrapper calls.

What would break it: a hook that works where nobody builds, or in other people's projects; backends
whose settings hide what was generated; a wrapper that has other hooks than its backend.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from building import (
    GENERATED,
    KERNELS,
    LAYER,
    WAYS,
    Builder,
    Way,
    copy_of_checkout,
    inside,
    make_package,
    tree,
)
from convgen import emit, pep517
from convgen.project.setuptools_hook import owned_package

pytestmark = pytest.mark.build

every_way = pytest.mark.parametrize("name", WAYS)


# ---- what builds leave alone ----


@every_way
def test_requirements_and_metadata_generate_nothing(tmp_path, builder, build_python, name):
    """Resolvers ask for them of projects that they never build."""
    project = make_package(tmp_path / "project", WAYS[name])
    backend = WAYS[name].backend
    for kind in ("wheel", "sdist", "editable"):
        done = builder.call(build_python, project, backend, f"get_requires_for_build_{kind}")
        assert done.returncode == 0, done.stdout
    for kind in ("wheel", "editable"):
        hook = f"prepare_metadata_for_build_{kind}"
        (tmp_path / kind).mkdir()
        done = builder.call(build_python, project, backend, hook, tmp_path / kind)
        assert done.returncode == 0, done.stdout
    assert not (project / KERNELS).exists()


def test_setuptools_leaves_projects_without_the_table_alone(tmp_path, builder):
    """The entry point runs in every build of an environment that happens to have convgen."""
    project = make_package(tmp_path / "project", WAYS["setuptools"], table="")
    before = tree(project)
    wheel = builder.wheel(project, "--wheel")
    assert [name for name in wheel if "dist-info" not in name] == ["small_up/__init__.py"]
    ours = {k: v for k, v in tree(project).items() if "egg-info" not in k}
    assert {k: v for k, v in ours.items() if not k.startswith(("build/", "dist/"))} == before


def test_the_entry_point_costs_other_projects_nothing(build_python, builder):
    """Sympy takes half a second, in every build of everything."""
    code = (
        "import sys, convgen.project.setuptools_hook\nprint({'sympy', 'jinja2'} & set(sys.modules))"
    )
    assert builder.run(build_python, "-c", code).stdout == "set()\n"


through_setuptools = pytest.mark.parametrize(
    "name", [name for name in WAYS if "setuptools" in WAYS[name].requires]
)


def wheel_again(builder: Builder, project: Path, *edit: str) -> dict[str, bytes]:
    """Change the project's table from `edit[0]` to `edit[1]`, build, and return what is shipped."""
    path = project / "pyproject.toml"
    assert edit[0] in path.read_text()
    path.write_text(path.read_text().replace(*edit))
    shutil.rmtree(project / "dist")
    return {k: v for k, v in builder.wheel(project, "--wheel").items() if "dist-info" not in k}


@through_setuptools
def test_a_kernel_that_is_gone_is_not_shipped(tmp_path, builder, name):
    """Setuptools packs its folder build/ as an earlier build left it."""
    project = make_package(tmp_path / "project", WAYS[name])
    assert "up.py" in inside(builder.wheel(project, "--wheel"), "small_up/_kernels")
    for kernels in (project / "build").glob("lib*/small_up/_kernels"):
        seal = hashlib.sha256(b"machine code").hexdigest()
        code = f"machine code\nconvgen sha256 {seal}\n"  # as an earlier table asked for
        (kernels / "up.sm_90.cubin").write_text(code)
        (kernels / "after.py").write_text("import anything\n")  # newer than the kernel
    _, mark, row = (project / "pyproject.toml").read_text().partition("[[tool.convgen.kernel]]")
    shipped = wheel_again(builder, project, mark + row, "")
    files = ("__init__.py", "_kernels/after.py", "_kernels/manifest.json")
    assert sorted(shipped) == [f"small_up/{file}" for file in files]
    assert shipped["small_up/_kernels/after.py"] == (project / KERNELS / "after.py").read_bytes()


@through_setuptools
@pytest.mark.parametrize("output", ["src/small_up/_other", "kernels"])
def test_kernels_of_a_folder_that_was_the_output_are_not_shipped(tmp_path, builder, name, output):
    """Files that were vendored are: they lie in the package, though they look alike."""
    listed = '\n[tool.setuptools]\npackages = ["small_up"]\npackage-dir = { "" = "src" }\n'
    way = dataclasses.replace(WAYS[name], settings=listed)
    project = make_package(tmp_path / "project", way)
    vendored = project / "src" / "small_up" / "vendored.py"
    vendored.write_text(emit(LAYER))
    assert "vendored.py" in inside(builder.wheel(project, "--wheel"), "small_up")
    shutil.rmtree(project / KERNELS)
    shipped = wheel_again(builder, project, f'"{KERNELS}"', f'"{output}"')
    folder = output.removeprefix("src/")
    kernels = [f"{folder}/{file}" for file in GENERATED] if output.startswith("src/") else []
    assert sorted(shipped) == ["small_up/__init__.py", *kernels, "small_up/vendored.py"]


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_convgen_is_built_as_ever_where_convgen_is_installed(
    tmp_path, root, builder, build_python, hook
):
    """Its own table is for a folder outside its package, checked in by the next version's hand."""
    checkout = copy_of_checkout(root, tmp_path / "checkout")
    (checkout / "generated" / "seed.py").unlink()
    before = tree(checkout / "generated")
    done = builder.call(build_python, checkout, "setuptools.build_meta", hook, tmp_path)
    assert done.returncode == 0, done.stdout
    assert tree(checkout / "generated") == before
    if hook == "build_wheel":
        (made,), (clean,) = (folder.glob("convgen-*.whl") for folder in (tmp_path, builder.wheels))
        assert made.read_bytes() == clean.read_bytes()


# ---- setuptools' own settings ----

SETUP = """
from setuptools import find_packages, setup

setup(
    name="small-up",
    version="0.1.0",
    packages=find_packages("src"),
    package_dir={"": "src"},
    package_data={"small_up": ["own.txt"]},
)
"""
LISTED = """
[tool.setuptools]
packages = ["small_up"]
package-dir = { "small_up" = "src/small_up" }
include-package-data = false

[tool.setuptools.package-data]
small_up = ["own.txt"]
"""


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist"])
@pytest.mark.parametrize("way", ["setup.py", "listed"])
def test_packages_found_before_the_files_are_there_get_them(
    tmp_path, builder, build_python, way, hook
):
    """setup.py looks for packages before any plugin runs; a list of packages names no new one."""
    settings = LISTED if way == "listed" else ""
    chosen = Way('"setuptools"', "setuptools.build_meta", settings)
    project = make_package(tmp_path / "project", chosen)
    (project / "src" / "small_up" / "own.txt").write_text("mine")
    if way == "setup.py":
        (project / "setup.py").write_text(SETUP)
    done = builder.call(build_python, project, "setuptools.build_meta", hook, tmp_path)
    assert done.returncode == 0, done.stdout
    (archive,) = (*tmp_path.glob("*.whl"), *tmp_path.glob("*.tar.gz"))
    shutil.unpack_archive(archive, tmp_path / "out", "zip" if hook == "build_wheel" else None)
    found = tree(tmp_path / "out")
    prefix = "" if hook == "build_wheel" else "small_up-0.1.0/src/"
    assert sorted(inside(found, f"{prefix}small_up/_kernels")) == GENERATED
    assert f"{prefix}small_up/own.txt" in found
    assert hook == "build_wheel" or "small_up-0.1.0/small.convgen" in found


OWN = """
from setuptools.command import build_py

class BuildPy(build_py.build_py):
    def run(self):
        super().run()
        print("built by the project's own class")
"""


def test_a_project_s_own_build_class_ships_them_too(tmp_path, builder, build_python):
    """pyproject.toml names it after every plugin has run, and it is none of ours."""
    settings = '\n[tool.setuptools]\ncmdclass = { build_py = "small_build.BuildPy" }\n'
    settings += 'package-dir = { "" = "src" }\npackages = ["small_up"]\n'
    chosen = Way('"setuptools"', "setuptools.build_meta", settings)
    project = make_package(tmp_path / "project", chosen)
    (project / "src" / "small_build.py").write_text(OWN)
    done = builder.call(
        build_python, project, "setuptools.build_meta", "build_wheel", tmp_path / "dist"
    )
    assert done.returncode == 0, done.stdout
    assert "built by the project's own class" in done.stdout
    (archive,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(archive, tmp_path / "out", "zip")
    assert sorted(inside(tree(tmp_path / "out"), "small_up/_kernels")) == GENERATED


@pytest.mark.parametrize(
    ("folder", "folders", "packages", "name"),
    [
        ("src/a/k", {"": "src"}, ["a"], "a.k"),
        ("src/a/k", {"a": "src/a"}, ["a", "a.k"], "a.k"),
        ("lib/k", {"": "src", "b.c": "lib"}, ["b.c"], "b.c.k"),
        ("k", {}, ["k"], "k"),
        ("k", {}, ["a"], None),
        ("ab/k", {}, ["a"], None),
        ("k", {"": "src"}, ["k"], None),
        ("generated", {"a": "codegen"}, ["a"], None),
    ],
)
def test_a_folder_s_package(folder, folders, packages, name):
    """A wrong name would add the manifest to nothing, or to somebody else's package."""
    assert owned_package(Path(folder), folders, packages) == name


# ---- the wrapper ----

PLAIN = """
class Backend:
    def build_wheel(self, directory, settings=None, metadata=None): ...
    def build_sdist(self, directory, settings=None): ...

backend = Backend()
"""


def go_to(folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str):
    """Go to a project where the wrapper delegates to that backend."""
    way = Way('"setuptools"', "convgen.pep517", table=f'build-backend = "{backend}"')
    monkeypatch.chdir(make_package(folder / "project", way))
    (folder / "plain_backend.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("backend", "optional"),
    [
        ("plain_backend:backend", False),
        ("setuptools.build_meta", True),
        ("flit_core.buildapi", True),
    ],
)
def test_the_wrapper_has_the_hooks_of_its_backend(tmp_path, monkeypatch, backend, optional):
    """Frontends take a hook that is there for one that works."""
    go_to(tmp_path, monkeypatch, backend)
    assert hasattr(pep517, "build_wheel")
    assert hasattr(pep517, "build_sdist")
    for hook in (
        "build_editable",
        "get_requires_for_build_wheel",
        "prepare_metadata_for_build_wheel",
    ):
        assert hasattr(pep517, hook) == optional
    assert not hasattr(pep517, "build_anything")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("convgen.pep517", "must name the backend to run after convgen.pep517"),
        ("convgen:pep517", "must name the backend to run after convgen.pep517"),
        ("no_such_backend", "cannot use no_such_backend, .* No module named 'no_such_backend'"),
        ("plain_backend:other", "cannot use plain_backend:other, .* has no attribute 'other'"),
        (":backend", "must be a backend such as .*, got ':backend'"),
    ],
)
def test_the_wrapper_says_what_it_cannot_delegate_to(tmp_path, monkeypatch, backend, message):
    """It would call itself for ever, or fail far from the line that is wrong."""
    go_to(tmp_path, monkeypatch, backend)
    with pytest.raises(SystemExit, match=message):
        pep517.build_wheel  # noqa: B018


def test_an_sdist_without_its_sources_is_refused(tmp_path, builder, build_python):
    """Flit ships what it is told to; the failure would come to those who install the sdist."""
    way = Way('"flit-core"', "convgen.pep517", table=WAYS["wrapped flit"].table)
    project = make_package(tmp_path / "project", way)
    done = builder.call(build_python, project, "convgen.pep517", "build_sdist", tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("convgen: error: small.convgen would be missing from the sdist")
    assert not list(tmp_path.glob("*.tar.gz"))


BARE = """
import zipfile

def build_wheel(directory, settings=None, metadata=None):
    with zipfile.ZipFile(f"{directory}/small_up-0.1.0-py3-none-any.whl", "w") as wheel:
        for name in FILES:
            wheel.writestr(name, "")
    return "small_up-0.1.0-py3-none-any.whl"
"""


@pytest.mark.parametrize(
    ("files", "passes"),
    [
        (["small_up/__init__.py"], False),
        (["small_up/_kernels/up.py"], False),
        ([f"small_up/_kernels/{name}" for name in GENERATED], True),
        (["other/__init__.py"], True),  # the kernels lie in no package
    ],
)
def test_a_wheel_without_its_kernels_is_refused(tmp_path, monkeypatch, files, passes):
    """Backends leave out what version control ignores; whoever installs it would find out."""
    go_to(tmp_path, monkeypatch, "bare_backend")
    Path("bare_backend.py").write_text(BARE.replace("FILES", repr(files)))
    monkeypatch.delitem(sys.modules, "bare_backend", raising=False)
    monkeypatch.syspath_prepend(Path.cwd())
    if passes:
        assert pep517.build_wheel(str(tmp_path)).endswith(".whl")
    else:
        with pytest.raises(SystemExit, match="would be missing from the wheel"):
            pep517.build_wheel(str(tmp_path))
    assert len(list(tmp_path.glob("*.whl"))) == passes


def test_a_build_into_the_sources_removes_nothing_of_them(tmp_path, monkeypatch):
    """Folders of builds are cleared of old kernels; the project's own are no such folders."""
    from setuptools import Distribution
    from setuptools.command.build_py import build_py

    from convgen.project.setuptools_hook import _clean

    monkeypatch.chdir(tmp_path)
    kernel = emit("ConvTranspose1d(4, 2, 4)")
    places = {name: tmp_path / name / "vox" / "up.py" for name in ("src", "build/lib")}
    for place in places.values():
        place.parent.mkdir(parents=True)
        place.write_text(kernel)
    for library in ("src", ".", "build/lib"):
        command = _clean(build_py)(Distribution())
        command.build_lib = library
        command.ensure_finalized()
        command.run()
    assert places["src"].read_text() == kernel
    assert not places["build/lib"].exists()
