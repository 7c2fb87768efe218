"""convgen's own wheel, built again and again in one checkout by the frontends that people use.

What would break it: a template that was deleted and comes back from what an earlier build left.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from building import Builder, copy_of_checkout

pytestmark = pytest.mark.build

OLD = "templates/parts/old.jinja"
PIP = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
UV = (sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--no-build-logs")
BUILD = (sys.executable, "-m", "build", "--installer", "uv")
FRONTENDS = {  # the command, with the option that is followed by the folder for the wheel
    "pip": (*PIP, "--wheel-dir"),
    "uv": (*UV, "--out-dir"),
    "build": (*BUILD, "--wheel", "--outdir"),
    "build by way of an sdist": (*BUILD, "--outdir"),
}


def templates_of(builder: Builder, checkout: Path, frontend: str, folder: Path) -> set[str]:
    """Build a wheel and return the names of its templates."""
    done = builder.run(*FRONTENDS[frontend], folder, checkout, cwd=builder.wheels)
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    return {name.partition("/")[2] for name in names if name.endswith(".jinja")}


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_deleted_template_does_not_come_back(tmp_path, root, builder, monkeypatch, frontend):
    """Neither from the build before, nor from the build/ of a version that left one."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    checkout = copy_of_checkout(root, tmp_path / "checkout")
    here = {path.relative_to(checkout).as_posix() for path in checkout.glob("templates/**/*.jinja")}
    (checkout / OLD).write_text("")
    assert templates_of(builder, checkout, frontend, tmp_path / "first") == {*here, OLD}
    assert not (checkout / "build").exists()

    (checkout / OLD).unlink()
    left = checkout / "build" / "lib" / "convgen" / OLD
    left.parent.mkdir(parents=True)
    left.write_text("")
    assert templates_of(builder, checkout, frontend, tmp_path / "second") == here
    assert not list((tmp_path / "temporary").glob("convgen-build-*"))


def test_an_editable_install_leaves_no_build_folder(tmp_path, root, builder):
    """Its modules are those of the checkout."""
    checkout = copy_of_checkout(root, tmp_path / "checkout")
    python = builder.install(tmp_path / "environment", "--editable", checkout)
    assert not (checkout / "build").exists()
    (checkout / OLD).write_text("as edited")
    code = "import importlib.resources as r; folder = r.files('convgen.templates'); "
    code += "print(folder.joinpath('parts', 'old.jinja').read_text())"
    done = builder.run(python, "-c", code, cwd=tmp_path)
    assert done.stdout == "as edited\n"
