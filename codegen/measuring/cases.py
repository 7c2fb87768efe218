"""Cases and ways of `convgen bench`: the layers, and the ways to compute a layer.

Stage 1 of bench. Input: the argument CASES (a .json file, a .convgen file or the text of a spec)
and its options; output: `Case`s whose sizes are all known, and `Way`s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import json_of
from ..errors import SpecError, nearest, shown
from ..files import read_text
from ..language.spec import LAYOUTS, MAX_SIZE, ConvTransposeSpec
from ..project.statements import resolve
from ..tables.dtypes import DTYPES
from ..values import check_integer

GEOMETRY = ("kernel_size", "stride", "padding", "output_padding", "dilation")
SIZES = ("rank", "batch", "in_channels", "out_channels", "input")
KEYS = ("id", *SIZES, *GEOMETRY, "groups", "bias")
CONVGEN = "convgen_"  # prefix of the ways of convgen, before the layout
CEILINGS = "ceilings"  # the job that measures the device's ceilings, named instead of a way


@dataclass(frozen=True, slots=True)
class Case:
    """A layer to measure, in one dtype."""

    id: str
    spec: ConvTransposeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to compute a layer; each runs in a separate process.

    Attributes:
        name: name in the report.
        emitted: whether convgen's file computes it; else torch does.
        channels_last: whether input and weight are in channels_last; converted before timing.
        flip: whether it is a convolution, whose weight is flipped and transposed before timing.
        benchmark: whether cuDNN's benchmark mode is on.
        compiled: whether it runs through torch.compile.
    """

    name: str
    emitted: bool = False
    channels_last: bool = False
    flip: bool = False
    benchmark: bool = False
    compiled: bool = False

    @property
    def layout(self) -> str:
        """The layout of input and weight, by its name in the language."""
        return "channels_last" if self.channels_last else "channels_first"

    def unfit(self, spec: ConvTransposeSpec) -> str | None:
        """Return why this way does not apply to `spec`, None if it does."""
        if self.channels_last and spec.rank == 1:
            return "rank 1 has no channels_last"
        if not self.flip:
            return None
        if set(spec.stride) != {1}:
            return "stride is not 1"
        if any(spec.output_padding):
            return "output_padding is not 0"
        axes = zip(spec.dilation, spec.kernel_size, spec.padding, strict=True)
        if any(p > d * (k - 1) for d, k, p in axes):
            return "padding exceeds dilation * (kernel_size - 1)"
        return None


TORCH_WAYS = (
    Way(name="default"),
    Way(name="benchmark", benchmark=True),
    Way(name="channels_last", channels_last=True),
    Way(name="channels_last_benchmark", channels_last=True, benchmark=True),
    Way(name="flip", flip=True),
    Way(name="flip_benchmark", flip=True, benchmark=True),
    Way(name="flip_channels_last", flip=True, channels_last=True),
    Way(name="flip_channels_last_benchmark", flip=True, channels_last=True, benchmark=True),
    Way(name="compile", compiled=True),
)
CONVGEN_WAYS = tuple(
    Way(name=CONVGEN + layout, emitted=True, channels_last=layout == "channels_last")
    for layout in LAYOUTS
)
WAYS = {way.name: way for way in (*TORCH_WAYS, *CONVGEN_WAYS)}


def read_ways(ways: str | None, layouts: str | None) -> list[Way]:
    """Return the ways named in comma-separated lists; None means all of its kind."""
    torch = _listed("--ways", ways, tuple(way.name for way in TORCH_WAYS))
    emitted = _listed("--layouts", layouts, LAYOUTS)
    return [WAYS[name] for name in (*torch, *(CONVGEN + layout for layout in emitted))]


def _listed(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(known if text is None else text.split(",") if text else ()))
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise SpecError(f"{option}: {shown(name)} is none of {', '.join(known)}{hint}")
    return names


def read_cases(text: str, only: str, dtypes: str | None) -> list[Case]:
    """Return the cases of CASES whose id contains `only`.

    Args:
        text: the argument CASES.
        only: text that the ids of the wanted cases contain; empty for all.
        dtypes: comma-separated dtypes instead of those of the cases; None keeps them.

    Raises:
        SpecError: the cases are wrong; the message names the file, the case and the argument.
    """
    asked = None if dtypes is None else dtypes.split(",")
    cases = _from_json(text, asked) if text.endswith(".json") else _from_specs(text, asked)
    chosen = [case for case in cases if only in case.id]
    if not chosen:
        raise SpecError(f"--only: no case has {shown(only)} in its id")
    return chosen


def _from_specs(text: str, dtypes: list[str] | None) -> list[Case]:
    """Return the layers of a .convgen file or of a text; those without a name are numbered."""
    cases = []
    for number, statement in enumerate(resolve(text, {"target": None}), 1):
        spec, name = statement.spec, statement.name or f"layer{number}"
        _check_known(name, spec)
        for dtype in dtypes or [spec.dtype]:
            precision = spec.precision if dtype == spec.dtype else None
            other = dataclasses.replace(spec, dtype=dtype, precision=precision)
            cases.append(Case(name, other))
    return cases


def _from_json(path: str, dtypes: list[str] | None) -> list[Case]:
    text = read_text(Path(path))
    try:
        document = json_of(text)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    entries = document.get("cases") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise SpecError(f'{path}: needs "cases", a list of layers', "cases")
    cases: list[Case] = []
    ids: set[object] = set()
    for number, entry in enumerate(entries, 1):
        name = entry.get("id") if isinstance(entry, dict) else None
        where = f"{path}: case {shown(name) if isinstance(name, str) else f'number {number}'}"
        try:
            specs = [spec_of(entry, dtype) for dtype in dtypes or _dtypes(entry)]
            if name in ids:
                raise SpecError("an earlier case has this id", "id")
            ids.add(name)
            cases += [Case(str(name), spec) for spec in specs]
        except SpecError as error:
            raise SpecError(f"{where}: {error}", error.argument) from None
    return cases


def _dtypes(entry: Any) -> list[Any]:
    """Return the dtypes that an entry names; an entry that names none is float32."""
    dtypes = entry.get("dtypes", ["float32"]) if isinstance(entry, dict) else [None]
    if not isinstance(dtypes, list) or not 1 <= len(dtypes) <= len(DTYPES):
        raise SpecError(
            f"dtypes must be a list of 1 to {len(DTYPES)} dtypes, got {shown(dtypes)}", "dtypes"
        )
    return dtypes


def spec_of(entry: Any, dtype: str) -> ConvTransposeSpec:
    """Return the spec of an entry of a .json file; raises SpecError naming the key at fault."""
    if not isinstance(entry, dict):
        raise SpecError(f"must be an object, got {shown(entry)}")
    for key in KEYS:
        if key not in entry:
            raise SpecError(f"has no {key}", key)
    name = entry["id"]  # which the report's table shows
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= 200:
        raise SpecError(f"id must be 1 to 200 printable characters, got {shown(name)}", "id")
    check_integer("batch", entry["batch"], 1, MAX_SIZE)
    if not isinstance(entry["input"], list):
        raise SpecError(f"input must be a list, got {shown(entry['input'])}", "input")
    axes: dict[str, Any] = {
        key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in GEOMETRY
    }
    spec = ConvTransposeSpec(
        rank=entry["rank"],
        in_channels=entry["in_channels"],
        out_channels=entry["out_channels"],
        groups=entry["groups"],
        bias=entry["bias"],
        input=(entry["batch"], entry["in_channels"], *entry["input"]),
        dtype=dtype,
        **axes,
    )
    _check_known(entry["id"], spec)
    return spec


def _check_known(name: str, spec: ConvTransposeSpec) -> None:
    for argument in ("in_channels", "out_channels"):
        if getattr(spec, argument) is None:
            raise SpecError(f"{name}: bench needs {argument}", argument)
    if spec.input is None or None in spec.input:
        raise SpecError(f"{name}: bench needs every size of input, got {spec.input}", "input")
