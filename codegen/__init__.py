"""convgen: a compiler from a description of a transposed convolution to a Triton kernel.

`parse(text)` reads a description, `emit(spec)` returns the text of the file. Importing this
package imports neither sympy nor jinja2: the compiler loads when it is first used.
"""

from __future__ import annotations

__version__ = "0.1.0"

from .language import parse
from .spec import ConvTransposeSpec, SpecError
from .targets import TARGETS, GpuTarget, find_target

__all__ = [
    "TARGETS",
    "ConvTransposeSpec",
    "GpuTarget",
    "SpecError",
    "__version__",
    "emit",
    "find_target",
    "parse",
]


def emit(spec: ConvTransposeSpec | str, target: GpuTarget | None = None) -> str:
    """Return the text of the file for `spec`.

    Args:
        spec: a spec, or its text.
        target: the GPU it is for; None is the spec's own, or the RTX 4090.

    Raises:
        SpecError: the text is no spec, or no launch grid can hold its programs.
    """
    from .compiler import compile_kernel

    return compile_kernel(parse(spec) if isinstance(spec, str) else spec, target).text
