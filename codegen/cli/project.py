"""The commands for projects: init, build, list-files.

Part of the command line. Input: the root of a project; output: its files, and a list of changes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ..errors import visible
from .common import guarded, print_json, progress

_root = click.argument("root", default=".", type=click.Path(file_okay=False, path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@_root
@_json
@guarded
def init(root: Path, as_json: bool) -> None:
    """Add a commented [tool.convgen] to ROOT/pyproject.toml, and print the remaining steps."""
    from ..project.scaffold import start

    started = start(root)
    if as_json:
        print_json("init", {"path": str(started.path), "steps": list(started.steps)})
        return
    click.echo(f"added [tool.convgen] to {started.path}; now", err=True)
    for step in started.steps:
        click.echo(f"  * {step}", err=True)


@click.command()
@_root
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file differs.")
@click.option("--diff", is_flag=True, help="Write nothing; print a unified diff.")
@click.option("--force", is_flag=True, help="Overwrite files that were edited by hand.")
@click.option("--exit-non-zero-on-change", "strict", is_flag=True, help="Exit 1 if a file changed.")
@_json
@guarded
def build(root: Path, check: bool, diff: bool, force: bool, strict: bool, as_json: bool) -> None:
    """Generate the files of [tool.convgen] in ROOT/pyproject.toml; write only changed ones.

    If a file to be written was edited by hand, the build stops with exit 1. An edited file that
    belongs to no kernel any more is kept, and the build exits with 1.
    """
    from ..project import build as project

    made = project.generate(root, progress)
    dry = check or diff
    drift = project.check(made) if dry else project.write(made, force=force)
    if diff and not as_json:
        click.echo(project.unified_diff(made, drift), nl=False)
    rows = {name: [str(path) for path in getattr(drift, name)] for name in drift.__slots__}
    if as_json:
        print_json("build", {"written": not dry, **rows})
    else:
        verbs = {"missing": "write", "changed": "rewrite", "extra": "remove"}
        verbs["kept"] = "kept (edited, no kernel names it)"
        for name, paths in rows.items():
            for path in paths:
                click.echo(f"{name if dry else verbs[name]} {visible(path, 4096)}", err=True)
        count = sum(len(paths) for name, paths in rows.items() if dry or name != "kept")
        verb = "differ" if dry else "brought up to date"
        files = f"{len(made.contents)} file{'s' * (len(made.contents) != 1)}"
        click.echo(f"{files}, {count} {verb}", err=True)
    sys.exit(1 if drift.kept or ((dry or strict) and drift) else 0)


@click.command("list-files")
@_root
@click.option("--sources", is_flag=True, help="List the inputs of the build instead.")
@_json
@guarded
def list_files(root: Path, sources: bool, as_json: bool) -> None:
    """List the files that `build` would write, for build systems; paths start with ROOT."""
    from ..project.build import files
    from ..project.table import read_table

    table = read_table(root)
    found = [root / "pyproject.toml", *table.sources] if sources else files(table)
    paths = [str(path) for path in found]
    if as_json:
        print_json("list-files", {"files": paths})
    else:
        for path in paths:
            click.echo(os.fsencode(path))  # as bytes: a path need not be valid text
