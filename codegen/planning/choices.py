"""Measured choices: for each spec, the fastest of the tiles that were timed on a target.

Stage 4, part of plan. Input: a JSON file for one target, as `convgen tune` writes it; output: a
`Choices`, which the planner prefers to the cost model. The package's own files are in `measured/`;
a user gives a path, and the hash of that file goes into the header of emitted files.

    {"schema": 1, "target": "h100", "measured": {"device": …, "triton": …, "date": …},
     "choices": [{"spec": "ConvTranspose2d(…)", "tile": {"family": …, …}, "ms": 0.17, "tried": 32,
                  "first_ms": 0.18, "torch": {"ms": 0.31, "best_ms": 0.22},
                  "input_gradient": {"tile": {…}, "ms": 0.18, "torch_ms": 0.31}}]}

`first_ms`, the time of the model's first choice, shows how well the model ranks; convgen does not
use it. The path ``none`` means no file at all: the package's choices are not used either. Two
entries are optional. `input_gradient` has the best tile for the gradient of the input, its time,
and that of torch's operator: an emitted file has that kernel if it is faster. `torch` has the times
of torch's operator (`MeasuredTorch`), which decide whether a model's layer is left to torch
(network/preference.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import json_of
from ..errors import SpecError, shown
from ..files import read_text
from ..geometry.tile import Tile
from ..language.spec import NO_CHOICES, ConvTransposeSpec, check_target
from ..values import check_choice, check_integer, integer_of, number_of
from .family import Family
from .plan import Measured, MeasuredGradient, MeasuredTorch

SCHEMA = 1
MAX_MS = 10**9  # about 12 days: longer than any kernel runs


@dataclass(frozen=True, slots=True)
class Choices:
    """The measured tiles of a target.

    Attributes:
        target: name of the target.
        table: maps `key_of` a spec to the fastest tile.
        digest: SHA-256 of the file, None for the package's own files.
        name: the file, as messages name it.
        measured: what the times were measured on: device, versions and date.
    """

    target: str
    table: Mapping[str, Measured]
    digest: str | None = None
    name: str = ""
    measured: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What tells these choices from others: the hash of their file, or `none`."""
        return self.digest or self.target

    def of(self, spec: ConvTransposeSpec) -> Measured | None:
        """Return the measurement of `spec`, None if there is none."""
        return self.table.get(key_of(spec))


MODEL_ALONE = Choices(NO_CHOICES, {})  # for the path `none`


def key_of(spec: ConvTransposeSpec) -> str:
    """Return the key of a spec: the text of what the best tile depends on.

    These are sizes, geometry, precision and layout. Bias, stages and the grid's rank are left out:
    they hardly change a program's time. bfloat16 counts as float16, which has the same rates.
    """
    bare = dataclasses.replace(
        spec,
        bias=False,
        before=(),
        after=(),
        grid=None,
        autotune="none",
        target=None,
        dtype="float16" if spec.dtype == "bfloat16" else spec.dtype,
    )
    return str(bare)


@functools.cache
def shipped(target: str, families: tuple[Family, ...]) -> Choices:
    """Return the package's choices for a target, empty if there are none."""
    source = importlib.resources.files(__package__) / "measured" / f"{target}.json"
    if not source.is_file():
        return Choices(target, {})
    name = f"convgen's measured/{target}.json"
    found = _read(source.read_text(encoding="utf-8"), name, families)
    return dataclasses.replace(found, digest=None)


def found_for(
    spec: ConvTransposeSpec, target: str, families: tuple[Family, ...], given: Choices | None
) -> tuple[Measured, Choices] | None:
    """Return the measurement of `spec` on a target, with the choices that have it; None without.

    The given choices are used if they are for this target and have the spec; else the package's.
    """
    if given == MODEL_ALONE:
        return None
    for choices in (given, shipped(target, families)):
        if choices is not None and choices.target == target:
            found = choices.of(spec)
            if found is not None:
                return found, choices
    return None


def choices_at(path: Path, families: tuple[Family, ...]) -> Choices:
    """Return `MODEL_ALONE` for the path ``none``, else `read_choices` of the file."""
    return MODEL_ALONE if path == Path(NO_CHOICES) else read_choices(path, families)


def choices_for(
    path: Path | None, targets: set[str], families: tuple[Family, ...]
) -> Choices | None:
    """Return the choices in a file, None for no file, `MODEL_ALONE` for the path ``none``.

    Raises:
        SpecError: the file is not legal, or is for none of `targets`.
        ProjectError: the file cannot be read.
    """
    if path is None:
        return None
    found = choices_at(path, families)
    check_targets(found, targets)
    return found


def check_targets(choices: Choices, targets: set[str]) -> None:
    """Raise SpecError if choices are for none of `targets`."""
    if choices.target not in {*targets, NO_CHOICES}:
        names = ", ".join(sorted(targets))
        raise SpecError(
            f"{choices.name} has choices for {choices.target}, not for {names}", "choices"
        )


def read_choices(path: Path, families: tuple[Family, ...]) -> Choices:
    """Return the choices in a file; raises SpecError for a bad one, ProjectError for no file."""
    found = _read(read_text(path), str(path), families)
    return dataclasses.replace(found, table=_by_key(found.table, path))


def _by_key(table: Mapping[str, Measured], path: Path) -> dict[str, Measured]:
    """Return the rows by `key_of` their specs, whose texts may have been written by hand."""
    from ..language.parser import parse

    keyed = {}
    for text, measured in table.items():
        try:
            keyed[key_of(parse(text))] = measured
        except SpecError as error:
            raise SpecError(f"{path}, spec {shown(text)}: {error}", "choices") from None
    return keyed


def rows_of(
    path: Path, families: tuple[Family, ...]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the `choices` and the `measured` entry of a choices file, as JSON values.

    Raises:
        SpecError: as `read_choices`.
    """
    text = read_text(path)
    _read(text, str(path), families)
    data = json_of(text)
    return data["choices"], data["measured"]


def _read(text: str, name: str, families: tuple[Family, ...]) -> Choices:
    try:
        data = json_of(text)
        schema = _field(data, "schema", "the file")
        if integer_of(schema) != SCHEMA:
            raise SpecError(f"schema must be {SCHEMA}, got {shown(schema)}")
        target = check_target(_field(data, "target", "the file"))
        measured = _field(data, "measured", "the file")
        device = _measured_on(measured)
        rows = _field(data, "choices", "the file")
        if not isinstance(rows, list):
            raise SpecError(f"choices must be a list of objects, got {shown(rows)}")
        table = {}
        for number, row in enumerate(rows, 1):
            spec = _field(row, "spec", f"row {number} of choices")
            if not isinstance(spec, str):
                raise SpecError(f"spec of row {number} must be a text, got {shown(spec)}")
            table[spec] = _row(row, number, device, families)
    except SpecError as error:
        raise SpecError(f"{name}: {error}", "choices") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Choices(target, table, digest, name, dict(measured))


def _field(holder: Any, key: str, where: str) -> Any:
    if not isinstance(holder, dict):
        raise SpecError(f"{where} must be an object with {key}, got {shown(holder)}")
    if key not in holder:
        raise SpecError(f"{where} lacks {key}")
    return holder[key]


def _measured_on(measured: Any) -> str:
    """Return the device of `measured`; checks every text, as all are printed into reports."""
    device = _field(measured, "device", "measured")
    for key, text in measured.items():
        if not isinstance(text, str) or not text.isprintable() or not 1 <= len(text) <= 200:
            raise SpecError(
                f"{shown(key)} of measured must be a text of 1 to 200 printable characters, "
                f"got {shown(text)}"
            )
    return str(device)


def _row(row: dict[str, Any], number: int, device: str, families: tuple[Family, ...]) -> Measured:
    where = f"row {number}"
    if row.get("first_ms") is not None:
        _time(row, "first_ms", where)
    return Measured(
        _tile(row, where, families),
        _time(row, "ms", where),
        check_integer(f"tried of {where}", _field(row, "tried", where), 1, 2**31),
        device,
        _gradient_of(row, where, families) if "input_gradient" in row else None,
        _torch_of(row["torch"], f"torch of {where}") if "torch" in row else None,
    )


def _torch_of(found: Any, where: str) -> MeasuredTorch:
    return MeasuredTorch(_time(found, "ms", where), _time(found, "best_ms", where))


def _gradient_of(
    row: dict[str, Any], row_name: str, families: tuple[Family, ...]
) -> MeasuredGradient:
    where = f"input_gradient of {row_name}"
    found = row["input_gradient"]
    tile = _tile(found, where, families)
    if tile.relayout:
        raise SpecError(f"tile of {where}: a gradient's kernel has no copy, relayout must be false")
    return MeasuredGradient(tile, _time(found, "ms", where), _time(found, "torch_ms", where))


def _tile(row: Any, where: str, families: tuple[Family, ...]) -> Tile:
    try:
        return tile_of(_field(row, "tile", where), families)
    except SpecError as error:
        raise SpecError(f"tile of {where}: {error}") from None


def _time(row: dict[str, Any], key: str, where: str) -> float:
    value = _field(row, key, where)
    number = number_of(value)
    if number is None or not 0 <= number <= MAX_MS:
        raise SpecError(
            f"{key} of {where} must be milliseconds, a number from 0 to {MAX_MS}, "
            f"got {shown(value)}"
        )
    return number


def tile_of(row: Any, families: tuple[Family, ...]) -> Tile:
    """Return the tile that a JSON object describes; raises SpecError if it describes none."""
    names = [field.name for field in dataclasses.fields(Tile)]
    given = {"rows": 1, "relayout": False, **row} if isinstance(row, dict) else {}
    if set(given) != set(names):
        raise SpecError(f"a tile must have exactly {', '.join(names)}")
    tile = Tile(**row)
    check_choice("family of a tile", tile.family, tuple(family.name for family in families))
    return tile


def text_of(target: str, measured: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """Return the text of a choices file: one line per spec, sorted."""
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: str(row["spec"]))]
    head = json.dumps({"schema": SCHEMA, "target": target, "measured": measured})
    body = ",\n".join(f"  {line}" for line in lines)
    return f'{head[:-1]}, "choices": [\n{body}\n]}}\n'
