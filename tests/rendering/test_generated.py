"""The files of generated/: up to date, legal Python, within the rules, and of every kind.

They are what people read first, and the corpus that a refactoring must not change by a byte.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from convgen import find_target
from convgen.compiler import plan
from convgen.families.registry import FAMILIES
from convgen.project.build import check, generate
from convgen.project.table import read_table
from rules import check_rules

ROOT = Path(__file__).parents[2]
KERNELS = read_table(ROOT).kernels
SPECS = [kernel.spec for kernel in KERNELS]


def test_there_is_no_drift():
    """The compiler was changed: run `convgen build`, read the diff, and commit it."""
    drift = check(generate(ROOT))
    assert (drift.missing, drift.changed, drift.extra) == ((), (), ())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.path.stem)
def test_each_file_is_legal_and_within_the_rules(kernel):
    """Read from the disk as users get it: edits by hand break a rule here, if not the syntax."""
    text = kernel.path.read_text("utf-8")
    compile(text, kernel.path.name, "exec", dont_inherit=True)
    assert check_rules(text) == []


def test_every_family_has_a_file():
    planned = {plan(kernel.spec, find_target(kernel.target)).family.name for kernel in KERNELS}
    assert planned == {family.name for family in FAMILIES}


KINDS = {
    "rank 1": lambda spec: spec.rank == 1,
    "rank 2": lambda spec: spec.rank == 2,
    "rank 3": lambda spec: spec.rank == 3,
    "stride 1": lambda spec: max(spec.stride) == 1,
    "a stride": lambda spec: max(spec.stride) > 1,
    "padding": lambda spec: max(spec.padding) > 0,
    "output padding": lambda spec: max(spec.output_padding) > 0,
    "dilation": lambda spec: max(spec.dilation) > 1,
    "groups": lambda spec: spec.groups > 1,
    "a bias": lambda spec: spec.bias,
    "no bias": lambda spec: not spec.bias,
    "float32": lambda spec: spec.dtype == "float32",
    "float16": lambda spec: spec.dtype == "float16",
    "bfloat16": lambda spec: spec.dtype == "bfloat16",
    "float64": lambda spec: spec.dtype == "float64",
    "depthwise": lambda spec: 1 < spec.groups == spec.in_channels,
    "channels last": lambda spec: spec.layout == "channels_last",
    "any layout": lambda spec: spec.layout == "any",
    "a precision": lambda spec: spec.precision not in (None, "tf32"),
    "autotuning": lambda spec: spec.autotune != "none",
    "a stage before": lambda spec: spec.before,
    "a stage after": lambda spec: spec.after,
    "every size known": lambda spec: None not in (spec.out_channels, *(spec.input or (None,))),
    "sizes of run time": lambda spec: spec.input is None,
    "channels of run time": lambda spec: spec.in_channels is None,
    "the brief's problem": lambda spec: str(spec).endswith("input=(8, 64, 1024, 1024))"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_has_a_file(kind):
    """A kind without a golden file can change unseen."""
    assert any(KINDS[kind](spec) for spec in SPECS)
