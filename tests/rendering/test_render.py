"""Rendering: the contract between contexts and templates, and the look of every emitted file.

Jinja spells; it computes nothing. A name that a template misspells, a field that no template reads
any more, arithmetic in a template: each would pass unseen until a user's file shows it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import shutil
import types
import typing

import jinja2
import pytest
from jinja2 import meta, nodes

from convgen.compiler import plan
from convgen.families.registry import FAMILIES
from convgen.language.parser import parse
from convgen.planning.family import Family
from convgen.rendering.copy_names import RelayoutText
from convgen.rendering.file_names import FileContext, HeaderText, RecordText, file_context
from convgen.rendering.glue import GlueText
from convgen.rendering.header import is_as_generated
from convgen.rendering.kernel_names import KernelText
from convgen.rendering.pack_names import PackText
from convgen.rendering.render import environment, render
from convgen.rendering.wrapper_names import LaunchText, WrapperContext
from convgen.tables.pointwise import POINTWISE
from drawing import draw, each_form
from linting import ruff

ENVIRONMENT = environment()
ENVIRONMENT.globals.clear()  # Jinja's own, such as `range` and `namespace`: no template uses them
# render() asks for these by name.
RENDERED = ("module.py.jinja", "shared_kernel.py.jinja", "parts/header.jinja")
ADDED = {"namespace"}  # by render(), to the fields of FileContext
# What module.py.jinja includes templates for, one after the other.
LOOPED = {"kernel", "pack", "launch", "gradient", "relayout"}
TEXTS = (WrapperContext, LaunchText, RelayoutText, PackText, HeaderText, RecordText)
# Beside random ones: what they do not draw, which is autotune, pipelines and targets.
SPECS = (
    "ConvTranspose2d(64, 64, 3, bias=False, input=(8, 64, 1024, 1024))",
    "ConvTranspose2d(kernel_size=3, stride=2, padding=1, autotune=blocks)",
    "ConvTranspose3d(8, 6, (1, 2, 3), (2, 1, 3), groups=2, autotune=blocks, grid=3, target=b200)",
    "ConvTranspose1d(128, 8, 7, 2, dilation=2, precision=bf16x3, autotune=blocks, target=a100)",
    "ConvTranspose2d(64, 32, 3, input=(None, 64, 128, None), autotune=launch, target=h100)",
    "leaky_relu(0.1) | ConvTranspose1d(512, 256, 16, stride=8, padding=4) | tanh",
    "sigmoid | ConvTranspose2d(3, 8, 3, dtype=bfloat16) | clamp(0, 1) | add(1) | mul(0.5)",
    "tanh | ConvTranspose3d(2, 2, 2, 2, dtype=float16, layout=channels_last) | leaky_relu(1e-20)",
    "add(1) | ConvTranspose2d(5, 7, 4, 3, padding=2, input=(1, 5, 9, 9), grid=1)",
    "relu | ConvTranspose1d(4096, 4096, 4096, stride=4096, groups=4096, input=(1, 4096, 4096))",
    "ConvTranspose2d(1, 1, 1, input=(1, 1, 1, 1)) | add(-1e+38)",
    "ConvTranspose2d(64, 32, 4, stride=2, padding=1, layout=any)",
    "ConvTranspose2d(16, 16, 3, input=(8, 16, 32, 32), dtype=float16, layout=any, target=h100)",
    "relu | ConvTranspose3d(8, 8, 3, groups=8, layout=any) | tanh",
    "ConvTranspose2d(100, 512, 4, rungs=((64, 100, 1, 1),), layout=any, target=h200)",
    "ConvTranspose3d(16, 16, 3, rungs=((4, 16, 9, 9, 9),), layout=any, target=h100)",
    "ConvTranspose1d(16, 8, 16, stride=8, padding=4, rungs=((4, 16, 63), (1, 16, 1000)))",
    "ConvTranspose2d(1048576, 1, 2, 2, input=(1099, 1048576, 1023, 1023), dtype=float64, grid=1)",
)


@pytest.fixture(scope="module")
def plans():
    """The plans of some thirty specs of every kind, and of every family that could serve some."""
    drawn = [draw(seed)[1] for seed in range(20)]
    planned = [plan(spec) for spec in [*map(parse, SPECS), *drawn]]
    return [*planned, *(source.plan for spec in drawn for source in each_form(spec).values())]


@pytest.fixture(scope="module")
def texts(plans):
    return [render(each).text for each in plans]


def test_what_a_record_states_is_read(texts):
    """Fields of a file's kernels that nothing reads are lines that a reader looks for in vain."""
    several = [text for text in texts if "\nclass Plan:" in text]
    assert len(several) >= 4
    for text in several:
        records = re.findall(r"^PLAN\w* = Plan\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
        stated = {name for record in records for name in re.findall(r"^    (\w+)=", record, re.M)}
        assert {name for name in stated if f"plan.{name}" not in text} == set()


# ---- the contract ----


# By test_package.py and test_shared_runtime.py.
ELSEWHERE = {"package.py.jinja", "shared_runtime.py.jinja"}
PARTS = (nodes.Include, nodes.FromImport)


def included(include: nodes.Include | nodes.FromImport) -> list[str]:
    """Return the templates an include can mean: `kernel.template` is one a family, or shared."""
    if isinstance(include.template, nodes.Const):
        return [include.template.value]
    assert isinstance(include.template, nodes.Getattr)
    assert include.template.attr == "template"
    return sorted({family.template for family in FAMILIES})


def trees() -> dict[str, nodes.Template]:
    """Return the syntax trees of all templates that a file can be rendered from."""
    found: dict[str, nodes.Template] = {}
    ahead = list(RENDERED)
    while ahead:
        name = ahead.pop()
        if name not in found:
            assert ENVIRONMENT.loader is not None
            found[name] = ENVIRONMENT.parse(ENVIRONMENT.loader.get_source(ENVIRONMENT, name)[0])
            ahead += [n for node in found[name].find_all(PARTS) for n in included(node)]
    return found


TREES = trees()
NAMES = set().union(*(meta.find_undeclared_variables(tree) for tree in TREES.values()))


def test_templates_use_the_names_of_the_context_and_no_other():
    """A name too many in a template is an error at run time; one too few is dead work."""
    known = {field.name for field in dataclasses.fields(FileContext)} | ADDED
    assert known == NAMES - LOOPED


def test_every_template_is_rendered():
    """A template that nothing includes is dead text that somebody will edit in vain."""
    listed = {name for name in ENVIRONMENT.list_templates() if name.endswith(".jinja")}
    assert listed == {*TREES, *ELSEWHERE}


class Reader:
    """Follows a template as Jinja would, with types in place of values.

    `wrapper` and the items of `kernels` are dataclasses, whose `body` is one a family; loops and
    macros hand out their fields, and an included template sees them. Each attribute must be a field
    of the type it is read from, and is noted as used.
    """

    def __init__(self, body: type, trees: dict[str, nodes.Template]) -> None:
        self.body = body
        self.trees = trees
        self.used: set[tuple[type, str]] = set()
        self.macros: dict[str, nodes.Macro] = {}

    def read(self, node: nodes.Node, scope: dict[str, object]) -> None:
        if isinstance(node, nodes.Macro):
            self.macros[node.name] = node
        elif isinstance(node, PARTS):
            for name in included(node):
                if name in self.trees:
                    self.read(self.trees[name], scope)
        elif isinstance(node, nodes.Call):
            macro = self.macros[node.node.name]
            given = [self.type_of(argument, scope) for argument in node.args]
            inside = scope | dict(zip((arg.name for arg in macro.args), given, strict=False))
            for part in macro.body:
                self.read(part, inside)
        elif isinstance(node, nodes.For):
            self.type_of(node.iter, scope)
            for item in self.items(node.iter, scope):
                for part in node.body:
                    self.read(part, scope | {node.target.name: item})
        elif isinstance(node, nodes.Getattr):
            self.type_of(node, scope)
        else:
            for child in node.iter_child_nodes():
                self.read(child, scope)

    def items(self, node: nodes.Expr, scope: dict[str, object]) -> list[object]:
        """Return the types of what a loop runs over."""
        if isinstance(node, nodes.Tuple):
            return [self.type_of(item, scope) for item in node.items]
        return [typing.get_args(self.type_of(node, scope))[0]]

    def type_of(self, node: nodes.Expr, scope: dict[str, object]) -> object:
        if isinstance(node, nodes.Name):
            return scope[node.name]
        if not isinstance(node, nodes.Getattr):
            return str
        owner = self.type_of(node.node, scope)
        assert dataclasses.is_dataclass(owner), f"{node.attr} is read from {owner}"
        hints = typing.get_type_hints(owner)
        assert node.attr in hints, f"{owner.__name__} has no field {node.attr}"
        self.used.add((owner, node.attr))
        if (owner, node.attr) == (KernelText, "body"):
            return self.body
        options = typing.get_args(hints[node.attr])
        if isinstance(hints[node.attr], types.UnionType):  # X | None
            return next(option for option in options if option is not type(None))
        return hints[node.attr]


def fields_below(owner: type) -> set[tuple[type, str]]:
    """Return (dataclass, field) of `owner` and of every dataclass in its fields."""
    found = set()
    for name, hint in typing.get_type_hints(owner).items():
        found.add((owner, name))
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                found |= fields_below(option)
    return found


# What `explain` reads: templates have the output's access as `outputs`.
EXPLAINED = ("y",)
# What Python reads: the template's name, by which it is included, and what the file has for both.
OF_THE_FILE = ("template", "precision_constant", "rounds", "settles", "swaps", "unpipelined")


def fields_read(family: Family) -> set[tuple[type, str]]:
    """Return (dataclass, field) of what the templates read for a kernel of a family."""
    others = {other.template for other in FAMILIES} - {family.template}
    scope = typing.get_type_hints(FileContext) | dict.fromkeys(ADDED, str)
    trees = {name: tree for name, tree in TREES.items() if name not in others}
    reader = Reader(family.context_type, trees)
    for name in RENDERED:
        reader.read(TREES[name], scope)
    return reader.used


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_templates_use_the_fields_of_kernel_and_wrapper_and_no_other(family):
    """The same one level down, for each family's own context."""
    used = {(owner, name) for owner, name in fields_read(family) if owner is not KernelText}
    used |= {(family.context_type, name) for name in EXPLAINED}
    others = set().union(*map(fields_below, (*TEXTS, GlueText)))
    assert used == fields_below(family.context_type) | others


def test_templates_use_the_fields_that_kernels_share_and_no_other():
    """Each is read for some family."""
    used = set().union(*map(fields_read, FAMILIES))
    used = {(owner, name) for owner, name in used if owner is KernelText}
    own = {(KernelText, field.name) for field in dataclasses.fields(KernelText)}
    assert used | {(KernelText, name) for name in OF_THE_FILE} == own


SPELLING = {  # text, names and their fields, choices, repetition, macros, parts; nothing else
    *("Template", "Output", "TemplateData", "Name", "Getattr", "Const", "Tuple", "Concat"),
    *(
        "If",
        "CondExpr",
        "Compare",
        "Operand",
        "For",
        "Macro",
        "Call",
        "Include",
        "FromImport",
        "Filter",
    ),
}


@pytest.mark.parametrize("name", [*TREES, *sorted(ELSEWHERE)])
def test_templates_compute_nothing(name):
    """What a template computes escapes the tests of the stages before it."""
    assert ENVIRONMENT.loader is not None
    tree = ENVIRONMENT.parse(ENVIRONMENT.loader.get_source(ENVIRONMENT, name)[0])
    found = list(tree.find_all(nodes.Node))
    assert {type(node).__name__ for node in found} <= SPELLING
    assert {node.name for node in found if isinstance(node, nodes.Filter)} <= {"indent", "join"}


def test_a_misspelt_name_is_an_error():
    """Jinja's own default prints nothing for it, and the file would be wrong in silence."""
    assert ENVIRONMENT.undefined is jinja2.StrictUndefined
    with pytest.raises(jinja2.UndefinedError, match="kernle"):
        ENVIRONMENT.from_string("{{ kernle }}").render(kernel=1)


def test_contexts_hold_text_numbers_and_flags(plans):
    """A sympy expression would be printed by sympy's rules, not by the printer's."""
    for each in plans:
        ahead: list[object] = [file_context(each)[0]]
        assert isinstance(ahead[0].kernels[0].body, each.family.context_type)
        while ahead:
            value = ahead.pop()
            if dataclasses.is_dataclass(value):
                ahead += [getattr(value, field.name) for field in dataclasses.fields(value)]
            elif type(value) is tuple:
                ahead += value
            else:
                assert type(value) in (str, int, bool, type(None)), (value, each.spec)


# ---- the files ----


def test_files_are_clean_text(texts):
    """Blanks at line ends, a missing last newline or a long line show in every diff."""
    for text in texts:
        assert re.search(r"\S\n\Z", text)
        assert re.search(r"[ \t\r]\n|\t|\n\n\n\n", text) is None
        assert text.isascii()
        body = [line for line in text.splitlines() if not line.startswith("#")]
        assert [line for line in body if len(line) > 100] == []


def test_the_header_s_hash_is_of_all_other_lines(texts):
    """By it `build` tells an edited file from its own: header, hash, one empty line, body."""
    for text in texts:
        header, _, body = text.partition("\n\n")
        *lines, last = header.splitlines(keepends=True)
        assert all(line.startswith("# ") for line in [*lines, last])
        digest = hashlib.sha256("".join([*lines, "\n", body]).encode()).hexdigest()
        assert last == f"# sha256 of the other lines: {digest}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# spec: ", "# my spec: "),
        ("\n\n", "\n# mine\n\n"),
        ("\n\n", "\nimport mine\n"),
        ("\n\n", "\nimport mine\n\n"),
        ("\n# target", "\n\n# target"),
        ("# sha256 of the other lines: ", "# sha256 of the other lines: 0"),
        ("# sha256 of the other lines: ", "# body sha256: "),
        ("# sha256 of the other lines: ", f"# sha256 of the other lines: {'0' * 64}\n# sha256 of "),
        ("import torch\n", "import torch\nimport mine\n"),
    ],
)
def test_an_edit_of_any_line_is_seen(texts, old, new):
    """In the header too, and where an import would go: below the header's last line."""
    assert is_as_generated(texts[0])
    edited = texts[0].replace(old, new, 1)
    assert edited != texts[0]
    assert not is_as_generated(edited)
    assert not is_as_generated(texts[0] + "# mine\n")
    assert not is_as_generated(texts[0].partition("\n")[2])


@pytest.mark.parametrize(
    "command", [["check"], ["format", "--check", "--diff"]], ids=lambda c: c[0]
)
def test_files_pass_the_linter_as_they_are(texts, root, tmp_path, command):
    """Packages lint what they vendor; a formatter that changes it breaks the header's hash."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "generated").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "generated" / f"file_{number}.py").write_text(text, encoding="utf-8")
    done = ruff(*command, "--no-cache", ".", cwd=tmp_path)
    failing = [
        text.split("\n")[1:4:2]  # spec and family
        for n, text in enumerate(texts)
        if f"file_{n}.py" in done.stdout
    ]
    assert failing == [], done.stdout
    assert done.returncode == 0, done.stderr


def test_numbers_of_stages_are_of_the_layer_s_dtype():
    """tl.where takes a bare number for float32, also beside float64; sums do not."""
    stages = " | ".join(
        f"{row.name}({', '.join(str(0.1 + place) for place in range(len(row.parameters)))})"
        for row in POINTWISE
    )
    tree = ast.parse(render(plan(parse(f"{stages} | {SPECS[0]} | {stages}"))).text)
    chosen = [
        value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.where"
        for value in node.args[1:]
    ]
    assert chosen
    constants = {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for argument in node.args.args
        if argument.annotation is not None
    }
    bare = [v for v in chosen if isinstance(v, ast.Constant) and v.value]
    bare += [v for v in chosen if isinstance(v, ast.Name) and v.id in constants]
    assert [ast.unparse(value) for value in bare] == []
