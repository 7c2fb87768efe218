"""Figures and table of a bench report.

Stage 3 of bench: arithmetic alone, no GPU and no process. Input: answers of the workers; output:
rows, their summary, and the text of the table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from ..errors import visible
from ..geometry.phases import decompose
from ..geometry.problem import problem_of
from ..language.spec import LAYOUTS, ConvTransposeSpec
from ..planning.costs import layer_bytes
from .cases import CONVGEN, Case

# Larger than the rounding error of any dtype (bfloat16's is 2e-3 here): the result is wrong.
MOST_ERROR = 0.05
FIGURES = {"over_default": "x default", "over_best": "x best", "of_floor": "of floor"}


def row_of(case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a case before it is measured: its work, and a lower bound of its time."""
    spec = case.spec
    flops = least_flops(spec)
    least_bytes = layer_bytes(spec, problem_of(spec, decompose(spec)))
    compute = flops / facts["matmul_tflops"][spec.dtype] / 1e9
    memory = least_bytes / facts["copy_gbps"] / 1e6
    return {
        "case": case.id,
        "dtype": spec.dtype,
        "spec": str(spec),
        "flops": flops,
        "bytes": least_bytes,
        "floor_ms": max(compute, memory),
        "bound": "compute" if compute > memory else "memory",
        "ways": {},
    }


def least_flops(spec: ConvTransposeSpec) -> int:
    """Return the FLOPs of the layer, two per product, without products that padding crops.

    The floor must be a true lower bound: counting cropped products would refuse honest times.
    """
    assert spec.input is not None
    assert spec.out_channels is not None
    products = math.prod(size for size in spec.input[:2] if size is not None)
    products *= spec.out_channels // spec.groups
    axes = zip(
        spec.spatial,
        spec.output_spatial,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        strict=True,
    )
    for size, output, kernel, stride, padding, dilation in axes:
        assert size is not None
        assert output is not None
        landed = 0
        for tap in range(kernel):
            first = (
                padding - tap * dilation
            )  # input i lands if first <= i * stride < first + output
            low, high = max(0, -(-first // stride)), min(size - 1, (first + output - 1) // stride)
            landed += max(0, high - low + 1)
        products *= landed
    return 2 * products


def judged(answer: dict[str, Any], floor_ms: float) -> dict[str, Any]:
    """Return a worker's answer; if it cannot be right, `refused` with the reason replaces `ms`."""
    if "failed" in answer:
        return answer
    if answer["ms"] < floor_ms:
        reason = f"{answer['ms']:.4f} ms is below the floor, {floor_ms:.4f} ms"
    elif answer["relative_error"] > MOST_ERROR:
        reason = f"a relative error of {answer['relative_error']:.1e} is too large for rounding"
    else:
        return answer
    return {"refused": reason, **{k: v for k, v in answer.items() if k != "ms"}}


def finished(head: dict[str, Any], rows: list[dict[str, Any]], *, complete: bool) -> dict[str, Any]:
    """Return the report: `head`, the rows with their figures, and a summary for each dtype."""
    rows = [row | figures(row) for row in rows]
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    summary = {d: summary_of([row for row in rows if row["dtype"] == d]) for d in dtypes}
    return {**head, "complete": complete, "cases": rows, "summary": summary}


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a row: speedups of convgen, and floor / convgen's time."""
    times = {name: way["ms"] for name, way in row["ways"].items() if "ms" in way}
    own = {name: ms for name, ms in times.items() if name.startswith(CONVGEN)}
    torch = {name: ms for name, ms in times.items() if name not in own}
    best_torch = min(torch, key=torch.__getitem__, default=None)
    best_own = min(own.values(), default=None)
    errors = {name: way.get("relative_error") for name, way in row["ways"].items()}
    return {
        "default_ms": torch.get("default"),
        "best_torch": best_torch,
        "best_torch_ms": None if best_torch is None else torch[best_torch],
        "convgen_ms": {layout: own.get(CONVGEN + layout) for layout in LAYOUTS},
        "best_convgen_ms": best_own,
        "over_default": _ratio(torch.get("default"), own.get(f"{CONVGEN}channels_first")),
        "over_best": _ratio(min(torch.values(), default=None), best_own),
        "of_floor": _ratio(row["floor_ms"], best_own),
        "torch_error": errors.get("default"),
        "convgen_error": max((errors[name] for name in own), default=None),
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the geometric mean and lowest case of each figure, over the rows that have it."""
    summary = {}
    for figure in FIGURES:
        known = [row for row in rows if row[figure] is not None]
        if known:
            lowest = min(known, key=lambda row: float(row[figure]))
            summary[figure] = {
                "cases": len(known),
                "geometric_mean": statistics.geometric_mean(row[figure] for row in known),
                "lowest": lowest[figure],
                "lowest_case": lowest["case"],
            }
    return summary


# ---- the table ----

COLUMNS = (
    ("case", "<24"),
    ("dtype", "<8"),
    ("default", ">9"),
    ("best torch", ">10"),
    ("its way", "<28"),
    ("ch. first", ">9"),
    ("ch. last", ">9"),
    ("x default", ">9"),
    ("x best", ">7"),
    ("floor", ">9"),
    ("reached", ">7"),
    ("error torch", ">11"),
    ("convgen", ">8"),
)


def table(report: dict[str, Any]) -> str:
    """Return the report as text: one line per case, then the summary and what was not timed."""
    rates = ", ".join(f"{rate:.0f} {name}" for name, rate in report["matmul_tflops"].items())
    lines = [
        f"{report['device']}, torch {report['torch']}, cuDNN {report['cudnn']}, "
        f"Triton {report['triton']}, convgen {report['convgen']} for {report['target']}, "
        f"{report['date']}",
        f"times in ms, medians; ceilings: copy {report['copy_gbps']:.0f} GB/s, "
        f"matrix product {rates} TFLOP/s; a kernel of one element {report['launch_ms']:.4f}",
        "",
        _line(name for name, _ in COLUMNS),
        *(_line(_cells(row)) for row in report["cases"]),
        "",
        *_summary_lines(report["summary"]),
        *_note_lines(report["cases"]),
    ]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    widths = (width for _, width in COLUMNS)
    return " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["case"][-24:],
        row["dtype"],
        _number(row["default_ms"], ".3f"),
        _number(row["best_torch_ms"], ".3f"),
        row["best_torch"] or "-",
        *(_number(row["convgen_ms"][layout], ".3f") for layout in LAYOUTS),
        _number(row["over_default"], ".2f"),
        _number(row["over_best"], ".2f"),
        _number(row["floor_ms"], ".3f"),
        _number(row["of_floor"], ".0%"),
        _number(row["torch_error"], ".1e"),
        _number(row["convgen_error"], ".1e"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary_lines(summary: dict[str, Any]) -> list[str]:
    return [
        f"{dtype}, {name}: geometric mean {entry['geometric_mean']:.2f} of {entry['cases']} cases, "
        f"lowest {entry['lowest']:.2f} ({entry['lowest_case']})"
        for dtype, entries in summary.items()
        for figure, name in FIGURES.items()
        if (entry := entries.get(figure))
    ]


def _note_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line per failed or refused row, and one per reason why a way does not apply."""
    lines: list[str] = []
    unfit: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        for way, entry in row["ways"].items():
            if "not_applicable" in entry:
                ways, cases = unfit.setdefault(entry["not_applicable"], ({}, {}))
                ways[way] = cases[row["case"]] = None
            for kind in {"failed", "refused"} & set(entry):
                text = visible(" ".join(entry[kind].split()))
                lines.append(f"{kind}: {way} on {row['case']} {row['dtype']}: {text}")
    lines += [
        f"not applicable, as {reason}: {', '.join(ways)}; on {', '.join(cases)}"
        for reason, (ways, cases) in unfit.items()
    ]
    return lines
