"""`convgen bench`: what it reads, what it runs, and the figures it makes of it.

What would break it: a way that computes another layer than it says, a crash that takes other rows
with it, a figure that is not what its name says, and a time that is too good to be true. Kernels
are timed in the one test that needs a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convgen import TARGETS, ConvTransposeSpec, SpecError, find_target
from convgen.compiler import plan
from convgen.execution import oracle
from convgen.execution.local_gpu import nearest_target
from convgen.execution.torch_oracle import reference
from convgen.language.parser import parse
from convgen.measuring import bench
from convgen.measuring import plot as benchplot
from convgen.measuring import worker as benchworker
from convgen.measuring.cases import CONVGEN_WAYS, TORCH_WAYS, WAYS, read_cases, read_ways
from convgen.planning.choices import key_of, text_of
from drawing import draw
from running import SMALL, run

ENTRY = {
    "id": "up",
    "rank": 2,
    "batch": 3,
    "in_channels": 4,
    "out_channels": 6,
    "input": [9, 7],
    "kernel_size": [3, 4],
    "stride": [2, 2],
    "padding": [1, 1],
    "output_padding": [0, 1],
    "dilation": [1, 1],
    "groups": 2,
    "bias": True,
}
UP = ConvTransposeSpec(
    rank=2,
    in_channels=4,
    out_channels=6,
    kernel_size=(3, 4),
    stride=2,
    padding=1,
    output_padding=(0, 1),
    groups=2,
    input=(3, 4, 9, 7),
)


def written(folder: Path, *entries: object) -> str:
    """Write a file of cases and return its path."""
    path = folder / "cases.json"
    path.write_text(json.dumps({"about": "anything", "cases": entries}))
    return str(path)


# ---- cases ----


def test_an_entry_is_the_layer_it_says_in_every_dtype_it_names(tmp_path):
    """A key that is dropped or swapped on the way times another layer."""
    path = written(tmp_path, ENTRY | {"dtypes": ["float16", "float32"]}, ENTRY | {"id": "other"})
    cases = read_cases(path, "", None)
    assert [(case.id, case.spec.dtype) for case in cases] == [
        ("up", "float16"),
        ("up", "float32"),
        ("other", "float32"),
    ]
    assert cases[1].spec == UP
    assert {case.spec.dtype for case in read_cases(path, "", "bfloat16")} == {"bfloat16"}
    assert [case.id for case in read_cases(path, "the", None)] == ["other"]


def test_specs_are_cases_too(tmp_path):
    """A precision belongs to float32: another dtype of the same layer has none."""
    document = tmp_path / "two.convgen"
    document.write_text(f"one = {SMALL[:-1]}, precision=tf32x3)\ntwo = relu | {SMALL}\n")
    one, half, *_ = read_cases(str(document), "one", "float32,float16")
    assert (one.id, one.spec.precision) == ("one", "tf32x3")
    assert (half.id, half.spec.dtype, half.spec.precision) == ("one", "float16", None)
    (case,) = read_cases(str(document), "two", None)
    assert case.spec == parse(f"relu | {SMALL}")
    (case,) = read_cases(SMALL, "", None)
    assert (case.id, case.spec) == ("layer1", parse(SMALL))


WRONG = [
    ({"batch": None}, "batch must be an integer from 1 to 1099511627775, got None"),
    ({"in_channels": None}, "bench needs in_channels"),
    ({"input": 9}, "input must be a list, got 9"),
    ({"input": [9]}, "input must be"),
    ({"input": [9, None]}, "bench needs every size of input"),
    ({"kernel_size": "33"}, "kernel_size must be"),
    ({"stride": [2]}, "stride must be one integer or 2 of them"),
    ({"output_padding": [2, 2]}, "output_padding must be smaller"),
    ({"groups": 3}, "in_channels must be divisible by groups"),
    ({"bias": 1}, "bias must be True or False"),
    ({"rank": 4}, "rank must be"),
    ({"dtypes": "float32"}, "dtypes must be a list"),
    ({"dtypes": ["half"]}, "dtype must be one of"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_entry_is_told_by_file_case_and_key(tmp_path, change, message):
    """In a file of a hundred layers, a message without the case is no help."""
    path = written(tmp_path, ENTRY | {"id": "first"}, ENTRY | change)
    with pytest.raises(SpecError) as error:
        read_cases(path, "", None)
    assert str(error.value).startswith(f"{path}: case 'up': ")
    assert message in str(error.value)


@pytest.mark.parametrize("key", sorted(ENTRY))
def test_a_missing_key_is_told_by_name(tmp_path, key):
    path = written(tmp_path, {name: value for name, value in ENTRY.items() if name != key})
    with pytest.raises(SpecError, match=f"cases.json: case .*: has no {key}$"):
        read_cases(path, "", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", 'needs "cases"'),
        ('{"cases": []}', 'needs "cases"'),
        ('{"cases": [3]}', "case number 1: must be an object"),
        (json.dumps({"cases": [ENTRY, ENTRY]}), "case 'up': an earlier case has this id"),
    ],
)
def test_a_file_that_is_no_list_of_cases(tmp_path, text, message):
    path = tmp_path / "cases.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=rf"{path}.*({message})"):
        read_cases(str(path), "", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SMALL, "--choices", "none.json"], "cannot read none.json"),
        (["none.json"], "cannot read none.json"),
        (["ConvTranspose1d(1, 1, 3)"], "layer1: bench needs every size of input, got None"),
        (["ConvTranspose1d(kernel_size=3, input=(1, None, 9))"], "bench needs in_channels"),
        ([SMALL, "--only", "zap"], "--only: no case has 'zap' in its id"),
        ([SMALL, "--dtypes", "float8"], "dtype must be one of"),
        ([SMALL, "--ways", "flipp"], "--ways: 'flipp' is none of .*(did you mean flip?)"),
        ([SMALL, "--layouts", "nchw"], "--layouts: 'nchw' is none of channels_first"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(monkeypatch, arguments, message):
    monkeypatch.setattr(bench, "answers", lambda jobs: pytest.fail("a worker was started"))
    done = run("bench", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert all(part in done.stderr for part in message.split(".*"))


# ---- ways ----


def job(way: str, spec: str) -> dict[str, str | None]:
    """Return a worker's job."""
    return {"way": way, "spec": spec, "target": "h100", "choices": None}


FIT = [
    ("ConvTranspose1d(1, 1, 3, input=(1, 1, 9))", {"channels_last"}, "rank 1"),
    ("ConvTranspose2d(1, 1, 3, stride=(1, 2), input=(1, 1, 9, 9))", {"flip"}, "stride"),
    ("ConvTranspose2d(1, 1, 3, padding=3, input=(1, 1, 9, 9))", {"flip"}, "padding"),
    (
        "ConvTranspose2d(1, 1, 3, output_padding=1, dilation=2, input=(1, 1, 9, 9))",
        {"flip"},
        "output_padding",
    ),
    ("ConvTranspose2d(1, 1, 3, padding=2, input=(1, 1, 9, 9))", set(), ""),
]


@pytest.mark.parametrize(("text", "kinds", "reason"), FIT)
def test_ways_that_do_not_apply_say_why(text, kinds, reason):
    """It would compute something else, or fail, under the name of the layer."""
    for way in WAYS.values():
        unfit = way.unfit(parse(text))
        if any(kind in way.name for kind in kinds):
            assert unfit.startswith(reason)
        else:
            assert unfit is None


def test_ways_are_what_their_names_say():
    assert [way.name for way in read_ways(None, None)] == list(WAYS)
    assert [way.name for way in read_ways("flip,default", "")] == ["flip", "default"]
    for way in (*TORCH_WAYS, *CONVGEN_WAYS):
        assert way.channels_last == ("channels_last" in way.name)
        assert way.flip == way.name.startswith("flip")
        assert way.benchmark == way.name.endswith("benchmark")
        assert way.emitted == way.name.startswith("convgen")
        assert way.compiled == (way.name == "compile")


STRIDE_1 = [
    "ConvTranspose1d(6, 4, 4, padding=3, groups=2, input=(2, 6, 9))",
    "ConvTranspose2d(4, 6, (3, 2), padding=(2, 0), groups=2, input=(2, 4, 5, 6))",
    "ConvTranspose2d(3, 2, (2, 3), padding=(0, 4), dilation=(1, 2), input=(3, 3, 6, 5))",
    "ConvTranspose2d(5, 1, 1, bias=False, input=(1, 5, 3, 2))",
    "relu | ConvTranspose3d(2, 3, (2, 3, 1), padding=(1, 1, 0), input=(1, 2, 3, 4, 2)) | mul(2.0)",
]


@pytest.mark.parametrize("spec", [*map(parse, STRIDE_1), *(draw(seed)[0] for seed in range(12))])
def test_every_way_of_torch_is_the_oracle(spec):
    """A kernel that is not flipped, or groups that are not swapped, time another layer."""
    random = np.random.default_rng(0)
    x = random.integers(-2, 3, spec.input)
    weight = random.integers(
        -2, 3, (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    )
    bias = random.integers(-2, 3, spec.out_channels) if spec.bias else None
    want = oracle.reference(spec, x, weight, bias)
    tensors = [None if a is None else torch.from_numpy(a).double() for a in (x, weight, bias)]
    assert np.array_equal(reference(spec, *tensors).numpy(), want)
    ways = [way for way in TORCH_WAYS if not way.compiled and way.unfit(spec) is None]
    assert len(ways) >= 2
    for way in ways:
        got = benchworker.torch_call(spec, way, *tensors)()
        assert np.array_equal(got.numpy(), want), way.name


@pytest.mark.interpreter
@pytest.mark.parametrize("way", [WAYS["flip_channels_last"], *CONVGEN_WAYS], ids=lambda w: w.name)
def test_a_measurement_is_of_the_layer(tmp_path, monkeypatch, device, way):
    """The whole of a job but the clock: what is timed is what the error was taken of."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(benchworker, "samples_of", lambda call: [1.0, 4.0, float(call().shape[0])])
    text = "relu | ConvTranspose2d(4, 6, 3, padding=1, input=(3, 4, 5, 6)) | add(1.0)"
    row = benchworker.measure(job(way.name, text), tmp_path, device)
    assert row["ms"] == 3.0
    assert row["samples"] == [1.0, 4.0, 3.0]
    assert row["relative_error"] < 6e-4
    assert ("tile" in row) == way.emitted
    spec = parse(text)
    assert all(map(torch.equal, benchworker.draw(spec, device), benchworker.draw(spec, device)))


def test_a_result_that_is_not_finite_is_no_measurement(tmp_path, monkeypatch, device):
    """NaN is neither above nor below a limit, and no JSON."""
    monkeypatch.setattr(benchworker, "torch_call", lambda *_: lambda: torch.full((1, 2, 3), np.nan))
    layer = "ConvTranspose1d(2, 2, 1, input=(1, 2, 3))"
    with pytest.raises(ArithmeticError):
        benchworker.measure(job("default", layer), tmp_path, "cpu")


@pytest.mark.interpreter
def test_a_file_of_choices_is_what_runs(tmp_path, monkeypatch, device):
    """Measured tiles that get lost on the way to the worker leave the model's."""
    monkeypatch.setattr(benchworker, "samples_of", lambda call: [1.0])
    spec = parse(SMALL)
    tile = plan(spec, find_target("h100")).ranking[-1].tile
    row = {"spec": key_of(spec), "tile": dataclasses.asdict(tile), "ms": 1.0, "tried": 1}
    path = tmp_path / "choices.json"
    path.write_text(text_of("h100", {"device": "The Card"}, [row]))
    way = "convgen_channels_first"
    assert str(tile) not in benchworker.measure(job(way, SMALL), tmp_path, device)["tile"]
    chosen = job(way, SMALL) | {"choices": str(path)}
    assert str(tile) in benchworker.measure(chosen, tmp_path, device)["tile"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_row_is_nearest_to_itself(target):
    """H100 and H200, or 4090 and L40S, are of one architecture: that alone finds the first."""
    found = nearest_target(target.compute_capability, target.sms, target.l2_bytes)
    assert found.name == target.name


def test_a_card_without_a_row_has_a_nearest_one():
    assert nearest_target((8, 9), 76, 64 << 20).name == "rtx4090"
    assert nearest_target((10, 3), 148, 126 << 20).name == "b200"


# ---- workers ----

# Jobs say how the worker ends: it answers with their number, or dies, or ends after its answer.
WORKER = """
import json, os, sys
for line in open(os.path.join(sys.argv[1], "jobs")):
    job = json.loads(line)
    if job["do"] == "die":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if job["do"].startswith("exit"):
        sys.exit(int(job["do"][5:]))
    print(json.dumps({"number": job["number"]}), flush=True)
    if job["do"] == "retire":
        sys.exit(0)
    if job["do"] == "die after it":
        sys.stdout.write('{"numb')
        sys.stdout.flush()
        os.kill(os.getpid(), 11)
"""


def test_a_dead_worker_costs_its_own_row():
    """A crash of one case must neither end the run nor shift the answers of the others."""
    deeds = [
        "",
        "die",
        "",
        "retire",
        "exit 0",
        "exit 3",
        "",
        "die after it",
        "",
        "exit 0",
        "retire",
    ]
    jobs = [{"do": deed, "number": number} for number, deed in enumerate(deeds)]
    rows = list(bench.answers(jobs, (sys.executable, "-c", WORKER)))
    assert len(rows) == len(jobs)
    failed = {number: row["failed"] for number, row in enumerate(rows) if "failed" in row}
    assert failed == {
        1: "the worker ended with SIGKILL: last words\n",
        4: "the worker ended with exit code 0: ",
        5: "the worker ended with exit code 3: ",
        8: "the worker ended with SIGSEGV: ",
        9: "the worker ended with exit code 0: ",
    }
    assert all(row == {"number": n} for n, row in enumerate(rows) if n not in failed)


def test_a_broken_job_is_an_error_of_its_row():
    """The worker itself, in its process: three jobs that cannot be done, each for its reason."""
    jobs = [
        job("default", "ConvTranspose9d(1)"),
        job("zap", SMALL),
        {"way": "default"},
    ]
    rows = list(bench.answers(jobs))
    assert [row["failed"].split("\n")[0][:40] for row in rows] == [
        "expected exactly one of ConvTranspose1d,",
        "KeyError: 'zap'",
        "KeyError: 'spec'",
    ]


def test_what_is_emitted_is_compiled_before_it_is_timed(tmp_path, monkeypatch):
    """Else the GPU waits for one compilation after another; a bad job must not stop the others."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layers = [SMALL, SMALL.replace("stride=2", "stride=3"), "nonsense"]
    jobs = [job("convgen_channels_first", layer) for layer in layers]
    benchworker.compile_ahead([json.dumps(each) for each in (*jobs, job("default", SMALL))])
    assert len(list(tmp_path.glob("*/*.cubin"))) == 2


def test_nothing_stands_between_the_answers(tmp_path):
    """Libraries print to stdout, from Python and from C; a line of theirs is no answer."""
    noisy = (
        "import os; from convgen.measuring import worker\n"
        "def answer(line, folder):\n"
        "    print('noise'); os.system('echo noise')\n"
        "    return {'line': line}\n"
        "worker.answer = answer\n"
        "worker.main()\n"
    )
    (tmp_path / "jobs").write_text("1\n2\n")
    command = [sys.executable, "-c", noisy, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(map(json.loads, done.stdout.splitlines())) == [{"line": "1"}, {"line": "2"}]
    assert done.stderr.count("noise") == 4


def test_no_module_of_bench_imports_what_it_measures_with():
    """`convgen --help` and the process that waits for the workers must stay light."""
    code = (
        "import sys, convgen.cli.commands\n"
        "from convgen.measuring import bench, plot, worker\n"
        "sys.exit(bool({'torch', 'triton', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what is missing ----


def test_without_a_gpu_it_says_so(monkeypatch):
    """The worker looks, so that this process never wakes a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("bench", SMALL)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: bench needs a CUDA GPU, and torch sees none\n"


def test_without_torch_triton_or_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    """Before the run, not after an hour of it."""
    monkeypatch.setattr(bench, "answers", lambda jobs: pytest.fail("a worker was started"))
    monkeypatch.setattr(benchplot, "find_spec", lambda name: None)
    done = run("bench", SMALL, "--plot", tmp_path / "out.svg")
    assert done.exit_code == 2
    assert done.stderr == "error: the plot needs matplotlib, of convgen's extra 'report'\n"
    for missing in ("torch", "triton"):
        monkeypatch.setattr(bench, "find_spec", lambda name, m=missing: None if name == m else 1)
        done = run("bench", SMALL)
        assert done.exit_code == 2
        assert done.stderr == f"error: bench needs {missing}, of convgen's extra 'torch'\n"


@pytest.mark.gpu
def test_the_command_measures_every_way(tmp_path):
    """Two tiny layers, one of each kind of way that applies: a flipped one and a strided one."""
    flat = ENTRY | {"id": "flat", "stride": [1, 1], "output_padding": [0, 0], "padding": [1, 0]}
    path = written(tmp_path, flat, ENTRY)
    done = run("bench", path, "--dtypes", "float16", "--json", "--plot", tmp_path / "out.svg")
    assert (done.exit_code, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert "<svg" in (tmp_path / "out.svg").read_text()
    for row in report["cases"]:
        assert list(row["ways"]) == list(WAYS)
        for name, way in row["ways"].items():
            if row["case"] == "up" and name.startswith("flip"):
                assert way == {"not_applicable": "stride is not 1"}
            else:
                assert way["ms"] > 0, (name, way)
                assert len(way["samples"]) >= 20
                assert way["relative_error"] < 2e-3
    assert report["complete"]
    assert set(report["summary"]) == {"float16"}
