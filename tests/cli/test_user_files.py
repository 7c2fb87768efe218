"""Files that users name, whatever they are and whatever is in them: tables, specs, choices, cases.

What would break it: a file that is read without end or waited for, a value that passes unchecked
into an emitted file or onto a terminal, and any message but one line that says what is wrong.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from pathlib import Path

import pytest

from convgen import ConvgenError
from convgen.documents import toml_of
from convgen.errors import SpecError
from convgen.families.registry import FAMILIES
from convgen.files import MAX_FILE
from convgen.measuring.cases import read_cases
from convgen.planning.choices import read_choices, rows_of
from convgen.project.setuptools_hook import _is_shipped
from convgen.project.table import has_table
from running import SMALL, make_project, rows, run

TILE = {"block_m": 32, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}
TILE |= {"family": "gather", "span": 1, "rows": 1, "relayout": False}
ROW = {"spec": SMALL, "tile": TILE, "ms": 0.5, "first_ms": 0.75, "tried": 7}
ROW |= {"input_gradient": {"tile": TILE, "ms": 0.5, "torch_ms": 0.75}}
ROW |= {"torch": {"ms": 0.75, "best_ms": 0.625}}
MEASURED = {"device": "a card", "torch": "2", "triton": "3", "date": "2026-01-01"}
CHOICES = {"schema": 1, "target": "h100", "measured": MEASURED, "choices": [ROW]}
ENTRY = {"id": "up", "rank": 1, "batch": 1, "in_channels": 4, "out_channels": 2, "input": [9]}
ENTRY |= {"kernel_size": [4], "stride": [2], "padding": [0], "output_padding": [0]}
ENTRY |= {"dilation": [1], "groups": 1, "bias": True, "dtypes": ["float16"]}
CASES = {"cases": [ENTRY]}
ESCAPES = "\x1b[2J\x1b[31m\r\n\u202e" * 999
ODD = ["1e400", "-1e400", "NaN", str(10**400), "1" * 5000, "-1", "0", "0.5", "true", "null", '""']
ODD += [
    "[]",
    "{}",
    "[[]]",
    '{"a": 1}',
    '"\\ud800"',
    json.dumps(ESCAPES),
    "[" * 100_000,
    '"x"',
    "1e308",
]


def refused(*arguments) -> str:
    """Run a command that must end with one message, exit code 2, and nothing for the terminal."""
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert len(done.stderr) < 1000
    return done.stderr


def paths(value, path=()):
    """Yield the path of every value in a document."""
    yield path
    entries = value.items() if isinstance(value, dict) else ()
    for key, entry in enumerate(value) if isinstance(value, list) else entries:
        yield from paths(entry, (*path, key))


def planted(document, path, text: str) -> str:
    """Return the JSON of `document` with `text` at `path`."""
    if not path:
        return text
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = "PLANTED"
    return json.dumps(document).replace('"PLANTED"', text)


# ---- what a file is ----


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif kind == "circle":
        path.symlink_to(path.name)
    else:
        path.symlink_to({"device": "/dev/zero", "folder": "."}[kind])


KINDS = {
    "device": "not a regular file",
    "pipe": "not a regular file",
    "folder": "Is a directory",
    "huge": "it is longer than",
    "circle": "Too many levels of symbolic links",
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes among files")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_some_size_is_not_read(tmp_path, monkeypatch, kind):
    """A device never ends and a pipe never begins: both would hang, or take all memory."""
    monkeypatch.chdir(tmp_path)
    for name in ("it.convgen", "it.json", "choices", "pyproject.toml"):
        special(kind, Path(name))
    message = refused("emit", "it.convgen")
    assert message.startswith("error: cannot read it.convgen: ")
    assert KINDS[kind] in message
    assert KINDS[kind] in refused("bench", "it.json")
    for read in (read_choices, rows_of):
        with pytest.raises(ConvgenError, match=KINDS[kind]):
            read(Path("choices"), FAMILIES)
    for command in ("build", "list-files"):
        refused(command, ".")
    refused("init", ".")
    assert not has_table(Path())


def test_a_file_at_the_limit_is_read(tmp_path):
    """The limit is what is told, and no byte less."""
    (tmp_path / "it.convgen").write_text(f"{SMALL} #".ljust(64 * 1024, "é")[: 64 * 1024])
    assert "longer than 64 KB" in refused("emit", tmp_path / "it.convgen")
    (tmp_path / "it.convgen").write_text(f"{SMALL} #".ljust(64 * 1024, "e"))
    assert run("emit", tmp_path / "it.convgen").exit_code == 0
    text = json.dumps(CHOICES)
    (tmp_path / "choices").write_text(text.ljust(MAX_FILE))
    assert read_choices(tmp_path / "choices", FAMILIES).target == "h100"
    (tmp_path / "choices").write_text(text.ljust(MAX_FILE + 1))
    with pytest.raises(ConvgenError, match="longer than 4096 KB"):
        read_choices(tmp_path / "choices", FAMILIES)


@pytest.mark.parametrize("key", ["output", "specs", "choices"])
def test_paths_of_a_table_that_lead_in_a_circle(tmp_path, key):
    table = {"output": '"kernels"', "specs": "[]", key: '["loop"]' if key == "specs" else '"loop"'}
    make_project(tmp_path, "\n".join(f"{k} = {v}" for k, v in table.items()))
    (tmp_path / "loop").symlink_to("loop")
    for command in ("build", "list-files"):
        message = refused(command, tmp_path)
        assert f"cannot use {key}, 'loop': " in message


def test_a_path_of_a_table_has_no_control_characters(tmp_path):
    """They would reach terminals, and lines of `list-files` that are no files."""
    for value in ("a\\u001b[2J", "a\\nb", "a\\u0000", "\\u202e"):
        make_project(tmp_path, f'output = "{value}"')
        assert "needs output, a path inside the project, got " in refused("list-files", tmp_path)


# ---- TOML ----

TOML = {
    "a number of 5001 digits": "x = " + "1" * 5001,
    "a number of 5001 hexadecimal digits": "target = 0x" + "f" * 5001,
    "brackets": "x = " + "[" * 50_000,
    "closed brackets": "target = " + "[" * 50_000 + "]" * 50_000,
    "braces": "x = " + "{a=" * 50_000,
    "a dotted key": "target." + ".".join("a" * 50_000) + " = 1",
    "a quoted dotted key": "target." + ".".join(["'a'"] * 50_000) + " = 1",
    "a dotted key in braces": "target = {" + ".".join("a" * 50_000) + " = 1}",
    "a dotted table": "[tool." + ".".join("a" * 50_000) + "]",
    "a date": "target = 2026-01-01",
    "an infinity": "output = inf",
    "escapes": f"output = {json.dumps(ESCAPES)}",
    "escapes in a key": f"{json.dumps(ESCAPES)} = 1",
    "escapes in a backend": f'output = "k"\nbuild-backend = {json.dumps("a" + ESCAPES)}',
    "raw escapes": "output = '\x1b[2J'",
}


@pytest.mark.parametrize("kind", TOML)
def test_a_table_that_cannot_be_read(tmp_path, monkeypatch, kind):
    """Also in every build by setuptools whose pyproject.toml mentions convgen."""
    make_project(tmp_path, TOML[kind])
    refused("build", tmp_path)
    refused("list-files", tmp_path)
    refused("init", tmp_path)
    monkeypatch.chdir(tmp_path)
    if has_table(Path()):

        class Distribution:
            packages = None
            package_dir = None

        assert _is_shipped(Path(), Distribution()) is True


@pytest.mark.parametrize(
    "text",
    [
        'tool = "convgen"',
        "tool = 3  # convgen",
        "[[tool]]\nconvgen = 1",
        "# convgen\nx = " + "[" * 50_000,
        "# convgen\nx = " + "1" * 5001,
    ],
)
def test_other_people_s_builds_are_left_alone(tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(text)
    assert not has_table(tmp_path)


@pytest.mark.parametrize("setuptools", ["3", "{packages = 3}", "{packages = [3], package-dir = 4}"])
def test_settings_of_setuptools_that_are_wrong_are_left_to_it(tmp_path, monkeypatch, setuptools):
    make_project(tmp_path, f"{rows('up')}\n[tool]\nsetuptools = {setuptools}")

    class Distribution:
        packages = None
        package_dir = None

    monkeypatch.chdir(tmp_path)
    assert _is_shipped(Path(), Distribution()) in (True, False)


def test_dots_that_belong_to_no_key():
    """Prose and versions have as many as they like."""
    dots = "." * 500
    text = f'a = "{dots}"  # {dots}\nb = \'{dots}\'\nc = """\n{dots}\n"""\n'
    assert toml_of(text) == {"a": dots, "b": dots, "c": f"{dots}\n"}
    assert len(toml_of(".".join("k" * 100) + " = 1")) == 1


# ---- JSON ----


@pytest.mark.parametrize("path", list(paths(CHOICES)), ids=lambda path: ".".join(map(str, path)))
def test_every_field_of_choices_is_checked(tmp_path, path):
    """A value is refused in a message, or it is one that the kernel and the report can have."""
    file = tmp_path / "choices.json"
    for text in ODD:
        file.write_text(planted(CHOICES, path, text))
        done = run("explain", SMALL, "--target", "h100", "--choices", file)
        assert done.exit_code in (0, 2), done.output
        assert all(line.isprintable() for line in done.output.splitlines())
        assert len(done.stderr) < 1000
        if done.exit_code == 2:
            assert done.stderr.count("choices") >= 1
        else:
            assert "True" not in done.stdout
            assert "nan" not in done.stdout
            assert run("emit", SMALL, "--target", "h100", "--choices", file).exit_code == 0
    file.write_text(json.dumps(CHOICES))
    assert read_choices(file, FAMILIES).table


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        (("schema",), ["true", "1.0", '"1"', "2"]),
        (("measured", "device"), ["3", "null", '""', '"a\\nb"', json.dumps("x" * 201)]),
        (("choices", 0, "ms"), ["NaN", "-1", "1e400", '"0.5"', "true", "null", str(10**400)]),
        (("choices", 0, "first_ms"), ["NaN", "-1", '"0.5"', "true"]),
        (("choices", 0, "tried"), ["0", "1.5", "true", '"7"', "1e400"]),
        (("choices", 0, "tile", "block_m"), ["true", "48", "2048", "32.0"]),
        (("choices", 0, "tile", "num_warps"), ["64", "1024", "true", "0"]),
        (("choices", 0, "tile", "num_stages"), ["0", "17", "true"]),
        (("choices", 0, "tile", "family"), ['"magic"', '"Gather\\n"', "3"]),
        (("choices", 0, "tile", "relayout"), ["0", "1", "null"]),
        (("choices", 0, "input_gradient"), ["null", "[]", "{}"]),
        (("choices", 0, "input_gradient", "torch_ms"), ["NaN", "-1", "true"]),
        (("choices", 0, "input_gradient", "tile", "rows"), ["true", "0"]),
        (("choices", 0, "torch"), ["null", "[]", "{}"]),
        (("choices", 0, "torch", "best_ms"), ["NaN", "-1", "true"]),
    ],
)
def test_a_wrong_field_is_told_by_its_name(tmp_path, path, texts):
    file = tmp_path / "choices.json"
    for text in texts:
        file.write_text(planted(CHOICES, path, text))
        message = refused("emit", SMALL, "--target", "h100", "--choices", file)
        assert "choices.json: " in message
        assert str(path[-1]) in message


@pytest.mark.parametrize("path", list(paths(CASES)), ids=lambda path: ".".join(map(str, path)))
def test_every_field_of_cases_is_checked(tmp_path, path):
    file = tmp_path / "cases.json"
    for text in ODD:
        file.write_text(planted(CASES, path, text))
        try:
            cases = read_cases(str(file), "", None)
        except SpecError as error:
            message = str(error)
            assert "cases.json" in message
            assert message.isprintable()
            assert len(message) < 1000
        else:
            assert all(case.id.isprintable() for case in cases)


@pytest.mark.parametrize("value", ["{}", "[]", "3", "null", '""', json.dumps(ESCAPES), '"\\ud800"'])
def test_an_id_is_a_short_text(tmp_path, value):
    (tmp_path / "cases.json").write_text(planted(CASES, ("cases", 0, "id"), value))
    assert "id must be 1 to 200 printable characters" in refused("bench", tmp_path / "cases.json")


def test_bytes_that_were_changed_at_random(tmp_path):
    """Each reader, on files with a few bytes replaced: a message, or what the file still says."""
    draw = random.Random(0)
    table = f'output = "k"\nspecs = ["a.convgen"]\nchoices = "c.json"\n{rows("up")[19:]}'
    make_project(tmp_path, table, a=f"up2 = {SMALL} | relu\n")
    seeds = {
        "pyproject.toml": (tmp_path / "pyproject.toml").read_bytes(),
        "a.convgen": (tmp_path / "a.convgen").read_bytes(),
        "c.json": json.dumps(CHOICES).encode(),
        "cases.json": json.dumps(CASES).encode(),
    }
    bits = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"1e999",
        b"\\u0000",
        b"\xff",
        b"\x1b",
        b"null",
        b"-",
        b".",
    ]
    for _ in range(300):
        name = draw.choice(list(seeds))
        content = bytearray(seeds[name])
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(content))
            content[at : at + draw.randint(0, 4)] = draw.choice(bits)
        for each, seed in seeds.items():
            (tmp_path / each).write_bytes(content if each == name else seed)
        for command in (
            ("list-files", tmp_path),
            ("emit", tmp_path / "a.convgen", "--choices", tmp_path / "c.json", "--target", "h100"),
            ("bench", tmp_path / "cases.json", "--only", "no such case"),
        ):
            done = run(*command)
            assert done.exit_code in (0, 2), (name, bytes(content), done.output)
            assert all(line.isprintable() for line in done.stderr.splitlines())


@pytest.mark.parametrize("line", ['\\"""', '\\"', "'", "'''"])
def test_quotes_without_an_end_are_refused_at_once(line):
    """Whatever is looked for from each of them to the end of the file takes a minute of a build."""
    start = time.process_time()
    with pytest.raises(SpecError):
        toml_of("convgen = 1\n" + f"a = {line}\n" * 40_000)
    assert time.process_time() - start < 5
