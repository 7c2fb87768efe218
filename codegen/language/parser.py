"""The parser of the language: text such as `relu | ConvTranspose2d(64, 64, 3, stride=2)` to specs.

Stage 1, parse. Input: the text of one statement or of a `.convgen` file; output:
`ConvTransposeSpec`s with their names. The syntax is Python's: `ast` parses it, a whitelist of nodes
is read, and nothing is evaluated.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
import warnings
from dataclasses import dataclass, replace
from typing import Any

from ..errors import SpecError, nearest, shown, text_of
from ..tables.pointwise import POINTWISE, Stage
from .spec import CONV_ARGUMENTS, OWN_ARGUMENTS, ConvTransposeSpec, check_target, make_stage

MAX_TEXT = 64 * 1024  # bytes
MAX_NESTING = 20
LAYERS = {f"ConvTranspose{rank}d": rank for rank in (1, 2, 3)}
# Names that an emitted file binds, so that no kernel may have them.
RESERVED = ("tl", "torch", "triton", "nn", "target")
# Brackets; comments and strings are matched too, so that brackets in them do not count.
_BRACKETS = re.compile(r"#[^\r\n]*|'[^'\r\n]*'|\"[^\"\r\n]*\"|[()\[\]{}]")
_SHOWN = 100  # characters of a line in an error message


@dataclass(frozen=True, slots=True)
class NamedSpec:
    """A statement: a spec and its name, None for a layer without a name."""

    name: str | None
    spec: ConvTransposeSpec


@dataclass(frozen=True, slots=True)
class Document:
    """A `.convgen` text: its statements, and the target it sets for them, None without one."""

    statements: tuple[NamedSpec, ...]
    target: str | None


def parse(text: str) -> ConvTransposeSpec:
    """Read one statement.

    Args:
        text: a layer or a pipeline, with or without a name in front.

    Raises:
        SpecError: the text is not one legal statement; the message shows the line with a caret.
    """
    document = parse_document(text)
    if len(document.statements) != 1:
        raise SpecError(f"expected one statement, got {len(document.statements)}")
    spec = document.statements[0].spec
    return replace(spec, target=spec.target or document.target)


def parse_document(text: str) -> Document:
    """Read the text of a `.convgen` file; raises SpecError as `parse` does."""
    text = _checked_text(text)
    # print(nn.Sequential(…)) shows `(0): ` before a layer.
    text = re.sub(r"(?m)^\([0-9]+\):[ \t]*", "", textwrap.dedent(text).lstrip(" \t").rstrip())
    reader = _Reader(text)
    target: str | None = None
    statements: list[NamedSpec] = []
    for node in _syntax_tree(text):
        name, value = reader.statement(node)
        if name == "target":
            if target is not None:
                raise reader.error(node, "target is given twice", "target")
            target = reader.at(value, check_target, reader.value(value))
            continue
        for other in (each.name for each in statements):
            if name is None or other is None:
                continue
            if name == other:
                raise reader.error(node, f"the name {name} is used twice")
            if name.lower() == other.lower():
                said = f"{name} and {other} are one file's name on systems that ignore case"
                raise reader.error(node, said)
        statements.append(NamedSpec(name, reader.pipeline(value)))
    return Document(tuple(statements), target)


def _syntax_tree(text: str) -> list[ast.stmt]:
    """Parse `text`, checking its nesting first: deep nesting can exhaust the C stack."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth > MAX_NESTING:
            before = _lines(text[: match.start()])
            line, column = len(before), len(before[-1])
            raise SpecError(
                located(text, line, column, f"brackets nest deeper than {MAX_NESTING} levels")
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes: an error follows anyway
            return ast.parse(text).body
    except SyntaxError as error:
        line, column = error.lineno or 1, max((error.offset or 1) - 1, 0)
        message = f"not readable as Python syntax: {(error.msg or '')[:120]}"
        raise SpecError(located(text, line, column, message)) from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error)[:120] or "nested too deeply"
        raise SpecError(f"not readable as Python syntax: {reason}") from None


def _checked_text(given: object) -> str:
    """Return `given` as an exact str; raises SpecError if it is not text, or too long."""
    text = text_of(given)
    if text is None:
        raise SpecError(f"a layer must be described by text, got {type(given).__name__}")
    if len(text) > MAX_TEXT or len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT:
        raise SpecError(f"the text is longer than {MAX_TEXT // 1024} KB")
    return text


def _lines(text: str) -> list[str]:
    """Split `text` at the line ends of Python's parser; str.splitlines has more of them."""
    return re.split(r"\r\n|\r|\n", text)


def located(text: str, line: int, column: int, message: str) -> str:
    """Return `message` with the line of `text` under it and a caret at `column` (from 0)."""
    lines = _lines(text)
    shown_line = lines[min(line, len(lines)) - 1]
    start = max(0, column - _SHOWN // 2)
    window = shown_line[start : start + _SHOWN]
    visible = "".join(c if c.isprintable() else "?" for c in window)
    place = f"line {line}: " if len(lines) > 1 else ""
    return f"{place}{message}\n  {visible}\n  {' ' * (column - start)}^"


class _Reader:
    """Reads values from ast nodes; keeps the text, so that errors can show their place."""

    def __init__(self, text: str) -> None:
        self.text = text

    def error(self, node: ast.AST, message: str, argument: str | None = None) -> SpecError:
        line: int = getattr(node, "lineno", 1)
        raw = _lines(self.text)[line - 1].encode()[: getattr(node, "col_offset", 0)]
        column = len(raw.decode("utf-8", "ignore"))  # ast counts bytes, a caret counts characters
        return SpecError(located(self.text, line, column, message), argument)

    def at(self, node: ast.AST, check: Any, *values: Any) -> Any:
        """Return `check(*values)`; its SpecError gets the place of `node`."""
        try:
            return check(*values)
        except SpecError as error:
            raise self.error(node, str(error), error.argument) from None

    def statement(self, node: ast.stmt) -> tuple[str | None, ast.expr]:
        """Split `name = value`, `(name): value` (as print(model) shows it) or a value alone."""
        if isinstance(node, ast.Expr):
            return None, node.value
        target: ast.expr | None = None
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            target, value = node.target, node.annotation
        if not isinstance(target, ast.Name):
            raise self.error(node, "expected `name = layer` or a layer")
        return self.at(target, check_name, target.id, value), value

    def pipeline(self, node: ast.expr) -> ConvTransposeSpec:
        """Read `stage | … | layer | … | stage`."""
        parts: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            parts.append(node.right)
            node = node.left
        parts = [node, *reversed(parts)]
        layers = [index for index, part in enumerate(parts) if self.called(part) in LAYERS]
        if len(layers) != 1:
            found = self.called(parts[0]) if len(parts) == 1 else None
            hint = nearest(found, tuple(LAYERS)) if found else ""
            got = found or (f"{len(layers)} of them" if layers else "none")
            where = parts[layers[1]] if layers else parts[0]
            raise self.error(where, f"expected exactly one of {', '.join(LAYERS)}, got {got}{hint}")
        before = tuple(map(self.stage, parts[: layers[0]]))
        after = tuple(map(self.stage, parts[layers[0] + 1 :]))
        return self.layer(parts[layers[0]], before, after)

    def called(self, node: ast.expr) -> str | None:
        """Return the name that `node` is or calls, without torch's module path; None for others."""
        function = node.func if isinstance(node, ast.Call) else node
        if isinstance(function, ast.Attribute) and _is_torch(function.value):
            return function.attr
        return function.id if isinstance(function, ast.Name) else None

    def stage(self, node: ast.expr) -> Stage:
        name = self.called(node)
        if name is None:
            raise self.error(node, "expected a stage such as relu or mul(0.5)")
        values: list[object] = []
        named: dict[str, object] = {}
        if isinstance(node, ast.Call):
            values = [self.value(argument) for argument in node.args]
            for word in node.keywords:
                if word.arg in named:
                    raise self.error(word, f"{word.arg} is given twice", word.arg)
                named[word.arg or "**"] = self.value(word.value)
        stage: Stage = self.at(node, make_stage, name, tuple(values), named)
        return stage

    def layer(
        self, node: ast.expr, before: tuple[Stage, ...], after: tuple[Stage, ...]
    ) -> ConvTransposeSpec:
        name = self.called(node)
        if not isinstance(node, ast.Call) or name is None:
            raise self.error(node, "a layer needs its arguments in parentheses")
        nodes = self.arguments(node, name)
        values: dict[str, Any] = {name: self.value(value) for name, value in nodes.items()}
        if "kernel_size" not in values:
            raise self.error(node, f"{name} needs kernel_size", "kernel_size")
        mode = values.pop("padding_mode", "zeros")
        if mode != "zeros":
            where = nodes["padding_mode"]
            raise self.error(
                where, f"padding_mode must be zeros, got {shown(mode)}", "padding_mode"
            )
        try:
            return ConvTransposeSpec(rank=LAYERS[name], before=before, after=after, **values)
        except SpecError as error:
            raise self.error(
                nodes.get(error.argument or "", node), str(error), error.argument
            ) from None

    def arguments(self, call: ast.Call, name: str) -> dict[str, ast.expr]:
        """Return the nodes of a call's arguments by name, matched as Python does."""
        known = CONV_ARGUMENTS + OWN_ARGUMENTS
        if len(call.args) > len(CONV_ARGUMENTS):
            raise self.error(
                call.args[len(CONV_ARGUMENTS)],
                f"{name} takes at most {len(CONV_ARGUMENTS)} positional arguments",
            )
        positional = CONV_ARGUMENTS
        if 0 < len(call.args) < 3 and not {"kernel_size"} & {word.arg for word in call.keywords}:
            raise self.error(
                call.args[0],
                f"{name} takes in_channels, out_channels, kernel_size; "
                "to leave the channels to run time write kernel_size=…",
            )
        nodes = dict(zip(positional, call.args, strict=False))
        for word in call.keywords:
            if word.arg not in known:
                what = "**" if word.arg is None else shown(word.arg)
                hint = nearest(word.arg or "", known)
                raise self.error(
                    word, f"{name} has no argument {what}{hint}; it has {', '.join(known)}"
                )
            if word.arg in nodes:
                raise self.error(word, f"{word.arg} is given twice", word.arg)
            nodes[word.arg] = word.value
        return nodes

    def value(self, node: ast.expr) -> object:
        """Read a number, word, None, True, False or a tuple of them."""
        if isinstance(node, ast.Constant) and (
            node.value is None or isinstance(node.value, (bool, int, float, str))
        ):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            number = node.operand.value if isinstance(node.operand, ast.Constant) else None
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                return -number if isinstance(node.op, ast.USub) else number
        if isinstance(node, (ast.Tuple, ast.List)):
            return tuple(map(self.value, node.elts))
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute) and _is_torch(node.value):
            return node.attr  # dtype=torch.float16
        raise self.error(node, "expected a number, a word, None, True, False or a tuple of them")


def _is_torch(node: ast.expr) -> bool:
    """Whether `node` is `torch`, `nn` or `torch.nn`."""
    if isinstance(node, ast.Attribute) and node.attr == "nn":
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("torch", "nn")


def check_name(name: str, value: ast.expr | None = None) -> str:
    """Return `name` if a kernel may have it: it names a file and a module; raises SpecError."""
    if name == "target" and value is not None and not isinstance(value, (ast.Call, ast.BinOp)):
        return name  # the statement `target = …`
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or keyword.iskeyword(name):
        raise SpecError(
            "a name must be an ASCII identifier that begins with a letter, of at most 64 "
            f"characters; got {shown(name)}"
        )
    if name in RESERVED or name in LAYERS or name in {row.name for row in POINTWISE}:
        raise SpecError(f"the name {name} is taken")
    return name
