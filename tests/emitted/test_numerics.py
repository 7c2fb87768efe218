"""Numbers: emitted kernels against scatter in exact integers, and in float64 on normal data.

On a machine with a GPU the same tests run there. What would break them: a wrong tap, shift, mask,
offset, launch extent, rounding or cast in any emitted kernel.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from convgen import ConvTransposeSpec, emit, parse
from convgen.execution import oracle
from convgen.execution.loading import load_module
from convgen.execution.verify import allowed, measure, run
from drawing import draw, each_form

DRAWN = 160  # tests/support/fuzz.py is for long runs
CHUNK = 20  # specs a test: enough to keep pytest's own time out of it


@pytest.mark.interpreter
@pytest.mark.parametrize("chunk", range(DRAWN // CHUNK))
def test_drawn_specs_are_exact_on_integers(chunk: int, tmp_path: Path, device: str) -> None:
    """-2..2 times -2..2 sums exactly in every dtype, so one wrong product shows."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        known, emitted = draw(seed)
        module = load_module(emit(emitted), f"drawn_{seed}", tmp_path)
        assert is_exact(known, module, device, seed), f"seed {seed}: {emitted}"


def is_exact(spec: ConvTransposeSpec, module: ModuleType, device: str, seed: int) -> bool:
    """Whether the file gives the oracle's numbers on integers."""
    random = np.random.default_rng(seed)
    x = random.integers(-2, 3, spec.input)
    weight = random.integers(-2, 3, weight_shape(spec))
    bias = random.integers(-2, 3, spec.out_channels) if spec.bias else None
    arrays = [array.astype(np.float64) for array in (x, weight, bias) if array is not None]
    got = run(spec, module, device, *arrays)
    want = torch.from_numpy(oracle.scatter(spec, x, weight, bias))
    want = want.to(getattr(torch, spec.dtype)).double()
    return torch.equal(torch.from_numpy(got), want)


def weight_shape(spec: ConvTransposeSpec) -> tuple[int, ...]:
    assert spec.in_channels is not None
    assert spec.out_channels is not None
    return (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)


FORMED = 32
SHARES = 4  # so that workers of pytest-xdist can divide the work
FORMS = {"gather 1", "polyphase 1", "polyphase 2", "polyphase 4"}


@pytest.mark.interpreter
@pytest.mark.parametrize("share", range(SHARES))
def test_every_form_of_drawn_specs_is_exact_on_integers(
    share: int, tmp_path: Path, device: str
) -> None:
    """The planner takes one family and span a spec: what it passes over would go unseen."""
    met = set()
    for seed in range(share, FORMED, SHARES):
        known, emitted = draw(seed)
        sources = each_form(emitted, seed)
        for form, source in sources.items() if len(sources) > 1 else ():
            module = load_module(source.text, f"{form}_{seed}".replace(" ", "_"), tmp_path)
            text = f"seed {seed}, {form}, {source.plan.tile}: {emitted}"
            assert is_exact(known, module, device, seed), text
            met.add(form)
    assert met >= FORMS


LAYERS = (
    "ConvTranspose2d(20, 18, 3, padding=1, input=(2, 20, 7, 9))",
    "ConvTranspose1d(40, 7, 4, stride=2, padding=1, input=(1, 40, 33))",
    "ConvTranspose3d(6, 4, 3, 2, padding=1, output_padding=1, groups=2, input=(2, 6, 3, 4, 5))",
)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "bf16x3", "bf16x6", "ieee"])
@pytest.mark.parametrize("layer", LAYERS)
def test_float32_error_is_that_of_the_precision(
    layer: str, precision: str, tmp_path: Path, device: str
) -> None:
    """Truncated operands, or a precision dropped on the way, at least double the error."""
    spec = dataclasses.replace(parse(layer), precision=precision)
    module = load_module(emit(spec), "layer", tmp_path)
    exact, error, faithful = measure(spec, module, device, seed=1)
    assert exact
    assert error <= allowed(spec, faithful)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layer", LAYERS)
def test_other_dtypes_sum_wide_and_round_once(
    layer: str, dtype: str, tmp_path: Path, device: str
) -> None:
    """Sums in 16 bits, or a truncating cast, miss the faithful kernel's error."""
    spec = dataclasses.replace(parse(layer), dtype=dtype, precision=None)
    exact, error, faithful = measure(spec, load_module(emit(spec), "layer", tmp_path), device, 2)
    assert exact
    assert error <= allowed(spec, faithful)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "pipeline",
    [
        "relu | {} | leaky_relu(0.2) | mul(0.5)",
        "sigmoid | {} | tanh",
        "add(1.0) | leaky_relu | {} | clamp(-1.5, 1.0)",
        "clamp(0.5, 2.0) | tanh | {} | sigmoid | add(-0.25)",
    ],
)
def test_pipelines_match_the_oracle(pipeline: str, dtype: str, tmp_path: Path, device: str) -> None:
    """sigmoid, add and clamp are not 0 at 0: padding that passed through them would show."""
    spec = parse(pipeline.format(LAYERS[0]))
    spec = dataclasses.replace(spec, dtype=dtype, precision=None)
    _, error, faithful = measure(spec, load_module(emit(spec), "layer", tmp_path), device, 3)
    assert error <= allowed(spec, faithful)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_grids_give_equal_results(layout: str, tmp_path: Path, device: str) -> None:
    """The grid only places programs: a result that depends on it has a wrong decode."""
    random = np.random.default_rng(5)
    base = parse("ConvTranspose2d(34, 40, 3, stride=2, padding=1, groups=2, input=(3, 34, 9, 8))")
    arrays = [random.standard_normal(s) for s in ((3, 34, 9, 8), (34, 20, 3, 3), (40,))]
    results = []
    for grid in (None, 1, 2, 3):
        spec = dataclasses.replace(base, grid=grid, layout=layout)
        module = load_module(emit(spec), f"grid_{grid}", tmp_path)
        results.append(
            run(spec, module, device, *[a.astype(np.float32).astype(float) for a in arrays])
        )
    assert all(np.array_equal(result, results[0]) for result in results)


GROUPED = {  # an idea each that could break a group
    "whole groups of inputs": "ConvTranspose1d(5, 3, 3, padding=1, input=(2, 5, 8))",
    "a row that ends in a group": "ConvTranspose1d(5, 3, 3, padding=1, input=(2, 5, 9))",
    "one input": "ConvTranspose1d(5, 3, 4, stride=2, padding=1, input=(2, 5, 1))",
    "more padding than a group": "ConvTranspose1d(3, 2, 2, 2, padding=9, input=(2, 3, 21))",
    "images that share a tile": "ConvTranspose2d(3, 4, 3, 2, 1, 1, input=(5, 3, 2, 3))",
    "groups of channels": "ConvTranspose2d(6, 4, (2, 3), 3, 1, groups=2, input=(2, 6, 3, 7))",
    "depthwise": "ConvTranspose2d(6, 6, (2, 3), 2, 1, groups=6, input=(2, 6, 3, 7))",
    "axes of every stride": "ConvTranspose3d(4, 2, (2, 1, 4), (2, 1, 2), input=(2, 4, 2, 3, 5))",
}


@pytest.mark.interpreter
@pytest.mark.parametrize("stages", ["sigmoid | {}", "add(1.0) | clamp(0.5, 2.0) | {} | tanh"])
@pytest.mark.parametrize("layer", GROUPED)
def test_stages_leave_what_a_group_lacks_zero(
    layer: str, stages: str, tmp_path: Path, device: str
) -> None:
    """None of them is 0 at 0: an input past the row, or a channel past the block, would show."""
    spec = parse(stages.format(GROUPED[layer]))
    for form, source in each_form(spec).items():
        module = load_module(source.text, form.replace(" ", "_"), tmp_path)
        _, error, faithful = measure(spec, module, device, 4)
        assert error <= allowed(spec, faithful), (form, str(source.plan.tile))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("stride", "stages"), [(2, "{}"), (3, "sigmoid | {} | mul(0.5)"), (5, "{}")]
)
def test_open_sizes_are_exact_in_every_form(
    stride: int, stages: str, tmp_path: Path, device: str
) -> None:
    """A number of groups, a mask or an offset fixed by the first size fails with the next one."""
    layers = (
        f"ConvTranspose1d(6, 4, 4, {stride}, 1, groups=2, input=(None, 6, None))",
        f"ConvTranspose2d(6, 4, 4, (1, {stride}), 1, groups=2, input=(None, 6, None, None))",
    )
    for layer in layers:
        spec = parse(stages.format(layer))
        sources = each_form(spec)
        assert {"gather 1", "polyphase 1"} <= set(sources)
        assert not {"polyphase 2", "polyphase 4"} & set(sources)  # they need the extent
        for form, source in sources.items():
            name = f"{form}_{spec.rank}".replace(" ", "_")
            module = load_module(source.text, name, tmp_path)
            for shape in ((2, 6, 2, 1), (1, 6, 2, 37)):
                known = dataclasses.replace(spec, input=(*shape[:2], *shape[-spec.rank :]))
                exact, error, faithful = measure(known, module, device, 5)
                assert exact is not False, (form, shape)
                assert error <= allowed(known, faithful), (form, shape)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "bf16x6", "ieee"])
def test_every_form_has_the_error_of_the_precision(
    precision: str, tmp_path: Path, device: str
) -> None:
    """A group's inputs are rearranged after they are loaded: unrounded, they would be truncated."""
    spec = dataclasses.replace(parse(LAYERS[1]), precision=precision)
    for form, source in each_form(spec).items():
        module = load_module(source.text, form.replace(" ", "_"), tmp_path)
        exact, error, faithful = measure(spec, module, device, 1)
        assert exact, form
        assert error <= allowed(spec, faithful), form


HOSTILE = [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity times a padded 0
@pytest.mark.parametrize("place", ["input", "weight"])
@pytest.mark.parametrize("bits", HOSTILE, ids=hex)
def test_rounding_keeps_nan_and_infinity(
    bits: int, place: str, tmp_path: Path, device: str
) -> None:
    """Rounded bare, 0x7fffffff would become -0.0 and the NaN 0x7f800001 infinity."""
    spec = parse("ConvTranspose1d(1, 1, 1, bias=False, input=(1, 1, 4))")
    module = load_module(emit(spec), "layer", tmp_path)
    value = float(np.array(bits, dtype=np.uint32).view(np.float32))
    x, weight = torch.ones(1, 1, 4, device=device), torch.ones(1, 1, 1, device=device)
    (x if place == "input" else weight).view(-1)[0] = value
    got = module.conv_transpose1d(x, weight).view(-1)[0].item()
    if np.isnan(value):
        assert np.isnan(got)
    else:  # FLT_MAX is nearer to infinity than to the largest TF32; a subnormal rounds to 0
        want = oracle.rounded(np.array([value], dtype=np.float32), "tf32")[0]
        assert got == want
