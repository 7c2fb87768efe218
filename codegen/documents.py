"""JSON and TOML that users wrote: text to values, or one message.

Beside the stages; called by the readers of tables, choices and cases. Input: the text of a file
whose size has been checked (files.py); output: a document, or a SpecError of one line. The caller
checks the content.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from .errors import SpecError, visible

_DEEP = "nested too deeply"
MAX_PARTS = 100  # of a dotted key: tomllib takes minutes for one of 100 000
# Strings and comments: dots in them belong to no key. An unclosed string runs to the end.
_QUOTED = re.compile(
    r'"""(?:[^\\"]|\\.|"(?!""))*(?:"""|\Z)'
    + r"|'''.*?(?:'''|\Z)"
    + r'|#[^\n]*|"(?:[^"\\\n]|\\[^\n])*"?|\'[^\'\n]*\'?',
    re.DOTALL,
)


def json_of(text: str) -> Any:
    """Return the value of a JSON text; raises SpecError if it is not JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise SpecError(f"not JSON: {_DEEP}") from None
    except ValueError as error:  # also for a number of more digits than Python reads
        raise SpecError(f"not JSON: {visible(str(error))}") from None


def toml_of(text: str) -> dict[str, Any]:
    """Return the table of a TOML text; raises SpecError if it is not TOML."""
    bare = _QUOTED.sub("", text)
    if any(key.count(".") >= MAX_PARTS for key in re.split(r"[=\n,{}\[\]]", bare)):
        raise SpecError(f"a key has more than {MAX_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SpecError(_DEEP) from None
    except ValueError as error:  # also for a number of more digits than Python reads
        raise SpecError(visible(str(error))) from None


def table_at(document: Any, *keys: str) -> dict[str, Any]:
    """Return the table at the path `keys` of a document, an empty one if there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}
