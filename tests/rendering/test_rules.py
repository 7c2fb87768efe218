"""The rules of emitted files: emitted files keep them, and every rule sees its own breaches.

A mutation is an edit of a real emitted file that breaks one rule; the header's hash is taken again
after it, as whoever slips something past the hash would do. It must make that rule complain and no
other: a rule that stays silent checks nothing, and one that fires beside it checks the wrong thing.
"""

import functools
import hashlib
import re

import pytest

import convgen
from rules import RULES, check_rules

PLAIN = "ConvTranspose2d(64, 64, 3, input=(8, 64, 128, 128), grid=2)"
BLOCKS = "ConvTranspose2d(64, 64, 3, stride=2, grid=1, autotune=blocks)"
LAUNCH = "ConvTranspose2d(64, 64, 3, input=(8, 64, 128, 128), autotune=launch)"

LINE = "ConvTranspose1d(16, 32, 16, stride=8, padding=4)"
VOLUME = "ConvTranspose3d(16, 32, 2, stride=2)"

CLEAN = (
    PLAIN,
    BLOCKS,
    LAUNCH,
    # Only BLOCK_K is tuned here, which no extent of the grid depends on.
    "ConvTranspose1d(128, 8, 7, stride=2, dilation=2, bias=False, input=(1, 128, 17), "
    "precision=bf16x3, autotune=blocks)",
    "ConvTranspose1d(16, 32, 3, stride=2, input=(2, 16, 100))",
    "ConvTranspose1d(kernel_size=5, stride=3, padding=2, bias=False, dtype=float16, grid=3)",
    "ConvTranspose2d(kernel_size=3, stride=1)",
    "ConvTranspose2d(64, 64, 4, stride=2, padding=1, groups=2)",
    "ConvTranspose2d(32, 32, 3, stride=2, dilation=2, groups=32, dtype=float64)",
    "ConvTranspose2d(64, 64, 3, precision=bf16x3, input=(8, 64, None, 1024), grid=3)",
    "relu | ConvTranspose2d(128, 64, 4, stride=2, dtype=bfloat16, layout=channels_last) | tanh",
    "sigmoid | ConvTranspose2d(3, 64, (3, 5), target=h100) | leaky_relu(0.2) | mul(0.5)",
    "ConvTranspose3d(8, 16, 3, stride=2, padding=1, input=(1, 8, 10, 10, 10), autotune=blocks)",
    "ConvTranspose3d(8, 16, (1, 2, 3), stride=(1, 2, 2), layout=channels_last, autotune=launch)",
    # Only large inputs are copied.
    "ConvTranspose2d(32, 16, 5, dilation=2, rungs=((2, 32, 9, 9),), layout=any, target=h100)",
    # Each of the rungs is copied before its kernel.
    "ConvTranspose2d(20, 16, 4, rungs=((6, 20, 1, 1), (2, 20, 3, 5)), layout=any, target=h200)",
)

HASH = "# sha256 of the other lines: "
emitted = functools.cache(convgen.emit)


def edited(text, pattern, replacement):
    """Return `text` with the first match replaced; an edit that edits nothing is an error."""
    result, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert count == 1, f"the emitted file has no {pattern}"
    return result


def rehashed(text):
    """Return `text` with the hash that fits its lines."""
    digest = hashlib.sha256(edited(text, rf"^{HASH}.*\n", "").encode()).hexdigest()
    return edited(text, rf"^{HASH}.*", f"{HASH}{digest}")


def complaining(text):
    """Return the names of the rules that complain about `text`."""
    return {re.search(r"\[(\w+)\]$", message)[1] for message in check_rules(text)}


@pytest.mark.parametrize("spec", CLEAN)
def test_an_emitted_file_keeps_every_rule(spec):
    """Catches a template or a plan that breaks a rule, and a rule that is stricter than it says."""
    assert check_rules(emitted(spec)) == []


# Places of an edit. `\g<0>` in a replacement is the place itself.
IMPORTS = r"^import torch$"
CONSTANTS = r"^GROUPS, DILATION = 1, .*$"
CONFIGS = r'^CONFIGS = \[\n    triton\.Config\(\{"(\w+)"'
KERNELS = r"^@triton\.jit$"
KERNEL_BODY = r"^    # The tile of this program$"
WRAPPER_BODY = r"^    grid = "
REGISTRATION = r"^# The operator's namespace"
LAUNCH_GRID = r"\[grid\]"
# From a kernel's body to its launch; the kernel asks for axes 0 and 1 itself.
FOUR_AXES = r"^(    # The tile of this program\n)((?:.|\n)*?_kernel)\[grid\]"
FOUR_IDS = "    depth = tl.program_id(2) + tl.program_id(3)\n"
LAUNCH_END = r",\s+enable_fp_fusion=True"
END = r"\Z"


def mutation(rule, catches, spec, pattern, replacement):
    return pytest.param(rule, spec, pattern, replacement, id=f"{rule}: {catches}")


ORDER = [
    mutation("order", catches, PLAIN, pattern, replacement)
    for catches, pattern, replacement in (
        ("no module docstring", r'^"""ConvTranspose(.|\n)*?"""\n', ""),
        ("import among the constants", CONSTANTS, r"\g<0>\nimport math"),
        ("constant after the wrappers", REGISTRATION, r"LATE = 1\n\g<0>"),
        ("wrapper before the kernels", KERNELS, r"def early():\n    return 1\n\n\n\g<0>"),
        (
            "kernel after the wrappers",
            REGISTRATION,
            r"@triton.jit\ndef late(x):\n    pass\n\n\g<0>",
        ),
        ("registration before the kernels", CONSTANTS, r'\g<0>\nNAMESPACE = "convgen"'),
        ("ModelNew that is no layer", r"^class ModelNew\(.*\)", "class ModelNew(nn.Module)"),
        ("second class", REGISTRATION, r"class Other(nn.Module):\n    pass\n\n\n\g<0>"),
        ("function after ModelNew", END, "\n\ndef after():\n    return 1\n"),
        ("constant after ModelNew", END, "\nAFTER = 1\n"),
        ("work at import", CONSTANTS, r"\g<0>\nwarnings.warn('loaded')"),
    )
]

HARNESS = [
    mutation("harness", catches, PLAIN, pattern, replacement)
    for catches, pattern, replacement in (
        (
            "if __name__",
            CONSTANTS,
            r'\g<0>\nif __name__ == "__main__":\n    GROUPS, DILATION = 1, (1, 1)',
        ),
        ("get_inputs", REGISTRATION, r"def get_inputs():\n    return []\n\n\n\g<0>"),
        ("get_init_inputs", REGISTRATION, r"def get_init_inputs():\n    return []\n\n\n\g<0>"),
        ("test function", REGISTRATION, r"def test_layer():\n    pass\n\n\n\g<0>"),
        ("test method", END, "\n    def test_layer(self):\n        pass\n"),
    )
]

TWICE = [mutation("once", "a function", PLAIN, REGISTRATION, r"def _fits():\n    pass\n\n\n\g<0>")]

FROM_OUTSIDE = [
    mutation("imports", "another package", PLAIN, IMPORTS, r"import numpy as np\n\g<0>"),
    mutation(
        "imports", "part of another package", PLAIN, IMPORTS, r"from jinja2.ext import do\n\g<0>"
    ),
    mutation("imports", "convgen", PLAIN, IMPORTS, r"from convgen import emit\n\g<0>"),
    mutation("imports", "neighbouring file", PLAIN, IMPORTS, r"from . import tiles\n\g<0>"),
    mutation("imports", "in a function", PLAIN, WRAPPER_BODY, r"    import math\n\g<0>"),
    mutation("imports", "in a method", PLAIN, END, "\n    def late(self):\n        import math\n"),
    *(
        mutation("inert", name, PLAIN, WRAPPER_BODY, rf'    {name}("1", "x", "exec")\n\g<0>')
        for name in ("eval", "exec", "compile", "open", "__import__")
    ),
    mutation("inert", "eval, renamed", PLAIN, IMPORTS, r"from builtins import eval as run\n\g<0>"),
    mutation("inert", "eval, as a value", PLAIN, CONSTANTS, r"\g<0>\nRUN = eval"),
    mutation("inert", "os", PLAIN, IMPORTS, r"import os\n\g<0>"),
    mutation("inert", "subprocess", PLAIN, IMPORTS, r"from subprocess import run\n\g<0>"),
    mutation("inert", "importlib", PLAIN, IMPORTS, r"import importlib\n\g<0>"),
    mutation(
        "foreign",
        "import of libdevice",
        PLAIN,
        IMPORTS,
        r"from triton.language.extra import libdevice as ld\n\g<0>",
    ),
    mutation(
        "foreign", "libdevice", PLAIN, KERNEL_BODY, r"    tl.extra.libdevice.tanh(0.0)\n\g<0>"
    ),
    mutation(
        "foreign", "assembly", PLAIN, KERNEL_BODY, r"    tl.inline_asm_elementwise('')\n\g<0>"
    ),
]

CONSTEXPR = [
    mutation("constants", catches, PLAIN, pattern, replacement)
    for catches, pattern, replacement in (
        ("plain number that a kernel reads", r"^(C_IN) = tl\.constexpr\((\d+)\)", r"\1 = \2"),
        ("wrapper's constant in a kernel", KERNEL_BODY, r"    groups = GROUPS\n\g<0>"),
        ("annotated global", CONSTANTS, "GROUPS: int = 1"),
        ("annotated constexpr", r"^C_IN = ", "C_IN: tl.constexpr = "),
        ("constexpr with a second value", r"^C_IN = .*", r"\g<0>\nC_IN = 3"),
        ("constexpr with a changed value", r"^C_IN = .*", r"\g<0>\nif STRIDE:\n    C_IN = 3"),
        ("KW that is a number", r"^KW = .*", "KW = 3"),
        ("KW that is a parameter", r"^    x_ptr,", r"\g<0>\n    KW,"),
        ("KW assigned in a kernel", KERNEL_BODY, r"    KW = 3\n\g<0>"),
        ("KW from nowhere", r"^KW = .*\n", ""),
        ("KW beside a second one", r"^KW = .*", r"\g<0>\nKW = tl.constexpr(5)"),
    )
]

# Blocks of rows have all taps along h at once, and no line of the kernel reads KH.
CONSTEXPR += [
    mutation("constants", "no KH, which no line reads", PLAIN, r"^KH = .*\n", ""),
    mutation("constants", "no KD", VOLUME, r"^KD = .*\n", ""),
    mutation("constants", "no KL", LINE, r"^KL = .*\n", ""),
]

# The input has a mask that each tap of KW shifts; this one is of positions alone.
MASKS = [
    mutation(
        "masks",
        "a mask of positions in the loop",
        PLAIN,
        r"^( +)x = tl\.load",
        r"\1y_inside = q_w < W_OUT\n\1y_inside &= q_w < W_IN\n\g<0>",
    )
]

LOOPS = [
    mutation("loops", catches, PLAIN, pattern, replacement)
    for catches, pattern, replacement in (
        ("loop to a number", r"in range\(.*\)", "in range(9)"),
        (
            "loop to a product with one",
            r"range\(channel_blocks \* KW\)",
            "range(channel_blocks * 3)",
        ),
        ("step divided by a number", r"step // KW", "step // 3"),
        ("step modulo a number", r"step % int\(KW\)", "step % 3"),
    )
]

GRID = [
    mutation("grid", catches, spec, pattern, replacement)
    for catches, spec, pattern, replacement in (
        ("four dimensions", PLAIN, FOUR_AXES, r"\g<1>" + FOUR_IDS + r"\g<2>[(1, 1, 1, 1)]"),
        ("four dimensions, of which two are asked for", PLAIN, LAUNCH_GRID, "[(1, 1, 1, 1)]"),
        ("no dimension", PLAIN, LAUNCH_GRID, "[()]"),
        ("number", PLAIN, LAUNCH_GRID, "[8]"),
        ("grid from a function", PLAIN, LAUNCH_GRID, "[tuple(shape)]"),
        ("rank known at run time only", PLAIN, LAUNCH_GRID, "[(*shape,)]"),
        ("two grids", PLAIN, WRAPPER_BODY, r"    grid = (1, 1)\n\g<0>"),
        ("grid changed later", PLAIN, r"^    with torch.cuda", r"    grid += (1,)\n\g<0>"),
        ("tuned grid that is a number", BLOCKS, LAUNCH_GRID, '[lambda META: META["BLOCK_M"]]'),
        ("argument of another name", BLOCKS, LAUNCH_GRID, '[lambda meta: (meta["BLOCK_M"],)]'),
        ("axis that the grid lacks", PLAIN, r"tl\.program_id\(1\)", "tl.program_id(2)"),
        ("axis that the kernel ignores", PLAIN, r"tl\.program_id\(1\)", "0"),
        ("axis too many, in a helper", PLAIN, r"^    bits = ", r"    tl.program_id(2)\n\g<0>"),
        ("axis that is computed", PLAIN, r"tl\.program_id\(0\)", "tl.program_id(KH - 3)"),
        ("kernel launched by another name", PLAIN, r"(\w+_kernel)\[grid\]\(", r"launch(\1, "),
    )
]

TUNING = [
    mutation("tuning", catches, spec, pattern, replacement)
    for catches, spec, pattern, replacement in (
        ("blocks and warps", BLOCKS, r"num_warps=\d+", "num_warps=16"),
        ("blocks and stages", BLOCKS, r"num_stages=\d+", "num_stages=9"),
        ("blocks and what only one names", BLOCKS, r", num_stages=\d+", ""),
        ("launch and another number", LAUNCH, r"Config\(\{\}", 'Config({"GROUP": 8}'),
        ("settings that are computed", LAUNCH, r"num_warps=\d+", "num_warps=len(STRIDE)"),
        ("fixed grid for tuned blocks", BLOCKS, LAUNCH_GRID, "[(1,)]"),
        ("launch that passes a block", BLOCKS, LAUNCH_END, r", BLOCK_Q=16\g<0>"),
    )
]

BLOCK_VALUES = [
    mutation("blocks", catches, spec, pattern, replacement)
    for catches, spec, pattern, replacement in (
        ("constant written twice", PLAIN, r"^BLOCK_M = .*", r"\g<0>\n\g<0>"),
        ("constant and launch", PLAIN, LAUNCH_END, r", BLOCK_M=64\g<0>"),
        ("constant and Configs", BLOCKS, CONFIGS, r"\1 = tl.constexpr(64)\n\g<0>"),
        ("no value", PLAIN, r"^BLOCK_M = .*\n", ""),
        ("assigned in a kernel", PLAIN, KERNEL_BODY, r"    BLOCK_M = 64\n\g<0>"),
        ("assigned in a wrapper", PLAIN, WRAPPER_BODY, r"    BLOCK_M = 64\n\g<0>"),
        ("parameter without tl.constexpr", BLOCKS, r"(BLOCK_\w): tl\.constexpr", r"\1"),
        ("parameter with a default", BLOCKS, r"(BLOCK_\w: .*),\n\):", r"\1 = 64,\n):"),
    )
]

PINNED = [
    mutation("pinned", catches, PLAIN, pattern, replacement)
    for catches, pattern, replacement in (
        ("tl.dot of the default precision", r", input_precision=\"\w+\"", ""),
        ("tl.dot of precision None", r"input_precision=\"\w+\"", "input_precision=None"),
        ("launch without enable_fp_fusion", LAUNCH_END, ""),
        ("launch with enable_fp_fusion None", LAUNCH_END, ", enable_fp_fusion=None"),
    )
]

MUTATIONS = (
    ORDER
    + HARNESS
    + TWICE
    + FROM_OUTSIDE
    + CONSTEXPR
    + LOOPS
    + MASKS
    + GRID
    + TUNING
    + BLOCK_VALUES
    + PINNED
)


@pytest.mark.parametrize(("rule", "spec", "pattern", "replacement"), MUTATIONS)
def test_a_breach_is_seen_by_its_rule_alone(rule, spec, pattern, replacement):
    """Catches a rule that misses the breach in the test's name, or that sees it in another's."""
    text = rehashed(edited(emitted(spec), pattern, replacement))
    assert complaining(text) == {rule}, check_rules(text)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        pytest.param(r"\A# Code generated by", "# Written by", id="another first line"),
        pytest.param(r" DO NOT EDIT\.$", "", id="no DO NOT EDIT"),
        pytest.param(r"\A", "\n", id="empty first line"),
        *(
            pytest.param(rf"^# {key}: .*\n", "", id=f"no {key}")
            for key in ("spec", "target", "family", "grid", "regenerate", HASH[2:-2])
        ),
        pytest.param(r"^# spec: .*", "# spec: ", id="empty spec"),
        pytest.param(r"^# target: .*", r"\g<0>\n\g<0>", id="two targets"),
        pytest.param(r"^GROUPS, DILATION = 1, ", "GROUPS, DILATION = 2, ", id="edited body"),
        pytest.param(rf"^{HASH}.{{8}}", f"{HASH}01234567", id="edited hash"),
        pytest.param(r"\n\n", "\n # a line\n", id="line below the hash"),
    ],
)
def test_a_header_that_does_not_fit_is_seen(pattern, replacement):
    """Catches a header check that an edited header, or a body edited under it, gets past."""
    assert complaining(edited(emitted(PLAIN), pattern, replacement)) == {"header"}


def test_every_rule_has_a_breach():
    """Catches a new rule that no test has ever seen complain."""
    assert {param.values[0] for param in MUTATIONS} | {"header"} == {r.__name__ for r in RULES}


def test_a_message_names_the_line_and_the_rule():
    """Catches messages that point to the wrong line of the file."""
    text = rehashed(edited(emitted(PLAIN), WRAPPER_BODY, r"    eval('1')\n\g<0>"))
    line = text.split("\n").index("    eval('1')") + 1
    assert check_rules(text) == [f"line {line}: uses eval [inert]"]


def test_every_breach_has_its_message():
    """Catches a check that stops at the first breach."""
    text = edited(emitted(PLAIN), IMPORTS, r"import os\nimport numpy\n\g<0>")
    assert complaining(text) == {"header", "imports", "inert"}


@pytest.mark.parametrize("text", ["def f(:\n", "\0", "", "x = 1\n"])
def test_what_is_no_emitted_file_breaks_rules(text):
    """Catches a check that raises, or finds nothing to complain of, where there is no such file."""
    assert check_rules(text)
