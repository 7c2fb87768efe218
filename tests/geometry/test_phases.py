"""The decomposition into phases, against the definition it is derived from.

scattering.py enumerates the definition; nothing there divides by the stride.
"""

import random
from collections import defaultdict

import pytest

from convgen import ConvTransposeSpec
from convgen.geometry.phases import decompose
from scattering import axis_of, output_extent, random_parameters, scattered


def gathered(axis, size, extent):
    """Return what `scattered` does as the phases tell it, and how often they tell each output."""
    pairs, told = defaultdict(set), defaultdict(int)
    for phase in axis:
        for m in range(size + axis.extent_growth):
            o = axis.stride * m + phase.residue
            if o >= extent:
                continue
            told[o] += 1
            for j in range(phase.taps):
                i = m + phase.shift - j * axis.input_step
                if 0 <= i < size:
                    pairs[o].add((i, phase.first_tap + j * axis.tap_step))
    return {o: pairs[o] for o in told}, dict(told)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6, 8, 12])
def test_phases_tell_each_output_once_and_with_the_pairs_that_reach_it(stride):
    """Breaks on a wrong tap, shift or residue, and on outputs that no phase or two phases store."""
    rng = random.Random(stride)
    seen = set()
    for _ in range(400):
        kernel, _, padding, output_padding, dilation = parameters = random_parameters(rng, stride)
        axis = axis_of(*parameters)
        smallest = next(n for n in range(1, 500) if output_extent(n, *parameters) > 0)
        for size in (smallest, smallest + rng.randint(1, 2 * kernel + 3)):
            extent = output_extent(size, *parameters)
            pairs, told = gathered(axis, size, extent)
            assert set(told.values()) == {1}, parameters
            assert pairs == scattered(size, extent, kernel, stride, padding, dilation), parameters
        met = {
            "phase without taps": any(not phase.taps for phase in axis),
            "outputs between taps": 1 < axis.gaps < stride,
            "padding beyond the kernel": padding > dilation * (kernel - 1),
            "largest output padding": output_padding == max(stride, dilation) - 1,
        }
        seen |= {name for name, happened in met.items() if happened}
    assert {"padding beyond the kernel", "largest output padding"} <= seen
    assert ("phase without taps" in seen) == (stride > 1)
    assert ("outputs between taps" in seen) == (stride in (4, 6, 8, 12))


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 7])
def test_the_figures_that_the_kernel_relies_on(stride):
    """Breaks if a kernel would run over too few or too many positions, or prove a false bound."""
    rng = random.Random(100 + stride)
    for _ in range(200):
        kernel, _, padding, _, dilation = parameters = random_parameters(rng, stride)
        axis = axis_of(*parameters)
        size = 2 * (padding + dilation * kernel) + 5  # every tap of every phase is inside somewhere
        extent = output_extent(size, *parameters)
        positions = size + axis.extent_growth
        assert stride * (positions - 1) < extent <= stride * positions
        assert axis.whole == all(output_extent(n, *parameters) % stride == 0 for n in range(1, 9))
        pairs = scattered(size, extent, kernel, stride, padding, dilation)
        apart = {i - o // stride for o, reached in pairs.items() for i, _ in reached}
        assert axis.shifts == (min(apart), max(apart))
        phases = list(axis)
        assert sorted(phase.residue for phase in phases) == list(range(stride))
        assert max(phase.taps for phase in phases) == axis.most_taps
        for phase in phases:
            fewer = phase.first_tap >= axis.full_phases
            assert phase.taps == (0 if phase.gap else axis.most_taps - fewer)


# residue of the output: its taps, (kernel index, input minus position) each; worked out by hand.
LITERAL = {
    "k4 s2 p1": ((4, 2, 1), {0: [(1, 0), (3, -1)], 1: [(0, 1), (2, 0)]}),
    "k3 s2 p1 op1": ((3, 2, 1, 1), {0: [(1, 0)], 1: [(0, 1), (2, 0)]}),
    "k2 s2": ((2, 2), {0: [(0, 0)], 1: [(1, 0)]}),
    "k3 s5 d2": ((3, 5, 0, 0, 2), {0: [(0, 0)], 1: [], 2: [(1, 0)], 3: [], 4: [(2, 0)]}),
    "k3 s2 d2": ((3, 2, 0, 0, 2), {0: [(0, 0), (1, -1), (2, -2)], 1: []}),
    "k3 s1 p1": ((3, 1, 1), {0: [(0, 1), (1, 0), (2, -1)]}),
    "k1 s1 p2": ((1, 1, 2), {0: [(0, 2)]}),
}


@pytest.mark.parametrize("name", LITERAL)
def test_phases_of_common_layers(name):
    """Breaks if the meaning of residue, first_tap, taps or shift changes."""
    parameters, expected = LITERAL[name]
    axis = axis_of(*parameters)
    taps = {
        phase.residue: [
            (phase.first_tap + j * axis.tap_step, phase.shift - j * axis.input_step)
            for j in range(phase.taps)
        ]
        for phase in axis
    }
    assert taps == expected


@pytest.mark.parametrize(
    ("parameters", "extent_growth", "whole", "shifts"),
    [
        ((4, 2, 1), 0, True, (-1, 1)),  # output = 2 * input
        ((3, 2, 1, 1), 0, True, (0, 1)),
        ((3, 2, 1), 0, False, (0, 1)),  # output = 2 * input - 1
        ((3, 1), 2, True, (-2, 0)),
        ((3, 1, 1), 0, True, (-1, 1)),
        ((2, 2), 0, True, (0, 0)),
        ((1, 4), 0, False, (0, 0)),  # output = 4 * input - 3
        ((1, 1, 2), -4, True, (2, 2)),  # padding crops two outputs at each end
        ((3, 2, 0, 0, 2), 2, False, (-2, 0)),
    ],
)
def test_figures_of_common_layers(parameters, extent_growth, whole, shifts):
    """Breaks if a layer whose output is a whole multiple of its input is not seen as one."""
    axis = axis_of(*parameters)
    assert (axis.extent_growth, axis.whole, axis.shifts) == (extent_growth, whole, shifts)


def test_axes_come_outermost_first_and_do_not_mix():
    """Breaks if an axis reads another's parameters."""
    spec = ConvTransposeSpec(
        rank=3,
        kernel_size=(3, 2, 4),
        stride=(1, 2, 2),
        padding=(1, 0, 1),
        output_padding=(0, 1, 0),
        dilation=(1, 3, 1),
    )
    assert decompose(spec) == (axis_of(3, 1, 1), axis_of(2, 2, 0, 1, 3), axis_of(4, 2, 1))
