"""The setuptools plugin: generates before setuptools builds, and ships what it would leave out.

Beside the stages; setuptools finds it by the entry point group
`setuptools.finalize_distribution_options`, in every build where convgen is installed: it returns at
once without the table. Input: a `Distribution` before its configuration is read, so that packages
are discovered after the files are there; output: generated files, and a `build_py` that knows them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from setuptools import Distribution

from ..documents import table_at, toml_of
from ..files import read_text, remove
from .hooks import Generated, errors_end_the_build, generate_into
from .table import has_table, read_table

# Never egg_info and dist_info: they are how setuptools answers for requirements and metadata.
BUILDING = frozenset(
    ("bdist_wheel", "build", "build_py", "develop", "editable_wheel", "install", "sdist")
)


def finalize(distribution: Distribution) -> None:
    """Generate if `distribution` is about to be built and ships the kernels of this folder.

    Raises:
        SystemExit: the project cannot be generated.
    """
    root = Path()  # setuptools builds the folder that it runs in
    if BUILDING.isdisjoint(distribution.script_args or ()) or not has_table(root):
        return
    generated = generate_into(root) if _is_shipped(root, distribution) else None
    found = distribution.get_command_class

    @functools.cache
    def get_command_class(command: str) -> type[Any]:
        # Asked when the command runs: only then is it known which class a project names.
        base: type[Any] = found(command)
        if command != "build_py":
            return base
        return _clean(base) if generated is None else _shipping(_clean(base), generated)

    distribution.get_command_class = get_command_class


def _is_shipped(root: Path, distribution: Distribution) -> bool:
    """Whether the output folder is in a package; True where setuptools is to discover them.

    Kernels for a project's own tests, say, are none of the wheel's business.
    """
    with errors_end_the_build():
        document = toml_of(read_text(root / "pyproject.toml"))
    tools = table_at(document, "tool", "setuptools")
    packages = distribution.packages or tools.get("packages")
    if not isinstance(packages, list):
        return True
    with errors_end_the_build():
        output = Path(os.path.relpath(read_table(root).output, root))
    folders = distribution.package_dir or table_at(tools, "package-dir")
    if not all(isinstance(home, str) for home in folders.values()):
        return True  # setuptools itself will say what is wrong
    return owned_package(output, folders, packages) is not None


def owned_package(folder: Path, folders: Mapping[str, str], packages: Iterable[str]) -> str | None:
    """Return the dotted name of `folder`, None if it neither is one of `packages` nor in one.

    Args:
        folder: from the root of the project.
        folders: setuptools' `package_dir`: package to folder, "" the folder of all others.
        packages: dotted names.
    """
    homes = [(Path(home), name) for name, home in ({"": "."} | dict(folders)).items()]
    homes = [(home, name) for home, name in homes if folder.is_relative_to(home)]
    if not homes:
        return None
    home, name = max(homes, key=lambda pair: len(pair[0].parts))
    package = ".".join([*filter(None, [name]), *folder.relative_to(home).parts])
    return package if any(f"{package}.".startswith(f"{p}.") for p in packages) else None


def _clean(base: type[Any]) -> type[Any]:
    """Return `build_py` that begins without the kernels of earlier builds.

    They lie in build/, which setuptools packs as it finds it: of another table, or of another
    folder that was the output. What belongs into this build is copied there again.
    """

    class BuildPy(base):  # type: ignore[misc]  # a class of the build: setuptools', or setup.py's
        def run(self) -> None:
            from .build import generated_below  # sympy and jinja2 load here

            # Where it is no folder of builds alone, what lies there may be the project's own.
            library, builds = Path(self.build_lib).resolve(), Path("build").resolve()
            base_folder = getattr(self.get_finalized_command("build"), "build_base", "build")
            apart = {builds, Path(base_folder).resolve()} - {Path().resolve()}
            if any(library.is_relative_to(each) for each in apart):
                with errors_end_the_build():
                    for path in generated_below(library):
                        remove(path)
            super().run()

    return BuildPy


def _shipping(base: type[Any], generated: Generated) -> type[Any]:
    """Return `build_py` with the generated files; it makes the lists of wheel and sdist."""

    class BuildPy(base):  # type: ignore[misc]  # as above
        def finalize_options(self) -> None:
            """Add what discovery does not find: data, and packages that only exist since now."""
            super().finalize_options()
            self.force = True  # else a newer file in build/ is shipped, whatever is in it
            folders = self.distribution.package_dir or {}
            packages = self.distribution.packages or []
            package = owned_package(generated.output, folders, packages)
            if package is None:
                return
            if package not in packages:
                self.packages = self.distribution.packages = [*packages, package]
            data = [path.name for path in generated.files if path.suffix != ".py"]
            self.package_data[package] = [*self.package_data.get(package, []), *data]

        def get_source_files(self) -> list[str]:
            """Add what the kernels are made of to the sdist."""
            return [*super().get_source_files(), *map(str, generated.sources)]

    return BuildPy
