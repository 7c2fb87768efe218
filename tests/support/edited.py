"""Emitted layers whose weights are edited, of small integers: what they compute is exact.

Used by test_weight_edits.py and test_weight_turns.py. The reference is a scatter in int64.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import convgen
from convgen.execution import oracle
from convgen.execution.loading import load_module

# By their families. The sizes of the second are such that it has zeros beside the weights.
SPECS = {
    "gather float32": "ConvTranspose1d(4, 6, 3, padding=1)",
    "polyphase float16": "ConvTranspose1d(4, 6, 4, 2, 1, input=(1, 4, 5), dtype=float16)",
    "direct float16": "ConvTranspose1d(4, 4, 4, stride=2, padding=1, groups=4, dtype=float16)",
    "polyphase of rank 2": "ConvTranspose2d(4, 6, 4, stride=2, padding=1, input=(1, 4, 3, 4))",
}

MODES = (torch.no_grad(), torch.enable_grad(), torch.inference_mode())
every_spec = pytest.mark.parametrize("name", SPECS)


def integers(*shape, seed, dtype, device):
    """Return numbers from -2 to 2 without 0, which no edit may leave as it is."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([-2, -1, 1, 2])[torch.randint(4, shape, generator=random)]
    return numbers.to(device, dtype)


class Emitted:
    """The file of a spec, the layers made of it, and what they have to compute."""

    def __init__(self, text, name, folder, device):
        self.spec, self.device = convgen.parse(text), device
        source = convgen.emit(text)
        self.family = source.partition("# family: ")[2].partition(",")[0]
        self.file = load_module(source, name, folder)
        self.integers = functools.partial(
            integers, dtype=getattr(torch, self.spec.dtype), device=device
        )
        self.x = self.integers(1, 4, *((5,), (3, 4))[self.spec.rank - 1], seed=1)

    def layer(self, dtype=None):
        """Return a layer whose parameters have gradients, of small integers too."""
        layer = self.file.ModelNew(device=self.device, dtype=dtype)
        for seed, parameter in enumerate(layer.parameters(), 2):
            parameter.data = self.integers(*parameter.shape, seed=seed).to(dtype)
            parameter.grad = self.integers(*parameter.shape, seed=seed + 7).to(dtype)
        return layer

    def want(self, weight, bias):
        """Return the exact output, as the file's dtype holds it."""
        arrays = [t.detach().cpu().double().numpy() for t in (self.x, weight, bias)]
        assert all(np.array_equal(array, np.rint(array)) for array in arrays)
        exact = oracle.scatter(self.spec, *(array.astype(np.int64) for array in arrays))
        return torch.from_numpy(exact).to(self.x)

    def check(self, run, layer):
        """Compare a run of `layer` with what its present weight has to give."""
        want = self.want(layer.weight, layer.bias)
        assert torch.equal(run(self.x), want)
        return want


@contextlib.contextmanager
def loading(folder: Path, device: str) -> Iterator[Callable[[str], Emitted]]:
    """Give the function from a name of `SPECS` to its `Emitted`, importable as pickle needs it."""
    count = itertools.count()
    with pytest.MonkeyPatch.context() as patch:

        @functools.cache
        def load(name: str) -> Emitted:
            emitted = Emitted(SPECS[name], f"edited_{next(count)}", folder, device)
            patch.setitem(sys.modules, emitted.file.__name__, emitted.file)
            return emitted

        yield load
