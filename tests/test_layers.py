"""The packages: their layers, in order, whether all are installed, and whether one finds them.

A module imports from its own package and from those below it, so that whoever changes one knows
what can feel it. A package that pyproject.toml does not list works in an editable install and is
missing from the wheel. What is moved leaves tests in folders of its old name, and the tour with
paths that no longer exist.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the ground up; names on a line do not import each other.
LAYERS = (
    {"version", "errors"},
    {"values", "documents"},
    {"tables", "files"},
    {"language"},
    {"geometry"},
    {"symbolic"},
    {"planning"},
    {"kernels"},
    {"families"},
    {"rendering", "explain"},
    {"compiler"},
    {"execution"},
    {"network"},
    {"project"},
    {""},  # the package itself: what users import
    {"measuring", "pep517"},
    {"cli"},
    {"__main__"},
)
HEIGHT = {name: number for number, names in enumerate(LAYERS) for name in names}
MOST_MODULES = 12  # of a package, families not counted
MOST_AT_THE_ROOT = 10


def modules(root: Path) -> dict[str, Path]:
    """Return the files of the package by their dotted names; the package itself is ''."""
    folder = root / "codegen"
    names = {path: path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py")}
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): path
        for path, parts in names.items()
    }


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a module imports, also inside of its functions.

    What only a type checker reads is left out.
    """
    here = name.split(".") if name else []
    here = here if path.name == "__init__.py" else here[:-1]
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            of = [*here[: len(here) - node.level + 1], *filter(None, [node.module])]
            for alias in node.names:
                inner = ".".join([*of, alias.name])
                yield inner if inner in known else ".".join(of)


def test_no_module_imports_from_a_layer_above_its_own(root: Path) -> None:
    known = modules(root)
    wrong = [
        f"{name or 'convgen'} imports {of}"
        for name, path in known.items()
        for of in imported(name, path, known)
        if name.split(".")[0] != of.split(".")[0]
        and HEIGHT[of.split(".")[0]] >= HEIGHT[name.split(".")[0]]
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle(root: Path) -> None:
    known = modules(root)
    ahead = {name: {*imported(name, path, known)} - {name} for name, path in known.items()}
    while free := {name for name, others in ahead.items() if not others}:
        ahead = {name: others - free for name, others in ahead.items() if name not in free}
    assert ahead == {}


def test_packages_are_of_a_size_to_look_through(root: Path) -> None:
    folders = {path.parent for path in modules(root).values()}
    for folder in folders - {root / "codegen", root / "codegen" / "families"}:
        assert len({*folder.glob("*.py")} - {folder / "__init__.py"}) <= MOST_MODULES, folder
    assert len([*(root / "codegen").glob("*.py")]) <= MOST_AT_THE_ROOT


def test_folders_of_tests_are_named_like_packages(root: Path) -> None:
    """Those in torch, of emitted files, have a folder that mirrors none."""
    tested = {path.parent.relative_to(root / "tests") for path in root.glob("tests/**/test_*.py")}
    packages = {path.parent.relative_to(root / "codegen") for path in modules(root).values()}
    assert tested <= packages | {Path("emitted")}


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "codegen/README.md"])
def test_paths_that_the_documents_name_exist(root: Path, document: str) -> None:
    text = (root / document).read_text("utf-8")
    named = re.findall(r"`([\w/]+/|[\w./]+\.(?:py|jinja|md|convgen))`", text)
    folders = (root, root / "codegen")
    assert named
    assert [name for name in named if not any((of / name).exists() for of in folders)] == []


@pytest.mark.parametrize("folder", ["codegen", "templates"])
def test_every_package_is_in_the_wheel(root: Path, folder: str) -> None:
    top = "convgen" if folder == "codegen" else "convgen.templates"
    inits = (root / folder).rglob("__init__.py")
    parts = [path.parent.relative_to(root / folder).parts for path in inits]
    table = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert {".".join([top, *of]) for of in parts} <= {*table["packages"]}
    assert {name for name in table["packages"] if name.startswith("convgen.")} >= {
        ".".join(["convgen", *of]) for of in parts if of and folder == "codegen"
    }
