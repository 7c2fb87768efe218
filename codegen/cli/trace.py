"""The command trace: the specs of a model's layers, as a `.convgen` document.

Part of the command line; needs torch. Input: MODULE:FACTORY and shapes; output: the document.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..errors import SpecError, visible
from ..tables.targets import DEFAULT_TARGET
from .common import choices_option, guarded, inputs_option, print_json, torch_for


@click.command()
@click.argument("model", metavar="MODULE:FACTORY")
@inputs_option
@click.option(
    "--open",
    "opened",
    type=click.Choice(["batch", "all"]),
    help="Leave the batch, or batch and spatial sizes, to run time.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    help="Run under autocast of this dtype.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where the forward runs (cpu).",
)
@click.option("--target", help="The GPU that the document names; see `convgen targets`.")
@choices_option
@click.option("-o", "--output", help="File, such as kernels.convgen; - is stdout.")
@click.option("--force", is_flag=True, help="Overwrite a file that trace did not make.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guarded
def trace(
    model: str,
    inputs: tuple[str, ...],
    target: str | None,
    choices: Path | None,
    output: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the specs of a model's transposed convolutions, with the sizes that they see.

    FACTORY is a torch.nn.Module in MODULE, or a function without required arguments that returns
    one; modules in the current folder are found. The model's forward runs once, in eval mode.
    `convgen emit` and `specs` of [tool.convgen] read the document. It and messages tell of kernels
    that were measured to be slower than torch.
    """
    from ..families.registry import FAMILIES
    from ..files import check_output, write_output
    from ..planning.choices import choices_for
    from ..project.document import document_of, notes, refusal

    _check_target(target)
    measured = choices_for(choices, {target or DEFAULT_TARGET}, FAMILIES)
    path = None if output in (None, "-") else Path(output or "")
    if path is not None:
        check_output(path, refusal, force=force)
    with torch_for("trace"):
        import torch  # noqa: F401  # so that its absence is told before the model is imported
    found = _traced(model, inputs, options)
    if not found.kernels:
        reasons = "".join(f"\n  {note}" for note in notes(found))
        raise SpecError(f"{model}: no transposed convolution that was called has a spec{reasons}")
    given = None if choices is None else str(choices)
    command = _command(model, inputs, {**options, "target": target, "choices": given})
    document = document_of(found, model, command, target, measured)
    if path is not None:
        write_output(path, document.text)
    if as_json:
        kernels = [
            {
                "name": name,
                "spec": str(kernel.spec),
                "layers": list(kernel.layers),
                "slower": None if times is None else asdict(times),
            }
            for name, kernel, times in zip(
                document.names, found.kernels, document.slower, strict=True
            )
        ]
        left = [{"layer": name, "reason": reason} for name, reason in found.left.items()]
        others = {"left": left, "uncalled": list(found.uncalled)}
        where = None if path is None else str(path)
        print_json("trace", {"kernels": kernels, **others, "path": where, "text": document.text})
        return
    if path is None:
        click.echo(document.text, nl=False)
    for note in (*document.warnings(), *notes(found)):
        click.echo(note, err=True)
    if path is not None:
        click.echo(f"wrote {path}", err=True)


def _traced(model: str, inputs: tuple[str, ...], options: dict[str, Any]) -> Any:
    from ..network.trace import trace_layers
    from .models import find_model, imports_from_here, made_inputs

    tensors = made_inputs(inputs)
    # What the model prints must not get into the document.
    with contextlib.redirect_stdout(sys.stderr), imports_from_here():
        found = find_model(model)
        try:
            return trace_layers(found, tensors, **options, in_place=True)
        except SpecError as error:
            flag = "--input: " if error.argument == "inputs" else ""
            raise SpecError(f"{flag}{error}", error.argument) from None


def _check_target(target: str | None) -> None:
    from ..language.spec import check_target

    try:
        if target is not None:
            check_target(target)
    except SpecError as error:
        raise SpecError(f"--target: {error}", "target") from None


def _command(model: str, inputs: tuple[str, ...], options: dict[str, Any]) -> str:
    """Return the command that traces this model again."""
    words = ["convgen", "trace", model]
    for shape in inputs:
        words += ["--input", shape]
    defaults = {"device": "cpu"}
    for name, value in options.items():
        if value != defaults.get(name):
            words += [f"--{'open' if name == 'opened' else name}", value]
    return visible(shlex.join(words), 2000)
