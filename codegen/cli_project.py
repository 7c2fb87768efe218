"""The commands for projects: init, build, list-files.

Part of the command line. Input: the root of a project; output: its files, and what changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .cli_common import guarded, print_json

_root = click.argument("root", default=".", type=click.Path(file_okay=False, path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@_root
@_json
@guarded
def init(root: Path, as_json: bool) -> None:
    """Add a commented [tool.convgen] to ROOT/pyproject.toml, and say what is left to do."""
    from .scaffold import start

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
@_json
@guarded
def build(root: Path, check: bool, diff: bool, force: bool, as_json: bool) -> None:
    """Generate all of [tool.convgen] in ROOT/pyproject.toml; write only what changed."""
    from . import project
    from .sources import unified_diff

    made = project.generate(root)
    dry = check or diff
    drift = project.check(made) if dry else project.write(made, force=force)
    if diff and not as_json:
        click.echo(unified_diff(made, drift), nl=False)
    rows = {name: [str(path) for path in getattr(drift, name)] for name in drift.__slots__}
    if as_json:
        print_json("build", {"written": not dry, **rows})
    else:
        verbs = {"missing": "write", "changed": "rewrite", "extra": "remove", "kept": "keep"}
        for name, paths in rows.items():
            for path in paths:
                click.echo(f"{name if dry else verbs[name]} {path}", err=True)
        count = sum(map(len, rows.values()))
        verb = "differ" if dry else "brought up to date"
        click.echo(f"{len(made.texts)} files, {count} {verb}", err=True)
    sys.exit(1 if dry and drift else 0)


@click.command("list-files")
@_root
@_json
@guarded
def list_files(root: Path, as_json: bool) -> None:
    """List the files that `build` would write, for build systems."""
    from .project import files
    from .table import read_table

    paths = [str(path) for path in files(read_table(root))]
    if as_json:
        print_json("list-files", {"files": paths})
    else:
        for path in paths:
            click.echo(path)
