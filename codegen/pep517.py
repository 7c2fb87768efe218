"""The wrapper backend: `build-backend = "convgen.pep517"` generates, then another backend builds.

Beside the stages. `[tool.convgen] build-backend` names the other backend. Input: the hook calls of
a build frontend (PEP 517, PEP 660), made in the project's folder; output: the other backend's
answers.

Only the hooks that build generate kernels: frontends ask for requirements and metadata far more
often, and from environments that may not be complete yet.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .project.hooks import errors_end_the_build, generate_into
from .project.table import read_build_backend

ASKING = (
    "get_requires_for_build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
)
BUILDING = ("build_wheel", "build_sdist", "build_editable")


def __getattr__(name: str) -> Callable[..., Any]:
    """Return a hook of the other backend; this module has the same hooks as that backend.

    Raises:
        AttributeError: the other backend has no such hook; frontends test this by `hasattr`.
        SystemExit: the table names no usable backend.
    """
    if name not in (*ASKING, *BUILDING):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hook: Callable[..., Any] = getattr(_delegate(), name)
    return _generating(hook, name) if name in BUILDING else hook


def _delegate() -> Any:
    """Import the other backend, named as `module` or `module:object`."""
    with errors_end_the_build():
        backend = read_build_backend(Path())
    name, _, attributes = backend.partition(":")
    try:
        module = importlib.import_module(name)
        delegate = functools.reduce(getattr, filter(None, attributes.split(".")), module)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SystemExit(
            f"convgen: error: cannot use {backend}, the build-backend of [tool.convgen]: {error}; "
            "add its package to requires of [build-system]"
        ) from None
    if delegate is sys.modules[__name__]:
        raise SystemExit(
            "convgen: error: build-backend of [tool.convgen] must name the backend to run after "
            f"{__name__}, such as setuptools.build_meta or flit_core.buildapi; got {backend}"
        )
    return delegate


def _generating(hook: Callable[..., str], name: str) -> Callable[..., str]:
    @functools.wraps(hook)
    def run(directory: str, *arguments: Any, **options: Any) -> str:
        generated = generate_into(Path())
        basename = hook(directory, *arguments, **options)
        if name == "build_sdist":
            _check_sdist(Path(directory, basename), generated.sources)
        if name == "build_wheel":
            _check_wheel(Path(directory, basename), generated.files)
        return basename

    return run


def _check_sdist(archive: Path, sources: tuple[Path, ...]) -> None:
    """Refuse an sdist from which no wheel could be built.

    Some backends leave out files outside the package, which a source of the kernels may be.

    Raises:
        SystemExit: a source of the kernels is not in the archive.
    """
    with tarfile.open(archive) as opened:
        inside = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    for path in sources:
        if path not in inside:
            archive.unlink()
            raise SystemExit(
                f"convgen: error: {path} would be missing from the sdist, and no wheel could be "
                "built from it; add the file to the build backend's list of extra sdist files"
            )


def _check_wheel(archive: Path, files: tuple[Path, ...]) -> None:
    """Refuse a wheel that has the package of the kernels but not the kernels.

    Some backends leave out files that version control ignores. Kernels outside every package, for
    example for a project's own tests, need not be in the wheel.

    Raises:
        SystemExit: a generated file is not in the archive.
    """
    with zipfile.ZipFile(archive) as opened:
        inside = [Path(name) for name in opened.namelist()]
    for path in files:
        package, ending = path.parent.parent.name, path.parts[-3:]
        shipped = any(package in found.parts[:-1] for found in inside)
        if package and shipped and all(found.parts[-len(ending) :] != ending for found in inside):
            archive.unlink()
            raise SystemExit(
                f"convgen: error: {path} would be missing from the wheel; have the build backend "
                "include the folder, which it may leave out because version control ignores it"
            )
