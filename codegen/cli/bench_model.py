"""The command bench-model: a user's model as it is, replaced, compiled, and both, side by side.

Part of the command line; needs torch, triton and a CUDA GPU. Input: MODULE:FACTORY and shapes;
output: a table, a report and a plot.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MachineError, SpecError
from .common import guarded, inputs_option, torch_for

if TYPE_CHECKING:
    from ..measuring.model_run import Setting

COMMAND = "bench-model"


@click.command(COMMAND)
@click.argument("model", metavar="MODULE:FACTORY")
@inputs_option
@click.option(
    "--autocast",
    type=click.Choice(["float16", "bfloat16"]),
    help="Run under autocast of this dtype.",
)
@click.option("--channels-last", is_flag=True, help="Model and inputs in channels_last.")
@click.option(
    "--train", is_flag=True, help="Time forward and backward in train mode, not a forward."
)
@click.option(
    "--rounds",
    default=50,
    type=click.IntRange(1, 100_000),
    help="How often each way is timed (50).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the report as JSON, with every sample.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for a bar chart, as SVG; needs matplotlib.",
)
@click.option("--force", is_flag=True, help="Overwrite files that bench-model did not make.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def bench_model(
    model: str,
    inputs: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Time a model as it is, replaced, compiled, and both, on this machine's GPU.

    FACTORY is a torch.nn.Module in MODULE, or a function without required arguments that returns
    one; modules in the current folder are found. Exits with 1 if the numbers of a way are off.
    """
    from ..files import check_output, write_output
    from ..measuring.bench import not_a_report
    from ..measuring.model_report import table
    from ..measuring.plot import MODEL_TITLE, draw_model_plot, not_a_plot, require_matplotlib

    if plot is not None:
        require_matplotlib()
    refusals = (partial(not_a_report, command=COMMAND), partial(not_a_plot, title=MODEL_TITLE))
    for path, refusal in zip((output, plot), refusals, strict=True):
        if path is not None:
            check_output(path, refusal, force=force)
    report = _measured(model, inputs, options)
    if output is not None:
        write_output(output, json.dumps(report) + "\n")
    if plot is not None:
        write_output(plot, draw_model_plot(report))
    click.echo(json.dumps(report) if as_json else table(report))
    sys.exit(0 if report["passed"] else 1)


def _measured(model: str, inputs: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Return the report."""
    # The profiler would print lines of its own between those of the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch_for(COMMAND):
        import torch  # noqa: F401
        import triton  # noqa: F401

        from ..measuring.model_bench import machine
        from ..measuring.model_report import finished
        from ..measuring.model_run import Setting
    from .models import find_model, imports_from_here, made_inputs

    tensors = made_inputs(inputs)
    setting = Setting(device=_device(), **options)
    head = {
        "schema": 1,
        "command": COMMAND,
        **machine(setting.device),
        "model": model,
        "inputs": list(inputs),
        **options,
    }
    # What the model prints must not get into the report.
    with contextlib.redirect_stdout(sys.stderr), imports_from_here():
        return finished(head, _rows(find_model(model), tensors, setting))


def _rows(model: Any, inputs: list[Any], setting: Setting) -> dict[str, Any]:
    from ..measuring.bench import progress
    from ..measuring.model_bench import measure, steps

    try:
        with progress(COMMAND, steps(setting)) as advance:
            return measure(model, inputs, setting, advance=advance)
    except SpecError as error:
        flags = {"inputs": "--input: ", "train": "--train: "}
        raise SpecError(f"{flags.get(error.argument or '', '')}{error}", error.argument) from None


def _device() -> str:
    """Return where the model runs; raises MachineError without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise MachineError(f"{COMMAND} needs a CUDA GPU, and torch sees none")
    return "cuda"
