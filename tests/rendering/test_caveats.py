"""What a user should mind is said everywhere, and is what kernels do.

What would break it: a caveat that README, file or `explain` leaves out, one that holds of a kernel
and is not said, and one that is said of a kernel that does what torch does.
"""

from __future__ import annotations

import ast
import math
import random
from pathlib import Path

import pytest
import torch

from convgen import find_target, parse
from convgen.compiler import plan
from convgen.execution.loading import load_module
from convgen.explain import explain
from convgen.planning.caveats import CAVEATS, caveats_of
from drawing import each_form
from scattering import axis_of, output_extent, random_parameters, scattered

SPREAD, _, PADDED = (caveat.text for caveat in CAVEATS)


def said(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


def test_the_readme_has_every_caveat(root: Path) -> None:
    readme = said((root / "README.md").read_text(encoding="utf-8"))
    assert [caveat.text for caveat in CAVEATS if caveat.text not in readme] == []


@pytest.mark.parametrize("name", ["grouped", "unet_up", "seed", "kernelbench_58_h100", "any"])
def test_file_and_explain_have_the_caveats_of_their_plan(name: str, root: Path) -> None:
    text = (root / f"generated/{name}.py").read_text(encoding="utf-8")
    docstring = said(ast.get_docstring(ast.parse(text)) or "")
    spec = next(line for line in text.splitlines() if line.startswith("# spec: "))
    target = next(line for line in text.splitlines() if line.startswith("# target: ")).split()[2]
    made = plan(parse(spec.removeprefix("# spec: ")), find_target(target))
    rows = dict(explain(made, "plan")[0].rows)
    held = caveats_of(made)
    assert [c.text for c in CAVEATS if c.text in docstring] == list(held)
    assert rows.get("caveat", "") == " ".join(held)


LAYERS = {
    "kernel no multiple": "ConvTranspose2d({c}, {c}, 3, 2, 1, 1, {g}input=(1, {c}, 5, 8))",
    "kernel a multiple": "ConvTranspose2d({c}, {c}, 4, 2, 1, {g}input=(1, {c}, 5, 8))",
    "kernel = stride": "ConvTranspose2d({c}, {c}, 2, 2, {g}input=(1, {c}, 5, 8))",
    "three phases": "ConvTranspose1d({c}, {c}, 6, 3, {g}input=(1, {c}, 9))",
    "stride 1": "ConvTranspose2d({c}, {c}, 3, 1, 1, {g}input=(1, {c}, 5, 8))",
    "dilated": "ConvTranspose1d({c}, {c}, 3, 2, 2, 1, dilation=3, {g}input=(1, {c}, 8))",
}


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("channels", ["c=3 g=", "c=4 g=groups=4, "])
@pytest.mark.parametrize("layer", LAYERS)
def test_kernels_do_what_is_said_of_them_and_no_more(
    layer: str, channels: str, tmp_path: Path, device: str
) -> None:
    c, g = (part.partition("=")[2] for part in channels.split(" ", 1))
    spec = parse(LAYERS[layer].format(c=c, g=g))
    inputs = torch.ones(spec.input, device=device)
    weight = torch.ones(int(c), int(c) // spec.groups, *spec.kernel_size, device=device)
    bias = torch.zeros(int(c), device=device)
    for form, source in each_form(spec, layer).items():
        module = load_module(source.text, form.replace(" ", "_"), tmp_path)
        function = getattr(module, f"conv_transpose{spec.rank}d")
        held = caveats_of(source.plan)
        poisoned, reached = inputs.clone(), torch.zeros_like(inputs)
        place = (0, 1, *(size // 2 for size in inputs.shape[2:]))
        poisoned[place], reached[place] = math.nan, 1
        beyond = function(poisoned, weight, bias).isnan() & (function(reached, weight, bias) == 0)
        assert bool(beyond.any()) == (SPREAD in held), form
        padded = function(inputs, torch.full_like(weight, math.inf), bias).isnan()
        if SPREAD not in held:  # zero times infinity has both reasons there
            assert bool(padded.any()) == (PADDED in held), form


def test_padding_is_read_where_an_output_has_a_tap_without_an_input() -> None:
    """Against an enumeration of the definition, which knows of no phases."""
    rng, met = random.Random(3), set()
    for _ in range(300):
        kernel, stride, padding, _, dilation = parameters = random_parameters(
            rng, rng.randint(1, 4)
        )
        size = 2 * (padding + dilation * kernel) + stride
        extent = output_extent(size, *parameters)
        pairs = scattered(size, extent, kernel, stride, padding, dilation)
        full = {
            o: sum((o + padding - dilation * k) % stride == 0 for k in range(kernel))
            for o in range(extent)
        }
        wanted = any(len(pairs.get(o, ())) < taps for o, taps in full.items())
        assert axis_of(*parameters).reads_padding == wanted, parameters
        met.add(wanted)
    assert met == {True, False}
