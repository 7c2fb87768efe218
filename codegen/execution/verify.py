"""Verification: the emitted kernel against the oracle.

A check of stage 5's output; needs torch, triton and numpy. Input: a spec and a target; output: a
`Report`. It runs on a GPU if there is one, else in Triton's interpreter. A stand-in (standin.py),
which the report names, bounds time and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..compiler import compile_kernel, plan
from ..families.registry import FAMILIES
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.choices import Choices
from ..planning.family import Family
from ..tables.targets import GpuTarget
from . import oracle
from .loading import laid_out, load_module
from .standin import stand_in

SECONDS = 55  # a command may take a minute, its start included
# Largest ratio of the kernel's error to that of a faithful kernel, with the same rounding and one
# accumulator.
MOST_ERROR = 1.05
# Unit roundoff u of the accumulator, allowed on top: the sums of layers with few terms and outputs
# differ by chance within it. On an H100 (2026-11-23) 13 of 368 drawn layers, all of ieee, tf32x3,
# bf16x6 or float64 and within a few u of exact, needed some of it, the most 0.69 u.
ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a verification.

    Attributes:
        spec: the spec that ran, with its sizes.
        where: name of the GPU, or the interpreter.
        reduced: whether sizes were reduced.
        reduced_geometry: whether kernel, stride, padding or dilation were.
        exact: integers in -2..2 came out exactly; None with stages, which have no integers, and
            where that was not verified.
        error: ||y - reference|| / ||reference|| on normal data, reference in float64; None where it
            was not verified.
        faithful: that error of a kernel which rounds operands to nearest and sums in one float32
            accumulator (float64 for that dtype).
        unverified: why a part was not verified, None if all was.
        passed: whether all was verified and exact, and the error is `allowed`.
    """

    spec: str
    where: str
    reduced: bool
    reduced_geometry: bool = False
    exact: bool | None = None
    error: float | None = None
    faithful: float | None = None
    unverified: str | None = None
    passed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        reduced = " (sizes reduced for it)" if self.reduced else ""
        if self.reduced_geometry:
            reduced = " (sizes and geometry reduced for it)"
        verdict = "passed" if self.passed else "FAILED"
        if self.unverified is not None and self.exact is not False:
            verdict = "NOT VERIFIED"
        return f"{verdict}: {self.spec}\n  in {self.where}{reduced}: {self._findings()}"

    def _findings(self) -> str:
        exact = {
            True: "exact on integers",
            False: "WRONG on integers",
            None: "not tried on integers, which stages do not keep",
        }
        if self.unverified is not None:
            done = "" if self.exact is None else f"{exact[self.exact]}, but "
            return f"{done}too large: {self.unverified}, the rest was not verified"
        return (
            f"{exact[self.exact]}, relative error {self.error:.2e} "
            f"against float64 (a faithful kernel: {self.faithful:.2e})"
        )


def verify(
    spec: ConvTransposeSpec,
    target: GpuTarget | None = None,
    seed: int = 0,
    choices: Choices | None = None,
    seconds: int = SECONDS,
    families: tuple[Family, ...] = FAMILIES,
) -> Report:
    """Run the emitted kernel of `spec`, or of a stand-in, and compare it with the oracle.

    Takes at most 2 GB, and at most `seconds` on systems with timers; the report says what was not
    verified by then. Rungs are verified one by one, as layers of their sizes, and kernels for small
    and for large inputs as the only one of a file: with a tile for small inputs the boxes, and
    whether images share tiles, are then those for any size.

    Without a GPU it sets TRITON_INTERPRET in this process, so triton must not be imported yet.
    """
    whole = dataclasses.replace(spec, rungs=())
    made = plan(whole, target, None, choices, families)
    parts: list[tuple[ConvTransposeSpec, Tile | None]] = [(whole, None)]
    parts += [(dataclasses.replace(whole, input=rung), None) for rung in spec.rungs]
    parts += [(k.spec, k.tile) for k in made.kernels if k.least or k.most]
    share = seconds // len(parts)
    reports = [_verify(part, target, seed, choices, share, families, tile) for part, tile in parts]
    return reports[0] if len(reports) == 1 else _together(spec, reports)


def _verify(
    spec: ConvTransposeSpec,
    target: GpuTarget | None,
    seed: int,
    choices: Choices | None,
    seconds: int,
    families: tuple[Family, ...],
    tile: Tile | None,
) -> Report:
    """Verify the kernels for any size of `spec`, or the one of `tile`; arguments as `verify`."""
    start = time.monotonic()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    found = stand_in(spec, target, choices, families, tile, small=not gpu)
    sized = found.sized
    source = compile_kernel(found.emitted, target, found.tiles, families=families)
    where = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    if not gpu and spec.product is not None and not spec.product.interpreted:
        where += f", which has no {spec.product.name} and multiplies in ieee"
    report = Report(
        spec=str(sized), where=where, reduced=found.reduced, reduced_geometry=found.geometry
    )
    random, device = np.random.default_rng(seed), "cuda" if gpu else "cpu"
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            # Before the timer starts: an interrupted import of Triton fails for good.
            module = load_module(source.text, "convgen_verified", Path(folder))
            stack.enter_context(_within(seconds - (time.monotonic() - start)))
            layouts = sized.each_layout
            exact = [_measure_integers(each, module, device, random) for each in layouts]
            report = dataclasses.replace(report, exact=None if None in exact else all(exact))
            errors = [
                _measure_errors(each, module, device, random, kernel.family.products)
                for each, kernel in zip(layouts, source.plan.kernels, strict=True)
            ]
            error, faithful = worst(sized, errors)
    except _OutOfTimeError:
        return dataclasses.replace(report, unverified=f"the {seconds} s are over")
    except MemoryError:
        return dataclasses.replace(report, unverified="there is not enough memory")
    passed = report.exact is not False and error <= allowed(sized, faithful)
    return dataclasses.replace(report, error=error, faithful=faithful, passed=passed)


def _together(spec: ConvTransposeSpec, reports: list[Report]) -> Report:
    """Return the report of a spec from those of its parts: what is worst counts."""
    exact = [report.exact for report in reports]
    errors = [
        (report.error, report.faithful)
        for report in reports
        if report.error is not None and report.faithful is not None
    ]
    error, faithful = worst(spec, errors) if errors else (None, None)
    return Report(
        spec=str(spec),
        where=reports[0].where,
        reduced=any(report.reduced for report in reports),
        reduced_geometry=any(report.reduced_geometry for report in reports),
        exact=None if None in exact else all(exact),
        error=error,
        faithful=faithful,
        unverified=next((r.unverified for r in reports if r.unverified is not None), None),
        passed=all(report.passed for report in reports),
    )


def worst(spec: ConvTransposeSpec, errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return of several kernels' (error, error of a faithful one) the pair that is most off.

    Not the largest error: kernels that round their operands are allowed more than others.
    """
    return max(errors, key=lambda pair: pair[0] / allowed(spec, pair[1]))


def allowed(spec: ConvTransposeSpec, faithful: float) -> float:
    """Return the largest relative error that passes, beside `faithful` of the same layer."""
    return MOST_ERROR * faithful + ROUNDOFF[spec.element.accumulator]


class _OutOfTimeError(BaseException):
    """The time is over; a BaseException, as Triton's interpreter catches every Exception."""


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise _OutOfTimeError in the block after `seconds`, on systems with timers."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def end(*_: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, end)
    try:
        # At once if no time is left; repeated, as a destructor may swallow the first exception.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    spec: ConvTransposeSpec, module: ModuleType, device: str, seed: int, rounds: bool = True
) -> tuple[bool | None, float, float]:
    """Return (exact on integers, error, error of a faithful kernel) of an imported file.

    Without matrix units a faithful kernel does not round its operands: `rounds` says if it does.
    """
    random = np.random.default_rng(seed)
    exact = _measure_integers(spec, module, device, random)
    return exact, *_measure_errors(spec, module, device, random, rounds)


def _measure_integers(
    spec: ConvTransposeSpec, module: ModuleType, device: str, random: np.random.Generator
) -> bool | None:
    """Return whether integers come out exactly; None with stages."""
    if spec.before or spec.after:
        return None
    integers = [random.integers(-2, 3, shape) for shape in _shapes(spec)]
    got = run(spec, module, device, *[array.astype(np.float64) for array in integers])
    want = oracle.scatter(spec, integers[0], integers[1], _bias(spec, integers))
    return bool(np.array_equal(got, _held(spec, want.astype(np.float64))))


def _measure_errors(
    spec: ConvTransposeSpec,
    module: ModuleType,
    device: str,
    random: np.random.Generator,
    rounds: bool,
) -> tuple[float, float]:
    """Return the error on normal data, and that of a faithful kernel."""
    arrays = [_held(spec, random.standard_normal(shape)) for shape in _shapes(spec)]
    got = run(spec, module, device, *arrays)
    # Long double: a reference with more digits than float64, on platforms that have it.
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
    return _norm(got - reference) / norm, _norm(_held(spec, faithful) - reference) / norm


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
