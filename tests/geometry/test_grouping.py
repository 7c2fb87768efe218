"""The grouping of the last axis, against the definition it is derived from.

scattering.py enumerates the definition; nothing there knows of groups. A table that differs from it
in one place is a wrong product in every row of every image.
"""

import itertools
import random
import time
from collections import Counter, defaultdict

import pytest

from convgen import parse
from convgen.families.polyphase import POLYPHASE, SPANS, span_refusal
from convgen.geometry.groups import MOST_LANES, MOST_SLOTS, Grouping, refusal
from scattering import axis_of, output_extent, random_parameters, scattered


def gathered(grouping, size, extent):
    """Return what `scattered` does as the table tells it, as lists, for the outputs of all groups.

    The groups are those of the launch: as many as cover the outputs.
    """
    weights = [
        (tap, output, place, k)
        for tap, lanes in enumerate(grouping.table)
        for output, places in enumerate(lanes)
        for place, k in enumerate(places)
        if k is not None
    ]
    pairs = defaultdict(list)
    largest = grouping.shifts[1]
    for group in range(-(-(extent + grouping.offset) // grouping.width)):
        for tap, output, place, k in weights:
            i = grouping.span * (group + largest - tap) + place
            if 0 <= i < size:
                pairs[grouping.width * group + output - grouping.offset].append((i, k))
    return pairs


@pytest.mark.parametrize("span", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8])
def test_groups_give_each_output_the_pairs_that_reach_it_once(stride, span):
    """Breaks on a wrong tap, place or shift, on a product twice, and on one of no output."""
    rng = random.Random(10 * stride + span)
    seen = set()
    for _ in range(50):
        kernel, _, padding, _, dilation = parameters = random_parameters(rng, stride)
        grouping = Grouping(axis_of(*parameters), span)
        smallest = next(n for n in range(1, 500) if output_extent(n, *parameters) > 0)
        for size in (smallest, smallest + rng.randint(1, 2 * kernel + 3)):
            extent = output_extent(size, *parameters)
            told = gathered(grouping, size, extent)
            pairs = scattered(size, extent, kernel, stride, padding, dilation)
            # Groups may start before the row and end after it: those outputs are not stored.
            assert {o: sorted(told[o]) for o in pairs} == {o: sorted(pairs[o]) for o in pairs}
            met = {
                "groups that hang over the inputs": size % span > 0,
                "groups that start before the row": grouping.offset > 0,
                "groups that end after it": (extent + grouping.offset) % grouping.width > 0,
                "taps without a weight": any(
                    k is None for k in itertools.chain(*itertools.chain(*grouping.table))
                ),
            }
            seen |= {name for name, value in met.items() if value}
    assert ("groups that hang over the inputs" in seen) == (span > 1)
    assert ("groups that start before the row" in seen) == (span * stride > 1)
    assert ("groups that end after it" in seen) == (span * stride > 1)
    assert "taps without a weight" in seen


@pytest.mark.parametrize("span", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 6, 7])
def test_the_figures_that_the_kernel_relies_on(stride, span):
    """Breaks if the loop has an idle first or last step, or a bound that the kernel trusts is off.

    In a long row every input meets every tap of the kernel, so that the table must hold each pair
    of them once; and lanes beyond the outputs of a group have no weight.
    """
    rng = random.Random(200 + 10 * stride + span)
    for _ in range(40):
        kernel, _, padding, _, dilation = parameters = random_parameters(rng, stride)
        grouping = Grouping(axis_of(*parameters), span)
        table = grouping.table
        reach = padding + dilation * kernel
        size = 2 * reach + 5 * span  # every tap of every output of a group is inside somewhere
        extent = output_extent(size, *parameters)
        pairs = scattered(size, extent, kernel, stride, padding, dilation)
        from_row, from_padding = (
            {i // span - (o + before) // (stride * span) for o, ik in pairs.items() for i, _ in ik}
            for before in (0, padding % (stride * span))
        )
        shorter = max(from_padding) - min(from_padding) < max(from_row) - min(from_row)
        apart = from_padding if shorter else from_row
        assert grouping.offset == (padding % (stride * span) if shorter else 0), parameters
        assert grouping.shifts == (min(apart), max(apart)), parameters
        assert grouping.taps == len(table) == max(apart) - min(apart) + 1
        # As the emitted file says where the number comes from.
        reach = dilation * (kernel - 1) + 1 + grouping.slack
        assert grouping.taps == -(-reach // grouping.width), parameters
        if span == 1:  # the size may be left to run time then
            assert size + grouping.growth == -(-(extent + grouping.offset) // stride), parameters
        for end in (table[0], table[-1]):
            assert any(k is not None for places in end for k in places), parameters
        met = Counter(
            (place, k)
            for lanes in table
            for places in lanes
            for place, k in enumerate(places)
            if k is not None
        )
        assert met == Counter(itertools.product(range(span), range(kernel))), parameters
        assert {len(lanes) for lanes in table} == {grouping.lanes}
        assert {len(places) for lanes in table for places in lanes} == {span}
        idle = {k for lanes in table for places in lanes[grouping.width :] for k in places}
        assert idle <= {None}


@pytest.mark.parametrize("span", SPANS)
def test_lanes_are_the_least_power_of_two(span):
    """Triton's tensors have no other extents; a power too many doubles the product."""
    for stride in range(1, 34):
        grouping = Grouping(axis_of(1, stride), span)
        assert grouping.width == stride * span
        assert grouping.lanes == next(2**n for n in range(20) if 2**n >= stride * span)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_groups_are_an_axis_of_stride_1(stride, span):
    """The loop over taps is that of any other axis: tap j reads the j-th group before tap 0's."""
    rng = random.Random(300 + 10 * stride + span)
    for _ in range(40):
        grouping = Grouping(axis_of(*random_parameters(rng, stride)), span)
        (phase,) = grouping.groups
        assert (phase.taps, phase.first_tap, phase.residue) == (grouping.taps, 0, 0)
        assert (phase.shift, grouping.groups.input_step) == (grouping.shifts[1], 1)
        assert grouping.groups.shifts == grouping.shifts


# [tap][output][input] of a group, by hand from o + p = s*i + d*k.
LITERAL = {
    "k4 s2 p1": ((4, 2, 1), 1, (((0,), (1,)), ((2,), (3,)))),  # from an output before the row
    "k3 s2 p1": ((3, 2, 1), 1, (((None,), (0,)), ((1,), (2,)))),
    "k1 s3": ((1, 3), 1, (((0,), (None,), (None,), (None,)),)),  # a lane to make it four
    "k2 s2": ((2, 2), 1, (((0,), (1,)),)),
    "k2 s1 p1": ((2, 1, 1), 1, (((0,),), ((1,),))),
    "k3 s1 p1, twos": (
        (3, 1, 1),
        2,
        (((0, None), (1, 0)), ((2, 1), (None, 2))),
    ),
    "k2 s2, twos": (
        (2, 2),
        2,
        (((0, None), (1, None), (None, 0), (None, 1)),),
    ),
    "k2 s1 d3, twos": (
        (2, 1, 0, 0, 3),
        2,
        (
            ((0, None), (None, 0)),
            ((None, None), (1, None)),
            ((None, 1), (None, None)),
        ),
    ),
}


@pytest.mark.parametrize("name", LITERAL)
def test_tables_of_common_layers(name):
    """Breaks if the meaning of tap, output or place changes: files carry the table as it is."""
    parameters, span, table = LITERAL[name]
    assert Grouping(axis_of(*parameters), span).table == table


LARGEST = (
    (4096, 4096),
    (4096, 4096, 2**20, 0, 2**18),
    (4096, 1),
    (1, 4096),
    (4096, 32),
    (2, 32, 0, 0, 2**20),
    (4096, 2, 0, 0, 2**18),
)


@pytest.mark.parametrize("parameters", LARGEST, ids=str)
def test_axes_too_large_are_refused_before_any_work(parameters):
    """Breaks if a refusal builds the table first, which would have 2**32 places here."""
    axis = axis_of(*parameters)
    begin = time.process_time()
    reasons = [refusal(axis, span) for span in (*SPANS, 2**20)]
    assert time.process_time() - begin < 0.1
    assert all(", at most " in reason for reason in reasons)


@pytest.mark.parametrize("span", SPANS)
def test_what_is_not_refused_has_a_small_table(span):
    """Breaks if the estimate falls below the table, which each file carries and the GPU reads.

    By one tap it may: where inputs and outputs meet in the middle of a group.
    """
    rng = random.Random(span)
    taken = Counter()
    for _ in range(2000):
        axis = axis_of(*random_parameters(rng, rng.randint(1, 40)))
        reason = refusal(axis, span)
        taken[reason is None] += 1
        if reason is None:
            grouping = Grouping(axis, span)
            assert grouping.lanes <= MOST_LANES
            assert (grouping.taps - 1) * grouping.width * span <= MOST_SLOTS
    assert min(taken[True], taken[False]) > 50


SERVED = {
    "ConvTranspose2d(4, 4, 4, stride=2, padding=1)": (1,),  # the last extent is of run time
    "ConvTranspose2d(4, 4, 4, stride=2, padding=1, input=(1, 4, None, 9))": (1, 2, 4),
    "ConvTranspose2d(4, 4, 3, padding=1, input=(1, 4, 9, 9))": (2, 4),
    "ConvTranspose2d(4, 4, (9, 1), stride=(9, 1), input=(1, 4, 9, 9))": (2, 4),
    "ConvTranspose2d(4, 4, 3, padding=1)": (),
    "ConvTranspose1d(4, 4, 16, stride=16, input=(1, 4, 9))": (1, 2),
    "ConvTranspose1d(4, 4, 4096, stride=4096, input=(1, 4, 9))": (),
    "ConvTranspose2d(4, 4, 4, stride=2, input=(1, 4, 9, 9), layout=channels_last)": (),
}


@pytest.mark.parametrize("text", SERVED)
def test_the_spans_that_serve_a_layer(text):
    """Breaks if a family is planned that it refuses, or if it refuses what it could serve."""
    spec = parse(text)
    refused = POLYPHASE.refusal(spec)
    assert (refused is None) == bool(SERVED[text])
    if spec.layout == "channels_first":
        assert tuple(span for span in SPANS if span_refusal(spec, span) is None) == SERVED[text]
