"""The form of a packed weight: kernels of one layer that agree in it may read each other's.

What would break it: a form that leaves out something which decides where an element lies. Each
kernel of drawn layers packs for itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from convgen.execution.loading import load_module
from convgen.kernels.packing import packed_form
from drawing import draw, each_form
from edited import integers

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("seed", range(16))
def test_an_equal_form_is_an_equal_tensor(seed: int, tmp_path: Path, device: str) -> None:
    """And another form has another shape, so that a weight of it is refused."""
    spec, _ = draw(seed)
    shape = spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size
    made = functools.partial(integers, dtype=getattr(torch, spec.dtype), device=device)
    weight, packed = made(*shape, seed=seed), {}
    for number, source in enumerate(each_form(spec, seed).values()):
        form = packed_form(source.plan)
        if form is None:
            continue
        module = load_module(source.text, f"form_{seed}_{number}", tmp_path)
        got = module.pack_weight(weight)
        assert torch.equal(got, packed.setdefault(form, got)), form
    shapes = [tuple(each.shape) for each in packed.values()]
    assert len(set(shapes)) == len(shapes)
