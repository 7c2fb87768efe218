"""The setuptools plugin: generates before setuptools builds, and adds the files to the build.

Beside the stages; setuptools finds it by the entry point group
`setuptools.finalize_distribution_options` and calls it in every build where convgen is installed.
It does nothing if the project has no `[tool.convgen]`. Input: a `Distribution` whose configuration
has not been read, so that package discovery, which follows, sees the generated files; output: these
files, and a `build_py` command that ships them.
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

# Not egg_info and dist_info: frontends run them only to ask for requirements and metadata.
BUILDING = frozenset(
    ("bdist_wheel", "build", "build_py", "develop", "editable_wheel", "install", "sdist")
)


def finalize(distribution: Distribution) -> None:
    """Generate the kernels if `distribution` is about to be built and its packages contain them.

    Raises:
        SystemExit: the kernels cannot be generated.
    """
    root = Path()  # setuptools builds the project in the current directory
    if BUILDING.isdisjoint(distribution.script_args or ()) or not has_table(root):
        return
    generated = generate_into(root) if _is_shipped(root, distribution) else None
    found = distribution.get_command_class

    @functools.cache
    def get_command_class(command: str) -> type[Any]:
        # Looked up when the command runs: the project's own class is not known before.
        base: type[Any] = found(command)
        if command != "build_py":
            return base
        return _clean(base) if generated is None else _shipping(_clean(base), generated)

    distribution.get_command_class = get_command_class


def _is_shipped(root: Path, distribution: Distribution) -> bool:
    """Whether the output folder belongs to a package; True if setuptools discovers the packages.

    A folder outside all packages, with kernels for the project's tests for example, is not shipped.
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
        return True  # setuptools reports the wrong value
    return owned_package(output, folders, packages) is not None


def owned_package(folder: Path, folders: Mapping[str, str], packages: Iterable[str]) -> str | None:
    """Return the dotted name of `folder`, None if it is neither one of `packages` nor inside one.

    Args:
        folder: path relative to the root of the project.
        folders: setuptools' `package_dir`: folder of each package, "" for all other packages.
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
    """Return a `build_py` that first removes the kernels of earlier builds from build/.

    setuptools packs everything in build/, also kernels that the table no longer names or that were
    generated into another folder. The files of this build are copied there afterwards.
    """

    class BuildPy(base):  # type: ignore[misc]  # a class of the build: setuptools', or setup.py's
        def run(self) -> None:
            from .build import generated_below  # sympy and jinja2 load here

            # Only below the build folders: elsewhere the files may be the project's own.
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
    """Return a `build_py` that adds the generated files and their sources to wheel and sdist."""

    class BuildPy(base):  # type: ignore[misc]  # as above
        def finalize_options(self) -> None:
            """Add what package discovery misses: data files, and the package if it is new."""
            super().finalize_options()
            self.force = True  # otherwise a newer file in build/ would not be overwritten
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
            """Add the sources of the kernels to the files of the sdist."""
            return [*super().get_source_files(), *map(str, generated.sources)]

    return BuildPy
