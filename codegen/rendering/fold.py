"""Folding: the source of `templates/runtime.py`, and what a file states, to the text of that file.

Stage 5, part of render. Input: source and values of its names in capitals; output: its sections, in
which those names are gone. The syntax tree only says where things are, so that comments and layout
stay as they were written:

* `if` whose test reads such names alone becomes the branch that is taken, moved to the left;
* a name becomes its value; in an f-string, the text of it; a default without a value is dropped;
* `plan.NAME` is such a name too; `plan` itself, if it has no value, is no parameter or argument;
* `getattr(x, NAME)` becomes an attribute of `x`;
* `{NAME}` in a docstring becomes the value; a line with one that has none is dropped;
* `# fmt: skip`, of lines that are too long until they are folded, is dropped.

A test that reads a name whose value is text stays, with that text in it.
"""

from __future__ import annotations

import ast
import functools
import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

Value = bool | int | str | None
INDENT = 4
RECORD = "plan"  # the parameter of functions that differ between the kernels of a file
MARK = re.compile(r"# ---- (\w+) ----")
_FIELD = re.compile(r"\{([A-Z_]+)\}")
_SKIP = "  # fmt: skip"


@dataclass(frozen=True, slots=True)
class _Choice:
    """An `if` of known names: its lines, and those of its branches; lines count from 0."""

    test: types.CodeType
    names: frozenset[str]
    lines: range
    body: range
    rest: range


@dataclass(frozen=True, slots=True)
class _Use:
    """A known name in a line, from column to column, and what stands there."""

    start: int
    end: int
    names: tuple[str, ...]
    kind: str  # "name", "argument", "default", "text", "opening" of an "attribute"


@dataclass(frozen=True, slots=True)
class Source:
    """A source with the places that `fold` changes; made once for all files.

    Attributes:
        lines: its lines.
        known: the names that have to have a value.
        sections: name to lines, each from below its marker to the next.
        choices: outer ones first.
        uses: line to the names in it, from left to right.
        docstrings: the lines of docstrings.
        records: the lines that find `plan`, if that is a known name.
    """

    lines: tuple[str, ...]
    known: frozenset[str]
    sections: dict[str, range]
    choices: list[_Choice] = field(default_factory=list)
    uses: dict[int, list[_Use]] = field(default_factory=dict)
    docstrings: set[int] = field(default_factory=set)
    records: set[int] = field(default_factory=set)


@functools.cache
def read_source(text: str, known: frozenset[str]) -> Source:
    """Return where the `known` names of a source are.

    Raises:
        ValueError: a test reads them beside others, one is in a text of several lines, or nowhere.
    """
    assert text.isascii()  # the tree counts bytes
    lines = tuple(text.splitlines())
    marks = [(n, found[1]) for n, line in enumerate(lines) if (found := MARK.fullmatch(line))]
    ends = [number for number, _ in marks[1:]] + [len(lines)]
    sections = {name: range(n + 1, end) for (n, name), end in zip(marks, ends, strict=True)}
    source = Source(lines, known, sections)
    _Reader(source).visit(_parsed(text))
    for uses in source.uses.values():
        uses.sort(key=lambda use: use.start)
    strange = known - set(_found(source))
    if strange:
        raise ValueError(f"no such name: {', '.join(sorted(strange))}")
    return source


@functools.cache
def _parsed(text: str) -> ast.Module:
    """Return the tree of a source, which nobody changes: files differ in what is known."""
    return ast.parse(text)


def _found(source: Source) -> Iterator[str]:
    """Yield the names that a source reads."""
    for choice in source.choices:
        yield from choice.names
    for uses in source.uses.values():
        for use in uses:
            yield from use.names
    for number in source.docstrings:
        yield from _FIELD.findall(source.lines[number])


class _Reader(ast.NodeVisitor):
    """Notes what `fold` changes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def visit_If(self, node: ast.If) -> None:
        names = set(_read(node.test))
        known = names & self.source.known
        if known and names == known:
            self.source.choices.append(self._choice(node, frozenset(names)))
            self.generic_visit(node)
            return
        flags = known & _tested(node.test)
        if flags:
            raise ValueError(f"line {node.lineno}: a test of {', '.join(sorted(flags))} and others")
        self.generic_visit(node)

    def _choice(self, node: ast.If, names: frozenset[str]) -> _Choice:
        test = compile(ast.Expression(node.test), "<test>", "eval")
        first, last = node.test.end_lineno, node.body[-1].end_lineno
        assert first is not None
        assert last is not None
        body, rest = range(first, last), range(0)
        if node.orelse:
            end = node.orelse[-1].end_lineno
            assert end is not None
            opening = " " * node.col_offset + "else:"
            found = [n for n in range(last, end) if self.source.lines[n] == opening]
            if node.orelse[0].col_offset == node.col_offset:
                raise ValueError(f"line {node.lineno}: an elif cannot be folded")
            rest = range(found[0] + 1, end)
        return _Choice(test, names, range(node.lineno - 1, (rest or body).stop), body, rest)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == RECORD:
            self._argument(node)
        elif isinstance(node.ctx, ast.Load):
            self._use(node, (node.id,), "name")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = _dotted(node)
        if name in self.source.known:
            self._use(node, (name,), "name")
        else:
            self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        if node.arg == RECORD:
            self._argument(node)

    def _argument(self, node: ast.Name | ast.arg) -> None:
        """Note a name of a list, with the comma between it and the next."""
        if RECORD in self.source.known:
            assert node.end_col_offset is not None
            end = node.end_col_offset
            end += len(", ") * self.source.lines[node.lineno - 1].startswith(", ", end)
            self._note(node.lineno, node.col_offset, end, (RECORD,), "argument")

    def visit_Assign(self, node: ast.Assign) -> None:
        if RECORD in self.source.known and _is_record(node.targets[0]):
            assert node.lineno == node.end_lineno
            self.source.records.add(node.lineno - 1)
        else:
            self.generic_visit(node)

    def visit_arguments(self, node: ast.arguments) -> None:
        for each in node.args:
            self.visit(each)
        for default in [*node.defaults, *node.kw_defaults]:
            if isinstance(default, ast.Name) and default.id in self.source.known:
                assert default.end_col_offset is not None
                start = default.col_offset - len("=")
                self._note(default.lineno, start, default.end_col_offset, (default.id,), "default")
            elif default is not None:
                self.visit(default)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2:
            names = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
            if names and names <= self.source.known:
                self._attribute(node)
                return
        self.generic_visit(node)

    def _attribute(self, node: ast.Call) -> None:
        """Note `getattr(` and `, NAME)`, between which the object stays as it is."""
        owner, name = node.args
        assert owner.end_col_offset is not None
        assert node.end_col_offset is not None
        self._note(owner.lineno, node.col_offset, owner.col_offset, (), "opening")
        text = self._text(name)
        names = tuple(_FIELD.findall(text)) or (text,)
        self._note(node.lineno, owner.end_col_offset, node.end_col_offset, names, "attribute")
        self.visit(owner)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        inner = [each.value for each in node.values if isinstance(each, ast.FormattedValue)]
        read = [each.id for each in inner if isinstance(each, ast.Name)]
        names = tuple(name for name in read if name in self.source.known)
        if names and node.lineno != node.end_lineno:
            raise ValueError(f"line {node.lineno}: {', '.join(names)} in a text of several lines")
        if names:
            self._use(node, names, "text")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._docstring(node)

    def _docstring(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            self.source.docstrings.update(range(first.lineno - 1, first.end_lineno))
        self.generic_visit(node)

    def _text(self, node: ast.expr) -> str:
        return self.source.lines[node.lineno - 1][node.col_offset : node.end_col_offset]

    def _use(self, node: ast.expr, names: tuple[str, ...], kind: str) -> None:
        if self.source.known.issuperset(names):
            assert node.end_col_offset is not None
            self._note(node.lineno, node.col_offset, node.end_col_offset, names, kind)

    def _note(self, line: int, start: int, end: int, names: tuple[str, ...], kind: str) -> None:
        self.source.uses.setdefault(line - 1, []).append(_Use(start, end, names, kind))


def _dotted(node: ast.Attribute) -> str:
    """Return `plan.NAME`; empty for another attribute."""
    return f"{RECORD}.{node.attr}" if _is_record(node.value) else ""


def _is_record(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == RECORD


def _read(node: ast.AST) -> Iterator[str]:
    """Yield the names that an expression reads; one of `plan`, as `plan.NAME`."""
    if isinstance(node, ast.Attribute) and _dotted(node):
        yield _dotted(node)
        return
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _read(child)


def _tested(test: ast.expr) -> set[str]:
    """Return the names that are operands of `and`, `or` and `not`: they are true or false."""
    if isinstance(test, ast.Name):
        return {test.id}
    if isinstance(test, ast.Attribute):
        return {_dotted(test)}
    operands = test.values if isinstance(test, ast.BoolOp) else []
    operands = [test.operand] if isinstance(test, ast.UnaryOp) else operands
    return set().union(*map(_tested, operands))


def fold(source: Source, values: Mapping[str, Value], words: Mapping[str, str]) -> dict[str, str]:
    """Return the sections of a source with the values of its known names put in.

    Args:
        source: of `read_source`.
        values: the text that stands for a name in Python, or a flag or integer, which tests may
            read; None for what there is not.
        words: what else is replaced, also where it is a part of a name or a text.

    Raises:
        ValueError: a known name has no value, or a value no name.
    """
    if values.keys() != source.known:
        raise ValueError(f"not both known and given: {sorted(values.keys() ^ source.known)}")
    dropped, moved = _branches(source, values)
    sections = {}
    for name, lines in source.sections.items():
        kept = (number for number in lines if number not in dropped)
        text = _spaced(each for n in kept for each in _line(source, n, values, moved[n]))
        for word, other in words.items():
            text = text.replace(word, other)
        sections[name] = text
    return sections


def _branches(source: Source, values: Mapping[str, Value]) -> tuple[set[int], Counter[int]]:
    """Return the lines that go, and by how many columns others move to the left."""
    dropped: set[int] = set(source.records)
    moved: Counter[int] = Counter()
    plan = types.SimpleNamespace()
    for name, value in values.items():
        if name.startswith(f"{RECORD}."):
            setattr(plan, name.removeprefix(f"{RECORD}."), value)
    for choice in source.choices:
        if choice.lines.start in dropped or any(_is_text(values[name]) for name in choice.names):
            continue
        taken = eval(choice.test, {}, {**values, RECORD: plan})
        kept = choice.body if taken else choice.rest
        blank = takewhile(lambda number: not source.lines[number], kept)
        dropped.update(set(choice.lines).difference(kept), blank)
        moved.update(dict.fromkeys(kept, INDENT))
    return dropped, moved


def _is_text(value: Value) -> bool:
    """Whether a value is what stands in the text: what it is, only a call knows."""
    return isinstance(value, str)


def _line(source: Source, number: int, values: Mapping[str, Value], moved: int) -> Iterator[str]:
    """Yield what becomes of a line: one as a rule, none or several of a docstring."""
    line = source.lines[number]
    for use in reversed(source.uses.get(number, ())):
        line = line[: use.start] + _put(line[use.start : use.end], use, values) + line[use.end :]
    line = line.removesuffix(_SKIP)
    if number not in source.docstrings or "{" not in line:
        yield line[moved:] if line[:moved].isspace() else line
        return
    names = [name for name in _FIELD.findall(line) if name in source.known]
    if any(values[name] is None for name in names):
        return
    indent = line[: len(line) - len(line.lstrip())]
    for each in _with_fields(line, names, values).replace("\n", f"\n{indent}").splitlines():
        yield each[moved:]


def _put(text: str, use: _Use, values: Mapping[str, Value]) -> str:
    """Return what stands for a use of names."""
    if use.kind in ("opening", "argument"):
        return ""
    if use.kind == "text":
        text = _with_fields(text, use.names, values)
        return text if _FIELD.search(text) or "{" in text else text.removeprefix("f")
    value = values[use.names[0]]
    if use.kind == "default":
        return "" if value is None else f"={value}"
    if use.kind == "attribute":
        name = text.removeprefix(", ").removesuffix(")")
        found = _with_fields(name, use.names, values) if "{" in name else str(value)
        return f".{ast.literal_eval(found.removeprefix('f'))}"
    return str(value)


def _with_fields(text: str, names: Iterable[str], values: Mapping[str, Value]) -> str:
    for name in names:
        value = str(values[name])
        bare = value[1:-1] if value.startswith('"') else value
        text = text.replace(f"{{{name}}}", bare)
    return text


def _spaced(lines: Iterable[str]) -> str:
    """Return lines as text, with as many empty ones as a formatter has between them."""
    kept: list[str] = []
    blanks = 0
    for line in lines:
        if not line:
            blanks += 1
            continue
        if kept and blanks:
            outer = not line[0].isspace()
            apart = outer and (line.startswith(("def ", "class ", "@")) or kept[-1][0].isspace())
            kept += [""] * (2 if apart else 1)
        kept.append(line)
        blanks = 0
    return "\n".join(kept)
