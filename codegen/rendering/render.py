"""Rendering: a plan to the text of the emitted file.

Stage 5, render. Input: a `KernelPlan`; output: a `KernelSource`. `FileContext` holds every name
that the templates use, as text, numbers, flags and tuples of them: Jinja spells, it computes
nothing.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, fields
from typing import Any

import jinja2

from ..planning.plan import KernelPlan
from ..version import __version__
from .file_names import FileContext, file_context
from .glue import GlueValues
from .header import _digest, with_hash

RUNTIME = "_runtime.py"  # from which files import what they share (project/shared_runtime.py)


@dataclass(frozen=True, slots=True)
class KernelSource:
    """An emitted file.

    Attributes:
        text: its bytes as UTF-8 text, lines ended by newline characters.
        sha256: hash of all lines but the one that states it.
        plan: the plan it was rendered from.
        helpers: names of the functions that its kernels call.
        glue: what was put into the glue that files have in common.
    """

    text: str
    sha256: str
    plan: KernelPlan
    helpers: tuple[str, ...]
    glue: GlueValues


@functools.cache
def environment(other: jinja2.BaseLoader | None = None) -> jinja2.Environment:
    """Return the Jinja environment of the templates: strict, and with no filter of its own.

    Templates that convgen has not come from the `other` loader, that of a family.
    """
    own = jinja2.PackageLoader("convgen.templates", "")
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([own, *([] if other is None else [other])]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(plan: KernelPlan, *, precompiled: bool = False, shared: bool = False) -> KernelSource:
    """Return the emitted file of `plan`; `precompiled` and `shared` as in `compile_kernel`."""
    context, values = file_context(plan, precompiled=precompiled, shared=shared)
    templates = environment(plan.family.loader)
    body = templates.get_template("shared_kernel.py.jinja" if shared else "module.py.jinja")
    # The operator's namespace is a hash of the file as it would be without one.
    unnamed = body.render(_names(context, ""))
    namespace = hashlib.sha256((__version__ + unnamed).encode()).hexdigest()[:16]
    text = body.render(_names(context, namespace))
    header = templates.get_template("parts/header.jinja").render(_names(context, namespace))
    text = f"\n{text}"
    return KernelSource(
        text=with_hash(header, text),
        sha256=_digest(header, text),
        plan=plan,
        helpers=context.helpers,
        glue=values,
    )


def _names(context: FileContext, namespace: str) -> dict[str, Any]:
    names = {field.name: getattr(context, field.name) for field in fields(context)}
    return names | {"namespace": namespace}
