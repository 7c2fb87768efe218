"""What became of the transposed convolutions of a torch model: `convgen.report`.

Beside the stages; needs torch, imported when a function is called. Input: a model; output: a
`Report`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..errors import visible
from .layers import (
    LeftError,
    Wishes,
    check_module,
    in_compiled,
    is_emitted,
    left_of,
    record_of,
    spec_of,
    spec_text,
    transposed,
)
from .preference import FASTER, Times

NOT_REPLACED = "not replaced: convgen.replace_layers(model) does"
UNCOUNTED = "Calls in compiled or captured graphs are not counted."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """A transposed convolution of a model.

    Attributes:
        name: its name in `named_modules()`; empty for the model itself.
        emitted: it runs an emitted file.
        spec: of that file; of a layer that is torch's, as it is printed.
        reason: why it is torch's; empty for an emitted one.
        note: how the spec came about, if that needs saying, or empty.
        kernel_calls: calls that the kernel computed.
        torch_calls: calls that an emitted layer left to torch, by the reason; the first reason
            stands for all of its kind (other sizes, for example).
        compiled: the model that was asked about is compiled here: "compiled: not counted".
        times: of its kernels beside torch's operator, at each size that `replace_layers` was given
            and that was measured, by choices files.
    """

    name: str
    emitted: bool
    spec: str
    reason: str
    note: str
    kernel_calls: int
    torch_calls: dict[str, int]
    compiled: bool
    times: tuple[Times, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The transposed convolutions of a model; `str()` is a table.

    Attributes:
        layers: one for each, in the order of `named_modules()`.
    """

    layers: tuple[LayerReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON has."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples to lists
        return values

    def __str__(self) -> str:
        if not self.layers:
            return "The model has no transposed convolutions."
        head = ("layer", "runs", "kernel calls", "torch calls", "spec")
        rows = [head, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for row, notes in zip(rows, ([], *map(_notes, self.layers)), strict=True):
            name, runs, kernel, torch, spec = row
            lines.append(
                f"{name:<{widths[0]}}  {runs:<{widths[1]}}  {kernel:>{widths[2]}}  "
                f"{torch:>{widths[3]}}  {spec}"
            )
            lines += [f"{'':<{widths[0]}}  {note}" for note in notes]
        return "\n".join([*lines, UNCOUNTED])


def report(model: Any) -> Report:
    """Implement `convgen.report`, which documents it."""
    check_module(model)
    compiled = in_compiled(model)
    return Report(
        tuple(
            _layer_report(name, layer, name in compiled)
            for name, layer in transposed(model).items()
        )
    )


def _layer_report(name: str, layer: Any, compiled: bool) -> LayerReport:
    emitted = is_emitted(layer)
    kernel, torch = _calls(layer) if emitted else (0, {})
    record = (record_of(layer) if emitted else left_of(layer)) or {}
    return LayerReport(
        name=name,
        emitted=emitted,
        spec=spec_text(layer) if emitted else str(layer).partition("\n")[0],
        reason="" if emitted else _reason(layer),
        note=record.get("note", ""),
        kernel_calls=kernel,
        torch_calls=torch,
        compiled=compiled,
        times=tuple(Times(**each) for each in record.get("times", ())),
    )


def _calls(layer: Any) -> tuple[int, dict[str, int]]:
    """Return the calls of an emitted layer, by the kernel and by torch.

    Those of a package's layer for several targets are those of the layers that it calls.
    """
    kernel, torch = 0, dict[str, int]()
    for each in (layer, *vars(layer).get("_layers", {}).values()):
        calls = vars(each).get("_calls")
        if calls is not None:
            kernel += calls.kernel
            for reason, number in calls.torch.values():
                torch[reason] = torch.get(reason, 0) + number
    return kernel, torch


def _reason(layer: Any) -> str:
    """Return why a layer is torch's."""
    from torch.nn.parameter import is_lazy

    if any(map(is_lazy, layer.parameters())):
        return "it is lazy and not initialised"
    if left_of(layer) is not None:
        return FASTER
    try:
        spec_of(layer, Wishes(None, None, None))
    except LeftError as error:
        return str(error)
    return NOT_REPLACED


def _cells(layer: LayerReport) -> tuple[str, str, str, str, str]:
    counts = ("-", "-")
    if layer.emitted:
        counts = (str(layer.kernel_calls), str(sum(layer.torch_calls.values())))
    runs = "kernel" if layer.emitted else "torch"
    return (visible(layer.name) or "(model)", runs, *counts, visible(layer.spec, 500))


def _notes(layer: LayerReport) -> list[str]:
    """Return the lines below a layer's row."""
    notes = [layer.reason, layer.note]
    # A kernel that won needs no word: most did.
    slower = (t for t in layer.times if not layer.emitted or t.is_slower)
    notes += [str(each) for each in slower]
    notes += [f"{number} by torch: {reason}" for reason, number in layer.torch_calls.items()]
    notes.append("compiled: not counted" if layer.compiled and layer.emitted else "")
    return [f"- {visible(note, 500)}" for note in notes if note]
