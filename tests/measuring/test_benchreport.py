"""`convgen bench`'s report: floors, figures, the table and the plot, from made-up times.

What would break it: a figure that is not what its name says, a time that is too good to be true, a
row without a time that is left out in silence.
"""

from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest

from convgen import parse
from convgen.compiler import plan
from convgen.geometry.problem import problem_of
from convgen.measuring import bench
from convgen.measuring.cases import Case
from convgen.measuring.plot import draw_plot
from convgen.measuring.report import judged, least_flops, row_of
from convgen.planning.costs import layer_flops
from drawing import draw
from running import SMALL, run

FACTS = {
    "device": "The Card",
    "target": "h100",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "cudnn": 91900,
    "copy_gbps": 1000.0,
    "matmul_tflops": {"float32": 100.0, "float16": 200.0},
    "launch_ms": 0.0023,
}
# 2 * 10 * 1000 * 1000 * 500 = 1e10 operations, 4 * (1e7 + 5e5 + 5e6) = 6.2e7 bytes in float32: by
# the ceilings above 0.1 ms and 0.062 ms, in float16 half of each.
LAYER = "ConvTranspose2d(1000, 500, 1, bias=False, input=(10, 1000, 20, 50))"
TIMES = {
    "default": {"a": 0.8, "b": 0.2},
    "benchmark": {"a": 0.4, "b": 0.3},
    "channels_last": {"a": 0.2, "b": 0.05},
    "convgen_channels_first": {"a": 0.2, "b": 0.2},
    "convgen_channels_last": {"a": 0.16, "b": None},
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Stand for the workers with `TIMES`; return the arguments that measure them."""
    document = tmp_path / "two.convgen"
    document.write_text(f"a = {LAYER}\nb = {LAYER}\n")

    def answers(jobs):
        if jobs and jobs[0]["way"] == "ceilings":
            yield FACTS
            return
        for asked, case in zip(jobs, itertools.cycle("ab"), strict=False):
            ms = TIMES[asked["way"]][case]
            way, error = asked["way"], 2e-4 if asked["way"].startswith("convgen") else 3e-4
            if ms is None:
                yield {"failed": "OutOfMemoryError: CUDA out of memory.\nTried to allocate"}
            else:
                yield {"ms": ms, "relative_error": error, "samples": [ms], "way": way}

    monkeypatch.setattr(bench, "answers", answers)
    return [document, "--ways", "default,benchmark,channels_last"]


def test_the_figures_are_what_their_names_say(measured):
    """Numbers worked out by hand from `TIMES`; 0.05 ms in float32 is below the floor of 0.1 ms."""
    report = json.loads(run("bench", *measured, "--json").stdout)
    assert (report["schema"], report["command"], report["complete"]) == (1, "bench", True)
    assert {name: report[name] for name in FACTS} == FACTS
    assert report["date"].endswith("+00:00")
    a, b = report["cases"]
    assert (a["flops"], a["bytes"], a["bound"]) == (10**10, 62 * 10**6, "compute")
    assert a["floor_ms"] == pytest.approx(0.1)
    assert (a["default_ms"], a["best_torch"], a["best_torch_ms"]) == (0.8, "channels_last", 0.2)
    assert a["convgen_ms"] == {"channels_first": 0.2, "channels_last": 0.16}
    assert a["over_default"] == pytest.approx(4.0)  # 0.8 / 0.2
    assert a["over_best"] == pytest.approx(1.25)  # 0.2 / 0.16
    assert a["of_floor"] == pytest.approx(0.625)  # 0.1 / 0.16
    assert (a["torch_error"], a["convgen_error"]) == (3e-4, 2e-4)
    assert a["ways"]["benchmark"]["samples"] == [0.4]
    assert (b["best_torch"], b["over_default"], b["over_best"]) == ("default", 1.0, 1.0)
    summary = report["summary"]["float32"]
    assert summary["over_default"] == {
        "cases": 2,
        "geometric_mean": pytest.approx(2.0),  # of 4 and 1
        "lowest": 1.0,
        "lowest_case": "b",
    }
    assert summary["of_floor"]["geometric_mean"] == pytest.approx((0.625 * 0.5) ** 0.5)


@pytest.mark.parametrize(
    ("dtype", "channels", "floor_ms", "bound"),
    [
        # 10 images of 20 x 50, 1 x 1: 2 * 10^4 operations a pair of channels; twice as many inputs
        # as outputs. 40 to 20 channels are 16 MFLOP, at 100 TFLOP/s 0.16 us, and 4 * (400 000 +
        # 800 + 200 000) bytes, at 1000 GB/s 2.4032 us.
        ("float32", 40, 2.4032e-3, "memory"),
        ("float16", 40, 1.2016e-3, "memory"),
        # 800 to 400: 6.4 GFLOP, 64 us, and 4 * (8 000 000 + 320 000 + 4 000 000) bytes, 49.28 us.
        ("float32", 800, 64e-3, "compute"),
        # In float16 32 us, and 24.64 us.
        ("float16", 800, 32e-3, "compute"),
        # 600 to 300: 3.6 GFLOP, 36 us, and 4 * (6 000 000 + 180 000 + 3 000 000) bytes, 36.72 us.
        ("float32", 600, 36.72e-3, "memory"),
    ],
)
def test_the_floor_is_of_compute_or_of_memory(dtype, channels, floor_ms, bound):
    """With one of the two alone a time that leaves something out would pass for a fast one."""
    layer = f"ConvTranspose2d({channels}, {channels // 2}, 1, bias=False"
    spec = parse(f"{layer}, input=(10, {channels}, 20, 50), dtype={dtype})")
    row = row_of(Case("a", spec), FACTS)
    assert row["floor_ms"] == pytest.approx(floor_ms)
    assert row["bound"] == bound
    assert "refused" in judged({"ms": 0.99 * floor_ms, "relative_error": 0.0}, row["floor_ms"])
    fine = {"ms": 1.01 * floor_ms, "relative_error": 0.0}
    assert judged(fine, row["floor_ms"]) == fine


def test_a_time_below_the_floor_is_refused(measured):
    """It says that something was not computed: neither a time nor a speed-up comes of it."""
    report = json.loads(run("bench", *measured, "--json").stdout)
    refused = report["cases"][1]["ways"]["channels_last"]
    assert "ms" not in refused
    assert refused["refused"] == "0.0500 ms is below the floor, 0.1000 ms"
    assert refused["samples"] == [0.05]
    # In float16 the floor is 0.05 ms, which is not below itself.
    report = json.loads(run("bench", *measured, "--json", "--dtypes", "float16").stdout)
    assert report["cases"][1]["ways"]["channels_last"]["ms"] == 0.05


def test_a_wrong_result_has_no_time(measured, monkeypatch):
    answer = {"ms": 1.0, "relative_error": 0.7, "samples": [1.0]}
    monkeypatch.setattr(
        bench, "answers", lambda jobs: [answer if "spec" in j else FACTS for j in jobs]
    )
    report = json.loads(run("bench", *measured, "--json").stdout)
    assert all("for rounding" in way["refused"] for way in report["cases"][0]["ways"].values())
    assert report["summary"] == {"float32": {}}


def test_the_table_shows_every_row_and_what_has_no_time(measured):
    done = run("bench", *measured)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    a, b = (next(line for line in lines if line.startswith(f"{name} ")) for name in "ab")
    assert " ".join(a.split()) == (
        "a float32 0.800 0.200 channels_last 0.200 0.160 4.00 1.25 0.100 62% 3.0e-04 2.0e-04"
    )
    assert " ".join(b.split()) == (
        "b float32 0.200 0.200 default 0.200 - 1.00 1.00 0.100 50% 3.0e-04 2.0e-04"
    )
    assert "float32, x default: geometric mean 2.00 of 2 cases, lowest 1.00 (b)" in lines
    assert "refused: channels_last on b float32: 0.0500 ms is below the floor, 0.1000 ms" in lines
    failed = "CUDA out of memory. Tried to allocate"
    assert f"failed: convgen_channels_last on b float32: OutOfMemoryError: {failed}" in lines


def test_what_does_not_apply_is_listed(measured):
    """A row that is only left out looks like one that was forgotten."""
    lines = run("bench", SMALL, "--ways", "flip,flip_benchmark").stdout.splitlines()
    assert lines[-2:] == [
        "not applicable, as stride is not 1: flip, flip_benchmark; on layer1",
        "not applicable, as rank 1 has no channels_last: convgen_channels_last; on layer1",
    ]


def test_the_file_is_written_after_each_way(measured, tmp_path, monkeypatch):
    """An interrupted run of an hour must leave what it measured."""
    texts = []
    monkeypatch.setattr(bench, "write_output", lambda path, text: texts.append(json.loads(text)))
    run("bench", *measured, "-o", tmp_path / "out.json")
    ways = [list(text["cases"][0]["ways"]) for text in texts]
    assert ways == [list(TIMES)[:count] for count in range(len(TIMES) + 1)]
    assert [text["complete"] for text in texts] == [False] * len(TIMES) + [True]


SVG = "{http://www.w3.org/2000/svg}"


def shapes(picture):
    """Return how many bars and marks a plot has, by its SVG: clipped rectangles, and uses."""
    tree = ElementTree.fromstring(picture)
    paths = [path.get("d") for path in tree.iter(f"{SVG}path") if path.get("clip-path")]
    bars = sum(path.count("L") == 3 and path.rstrip().endswith("z") for path in paths)
    marks = sum(
        1
        for group in tree.iter(f"{SVG}g")
        if group.get("clip-path") and not (group.get("id") or "").startswith("axes")
        for _ in group.iter(f"{SVG}use")
    )
    return bars, marks


def test_file_and_plot_are_written(measured, tmp_path):
    """Two bars of each layer, and two marks; the same picture for the same report."""
    done = run("bench", *measured, "-o", tmp_path / "out.json", "--plot", tmp_path / "out.svg")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("The Card, torch 2.13.0, cuDNN 91900, Triton ")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["best_convgen_ms"] for row in report["cases"]] == [0.16, 0.2]
    picture = (tmp_path / "out.svg").read_text()
    assert shapes(picture) == (4, 4)
    for text in ("The Card", "float32: times faster than", "torch's default", "TFLOP/s"):
        assert text in picture
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert picture == draw_plot(report)  # no random ids, no time of day


def test_a_report_takes_the_place_of_a_report_alone(measured, tmp_path, monkeypatch):
    """Before an hour of measuring, not after it; of a plot likewise."""
    report, plot = tmp_path / "out.json", tmp_path / "out.svg"
    options = ("-o", report, "--plot", plot)
    for path, kind in ((report, "report"), (plot, "plot")):
        path.write_text('{"schema": 1, "command": "tune"}' if kind == "report" else "<svg></svg>")
        with monkeypatch.context() as patch:
            patch.setattr(bench, "answers", None)  # nothing is measured
            done = run("bench", *measured, *options)
        said = f"error: {path} is no {kind} of convgen bench; --force overwrites it\n"
        assert (done.exit_code, done.stderr) == (2, said)
        assert path.stat().st_size < 40
        assert run("bench", *measured, *options, "--force").exit_code == 0
        assert run("bench", *measured, *options).exit_code == 0
    report.write_text(json.dumps(json.loads(report.read_text()), indent=2))
    assert run("bench", *measured, *options).exit_code == 0


def test_a_pipe_gets_one_report(measured, tmp_path):
    """What is written after each way would be several documents."""
    os.mkfifo(tmp_path / "report")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "report").read_text)
        assert run("bench", *measured, "-o", tmp_path / "report").exit_code == 0
        assert json.loads(read.result(20))["complete"] is True
    assert (tmp_path / "report").is_fifo()


def test_a_report_with_hardly_a_time_is_still_drawn_and_printed(measured, monkeypatch, tmp_path):
    """Of a run where everything failed, that is what the reader wants to see."""
    answer = {"failed": "out of memory"}
    monkeypatch.setattr(
        bench, "answers", lambda jobs: [answer if "spec" in j else FACTS for j in jobs]
    )
    done = run("bench", *measured, "--plot", tmp_path / "out.svg")
    assert done.exit_code == 0
    picture = (tmp_path / "out.svg").read_text()
    assert shapes(picture) == (0, 0)
    assert "The Card" in picture
    lines = done.stdout.splitlines()
    assert "failed: default on a float32: out of memory" in lines
    assert "a float32 - - - - - - - 0.100 - - -" in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("seed", range(30))
def test_the_floor_counts_the_products_that_land(seed):
    """Counting those that padding cuts off would refuse honest times; counted here one by one."""
    spec, _ = draw(seed)
    taps = 1
    for size, output, *axis in zip(
        spec.spatial,
        spec.output_spatial,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        strict=True,
    ):
        k, s, p, d = axis
        landings = (i * s + t * d - p for i in range(size) for t in range(k))
        taps *= sum(0 <= landing < output for landing in landings)
    per_group = spec.out_channels // spec.groups
    assert least_flops(spec) == 2 * spec.batch * spec.in_channels * per_group * taps
    if not any(spec.padding):
        assert least_flops(spec) == layer_flops(spec, problem_of(spec, plan(spec).phases))
