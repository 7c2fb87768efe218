"""One kernel of each family, as it stands in the emitted file, to be read whole.

The files of generated/ are of real layers and long; these layers are as short as shows what the
family does. What would break it: any change of what is printed, which is then seen where it is
small. A new family has to add its layer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest

from convgen import emit, find_target, parse
from convgen.compiler import compile_kernel, plan
from convgen.families.registry import FAMILIES
from drawing import each_form

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


# ---- what readers compare ----

SEVERAL = "ConvTranspose2d(64, 32, 4, 2, 1, layout=any, rungs=((2, 64, 8, 8),), dtype=float16)"
BOXES = "ConvTranspose2d(64, 64, 3, input=(8, 64, 1024, 1024), layout=channels_last, target=h100)"


def test_functions_that_launch_several_kernels_say_which() -> None:
    """A reader who looks for one of several `_start` functions goes by more than its name."""
    text = emit(parse(SEVERAL))
    said = re.findall(r"def _start(?:_\w+)?\(x, packed.*\n.*\n(?:    # For (.*)\.)?", text)
    rung = "inputs of 8 x 8"
    assert said == ["", "channels_last", rung, f"{rung} in channels_last"]


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_the_row_that_is_loaded_is_the_one_in_the_comment(padding: int) -> None:
    """The pointer of a tile is that of input row 0 of its block, whatever the padding."""
    spec = parse(f"ConvTranspose2d(16, 16, 3, padding={padding}, input=(2, 16, 16, 20))")
    files = {form: source.text for form, source in each_form(spec).items() if "rows" in form}
    assert files
    for form, text in files.items():
        named = re.findall(r"# Input row (-?\d+) of", text)
        loaded = re.findall(r"# Input row .*\n(?:.*\n)*?.*tl\.load\(([^,)]*)", text)
        rows = []
        for pointer in loaded:
            way = re.search(r"([+-]) (?:(\d+) \* )?(?:C_IN \* )?W_IN\b", pointer)
            rows.append(int(f"{way[1]}{way[2] or 1}") if way else 0)
        assert rows == list(map(int, named)), form


def test_descriptors_name_their_sizes() -> None:
    """1024 is two sizes here, and 64 three."""
    tree = ast.parse(emit(parse(BOXES)))
    (made,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_descriptors")
    numbers = {node.value for node in ast.walk(made) if isinstance(node, ast.Constant)}
    assert {number for number in numbers if isinstance(number, int)} == {1}
