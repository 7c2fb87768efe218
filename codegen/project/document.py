"""The text of a `.convgen` file for a traced model.

Input: a `Trace`; output: a statement for each of its kernels, with the layers in comments, and the
times if torch was measured to be faster, under a header that tells how the file was made and
whether it was edited since.
"""

from __future__ import annotations

import builtins
import dataclasses
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import SpecError, visible
from ..language.parser import MAX_TEXT, check_name
from ..language.spec import ConvTransposeSpec
from ..network.preference import Times, times_of
from ..network.trace import Trace, TracedKernel
from ..planning.choices import Choices
from ..rendering.header import around_hash, with_hash
from ..version import __version__
from .table import TAKEN

_START = "# Traced by convgen "
_LONGEST = 60  # characters of a name, which may get a number; 64 are allowed
_WIDTH = 98


@dataclass(frozen=True, slots=True)
class TracedDocument:
    """The text of a document, and what it has of each kernel, in the order of the trace's.

    Attributes:
        text: the document.
        names: of its statements.
        slower: the times of a kernel that was measured to be slower than torch, None for others.
    """

    text: str
    names: tuple[str, ...]
    slower: tuple[Times | None, ...]

    def warnings(self) -> list[str]:
        """Return a line for each kernel that was measured to be slower than torch."""
        pairs = zip(self.names, self.slower, strict=True)
        return [f"slower than torch: {name}: {times}" for name, times in pairs if times is not None]


def document_of(
    trace: Trace, model: str, command: str, target: str | None, choices: Choices | None = None
) -> TracedDocument:
    """Return the document of a trace.

    Args:
        trace: the kernels and the layers that have none.
        model: what was traced, for the header.
        command: the command that makes the document, for the header.
        target: the GPU that the document sets for its kernels, None for none.
        choices: measured tiles, preferred to the package's own.

    Raises:
        SpecError: the text is longer than a document may be.
    """
    names = tuple(_names(trace.kernels))
    slower = tuple(_slower(kernel.spec, target, choices) for kernel in trace.kernels)
    lines = [f"target = {target}"] * (target is not None)
    for name, kernel, times in zip(names, trace.kernels, slower, strict=True):
        lines += ["", *_comment(", ".join(map(_shown, kernel.layers)))]
        if times is not None:
            lines += _comment(f"Torch was measured to be faster: {times}.")
        if kernel.resized:
            lines += _comment(
                "A call gives output_size: leave it out, the spec has it as output_padding."
            )
        lines.append(f"{name} = {kernel.spec}")
    lines += [""] * bool(trace.left or trace.uncalled)
    for said in notes(trace):
        lines += _comment(said)
    header = f"{_START}{__version__}: transposed convolutions of {model}\n# regenerate: {command}\n"
    text = with_hash(header, "\n".join([*lines, ""]))
    if len(text.encode()) > MAX_TEXT:
        raise SpecError(
            f"the document would be longer than {MAX_TEXT // 1024} KB; "
            "with sizes left open, layers share specs"
        )
    return TracedDocument(text, names, slower)


def _slower(spec: ConvTransposeSpec, target: str | None, choices: Choices | None) -> Times | None:
    """Return the times of a spec on a target, if its kernel was measured to be slower than torch.

    A package's layer may be called eagerly: torch's operator is as the layer calls it.
    """
    layer = dataclasses.replace(spec, target=target)
    (times,) = times_of(layer, (spec.layout,), choices) or (None,)
    return times if times is not None and times.is_slower else None


def notes(trace: Trace) -> list[str]:
    """Return a line for each layer that has no kernel, with the reason."""
    left = [f"left to torch: {_shown(name)}: {why}" for name, why in trace.left.items()]
    return left + [f"never called: {_shown(name)}" for name in trace.uncalled]


def refusal(text: str) -> str | None:
    """Return why a file with this text must not be overwritten by a trace, None if it may be."""
    if not text.startswith(_START):
        return "was not made by `convgen trace`"
    parts = around_hash(text)
    if parts is None or with_hash(*parts) != text:
        return "was edited since convgen made it"
    return None


def _names(kernels: tuple[TracedKernel, ...]) -> Iterator[str]:
    """Yield a name for each kernel, distinct where case is ignored too, as in names of files."""
    used: set[str] = set()
    for kernel in kernels:
        name, number = _name(kernel.layers[0]), 1
        unique = name
        while unique.lower() in used:
            number += 1
            unique = f"{name}_{number}"
        used.add(unique.lower())
        yield unique


def _name(layer: str) -> str:
    """Return a name that a kernel may have in a document and in a package, from a layer's."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", layer).strip("_")[-_LONGEST:].strip("_") or "layer"
    try:
        check_name(name)
    except SpecError:  # a number or a keyword, for example
        return f"layer_{name}"[:_LONGEST]
    return f"layer_{name}" if name in TAKEN or name in dir(builtins) else name


def _shown(layer: str) -> str:
    return visible(layer or "the model itself")


def _comment(text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines]
