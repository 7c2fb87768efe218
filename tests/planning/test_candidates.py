"""The order of candidates: the first tiles of real layers on two cards, as a person can read them.

A change of the cost model shows here as what it does to the ranking; whether that is for the better
is for the one to say who makes it. Other tests check the model by hand. What would break it: a form
that is no longer tried, a price that changes unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from convgen import find_target, parse
from convgen.compiler import plan

SHOWN = 6
LAYERS = {
    # The problem that convgen began with: compute-bound products, no phases.
    "seed": "ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 1024, 1024))",
    # Four phases of small images, in half precision and channels last.
    "dcgan": "ConvTranspose2d(512, 256, 4, 2, 1, bias=False, input=(64, 512, 4, 4), "
    "dtype=float16, layout=channels_last)",
    # Bound by memory, no matrix units.
    "depthwise": "ConvTranspose2d(64, 64, 4, 2, 1, groups=64, bias=False, input=(16, 64, 64, 64))",
}


def ranking(text: str, target: str) -> str:
    """Return the first tiles of a layer, a line each: the model's time in ms, family and tile.

    Times of a step of a percent are equal to the planner, so that they need not rise from line to
    line. Below them stands every form that has a tile.
    """
    planned = plan(parse(text), find_target(target))
    lines = [
        f"{c.cost.model_ms:10.3g} ms  {c.tile.family:9}  {c.tile}" for c in planned.ranking[:SHOWN]
    ]
    forms = {(c.tile.family, c.tile.span, c.tile.rows, c.tile.relayout) for c in planned.ranking}
    among = [
        f"{family}{f' x {span} inputs' if span > 1 else ''}{f' x {rows} rows' if rows > 1 else ''}"
        f"{' of a copy' if relayout else ''}"
        for family, span, rows, relayout in sorted(forms)
    ]
    return "\n".join([text, f"on {target}", "", *lines, "", "among", *among]) + "\n"


@pytest.mark.parametrize("target", ["rtx4090", "h100"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_first_tiles(name: str, target: str, expect: Callable[[str, str], None]) -> None:
    expect(f"{name}_{target}.txt", ranking(LAYERS[name], target))
