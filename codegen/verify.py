"""Verification: the emitted kernel against the oracle.

A check of stage 5's output; needs torch, triton and numpy, which the compiler does not. Input: a
spec and a target; output: a `Report`. It runs on the GPU if there is one, else in Triton's
interpreter at a size that the report states.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import oracle
from .choices import Choices
from .compiler import compile_kernel, plan
from .families import find_family
from .loading import laid_out, load_module
from .plan import problem_of
from .spec import ConvTransposeSpec
from .targets import GpuTarget

# The interpreter runs a program in milliseconds: sizes along an axis, channels of a group, groups.
SMALL_SPATIAL = {1: 70, 2: 13, 3: 6}
SMALL_CHANNELS = 20
SMALL_GROUPS = 3
# A tile's family and span may need whole vectors of these: known channels, and the last extent
# where it is known, keep what is left of them.
VECTOR = 8
# The kernel's error over that of a faithful one, which rounds alike and sums in one accumulator.
MOST_ERROR = 1.05
# Unit roundoff u of the accumulator, allowed on top: the sums of layers with few terms and outputs
# differ by chance within it. On an H100 (2026-11-23) 13 of 368 drawn layers, all of ieee, tf32x3,
# bf16x6 or float64 and within a few u of exact, needed some of it, the most 0.69 u.
ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verification found.

    Attributes:
        spec: what ran, sizes included.
        where: the GPU's name, or the interpreter.
        reduced: whether sizes were reduced for it.
        exact: integers in -2..2 came out exactly; None with stages, which have no integers.
        error: ||y - reference|| / ||reference|| on normal data, reference in float64.
        faithful: that error of a kernel which rounds operands to nearest and sums in one float32
            accumulator (float64 for that dtype).
        passed: exact, and the error is `allowed`.
    """

    spec: str
    where: str
    reduced: bool
    exact: bool | None
    error: float
    faithful: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        size = " (sizes reduced for it)" if self.reduced else ""
        exact = {
            True: "exact on integers",
            False: "WRONG on integers",
            None: "not tried on integers, which stages do not keep",
        }
        return (
            f"{'passed' if self.passed else 'FAILED'}: {self.spec}\n"
            f"  in {self.where}{size}: {exact[self.exact]}, relative error {self.error:.2e} "
            f"against float64 (a faithful kernel: {self.faithful:.2e})"
        )


def verify(
    spec: ConvTransposeSpec,
    target: GpuTarget | None = None,
    seed: int = 0,
    choices: Choices | None = None,
) -> Report:
    """Run the emitted kernel of `spec` and compare it with the oracle.

    Sets TRITON_INTERPRET for this process if there is no GPU, so triton must not be imported yet.
    """
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    sized = concrete(spec, small=not gpu)
    source = compile_kernel(
        _run_spec(spec, sized), target, plan(spec, target, choices=choices).tile
    )
    where = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    if not gpu and spec.product is not None and not spec.product.interpreted:
        where += f", which has no {spec.product.name} and multiplies in ieee"
    with tempfile.TemporaryDirectory() as folder:
        module = load_module(source.text, "convgen_verified", Path(folder))
        rounds = find_family(source.plan.family).products
        exact, error, faithful = measure(sized, module, "cuda" if gpu else "cpu", seed, rounds)
    return Report(
        spec=str(sized),
        where=where,
        reduced=sized != concrete(spec, small=False),
        exact=exact,
        error=error,
        faithful=faithful,
        passed=exact is not False and error <= allowed(sized, faithful),
    )


def allowed(spec: ConvTransposeSpec, faithful: float) -> float:
    """Return the largest relative error that passes, beside `faithful` of the same layer."""
    return MOST_ERROR * faithful + ROUNDOFF[spec.element.accumulator]


def concrete(spec: ConvTransposeSpec, *, small: bool) -> ConvTransposeSpec:
    """Return `spec` with every size known, reduced for the interpreter if `small`."""
    axes = plan(spec).phases
    problem = problem_of(spec, axes)
    batch, extents, groups = problem.batch, problem.extents, spec.groups
    group_in, group_out = problem.in_channels // groups, problem.out_channels // groups
    if small:
        batch, groups = min(batch, 2), min(groups, SMALL_GROUPS)
        group_in = _small(group_in, SMALL_CHANNELS, known=spec.in_channels is not None)
        group_out = _small(group_out, SMALL_CHANNELS, known=spec.out_channels is not None)
        extents = tuple(
            _small(
                extent,
                SMALL_SPATIAL[spec.rank],
                known=number == spec.rank - 1 and spec.spatial[number] is not None,
                least=max(1, 1 - axis.extent_growth),
            )
            for number, (extent, axis) in enumerate(zip(extents, axes, strict=True))
        )
    return dataclasses.replace(
        spec,
        groups=groups,
        in_channels=groups * group_in,
        out_channels=groups * group_out,
        input=(batch, groups * group_in, *extents),
    )


def _small(size: int, most: int, *, known: bool, least: int = 1) -> int:
    """Return a size of about `most`, from `least`; of a `known` one, with the same rest."""
    small = max(least, min(size, most))
    if known:
        small -= (small - size) % VECTOR
    return small if small >= least else small + VECTOR


def _run_spec(spec: ConvTransposeSpec, sized: ConvTransposeSpec) -> ConvTransposeSpec:
    """Return `sized` with the sizes left open that `spec` leaves open: the kernel under test."""
    open_in, open_out = spec.in_channels is None, spec.out_channels is None
    sizes = (spec.batch, None, *spec.spatial)
    shape = tuple(None if s is None else v for s, v in zip(sizes, sized.input or (), strict=True))
    return dataclasses.replace(
        sized,
        in_channels=None if open_in else sized.in_channels,
        out_channels=None if open_out else sized.out_channels,
        input=shape,
    )


def measure(
    spec: ConvTransposeSpec, module: ModuleType, device: str, seed: int, rounds: bool = True
) -> tuple[bool | None, float, float]:
    """Return (exact on integers, error, error of a faithful kernel) of an imported file.

    Without matrix units a faithful kernel does not round its operands: `rounds` says if it does.
    """
    random = np.random.default_rng(seed)
    shapes = _shapes(spec)
    exact: bool | None = None
    if not spec.before and not spec.after:
        integers = [random.integers(-2, 3, shape) for shape in shapes]
        got = run(spec, module, device, *[array.astype(np.float64) for array in integers])
        want = oracle.scatter(spec, integers[0], integers[1], _bias(spec, integers))
        exact = bool(np.array_equal(got, _held(spec, want.astype(np.float64))))
    arrays = [_held(spec, random.standard_normal(shape)) for shape in shapes]
    got = run(spec, module, device, *arrays)
    # Of float64 layers too the reference has digits to spare, where numpy has such a type.
    precise = [array.astype(np.longdouble) for array in arrays]
    reference = oracle.reference(spec, precise[0], precise[1], _bias(spec, precise))
    x = arrays[0]
    for stage in spec.before:
        x = oracle.POINTWISE[stage.name](x, *stage.values)
    whole = dataclasses.replace(spec, precision="ieee") if spec.precision and not rounds else spec
    faithful = oracle.expected(whole, _held(spec, x), arrays[1], _bias(spec, arrays)).astype(float)
    for stage in spec.after:
        faithful = oracle.POINTWISE[stage.name](faithful, *stage.values)
    norm = _norm(reference) or 1.0
    return exact, _norm(got - reference) / norm, _norm(_held(spec, faithful) - reference) / norm


def _norm(array: oracle.Array) -> float:
    return float(np.sqrt((array * array).sum()))


def _shapes(spec: ConvTransposeSpec) -> list[tuple[int, ...]]:
    assert spec.input is not None
    assert spec.in_channels is not None
    assert spec.out_channels is not None
    weight = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    sizes = tuple(size for size in spec.input if size is not None)
    return [sizes, weight, *([(spec.out_channels,)] if spec.bias else [])]


def _bias(spec: ConvTransposeSpec, arrays: list[Any]) -> Any:
    return arrays[2] if spec.bias else None


def _held(spec: ConvTransposeSpec, array: oracle.Array) -> oracle.Array:
    """Return `array` rounded to the spec's dtype, as float64."""
    if spec.dtype == "bfloat16":
        return oracle.rounded(array, "bfloat16").astype(np.float64)
    return array.astype(spec.dtype).astype(np.float64)


def run(
    spec: ConvTransposeSpec, module: ModuleType, device: str, *arrays: oracle.Array
) -> oracle.Array:
    """Return the emitted function's output on float64 arrays that the dtype holds exactly."""
    import torch

    dtype = getattr(torch, spec.dtype)
    x, weight, *bias = (torch.from_numpy(array).to(device, dtype) for array in arrays)
    x = laid_out(x, spec.layout)
    function = getattr(module, f"conv_transpose{spec.rank}d")
    output = function(x, weight, bias[0] if bias else None)
    result: oracle.Array = output.double().cpu().numpy()
    return result
