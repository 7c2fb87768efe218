"""The commands: each parses its arguments, calls the library, prints, and sets the exit code.

Part of the command line. Input: arguments; output: data on stdout, messages on stderr, and an exit
code (common.py). Commands import what they need when they run, so that `convgen --help` is fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..language.spec import NO_CHOICES
from ..version import __version__
from .bench_model import bench_model
from .common import choices_option, guarded, open_output, print_json, progress, torch_for
from .flags import SPEC_OPTIONS
from .project import build, init, list_files
from .trace import trace


def _spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument SPEC and an option for every argument of the language."""
    for option in reversed(SPEC_OPTIONS):
        command = option(command)
    return click.argument("spec", required=False)(command)


def _choices(path: Path | None, statements: list[Any]) -> Any:
    from ..families.registry import FAMILIES
    from ..planning.choices import choices_for

    return choices_for(path, {statement.target.name for statement in statements}, FAMILIES)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="convgen")
def main() -> None:
    """Compile a transposed convolution into one Python file with a Triton kernel."""
    open_output()


@main.command()
@_spec_options
@choices_option
@click.option("-o", "--output", help="File, or folder for a .convgen file; - is stdout.")
@click.option("--force", is_flag=True, help="Overwrite a file that convgen did not make.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def emit(
    spec: str | None,
    choices: Path | None,
    output: str | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Print the kernel of SPEC: text, a .convgen file, or flags such as --k 3 --stride 1."""
    from ..compiler import compile_kernel
    from ..files import write_output
    from ..project.statements import resolve
    from .sources import destinations

    statements = resolve(spec, flags)
    paths = destinations(statements, spec, output, force=force)
    measured = _choices(choices, statements)
    with progress(statements) as bar:
        sources = [compile_kernel(s.spec, s.target, choices=measured) for s in bar]
    for source, path in zip(sources, paths, strict=True):
        if path is not None:
            write_output(path, source.text)
        elif not as_json:
            click.echo(source.text, nl=False)
        if path is not None and not as_json:
            click.echo(f"wrote {path}", err=True)
    if as_json:
        rows = [
            {
                "name": statement.name,
                "spec": str(statement.spec),
                "target": source.plan.target.name,
                "family": source.plan.family.name,
                "path": None if path is None else str(path),
                "sha256": source.sha256,
                "text": source.text,
            }
            for statement, source, path in zip(statements, sources, paths, strict=True)
        ]
        print_json("emit", {"kernels": rows})


@main.command()
@_spec_options
@choices_option
@click.option(
    "--seconds",
    default=55,
    type=click.IntRange(1, 86400),
    help="Time limit per kernel in seconds (55).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def verify(
    spec: str | None, choices: Path | None, seconds: int, as_json: bool, **flags: Any
) -> None:
    """Run the emitted kernel of SPEC against the oracle, on a GPU or in Triton's interpreter.

    A layer too large to check in a minute and 2 GB is checked at smaller sizes, and if need be
    with a smaller kernel, stride, padding and dilation; the report says so. Exits with 1 if a
    kernel fails, or is not fully verified within the time limit.
    """
    from ..project.statements import resolve

    statements = resolve(spec, flags)
    with torch_for("verify"):
        from ..execution.verify import verify as run
    measured = _choices(choices, statements)
    with progress(statements) as bar:
        reports = [run(s.spec, s.target, choices=measured, seconds=seconds) for s in bar]
    if as_json:
        print_json("verify", {"kernels": [report.as_dict() for report in reports]})
    else:
        for report in reports:
            click.echo(str(report))
    sys.exit(0 if all(report.passed for report in reports) else 1)


@main.command()
@_spec_options
@choices_option
@click.option(
    "--stage",
    type=click.Choice(["spec", "phases", "index", "plan", "candidates", "wrapper"]),
    help="One stage only.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def explain(
    spec: str | None, choices: Path | None, stage: str | None, as_json: bool, **flags: Any
) -> None:
    """Show every stage of SPEC: phases, accesses, tile and grid with their reasons, roofline."""
    from ..compiler import plan
    from ..explain import explain as sections_of
    from ..project.statements import resolve

    statements = resolve(spec, flags)
    kernels, measured = [], _choices(choices, statements)
    for statement in statements:
        made = plan(statement.spec, statement.target, choices=measured)
        sections = sections_of(made, stage)
        if as_json:
            stages = {section.stage: dict(section.rows) for section in sections}
            cost = {name: getattr(made.cost, name) for name in made.cost.__slots__}
            kernels.append({"name": statement.name, "stages": stages, "cost": cost})
            continue
        if statement.name is not None:
            click.secho(f"{statement.name} = {statement.spec}", bold=True)
        for section in sections:
            click.secho(section.stage, bold=True)
            for name, value in section.rows:
                lines = str(value).split("\n")
                click.echo(f"  {name}: {lines[0]}")
                for line in lines[1:]:
                    click.echo(f"    {line}")
    if as_json:
        print_json("explain", {"kernels": kernels})


@main.command("compile")
@_spec_options
@choices_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def compile_command(
    spec: str | None, choices: Path | None, as_json: bool, target: str | None, **flags: Any
) -> None:
    """Compile SPEC to machine code for the GPUs of --target a,b,…; needs triton, but no GPU."""
    from ..project.statements import resolve_for

    pairs = resolve_for(spec, flags, target)
    with torch_for("compile"):
        from .compile import resources_of

        measured = _choices(choices, pairs)
        with progress(pairs) as bar:
            rows = [row for statement in bar for row in resources_of(statement, measured)]
    if as_json:
        click.echo(json.dumps({"schema": 1, "kernels": rows}, indent=2))
    for row in rows if not as_json else ():
        click.echo(
            f"{row['name']:16} {row['target']:8} {row['registers']:3} registers, "
            f"{row['spills']} bytes of spills, {row['shared']} bytes of shared memory, "
            f"{row['occupancy']} programs per SM"
        )
    stuck = [f"{row['name']} for {row['target']}" for row in rows if row["occupancy"] == 0]
    if stuck:
        click.echo(f"Error: {', '.join(stuck)} needs more resources than an SM has", err=True)
        sys.exit(1)


@main.command()
@_spec_options
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tiles", default=48, type=click.IntRange(1, 4096), help="Candidates per spec (48).")
@click.option(
    "--choices",
    type=click.Choice([NO_CHOICES]),
    help="`none` keeps the package's measured tiles out of the candidates.",
)
@click.option("--force", is_flag=True, help="Overwrite a file that is no choices file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def tune(
    spec: str | None,
    output: Path,
    tiles: int,
    choices: str | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Time SPEC's candidates on this machine's GPU; write the fastest to a choices file.

    Specs already in the file are skipped, so that a rerun resumes an interrupted one.
    """
    from ..project.statements import resolve

    statements = resolve(spec, flags)
    with torch_for("tune"):
        from ..measuring.tune import gpu_executor, tuning_target
        from ..measuring.tune import tune as run

        target = tuning_target(flags["target"])
    specs = [statement.spec for statement in statements]
    rows = []
    workers, gpus = gpu_executor()
    with workers, click.progressbar(length=len(specs), file=sys.stderr) as bar:
        given = {"known": choices != NO_CHOICES, "force": force}
        for row in run(specs, target, output, workers, tiles, gpus, **given):
            rows.append(row)
            bar.update(1)
    if as_json:
        print_json("tune", {"target": target.name, "choices": rows})
    else:
        click.echo(
            f"{len(rows)} of {len(specs)} specs measured, the others were already in the file",
            err=True,
        )
        _tell_ranking([row["first_ms"] / row["ms"] for row in rows if row["first_ms"]])


def _tell_ranking(ratios: list[float]) -> None:
    """Print how well the model ranks: time of its first choice over time of the best tile."""
    from statistics import geometric_mean

    if ratios:
        click.echo(
            f"the model's first choice took {geometric_mean(ratios):.2f} times the best "
            f"(geometric mean of {len(ratios)}; the worst {max(ratios):.2f})",
            err=True,
        )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def targets(as_json: bool) -> None:
    """List the GPUs that convgen can plan for; * marks the default."""
    from dataclasses import asdict

    from ..tables.targets import DEFAULT_TARGET, TARGETS

    if as_json:
        print_json("targets", {"targets": [asdict(target) for target in TARGETS]})
        return
    for t in TARGETS:
        mark = "*" if t.name == DEFAULT_TARGET else " "
        click.echo(
            f"{mark} {t.name:8} {t.arch:6} {t.sms:4} SMs {t.shared_per_block // 1024:4} KB shared "
            f"{t.dram_gbps:6.0f} GB/s {t.tflops_tf32:6.1f} tf32 {t.tflops_fp16:6.1f} fp16 TFLOP/s"
            f"  {t.product}"
        )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def families(as_json: bool) -> None:
    """List the kernel families; the planner ranks the tiles of all families that serve a spec."""
    from ..families.registry import FAMILIES

    if as_json:
        rows = [{"name": f.name, "serves": f.serves, "idea": f.method} for f in FAMILIES]
        print_json("families", {"families": rows})
        return
    for family in FAMILIES:
        click.echo(f"{family.name:8} serves {family.serves}: {family.method}")


@main.command()
@click.argument("cases")
@click.option("--only", default="", metavar="TEXT", help="Only cases with TEXT in their id.")
@click.option("--dtypes", help="Dtypes, comma-separated, instead of those in CASES.")
@click.option("--ways", help="Ways of torch, comma-separated (all); '' means none.")
@click.option("--layouts", help="Layouts of convgen's files, comma-separated (both).")
@choices_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the report as JSON, with every sample; rewritten after each way.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for a bar chart and roofline, as SVG; needs matplotlib.",
)
@click.option("--force", is_flag=True, help="Overwrite files that bench did not make.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def bench(
    cases: str,
    only: str,
    dtypes: str | None,
    ways: str | None,
    layouts: str | None,
    choices: Path | None,
    output: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Time CASES (a spec, a .convgen file or a .json file) against torch on this machine's GPU.

    Each way to compute a layer runs in a separate process, on the same data. Speedups are over
    torch's default and over torch's fastest way; errors are relative to float64.
    """
    from ..families.registry import FAMILIES
    from ..files import check_output, write_output
    from ..measuring.bench import not_a_report, run
    from ..measuring.cases import read_cases, read_ways
    from ..measuring.plot import draw_plot, not_a_plot, require_matplotlib
    from ..measuring.report import table
    from ..planning.choices import choices_at

    found, chosen = read_cases(cases, only, dtypes), read_ways(ways, layouts)
    if choices is not None:
        choices_at(choices, FAMILIES)  # the workers read it; a bad file should stop the run here
    if plot is not None:
        require_matplotlib()
    for path, refusal in ((output, not_a_report), (plot, not_a_plot)):
        if path is not None:
            check_output(path, refusal, force=force)
    report = run(found, chosen, output, choices)
    if plot is not None:
        write_output(plot, draw_plot(report))
    if as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(table(report))


for _command in (bench_model, trace, init, build, list_files):
    main.add_command(_command)
