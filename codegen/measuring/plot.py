"""The plots of bench and bench-model.

Stage 4 of bench; needs matplotlib (extra `report`). Input: a report; output: the text of an SVG
file. That of bench has a bar chart of speedups over torch and a roofline, that of bench-model a bar
chart of times. Equal reports give equal files.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

from ..errors import MachineError, visible

BARS = {"over_default": "torch's default", "over_best": "the fastest way of torch"}
SIDES = {"best_convgen_ms": ("convgen", "o", "full"), "best_torch_ms": ("torch", "s", "none")}
MODEL_BARS = {"ms": "wall time", "device_ms": "time of its kernels on the GPU"}
PANEL = 3.2  # inches
# They mark a file, so that a later plot may overwrite it.
TITLE, MODEL_TITLE = "convgen bench", "convgen bench-model"


def require_matplotlib() -> None:
    """Raise MachineError without matplotlib; called before a long run, not after it."""
    if find_spec("matplotlib") is None:
        raise MachineError("the plot needs matplotlib, of convgen's extra 'report'")


def draw_plot(report: dict[str, Any]) -> str:
    """Return the plot of a report as SVG text; raises MachineError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    by_dtype: dict[str, list[dict[str, Any]]] = {}
    for row in report["cases"]:
        by_dtype.setdefault(row["dtype"], []).append(row)
    width = max(9.0, 2.0 + 0.45 * max(map(len, by_dtype.values())))
    figure = Figure(figsize=(width, PANEL * (len(by_dtype) + 1)), layout="constrained")
    *bars, roofline = figure.subplots(len(by_dtype) + 1, squeeze=False)[:, 0]
    for axis, (dtype, rows) in zip(bars, by_dtype.items(), strict=True):
        _draw_bars(axis, dtype, rows)
    _draw_roofline(roofline, report, by_dtype)
    return _svg(figure, report, TITLE)


def _svg(figure: Any, report: dict[str, Any], title: str, below: str = "") -> str:
    """Return the text of a figure, with the machine of its report, and `below` it, on top."""
    import matplotlib

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{report['device']}, torch {report['torch']}, cuDNN {report['cudnn']}, "
        f"Triton {report['triton']}, convgen {report['convgen']}, {report['date'][:10]}{below}",
        fontsize=9,
    )
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "convgen"}):
        figure.savefig(picture, format="svg", metadata={"Date": None, "Title": title})
    return picture.getvalue()


def draw_model_plot(report: dict[str, Any]) -> str:
    """Return the plot of a report of bench-model; raises MachineError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    ways = report["ways"]
    figure = Figure(figsize=(9.0, PANEL), layout="constrained")
    axis = figure.subplots()
    for offset, (time, label) in zip((-0.2, 0.2), MODEL_BARS.items(), strict=True):
        known = [(place, way[time]) for place, way in enumerate(ways.values()) if way.get(time)]
        bars = axis.barh([n + offset for n, _ in known], [ms for _, ms in known], 0.4, label=label)
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=7)
    notes = {name: "\nfailed" if "failed" in way else "" for name, way in ways.items()}
    notes |= {name: "\nwrong numbers" for name, way in ways.items() if way.get("off")}
    axis.set_yticks(range(len(ways)), [f"{name}{notes[name]}" for name in ways], fontsize=8)
    axis.set_ylim(len(ways) - 0.4, -0.6)  # the first on top
    axis.set_xlabel("milliseconds of a call")
    return _svg(figure, report, MODEL_TITLE, f"\n{visible(report['model'])}")


def not_a_plot(text: str, title: str = TITLE) -> str | None:
    """Return why a plot must not overwrite a file with this text, None if it is a plot."""
    return None if f"<title>{title}</title>" in text[:1000] else f"is no plot of {title}"


def _draw_bars(axis: Any, dtype: str, rows: list[dict[str, Any]]) -> None:
    for offset, (figure, label) in zip((-0.2, 0.2), BARS.items(), strict=True):
        known = [(index, row[figure]) for index, row in enumerate(rows) if row[figure] is not None]
        # Bars start at 1, where both sides are equally fast.
        axis.bar(
            [index + offset for index, _ in known],
            [ratio - 1.0 for _, ratio in known],
            0.4,
            bottom=1.0,
            label=label,
        )
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    names = [row["case"][-24:] for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=35, ha="right", fontsize=7)
    axis.set_ylabel(f"{dtype}: times faster than")


def _draw_roofline(
    axis: Any, report: dict[str, Any], by_dtype: dict[str, list[dict[str, Any]]]
) -> None:
    for index, (dtype, rows) in enumerate(by_dtype.items()):
        color = f"C{index}"
        intensities = [row["flops"] / row["bytes"] for row in rows]
        peak, copy = report["matmul_tflops"][dtype], report["copy_gbps"] / 1e3
        corners = sorted({min(intensities) / 2, peak / copy, max(*intensities, peak / copy) * 2})
        axis.plot(corners, [min(copy * x, peak) for x in corners], color=color, linewidth=1)
        for side, (label, marker, fill) in SIDES.items():
            known = [(x, row) for x, row in zip(intensities, rows, strict=True) if row[side]]
            axis.plot(
                [x for x, _ in known],
                [row["flops"] / row[side] / 1e9 for _, row in known],
                marker,
                color=color,
                fillstyle=fill,
                markersize=4,
                label=f"{label}, {dtype}",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP a byte that must move")
    axis.set_ylabel("TFLOP/s; line: the ceilings")
