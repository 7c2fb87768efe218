"""The options of the language: one command-line option for every argument of a spec.

Stage 1, parse, for the command line. Input: command-line arguments; output: texts, which
project/statements.py turns into a `ConvTransposeSpec`.
"""

from __future__ import annotations

import click

_AXES = "N for all axes, or N,N with one per axis"
SPEC_OPTIONS = (
    click.option("--rank", help="Spatial axes: 1, 2 or 3 (2)."),
    click.option("--k", "--kernel-size", "kernel_size", help=f"Kernel size; {_AXES}."),
    click.option("--stride", help=f"Stride (1); {_AXES}."),
    click.option("--padding", help=f"Padding (0); {_AXES}."),
    click.option("--output-padding", help=f"Output padding (0); {_AXES}."),
    click.option("--dilation", help=f"Dilation (1); {_AXES}."),
    click.option("--groups", help="Groups (1)."),
    click.option("--in-channels", help="Input channels (left to run time)."),
    click.option("--out-channels", help="Output channels (left to run time)."),
    click.option("--bias/--no-bias", default=None, help="Add a bias (yes)."),
    click.option("--input", help="batch,channels,sizes; write none for a size left to run time."),
    click.option("--rungs", help="Inputs with a kernel of their own, between semicolons."),
    click.option("--dtype", help="float32, float16, bfloat16, float64."),
    click.option("--precision", help="tf32, tf32x3, bf16x3, bf16x6, ieee; float32 only."),
    click.option("--layout", help="channels_first, channels_last, any."),
    click.option("--grid", help="Launch grid dimensions: 1, 2 or 3."),
    click.option("--autotune", help="none, blocks, launch."),
    click.option("--target", help="The GPU to plan for (rtx4090); see `convgen targets`."),
)
