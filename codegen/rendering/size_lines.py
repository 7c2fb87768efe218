"""The sizes of a kernel as lines of the file: constants, arguments, locals.

Stage 5, render. Input: `Sizes`, and the kernel's `Scribe`, whose `used` says which sizes the
kernel reads; output: text.
"""

from __future__ import annotations

import re
from collections.abc import Set

from sympy import Expr, Symbol

from ..symbolic.lines import WIDTH, bare
from ..symbolic.scribe import Scribe
from ..symbolic.sizes import BLOCKS, GRADIENT, Size, Sizes
from ..symbolic.space import FloorDiv, floors

_COMMENTS = {
    "BLOCK_M": "output positions of a tile",
    "BLOCK_N": "output channels of a tile",
    "BLOCK_K": "input channels of a step",
    "BOX_N": "images of a tile",
    "BOX_D": "positions of a tile along axis d",
    "BOX_H": "positions of a tile along axis h",
    "BOX_W": "positions of a tile along axis w",
    "BOX_L": "positions of a tile along axis l",
    "PHASE": "outputs of a phase: ceil(output / stride)",
    "ROW": "positions of a row, an even number: Triton then sees runs of them",
    "SPAN": "neighbouring inputs of a row, taken together",
    "PHASES": "neighbouring outputs of a row, computed together",
    "PHASE_LANES": "PHASES, up to a power of two",
    "ROWS": "neighbouring rows of outputs, computed together",
    "BLOCKS": "blocks of ROWS rows",
    "ROWS_IN": "rows of inputs from a block to the next",
    "DILATION": "outputs from a kernel index to the next",
    "OFFSET": "outputs of a row's first group that lie before the row",
    "IN_GROUPS": "groups of SPAN inputs in a row",
    "GROUPS": "groups of PHASES outputs in a row",
}
_SIZES = re.compile(r"\b(ROWS|SPAN|PHASES)\b")  # sizes in comments, which take the prefix too


def list_text(names: tuple[str, ...]) -> str:
    """Return a list of quoted names, broken if the longest line that contains it is too long."""
    quoted = [f'"{name}"' for name in names]
    line = f"[{', '.join(quoted)}]"
    if len(f"    do_not_specialize_on_alignment={line},") <= WIDTH:
        return line
    return "[\n" + "".join(f"    {name},\n" for name in quoted) + "]"


def size_lines(
    sizes: Sizes, scribe: Scribe, elsewhere: Set[Symbol] = frozenset()
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the lines of constants, the arguments, and the lines of locals of a kernel.

    They cover the sizes that the kernel reads, and known sizes that are read `elsewhere` in the
    file.
    """
    constants: list[str] = []
    arguments: list[str] = []
    local_lines: list[str] = []
    known = {size.symbol for size in sizes.table if size.value is not None and not size.is_count}
    scribe.used |= known & elsewhere
    for size in reversed(sizes.table):
        if size.symbol not in scribe.used:
            continue
        if size.symbol in known:
            constants.insert(0, _constant(size, sizes, scribe))
        elif size.definition is not None:
            local_lines.insert(0, f"{size.text} = {scribe.text(floors(size.definition))}")
        elif size.name not in BLOCKS:
            arguments.insert(0, size.text)
    return tuple(constants), tuple(arguments), tuple(local_lines)


def _constant(size: Size, sizes: Sizes, scribe: Scribe) -> str:
    comment = None
    if sizes.block is not None and size.name == "BLOCK_M":
        what = "groups of outputs" if sizes.grouping is not None else "outputs"
        rows = "ROWS" if size.prefix in ("", GRADIENT) else "its"  # a longer name has no place
        comment = f"positions of a tile: {what}, in each of {rows} rows"
    elif sizes.grouping is not None:
        comment = {
            "BLOCK_M": "positions of a tile: groups of outputs",
            f"TAPS_{sizes.letter(sizes.rank - 1)}": "groups of inputs that a group reads",
        }.get(size.name)
    if comment is None and size.spelled and size.definition is not None:
        comment = f"taps of a phase, {size.definition.args[1]} kernel indices apart"
    comment = comment or _COMMENTS.get(size.name) or _COMMENTS.get(size.name.partition("_")[2])
    comment = comment or _COMMENTS.get(size.name.partition("_")[0])
    if comment and size.prefix:
        comment = _SIZES.sub(rf"{size.prefix}\1", comment)
    value = _spelled(size.definition, size.value, scribe) if size.spelled else str(size.value)
    return f"{size.text} = tl.constexpr({value})" + (f"  # {comment}" if comment else "")


def _spelled(quotient: Expr, value: int | None, scribe: Scribe) -> str:
    """Return the text of a CeilDiv of known `value`: `//` if the division is exact."""
    top, divisor = quotient.args
    if scribe.space.value(top - divisor * value) == 0:
        return bare(scribe.text(FloorDiv(top, divisor)))
    return f"triton.cdiv({scribe.text(top)}, {scribe.text(divisor)})"
