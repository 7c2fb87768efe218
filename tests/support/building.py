"""Real builds in the tests: a folder of wheels, environments without torch, small projects.

The network is needed once, for the folder; every build after that is offline, in an environment
that its frontend makes and fills from the folder. What is slow to make is made once for all the
processes of a run.
"""

from __future__ import annotations

import compileall
import fcntl
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# What downstream projects name in `requires`; editables is what hatchling asks for by itself.
BACKENDS = ("hatchling", "setuptools>=77", "flit-core>=3.12", "editables")
PARTS = ("codegen", "templates", "generated", "pyproject.toml", "README.md", "LICENSE")
PARTS += ("MANIFEST.in", "setup.py")

# One layer with a name in the package and one from a document beside it; float64 is nearly exact.
LAYER = "ConvTranspose1d(4, 2, 4, stride=2, padding=1, dtype=float64)"
TABLE = f"""
[tool.convgen]
output = "src/small_up/_kernels"
specs = ["small.convgen"]
%s

[[tool.convgen.kernel]]
name = "up"
spec = "{LAYER}"
class-name = "Up"
"""
KERNELS = "src/small_up/_kernels"
GENERATED = ["__init__.py", "after.py", "manifest.json", "up.py"]
DOCUMENT = f"after = {LAYER} | relu\n"
PROJECT = """
[build-system]
requires = [%s, "convgen"]
build-backend = "%s"

[project]
name = "small-up"
version = "0.1.0"
description = "A layer"
requires-python = ">=3.11"
"""


@dataclass(frozen=True)
class Way:
    """A way to build a project: its backend, what the backend is told, what the wrapper is."""

    requires: str
    backend: str
    settings: str = ""
    table: str = ""


WAYS = {
    "hatchling": Way(
        '"hatchling"',
        "hatchling.build",
        '[tool.hatch.build]\nhooks.convgen = {}\ntargets.sdist.only-include = ["src"]\n',
    ),
    "setuptools": Way('"setuptools"', "setuptools.build_meta"),
    "wrapped setuptools": Way('"setuptools"', "convgen.pep517"),
    "wrapped flit": Way(
        '"flit-core"',
        "convgen.pep517",
        '[tool.flit.sdist]\ninclude = ["small.convgen"]\n',
        'build-backend = "flit_core.buildapi"',
    ),
}


def make_package(folder: Path, way: Way, table: str = TABLE) -> Path:
    """Write the project that the tests build, without its generated files; return its folder."""
    package = folder / "src" / "small_up"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""A layer."""\n')
    text = PROJECT % (way.requires, way.backend) + way.settings
    (folder / "pyproject.toml").write_text(text + (table % way.table if "%s" in table else table))
    (folder / "small.convgen").write_text(DOCUMENT)
    (folder / ".gitignore").write_text("src/small_up/_kernels/\n")
    return folder


def copy_of_checkout(root: Path, folder: Path) -> Path:
    """Copy what convgen is built from: a build leaves its own folders beside it."""
    folder.mkdir(parents=True)
    for name in PARTS:
        source = root / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    return folder


def once(base: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` below `base`, made by whichever process comes first."""
    folder, unfinished = base / name, base / f"{name}.unfinished"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def download(root: Path, folder: Path) -> None:
    """Fill a folder with the wheels of convgen, of the backends and of what these need."""
    checkout = copy_of_checkout(root, folder / "checkout")
    command = [sys.executable, "-m", "pip", "wheel", "--wheel-dir", folder, checkout, *BACKENDS]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, check=True, env=environment, timeout=600)
    shutil.rmtree(checkout)
    (sympy,) = folder.glob("sympy-*.whl")
    add_bytecode(sympy)


def add_bytecode(wheel: Path) -> None:
    """Add the bytecode of a wheel's modules, but for its tests, to it.

    Every build has a fresh environment, in which Python would compile what it imports of sympy: two
    of the three seconds that a build takes. The bytecode is of a kind that asks for no source's
    time, which unpacking may set.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder)
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        tests = re.compile("/tests/")
        compileall.compile_dir(folder, rx=tests, quiet=2, invalidation_mode=unchecked)
        with zipfile.ZipFile(wheel, "a") as opened:
            for path in Path(folder).rglob("*.pyc"):
                opened.write(path, path.relative_to(folder))


@dataclass(frozen=True)
class Builder:
    """Builds and installs with nothing but the wheels of a folder."""

    wheels: Path

    def run(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command offline; its messages and its output come as one."""
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )

    def build(self, project: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m build` in a project, into its dist/; without options sdist to wheel."""
        # Not from the project's folder: a build/ of setuptools would be taken for the module.
        command = (sys.executable, "-m", "build", "--installer", "uv", *options, project)
        return self.run(*command, cwd=self.wheels)

    def wheel(self, project: Path, *options: str) -> dict[str, bytes]:
        """Build and return the files of the wheel: name to bytes."""
        done = self.build(project, *options)
        assert done.returncode == 0, done.stdout
        (path,) = (project / "dist").glob("*.whl")
        with zipfile.ZipFile(path) as opened:
            return {name: opened.read(name) for name in opened.namelist()}

    def call(
        self, python: Path, project: Path, backend: str, hook: str, *arguments: object
    ) -> subprocess.CompletedProcess[str]:
        """Call a hook of a backend in a project's folder, as frontends do."""
        given = ", ".join(repr(str(argument)) for argument in arguments)
        code = f"import {backend} as backend; backend.{hook}({given})"
        return self.run(python, "-c", code, cwd=project)

    def install(self, environment: Path, *what: object) -> Path:
        """Install into a new environment that has nothing else; return its interpreter."""
        made = self.run(sys.executable, "-m", "venv", "--without-pip", environment)
        assert made.returncode == 0, made.stdout
        python = environment / "bin" / "python"
        command = (sys.executable, "-m", "uv", "pip", "install", "--python", python, *what)
        done = self.run(*command, cwd=self.wheels)
        assert done.returncode == 0, done.stdout
        return python

    def _environment(self) -> dict[str, str]:
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
        return mine | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_COMPILE": "0",  # pip reads this as `compile = 0`: sympy takes seconds
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),  # nobody there
            "UV_NO_CONFIG": "1",
            "UV_OFFLINE": "1",
            "UV_FIND_LINKS": str(self.wheels),
            "UV_CACHE_DIR": str(self.wheels.with_name("uv")),  # not one with another convgen
            "SOURCE_DATE_EPOCH": "1700000000",
            "TRITON_INTERPRET": "1",
        }


def lend_torch(python: Path) -> None:
    """Let an environment import the torch and the triton of this one."""
    home = Path(torch.__file__).parent.parent
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(f"{home}\n")


def lend_triton(python: Path, folder: Path) -> None:
    """Let an environment import the triton of this one, without its torch."""
    home = Path(torch.__file__).parent.parent
    folder.mkdir()
    for path in (home / "triton", *home.glob("triton-*.dist-info")):
        (folder / path.name).symlink_to(path)
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    (packages / "triton.pth").write_text(f"{folder}\n")


def inside(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """Return those of the files that lie in a folder, by their names in it."""
    prefix = f"{folder}/"
    return {k.removeprefix(prefix): v for k, v in files.items() if k.startswith(prefix)}


def tree(folder: Path) -> dict[str, bytes]:
    """Return name to bytes of every file below `folder`, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
