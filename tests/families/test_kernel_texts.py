"""One kernel of each family, as it stands in the emitted file, to be read whole.

The files of generated/ are of real layers and long; these layers are as short as shows what the
family does. What would break it: any change of what is printed, which is then seen where it is
small. A new family has to add its layer.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from convgen import find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.families.registry import FAMILIES

LAYERS = {  # and the card they are planned for
    "gather": ("ConvTranspose1d(4, 6, 3, bias=False, input=(2, 4, 13))", "rtx4090"),
    "polyphase": ("ConvTranspose1d(4, 6, 4, 2, 1, bias=False, input=(2, 4, 13))", "rtx4090"),
    "window": (
        "ConvTranspose2d(64, 64, 3, bias=False, input=(2, 64, 14, 14), dtype=float16, "
        "layout=channels_last)",
        "h100",
    ),
    "direct": ("ConvTranspose1d(5, 5, 3, groups=5, bias=False, input=(2, 5, 13))", "rtx4090"),
    "stencil": (
        "ConvTranspose1d(3, 3, 4, 2, 1, groups=3, bias=False, input=(2, 3, 16))",
        "rtx4090",
    ),
}


def kernel_of(family: str) -> str:
    """Return the text of the layer's kernel, with its decorators."""
    text, target = LAYERS[family]
    spec, gpu = parse(text), find_target(target)
    tile = next(c.tile for c in plan(spec, gpu).ranking if c.tile.family == family)
    emitted = compile_kernel(spec, gpu, tile).text
    (node,) = (
        node
        for node in ast.parse(emitted).body
        if isinstance(node, ast.FunctionDef) and node.name == f"conv_transpose{spec.rank}d_kernel"
    )
    lines = emitted.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]
    return "\n".join([f"# {text}", f"# on {target}: {tile}", *lines]) + "\n"


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_the_kernel_of_a_family(family: str, expect: Callable[[str, str], None]) -> None:
    expect(f"{family}.py.txt", kernel_of(family))
