"""Wrong input on the command line: one message that says what is wrong, at once, and exit code 2.

What a user types never runs, never shows a traceback, and never reaches an emitted file as typed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

import pytest

import convgen
from convgen.cli.commands import main
from running import SMALL, make_project, rows, run, start

MEGABYTE = 1 << 20
CODE = "__import__('os').system('touch x')"


def refused(*arguments):
    """Run a command that must fail as a user's mistake, within a second; return its message.

    It is a second of the processor, which other work on the machine does not use up.
    """
    begin = time.process_time()
    done = run(*arguments)
    seconds = time.process_time() - begin
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert len(done.stderr) < 5000
    assert seconds < 1
    return done.stderr


# ---- flags ----

WRONG = {
    "--rank": ["0", "4", "x", "", "2.0", "1_0", "9" * 5000, "\N{FULLWIDTH DIGIT TWO}"],
    "--kernel-size": ["0", "-1", "x", "", ",", "3,,3", "3,3,3", "(3", "3)", "4097", "300,300"],
    "--stride": ["0", "x", "1,2,3", "4097", "None", "1e3"],
    "--padding": ["-1", "x", "1048577"],
    "--output-padding": ["-1", "1", "x"],
    "--dilation": ["0", "x", "1048577"],
    "--groups": ["0", "x", "1,2", ""],
    "--in-channels": ["0", "x", "1.5", "none", "1048577"],
    "--out-channels": ["0", "x", "1048577"],
    "--input": ["", "1", "1,2", "1,2,x,4", "0,1,2,3", "1,2,3,4,5", "1,2,1099511627776,1"],
    "--rungs": ["", "1,2", "1,2,3,4;", "1,2,none,4", "1,2,3,4;5,2,3,4"],
    "--dtype": ["float", "float8", "", "f'\n"],
    "--precision": ["tf33", "", 'x"'],
    "--layout": ["nchw", ""],
    "--grid": ["0", "4", "x"],
    "--autotune": ["yes", ""],
    "--target": ["rtx4091", "", "cpu"],
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_value_is_told_by_its_flag(flag):
    """A message that names another flag, or none, sends the reader to the wrong place."""
    others = () if flag == "--kernel-size" else ("--k", "3")
    for value in WRONG[flag]:
        assert refused("emit", *others, flag, value).startswith(f"error: {flag}: ")


def test_every_flag_of_the_language_is_in_the_table_above():
    """A flag that nobody tests: add it there."""
    options = {max(option.opts, key=len) for option in main.commands["emit"].params}
    others = {"spec", "--bias", "--choices", "--output", "--force", "--json"}
    assert options - set(WRONG) == others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("emit", "give a spec, a .convgen file, or --k"),
        ("emit --bias", "give a spec, a .convgen file, or --k"),
        ("emit --k", "Option '--k' requires an argument"),
        ("emit --k 3 --bias=1", "Option '--bias' does not take a value"),
        ("emit --k 3 --strid 2", "No such option '--strid'"),
        ("emit --k 3 --in-channels 6 --groups 4", "--groups: in_channels must be divisible by"),
        ("emit --k 3 --in-channels 6 --input 1,4,8,8", "--input: "),
        ("emit --k 3 --dtype float16 --precision tf32", "--precision: precision is for dtype"),
        ("emit --k 3 --rank 1 --layout channels_last", "--layout: "),
        ("emit --k 3 --rank 1 --layout any", "--layout: layout any needs rank 2 or 3, rank is 1"),
        (
            "emit --k 3 --layout any --autotune launch",
            "--autotune: autotune launch needs one layout",
        ),
        ("emit ConvTranspose2d(kernel_size=3) --k 3", "--kernel-size cannot be combined with SPEC"),
        ("explain --k 3 --stage rendered", "Invalid value for '--stage'"),
        ("build --zap", "No such option '--zap'"),
        ("zap", "No such command 'zap'"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    assert message in refused(*arguments.split())


# ---- text ----

HOSTILE = {
    "a megabyte": "a" * MEGABYTE,
    "a megabyte of layers": SMALL * (MEGABYTE // len(SMALL)),
    "parentheses": "(" * 30_000,
    "parentheses in a layer": f"ConvTranspose1d(kernel_size={'(' * 5000}3{')' * 5000})",
    "signs": f"ConvTranspose1d(kernel_size={'-' * 30_000}3)",
    "operators": "+".join("1" * 30_000),
    "attributes": "a" + ".b" * 30_000,
    "a long pipeline": " | ".join(["relu"] * 9000),
    "digits": f"ConvTranspose1d(kernel_size={'9' * 60_000})",
    "a null": "ConvTranspose1d(1, 1, 3)\0",
    "a surrogate": "ConvTranspose1d(1, 1, '\udcff')",
    "code": CODE,
    "code in an argument": f"ConvTranspose1d(1, 1, kernel_size={CODE})",
    "code in a stage": f"mul({CODE}) | ConvTranspose1d(1, 1, 3)",
    "code in a name": f"{CODE} = ConvTranspose1d(1, 1, 3)",
    "code in a string": f'ConvTranspose1d(1, 1, 3, dtype="{CODE}")',
    "code in a format": f"ConvTranspose1d(1, 1, 3, dtype=f'{{{CODE}}}')".replace("'os'", '"os"'),
    "an import": "import os; os.system('touch x')",
    "a comprehension": "ConvTranspose1d(1, 1, [3 for _ in range(10**9)])",
    "a power": "ConvTranspose1d(1, 1, 9**9**9**9)",
    "an infinity": "ConvTranspose1d(1, 1, 3) | mul(1e400)",
    "a name that is no number": "ConvTranspose1d(1, 1, 3) | mul(nan)",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("door", ["argument", "document", "table"])
def test_hostile_text_is_refused_at_every_door(tmp_path, monkeypatch, name, door):
    """Text is read, never run; it can exhaust neither time nor stack, at none of the doors."""
    monkeypatch.chdir(tmp_path)
    text = HOSTILE[name]
    if door == "argument":
        refused("emit", text)
    elif door == "document":
        (tmp_path / "it.convgen").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert "it.convgen" in refused("emit", "it.convgen")
    else:
        escaped = "".join(
            c if 32 <= ord(c) < 127 and c not in '"\\' else f"\\u{ord(c):04X}" for c in text
        )
        refused("build", make_project(tmp_path, rows("up", spec=escaped)))
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "kernels").exists()


NAMES = ["a'b", 'a"b', "a\nb", "a b", "../a", "a/b", "", "1a", "é", "class", "torch", "a" * 65]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_leave_its_place_is_refused(tmp_path, name):
    """A name becomes a file's and a module's: no quote, newline, folder or keyword gets there."""
    refused("emit", f"{name} = {SMALL}", "-o", tmp_path / "out")
    escaped = "".join(f"\\u{ord(character):04X}" for character in name)
    make_project(tmp_path, rows(escaped))
    assert "name" in refused("build", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


@pytest.mark.parametrize(
    "typed",
    [
        'ConvTranspose1d(1, 1, 3) | mul(2)  # """; import os; os.system(\'touch x\')',
        "ConvTranspose1d(1, 0x1, 0b11) | mul(2.0_0)",
        "torch.nn.ConvTranspose1d(1, 1, kernel_size=(3,)) | mul(other=20e-1)",
        "\N{FULLWIDTH LATIN CAPITAL LETTER C}onvTranspose1d(1, 1, 3, dtype='float32') | mul(+2)",
    ],
)
def test_what_a_user_typed_is_not_what_is_printed(typed):
    """Only the canonical text of a spec is printed: comments, spelling and quotes are gone."""
    done = run("emit", typed)
    assert done.stdout == convgen.emit("ConvTranspose1d(1, 1, 3) | mul(2)")
    assert done.stdout.isascii()


# ---- files ----


def test_a_spec_file_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.convgen").mkdir()
    (tmp_path / "binary.convgen").write_bytes(b"up = \xff\xfe")
    (tmp_path / "empty.convgen").write_text("# nothing\n")
    assert "No such file" in refused("emit", tmp_path / "missing.convgen")
    assert "Is a directory" in refused("emit", tmp_path / "folder.convgen")
    assert "it is not UTF-8" in refused("emit", tmp_path / "binary.convgen")
    assert "no layer" in refused("emit", tmp_path / "empty.convgen")
    assert "File name too long" in refused("emit", "a" * MEGABYTE + ".convgen")


def test_an_error_in_a_file_shows_file_line_and_place(tmp_path):
    (tmp_path / "two.convgen").write_text(f"up = {SMALL}\ndown = ConvTranspose1d(4, 2, k=3)\n")
    message = refused("emit", tmp_path / "two.convgen", "-o", tmp_path)
    assert "two.convgen: line 2: " in message
    assert "\n  down = ConvTranspose1d(4, 2, k=3)\n" in message


def test_a_place_that_cannot_be_written(tmp_path):
    """A file where a folder should be stops root too, whom permissions would not stop."""
    (tmp_path / "file").write_text("mine\n")
    (tmp_path / "two.convgen").write_text(f"up = {SMALL}\ndown = {SMALL}\n")
    for arguments in (
        (SMALL, "-o", tmp_path / "file" / "up.py"),
        (SMALL, "-o", tmp_path / ("a" * 4000)),
        (SMALL, "-o", tmp_path / ("a" * 4000) / "up.py"),
    ):
        assert "cannot write" in refused("emit", *arguments)
    for name in ("two", "one"):
        layers = tmp_path / f"{name}.convgen"
        if name == "one":
            layers.write_text(f"up = {SMALL}\n")
        assert "must be a folder" in refused("emit", layers, "-o", tmp_path / "file")
        assert "is named like a file" in refused("emit", layers, "-o", tmp_path / "up.py")
        assert not (tmp_path / "up.py").exists()
    make_project(tmp_path, rows("up").replace('"kernels"', '"file"'))
    assert "cannot write" in refused("build", tmp_path)
    assert (tmp_path / "file").read_text() == "mine\n"


def test_a_path_in_place_of_a_spec(tmp_path):
    """Else it is read as a spec, and the message speaks of syntax."""
    (tmp_path / "layers.txt").write_text(f"up = {SMALL}\n")
    assert "is a folder" in refused("emit", tmp_path)
    assert "is a file with another suffix" in refused("explain", tmp_path / "layers.txt")


def test_a_target_that_is_listed_twice():
    assert "h100 is listed twice" in refused("compile", SMALL, "--target", "h100,a100, h100")


def test_a_statement_without_a_place(tmp_path):
    """Two files on one stdout, or a file without a name."""
    assert "2 statements need -o FOLDER" in refused("emit", f"up = {SMALL}\ndown = {SMALL}")
    assert "needs a name" in refused("emit", SMALL, "-o", tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "needs output"),
        ("output = 3", "needs output, a path inside the project, got 3"),
        ('outpt = "kernels"', "no key 'outpt' (did you mean output?)"),
        ('output = "kernels"\nspec = ["a.convgen"]', "no key 'spec' (did you mean specs?)"),
        (rows("up") + 'targets = "a100"', "no key 'targets' (did you mean target?)"),
        (rows("up") + 'target = "a10"', "(did you mean a100?)"),
        ('output = "kernels"\ntarget = []', "target"),
        ('output = "kernels"\ntarget = [3]', "target must be one of"),
        ('output = "kernels"\nspecs = "a.convgen"', "specs of [tool.convgen] must be a list"),
        ('output = "kernels"\nspecs = ["none.convgen"]', "none.convgen: No such file"),
        ('output = "kernels"\nkernel = ["up"]', "needs name and spec"),
        (rows("up", "up"), "two kernels are called up"),
        (f'target = ["a100", "a100"]\n{rows("up")}', "names a100 twice"),
        ('output = "k"\n[tool.convgen.kernel]\nname = "up"', "[[tool.convgen.kernel]]"),
        (rows("up").replace("Conv", "Cnov"), "(did you mean ConvTranspose1d"),
        ("output = kernels", "cannot read"),
    ],
)
def test_a_wrong_table(tmp_path, table, message):
    assert message in refused("build", make_project(tmp_path, table))


def test_a_project_that_is_none(tmp_path):
    assert "there is no " in refused("build", tmp_path)
    (tmp_path / "pyproject.toml").write_text("tool = 3\n")
    assert "has no table [tool.convgen]" in refused("list-files", tmp_path)


@pytest.mark.parametrize("row", ['name = "up"', 'name = "up"\nspec = "Conv"', 'spec = "Conv"', ""])
def test_a_wrong_row_is_told_by_name_or_number(tmp_path, row):
    """Of twenty rows the message must say which."""
    table = f"{rows('first')}[[tool.convgen.kernel]]\n{row}"
    name = "'up'" if "up" in row else "number 2"
    assert f"[[tool.convgen.kernel]] {name}: " in refused("build", make_project(tmp_path, table))


@pytest.mark.parametrize("value", ["3", '""', '"a b"'])
def test_a_backend_is_a_name(tmp_path, value):
    table = f"build-backend = {value}\n{rows('up')}"
    message = refused("build", make_project(tmp_path, table))
    assert "build-backend of [tool.convgen] must be a backend such as" in message


# ---- places ----


def test_a_document_of_another_editor_is_read(tmp_path):
    """A byte order mark and line ends of Windows are no part of a spec."""
    path = tmp_path / "a.convgen"
    path.write_bytes(f"\ufeffone = {SMALL}\r\n\r\n# two\r\ntwo = {SMALL}\r\n".encode())
    done = run("emit", path, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert sorted(made.name for made in (tmp_path / "out").iterdir()) == ["one.py", "two.py"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("command", ["emit --k 3", "explain --k 3", "targets"])
@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_is_full_is_no_bug(command, buffered):
    """What is buffered is tried again when Python ends."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    line = [sys.executable, *["-u"] * (not buffered), "-m", "convgen", *command.split()]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            line, stdout=full, stderr=subprocess.PIPE, env=environment, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


def test_a_slash_at_the_end_means_a_folder(tmp_path):
    """A file of that name is not what was asked for."""
    done = run("emit", SMALL, "-o", f"{tmp_path}/up.py/")
    assert done.exit_code == 2
    assert "up.py must be a folder, as it ends in a slash, but it is named like" in done.stderr
    assert run("emit", SMALL, "-o", f"{tmp_path}/new/").exit_code == 2  # it has no name there
    assert not [*tmp_path.iterdir()]


def test_a_document_without_a_layer_is_named(tmp_path):
    path = tmp_path / "none.convgen"
    path.write_text("# none yet\n")
    done = run("emit", path, "-o", tmp_path)
    assert (done.exit_code, done.stderr) == (2, f"error: {path} contains no layer\n")


@pytest.mark.parametrize("command", ["emit --k 3", "targets", "families --json"])
def test_output_that_is_closed_is_no_success(command):
    """Python would discard it: a script that forgot its descriptor would think it had a kernel."""
    line = f"{shlex.quote(sys.executable)} -m convgen {command} >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the output: Bad file descriptor\n"


# ---- bugs ----


@pytest.mark.parametrize("arguments", [[SMALL], ["--k", "4", "--stride", "7"]])
def test_a_bug_exits_123_and_prints_the_spec(monkeypatch, arguments):
    """A bug must not pass for a user's mistake, and its report needs the spec."""

    def broken(*_, **__):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr("convgen.compiler.compile_kernel", broken)
    done = run("emit", *arguments)
    assert (done.exit_code, done.stdout) == (123, "")
    assert "ZeroDivisionError: oh no" in done.stderr
    assert arguments[-1] in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_of_its_own_says_the_same():
    done = start("emit", "--k", "0")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: --kernel-size: kernel_size must be an integer from 1")
