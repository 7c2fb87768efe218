"""The flags of the language: one command-line option for every argument of a spec.

Stage 1, the door of the command line. Input: click's values, all text; output: a
`ConvTransposeSpec`.
"""

from __future__ import annotations

import re
from typing import Any

import click

from .errors import SpecError, shown
from .language.spec import ConvTransposeSpec

_AXES = "N or N,N: one for all axes, or one for each"
SPEC_OPTIONS = (
    click.option("--rank", help="Spatial axes: 1, 2 or 3 (2)."),
    click.option("--k", "--kernel-size", "kernel_size", help=f"Kernel size; {_AXES}."),
    click.option("--stride", help=f"Stride (1); {_AXES}."),
    click.option("--padding", help=f"Padding (0); {_AXES}."),
    click.option("--output-padding", help=f"Output padding (0); {_AXES}."),
    click.option("--dilation", help=f"Dilation (1); {_AXES}."),
    click.option("--groups", help="Groups (1)."),
    click.option("--in-channels", help="Input channels; left out: known at run time."),
    click.option("--out-channels", help="Output channels; left out: known at run time."),
    click.option("--bias/--no-bias", default=None, help="Add a bias (yes)."),
    click.option("--input", help="batch,channels,sizes; none for those of run time."),
    click.option("--dtype", help="float32, float16, bfloat16, float64."),
    click.option("--precision", help="tf32, tf32x3, bf16x3, bf16x6, ieee; float32 only."),
    click.option("--layout", help="channels_first, channels_last."),
    click.option("--grid", help="Launch grid dimensions: 1, 2 or 3."),
    click.option("--autotune", help="none, blocks, launch."),
    click.option("--target", help="The GPU to plan for (rtx4090); see `convgen targets`."),
)
_INTEGERS = ("rank", "groups", "in_channels", "out_channels", "grid")
_TUPLES = ("kernel_size", "stride", "padding", "output_padding", "dilation", "input")


def spec_from_flags(flags: dict[str, Any]) -> ConvTransposeSpec:
    """Return the spec that flags describe.

    Args:
        flags: option to text, None where it was not given; `target` is left to the caller.

    Raises:
        SpecError: a flag is wrong; the message starts with its name.
    """
    given = {name: value for name, value in flags.items() if value is not None and name != "target"}
    if "kernel_size" not in given:
        raise SpecError("give a spec, a .convgen file, or --k with a kernel size", "kernel_size")
    try:
        values = {name: _value(name, value) for name, value in given.items()}
        return ConvTransposeSpec(**{"rank": 2, **values})
    except SpecError as error:
        flag = f"--{(error.argument or 'k').replace('_', '-')}"
        raise SpecError(f"{flag}: {error}", error.argument) from None


def _value(name: str, text: Any) -> Any:
    if name in _INTEGERS:
        return _integer(name, text)
    if name in _TUPLES:
        text = text.strip()
        if text[:1] == "(" and text[-1:] == ")":
            text = text[1:-1].strip()
        parts = text.removesuffix(",").split(",")
        numbers = tuple(_integer(name, part, none=name == "input") for part in parts)
        return numbers[0] if len(numbers) == 1 and name != "input" else numbers
    return text


def _integer(name: str, text: str, none: bool = False) -> int | None:
    text = text.strip()
    if none and text.lower() in ("none", "?"):
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise SpecError(f"{name} must be an integer, got {shown(text)}", name)
    return int(text)
