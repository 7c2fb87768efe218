"""Whether torch computes a layer: by the times of its operator in choices files, beside a kernel's.

Beside the stages. Input: a layer's spec, the layouts that arrive, choices; output: `Times`, and
what they decide. In graphs of Inductor's more counts than that: graph_choice.py.

Only known sizes are compared: those of open ones were taken at nominal sizes, which say little of
a call's. What nobody measured a kernel computes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SpecError, shown
from ..families.registry import FAMILIES
from ..language.spec import ConvTransposeSpec
from ..planning.choices import Choices, choices_at, found_for
from ..tables.targets import DEFAULT_TARGET

PREFER = "fastest", "kernel"
FASTER = 'torch was measured to be faster (prefer="kernel" replaces it even so)'
LEAST_SHARE = 0.98  # of a kernel's time: what is less than that away counts as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Times of a kernel and of torch's operator on the same data, in milliseconds.

    Attributes:
        input: (batch, channels, spatial…), all known.
        layout: layout of the input.
        kernel_ms: of the kernel, with its weight packed.
        torch_ms: of torch's operator, as a layer calls it.
        torch_best_ms: the same in the better layout for it, with a copy of the input into that.
        target: the GPU that the kernel is planned for.
        measured: what was measured on: device, versions and date.
        file: the choices file.
    """

    input: tuple[int | None, ...]
    layout: str
    kernel_ms: float
    torch_ms: float
    torch_best_ms: float
    target: str
    measured: dict[str, str]
    file: str

    @property
    def is_slower(self) -> bool:
        """Whether the kernel is slower than torch's operator as a layer calls it."""
        return self.torch_ms < LEAST_SHARE * self.kernel_ms

    def __str__(self) -> str:
        versions = [f"{k} {v}" for k, v in self.measured.items() if k in ("torch", "triton")]
        known = self.measured.get("device"), *versions, self.measured.get("date")
        return (
            f"at {self.input} in {self.layout} torch's operator takes {self.torch_ms:.4f} ms "
            f"({self.torch_best_ms:.4f} ms in the better layout), the kernel for {self.target} "
            f"{self.kernel_ms:.4f} ms ({', '.join(each for each in known if each)}; {self.file})"
        )


def times_of(
    spec: ConvTransposeSpec, layouts: Collection[str], choices: Choices | None
) -> tuple[Times | None, ...]:
    """Return the times of each known size of a spec in each of `layouts`, None if not measured.

    `choices` are preferred to the package's own.
    """
    return tuple(
        _times(part, choices)
        for part in spec.parts
        if part.layout in layouts and part.input and None not in part.input
    )


def _times(part: ConvTransposeSpec, choices: Choices | None) -> Times | None:
    target = part.target or DEFAULT_TARGET
    found = found_for(part, target, FAMILIES, choices)
    if found is None:
        return None
    row, source = found
    if row.torch is None:
        return None
    assert part.input is not None
    return Times(
        input=part.input,
        layout=part.layout,
        kernel_ms=row.ms,
        torch_ms=row.torch.ms,
        torch_best_ms=row.torch.best_ms,
        target=target,
        measured=dict(source.measured),
        file=source.name,
    )


def is_slower(times: Sequence[Times | None]) -> bool:
    """Whether kernels were measured to be slower than torch at every known size.

    One size that is not, or that nobody measured, is enough for no.
    """
    return bool(times) and all(each is not None and each.is_slower for each in times)


def is_as_precise(spec: ConvTransposeSpec) -> bool:
    """Whether torch's operator computes with the precision of a spec, as torch is set now."""
    return spec.dtype != "float32" or spec.precision == ("tf32" if allows_tf32() else "ieee")


def allows_tf32() -> bool:
    """Whether torch's own convolutions may round float32 to TF32."""
    from torch.backends import cudnn

    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:  # settings of convolutions and of recurrent layers differ
        return bool(cudnn.conv.fp32_precision == "tf32")


def choices_given(argument: str, path: object) -> Choices | None:
    """Return the choices of a file that a user names, None for None.

    Raises:
        SpecError: `path` is no path, or its file is no choices file.
        ProjectError: the file cannot be read.
    """
    if path is None:
        return None
    if not is_path(path):
        raise SpecError(f"{argument} must be a path or None, got {shown(path)}", argument)
    return choices_at(Path(os.fspath(path)), FAMILIES)  # type: ignore[call-overload]


def is_path(value: object) -> bool:
    """Whether `value` can name a file: text that the system and Triton can encode."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]  # it raises what it is caught for
        return isinstance(text, str) and bool(text) and "\0" not in text and bool(text.encode())
    except (TypeError, ValueError):
        return False
