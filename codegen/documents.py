"""JSON and TOML that users wrote: text to values, or one message.

Beside the stages; the readers of tables, choices and cases call it. Input: the text of a file whose
size has been checked (files.py); output: a document, or a reason of one line. What is in it is
checked by who asked.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from .errors import SpecError, visible

_DEEP = "it nests too deeply"
MAX_PARTS = 100  # of a dotted key: tomllib takes minutes for one of 100 000
# Strings and comments, in which a dot is part of no key; one that does not end goes to the end.
_QUOTED = re.compile(
    r'"""(?:[^\\"]|\\.|"(?!""))*(?:"""|\Z)'
    + r"|'''.*?(?:'''|\Z)"
    + r'|#[^\n]*|"(?:[^"\\\n]|\\[^\n])*"?|\'[^\'\n]*\'?',
    re.DOTALL,
)


def json_of(text: str) -> Any:
    """Return what a JSON text says; raises SpecError with the reason."""
    try:
        return json.loads(text)
    except RecursionError:
        raise SpecError(f"it is not JSON: {_DEEP}") from None
    except ValueError as error:  # of a number of more digits than Python reads, too
        raise SpecError(f"it is not JSON: {visible(str(error))}") from None


def toml_of(text: str) -> dict[str, Any]:
    """Return what a TOML text says; raises SpecError with the reason."""
    bare = _QUOTED.sub("", text)
    if any(key.count(".") >= MAX_PARTS for key in re.split(r"[=\n,{}\[\]]", bare)):
        raise SpecError(f"a key has more than {MAX_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SpecError(_DEEP) from None
    except ValueError as error:  # as above
        raise SpecError(visible(str(error))) from None


def table_at(document: Any, *keys: str) -> dict[str, Any]:
    """Return the table of a document at `keys`, an empty one where there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}
