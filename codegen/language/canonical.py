"""Canonical text of a spec: the key of headers, choices and manifests.

Stage 1, parse. Input: a `ConvTransposeSpec`; output: text that parses to an equal spec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import ConvTransposeSpec


def format_spec(spec: ConvTransposeSpec) -> str:
    """Return the canonical text of `spec`: defaults left out, arguments in torch's order."""
    layer = f"ConvTranspose{spec.rank}d({', '.join(_arguments(spec))})"
    return " | ".join([*map(str, spec.before), layer, *map(str, spec.after)])


def _arguments(spec: ConvTransposeSpec) -> list[str]:
    texts = []
    if spec.in_channels is not None or spec.out_channels is not None:
        texts += [str(spec.in_channels), str(spec.out_channels)]
    texts += [f"kernel_size={_axes(spec.kernel_size)}", f"stride={_axes(spec.stride)}"]
    texts += [
        f"{name}={_axes(getattr(spec, name))}"
        for name in ("padding", "output_padding")
        if any(getattr(spec, name))
    ]
    texts += [f"groups={spec.groups}"] * (spec.groups != 1)
    texts += ["bias=False"] * (not spec.bias)
    texts += [f"dilation={_axes(spec.dilation)}"] * (set(spec.dilation) != {1})
    texts += [f"input={spec.input}"] * (spec.input is not None)
    texts += [f"rungs={spec.rungs}"] * bool(spec.rungs)
    defaults = {
        "dtype": "float32",
        "precision": "tf32" if spec.dtype == "float32" else None,
        "layout": "channels_first",
        "grid": None,
        "target": None,
        "autotune": "none",
    }
    texts += [
        f"{n}={getattr(spec, n)}" for n, default in defaults.items() if getattr(spec, n) != default
    ]
    return texts


def _axes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values)
