"""`convgen verify`'s verdicts: files that are wrong in a known way, and one that is right.

What would break it: a kernel that is compared with itself, a reference that follows its rounding,
an inexact sum or a large error that passes. The files are stand-ins that torch computes in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import conv_transpose2d

from convgen import find_target, parse
from convgen.execution.verify import Report, allowed, measure, verify, worst

LAYER = parse("ConvTranspose2d(24, 16, 3, padding=1, input=(2, 24, 9, 8))")
File = Callable[..., torch.Tensor]


def bits_of(tensor: torch.Tensor, added: int) -> torch.Tensor:
    """Return float32 numbers, `added` to their bits, with the 10 bits of mantissa that TF32 has."""
    return ((tensor.view(torch.int32) + added) & ~0x1FFF).view(torch.float32)


def right(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, added: int = 0x1000) -> File:
    """Return the layer of operands rounded to TF32, halves away from zero, summed exactly."""
    x, weight = bits_of(x, added), bits_of(weight, added)
    y = conv_transpose2d(x.double(), weight.double(), bias.double(), padding=1)
    return y.float()


def lost_tap(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return it without the products of one tap."""
    weight = weight.clone()
    weight[:, :, 2, 1] = 0
    return right(x, weight, bias)


def truncated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return it with operands cut off, as `tl.dot` takes them if nothing rounds them before."""
    return right(x, weight, bias, added=0)


def a_bit_off(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return it with every output at the next number: nothing beside the rounding to TF32."""
    return torch.nextafter(right(x, weight, bias), torch.tensor(torch.inf, device=x.device))


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> Callable[[File], Report]:
    """Return what `verify` says of a file that has a function in place of the kernel."""

    def of(function: File) -> Report:
        file = SimpleNamespace(conv_transpose2d=function)
        monkeypatch.setattr("convgen.execution.verify.load_module", lambda *_: file)
        return verify(LAYER, find_target("h100"))

    return of


def test_a_file_that_rounds_and_sums_as_it_should_passes(verdict) -> None:
    """Else the verdicts below could be those of any stand-in."""
    report = verdict(right)
    assert (report.exact, report.passed) == (True, True)
    assert str(report).startswith(f"passed: {report.spec}\n")
    # Rounding alone: two operands of 2^-12 at most each, which are uniform below it.
    assert 1e-4 < report.faithful < 4e-4
    assert report.error == pytest.approx(report.faithful, rel=0.01)


def test_a_lost_tap_fails(verdict) -> None:
    """One of nine: a ninth of the sum's squares is missing, a third of its norm."""
    report = verdict(lost_tap)
    assert (report.exact, report.passed) == (False, False)
    assert report.error == pytest.approx(1 / 3, rel=0.2)
    assert report.faithful < 4e-4
    assert str(report).startswith(f"FAILED: {report.spec}\n")
    assert "WRONG on integers" in str(report)


def test_truncated_operands_fail(verdict) -> None:
    """Integers do not show it: their products are exact. The error is twice as large, at least."""
    report = verdict(truncated)
    assert (report.exact, report.passed) == (True, False)
    assert report.error > 1.8 * report.faithful
    assert str(report).startswith("FAILED: ")
    assert "exact on integers" in str(report)


def test_an_inexact_sum_fails_however_small_its_error(verdict) -> None:
    report = verdict(a_bit_off)
    assert report.error < allowed(LAYER, report.faithful)
    assert (report.exact, report.passed) == (False, False)


@pytest.mark.parametrize(
    ("file", "exact", "within"),
    [(right, True, True), (lost_tap, False, False), (truncated, True, False)],
)
def test_other_tests_can_lean_on_measure(file, exact, within, device) -> None:
    """They ask for `exact`, and for an error within `allowed`."""
    module = SimpleNamespace(conv_transpose2d=file)
    found, error, faithful = measure(LAYER, module, device, seed=3)
    assert found is exact
    assert (error <= allowed(LAYER, faithful)) is within


@pytest.mark.parametrize(
    ("dtype", "roundoff"), [("float32", 2**-24), ("float16", 2**-24), ("float64", 2**-53)]
)
def test_what_is_allowed(dtype: str, roundoff: float) -> None:
    """A twentieth more than a faithful kernel, and a rounding of the accumulator."""
    spec = parse(f"ConvTranspose1d(4, 4, 3, input=(1, 4, 9), dtype={dtype})")
    assert allowed(spec, 1e-3) == pytest.approx(1.05e-3 + roundoff, rel=1e-12)
    assert allowed(spec, 0.0) == roundoff


def test_of_several_kernels_the_one_that_is_most_off_counts():
    """A kernel that rounds nothing is wrong at an error that is right for one that rounds."""
    spec = parse("ConvTranspose2d(8, 8, 3, groups=8, layout=any)")
    rounds, exact = (3e-4, 3e-4), (2e-4, 1e-7)
    assert worst(spec, [rounds, exact]) == worst(spec, [exact, rounds]) == exact
    assert exact[0] > allowed(spec, exact[1])
    assert rounds[0] <= allowed(spec, rounds[1])
