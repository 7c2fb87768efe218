"""Blocks of rows, against the definition they are derived from, and what they compute.

scattering.py enumerates the definition; nothing there knows of blocks. What would break it: a row
that misses a tap or meets one twice, an input beyond the image, a block that hangs over the last
row, and the mask of one row that is used for another.
"""

from __future__ import annotations

import ast
import dataclasses
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from convgen import ConvTransposeSpec, SpecError, find_target, parse
from convgen.compiler import plan
from convgen.execution.loading import load_module
from convgen.execution.verify import allowed, measure
from convgen.families.registry import FAMILIES
from convgen.geometry.phases import decompose
from convgen.geometry.row_blocks import MOST_INPUTS, ROWS, RowBlock, rows_refusal
from convgen.planning.candidates import rank_tiles
from convgen.planning.choices import Choices, key_of
from convgen.planning.plan import Measured
from convgen.rendering.render import KernelSource
from drawing import draw, each_form, opened
from scattering import axis_of, output_extent, random_parameters, scattered

H100 = find_target("h100")


def gathered(block: RowBlock, size: int, extent: int) -> dict[int, list[tuple[int, int]]]:
    """Return what `scattered` does, as a program's loads and products have it."""
    pairs = defaultdict(list)
    for number in range(-(-extent // block.rows)):
        for offset, served in block.inputs.items():
            i = block.advance * number + block.taps.first(0) + offset
            for row, k in served if 0 <= i < size else ():
                pairs[block.rows * number + row].append((i, k))
    return pairs


@pytest.mark.parametrize(
    ("rows", "stride"), [(2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4)]
)
def test_blocks_give_each_output_the_pairs_that_reach_it_once(rows: int, stride: int) -> None:
    rng = random.Random(rows)
    for _ in range(100):
        kernel, _, padding, _, dilation = parameters = random_parameters(rng, stride)
        smallest = next(n for n in range(1, 500) if output_extent(n, *parameters) > 0)
        size = smallest + rng.randint(0, 2 * kernel + 3)
        extent = output_extent(size, *parameters)
        told = gathered(RowBlock(axis_of(*parameters), rows), size, extent)
        pairs = scattered(size, extent, kernel, stride, padding, dilation)
        # The last block may hang over the image: those rows are not stored.
        assert {o: sorted(told[o]) for o in pairs} == {o: sorted(pairs[o]) for o in pairs}


def test_a_block_loads_an_input_once_for_all_its_rows() -> None:
    """Else it would only be a larger tile."""
    block = RowBlock(axis_of(3), 4)
    assert list(block.inputs) == [-2, -1, 0, 1, 2, 3]
    assert block.inputs[0] == ((0, 0), (1, 1), (2, 2))
    assert sum(map(len, block.inputs.values())) == block.products == 4 * 3


def test_a_block_has_all_phases_of_its_axis() -> None:
    """Kernel 4, stride 2, padding 1: three rows of inputs for the four products of two rows."""
    block = RowBlock(axis_of(4, 2, 1), 2)
    assert block.inputs == {-1: ((0, 3),), 0: ((0, 1), (1, 2)), 1: ((1, 0),)}
    assert RowBlock(axis_of(2, 2), 2).inputs == {0: ((0, 0), (1, 1))}


REFUSED = {
    "ConvTranspose1d(4, 4, 3, input=(1, 4, 64))": "rank 1",
    "ConvTranspose2d(4, 4, 3, stride=(3, 1), input=(1, 4, 64, 64))": "stride",
    "ConvTranspose2d(4, 4, 3, stride=(8, 1), input=(1, 4, 64, 64))": "stride",
    "ConvTranspose2d(4, 4, (1, 3), input=(1, 4, 64, 64))": "share no input",
    "ConvTranspose2d(4, 4, 3, dilation=(4, 1), input=(1, 4, 64, 64))": "share no input",
    "ConvTranspose2d(4, 4, 3, padding=1, input=(1, 4, 3, 64))": "3 rows",
    "ConvTranspose2d(4, 4, (8, 3), input=(1, 4, 64, 64))": "11 rows",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_blocks_cannot_serve(text: str) -> None:
    reason = rows_refusal(parse(text), 4)
    assert reason is not None
    assert REFUSED[text] in reason
    ranking = rank_tiles(parse(text), decompose(parse(text)), H100, FAMILIES)
    assert all(candidate.tile.rows != 4 for candidate in ranking)


def test_a_measured_block_that_cannot_serve_is_refused() -> None:
    tile = dataclasses.replace(plan(parse(SERVED["plain"])).tile, rows=4)
    with pytest.raises(SpecError, match=r"family .*, span .* and rows 4 serves"):
        plan(parse(next(iter(REFUSED))), H100, tile)


SERVED = {
    "plain": "ConvTranspose2d(5, 3, 3, bias=False, input=(2, 5, 9, 8))",
    "padded": "ConvTranspose2d(20, 18, (3, 2), padding=(1, 0), input=(2, 20, 7, 10))",
    "one column": "ConvTranspose2d(3, 4, (3, 1), padding=(1, 0), input=(2, 3, 6, 5))",
    "much padding": "ConvTranspose2d(3, 2, 3, padding=4, input=(2, 3, 13, 11))",
    "dilated": "ConvTranspose2d(4, 2, (2, 3), dilation=(3, 1), input=(2, 4, 5, 6))",
    "images that share a tile": "ConvTranspose2d(3, 4, 3, padding=1, input=(5, 3, 5, 4))",
    "groups of channels": "ConvTranspose2d(6, 4, (2, 3), groups=2, input=(2, 6, 3, 7))",
    "strided columns": "ConvTranspose2d(6, 4, 4, (1, 2), 1, input=(2, 6, 5, 8))",
    "volumes": "ConvTranspose3d(4, 2, 3, (2, 1, 1), 1, input=(2, 4, 2, 4, 6), grid=1)",
    "kernel = stride": "ConvTranspose2d(6, 4, 2, 2, input=(3, 6, 5, 4))",
    "two phases of rows": "ConvTranspose2d(5, 18, 4, 2, 1, input=(2, 5, 7, 8))",
    "three phases of rows": "ConvTranspose2d(4, 2, (5, 3), 3, 2, 1, input=(2, 4, 4, 5))",
    "four phases of rows": "ConvTranspose2d(4, 2, (9, 1), (4, 1), input=(2, 4, 3, 6))",
    "rows that no tap reaches": "ConvTranspose2d(4, 2, 3, 2, dilation=2, input=(2, 4, 4, 5))",
    "rows that nothing is added to": "ConvTranspose2d(4, 2, 3, 2, dilation=2, bias=False, "
    "input=(2, 4, 4, 5))",
    "empty rows, last": "ConvTranspose2d(8, 2, 3, 2, dilation=2, input=(2, 8, 3, 5), "
    "layout=channels_last, dtype=float16)",
    "strided volumes": "ConvTranspose3d(4, 2, 3, 2, 1, 1, input=(2, 4, 2, 4, 3))",
    "strided, last": "ConvTranspose2d(8, 6, 4, 2, 1, input=(2, 8, 5, 7), layout=channels_last)",
    "channels_last": "ConvTranspose2d(8, 6, 3, 1, 1, input=(2, 8, 5, 7), layout=channels_last)",
    "open sizes": "ConvTranspose2d(None, None, 3, padding=1, target=h100)",
    "open, strided": "ConvTranspose2d(None, None, 4, 2, 1, input=(None, None, None, 11), "
    "target=h100)",
    "open extents": "ConvTranspose2d(6, 4, 3, padding=1)",
}


def blocks_of(spec: ConvTransposeSpec, seed: int | str = 0) -> dict[str, KernelSource]:
    """Return a file of each form with rows."""
    return {form: source for form, source in each_form(spec, seed).items() if "rows" in form}


@pytest.mark.interpreter
@pytest.mark.parametrize("stages", ["{}", "add(1.0) | sigmoid | {} | tanh"])
@pytest.mark.parametrize("layer", SERVED)
def test_blocks_are_exact_in_every_form(
    layer: str, stages: str, tmp_path: Path, device: str
) -> None:
    """The stages make something of zero: a load that is not masked would show."""
    emitted = parse(stages.format(SERVED[layer]))
    known = emitted
    if None in (emitted.in_channels, *(emitted.input or (None,))):
        known = dataclasses.replace(
            emitted, in_channels=6, out_channels=4, input=(2, 6, 6, 11), bias=True
        )
    sources = blocks_of(emitted)
    wanted = {f"gather 1 rows {n}" for n in ROWS if rows_refusal(emitted, n) is None}
    assert set() < wanted <= set(sources)
    for form, source in sources.items():
        module = load_module(source.text, form.replace(" ", "_"), tmp_path)
        exact, error, faithful = measure(known, module, device, 6)
        assert exact is not False, (form, str(source.plan.tile))
        assert error <= allowed(known, faithful), (form, str(source.plan.tile))


def with_rows(spec: ConvTransposeSpec, stride: int) -> ConvTransposeSpec:
    """Return `spec` with a stride along the last axis but one, in a precision of one product."""

    def with_row(values: tuple[int, ...], row: int) -> tuple[int, ...]:
        return (*values[:-2], row, values[-1])

    padding = min(spec.output_padding[-2], max(spec.dilation[-2], stride) - 1)
    return dataclasses.replace(
        spec,
        stride=with_row(spec.stride, stride),
        output_padding=with_row(spec.output_padding, padding),
        precision="tf32" if spec.precision not in (None, "ieee") else spec.precision,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize(("stride", "rows"), {1: (2, 4), 2: (2, 4), 3: (3,), 4: (4,)}.items())
def test_blocks_of_drawn_specs_are_exact_on_integers(
    stride: int, rows: tuple[int, ...], tmp_path: Path, device: str
) -> None:
    met: set[str] = set()
    for seed in range(4999 + stride, 5080, 4):
        drawn = draw(seed)[0]
        try:
            spec = with_rows(drawn, stride) if drawn.rank > 1 else drawn
        except SpecError:  # such as an output of no elements
            continue
        emitted = opened(spec) if seed % 3 == 0 else spec
        for form, source in blocks_of(emitted, seed).items():
            module = load_module(source.text, f"{form}_{seed}".replace(" ", "_"), tmp_path)
            exact, error, faithful = measure(spec, module, device, seed)
            assert exact, f"{form}, {source.plan.tile}: {spec}"
            assert error <= allowed(spec, faithful), f"{form}, {source.plan.tile}: {spec}"
            met.add(form)
    assert met >= {f"gather 1 rows {n}" for n in rows}


@pytest.mark.interpreter
@pytest.mark.parametrize("number", ["tf32", "ieee", "float16", "bfloat16", "float64"])
def test_blocks_have_the_error_of_dtype_and_precision(
    number: str, tmp_path: Path, device: str
) -> None:
    """Every input tile of a block is rounded, not the first alone."""
    spec = parse(SERVED["padded"])
    if "float" in number:
        spec = dataclasses.replace(spec, dtype=number, precision=None)
    else:
        spec = dataclasses.replace(spec, precision=number)
    for form, source in blocks_of(spec, number).items():
        module = load_module(source.text, form.replace(" ", "_"), tmp_path)
        exact, error, faithful = measure(spec, module, device, 1)
        assert exact, form
        assert error <= allowed(spec, faithful), form


@pytest.mark.parametrize("seed", range(12))
def test_a_kernel_has_a_load_for_each_input_and_a_product_for_each_row_and_tap(seed: int) -> None:
    known = draw(seed)[0]
    while known.rank == 1 or rows_refusal(known, 2):
        seed += 100
        known = draw(seed)[0]
    for source in blocks_of(known, seed).values():
        block = source.plan.block
        taps = known.kernel_size[-2]
        kernel = kernel_of(source)
        assert kernel.count("tl.dot(") == block.advance * taps
        assert kernel.count("x = tl.load(") == len(block.inputs) <= MOST_INPUTS
        assert kernel.count("tl.store(") == block.rows


def kernel_of(source: KernelSource) -> str:
    """Return the text of the layer's kernel."""
    start = source.text.index(f"def conv_transpose{source.plan.spec.rank}d_kernel(")
    return source.text[start : source.text.index("\n\n\n", start)]


@pytest.mark.parametrize("layer", SERVED)
def test_a_step_computes_a_condition_once(layer: str) -> None:
    """What all rows share, such as the columns' conditions, is no matter of a row."""
    for form, source in blocks_of(parse(SERVED[layer])).items():
        nodes = ast.walk(ast.parse(kernel_of(source)))
        for loop in (node for node in nodes if isinstance(node, ast.For)):
            found = Counter(ast.unparse(n) for n in ast.walk(loop) if isinstance(n, ast.Compare))
            # Input and weight have the input channels' condition each.
            twice = {text for text, count in found.items() if count > 1 and "ci <" not in text}
            assert twice == set(), form


@pytest.mark.parametrize("layer", ["rows that no tap reaches", "rows that nothing is added to"])
def test_outputs_that_no_input_reaches_have_no_accumulator(layer: str) -> None:
    """They are the bias, or nothing: no zeros are carried through the loop, nor reordered."""
    for form, source in blocks_of(parse(SERVED[layer])).items():
        block, text = source.plan.block, kernel_of(source)
        reached = {row for pairs in block.inputs.values() for row, _ in pairs}
        assert 0 < len(reached) < block.rows
        assert text.count("tl.zeros(") == len(reached), form
        assert text.count("which no input reaches") == block.rows - len(reached), form
        if not source.plan.spec.bias:
            assert text.count(", 0.0") == block.rows - len(reached), form


def test_groups_are_reordered_by_one_function() -> None:
    """Four rows of a block would have four copies of its lines."""
    sources = blocks_of(parse(SERVED["strided columns"]))
    grouped = [source for source in sources.values() if source.plan.grouping is not None]
    assert grouped
    for source in grouped:
        assert source.text.count(".permute(1, 0, 2)") == 1
        assert kernel_of(source).count("swap_groups(acc") == source.plan.block.rows


def test_the_planner_takes_blocks_by_itself() -> None:
    """On a card that nobody measured, too; a file of choices comes before it."""
    spec = parse("ConvTranspose2d(64, 64, 3, input=(8, 64, 1024, 1024))")
    ranking = rank_tiles(spec, decompose(spec), H100, FAMILIES)
    for target in ("rtx4090", "b200"):
        assert plan(spec, find_target(target)).tile.rows > 1
    tile = next(candidate.tile for candidate in ranking if candidate.tile.rows == 1)
    choices = Choices("h100", {key_of(spec): Measured(tile, 0.5, 7, "a card")})
    assert plan(spec, H100, choices=choices).tile == tile
