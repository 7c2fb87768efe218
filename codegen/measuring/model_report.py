"""Verdict and table of a bench-model report.

Arithmetic alone, no GPU. Input: measurements of model_bench.py; output: the report, and the text of
its table.
"""

from __future__ import annotations

import statistics
from typing import Any

from ..errors import visible

TORCH = "torch"
MULTIPLE = 4  # of torch's own error, or of a roundoff: what rounding in another order may reach
# Of a roundoff, if the model does not run in float64: torch's own error is unknown, and that of
# many layers in a row is several roundoffs.
MULTIPLE_OF_TORCH = 32


def finished(head: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return the report: `head`, the measurements, speedups, and a verdict on the numbers.

    Each way that did not fail gets `off`, whether its error is above `limit` or not finite though
    torch's is. If torch's own numbers are not finite, there is nothing to compare. `passed` tells
    whether none is off.
    """
    ways = measured["ways"]
    limit = _limit(measured)
    rows = {}
    for name, way in ways.items():
        rows[name] = dict(way)
        if "failed" in way:
            continue
        rows[name]["over_torch"] = _speedup(ways[TORCH], way)
        error = way["relative_error"]
        rows[name]["off"] = limit is not None and (error is None or error > limit)
    passed = not any(row.get("off") for row in rows.values())
    return {**head, **measured, "ways": rows, "limit": limit, "passed": passed}


def _speedup(torch: dict[str, Any], way: dict[str, Any]) -> float | None:
    """Return how many times faster a way is than torch's in the same round; None without torch's.

    The median of all rounds: a host that changes its speed changes it for all ways of a round.
    """
    if "failed" in torch:
        return None
    pairs = zip(torch["samples"], way["samples"], strict=True)
    return float(statistics.median(base / own for base, own in pairs))


def _limit(measured: dict[str, Any]) -> float | None:
    """Return the largest error that rounding explains, None if torch's is not finite."""
    torch, roundoff = measured["ways"][TORCH].get("relative_error", 0.0), measured["roundoff"]
    if torch is None:
        return None
    if measured["reference"] == TORCH:
        return float(MULTIPLE_OF_TORCH * roundoff)
    return float(MULTIPLE * max(torch, roundoff))


# ---- the table ----

COLUMNS = (("way", "<18"), ("wall", ">9"), ("x torch", ">8"), ("GPU", ">9"), ("error", ">9"))


def table(report: dict[str, Any]) -> str:
    """Return the report as text: a line for each way, and what it should be read with."""
    return "\n".join(
        [
            f"{report['device']}, torch {report['torch']}, cuDNN {report['cudnn']}, "
            f"Triton {report['triton']}, convgen {report['convgen']} for {report['target']}, "
            f"{report['date']}",
            _what(report),
            f"times of a call in ms; wall: median of {report['rounds']} rounds, all ways in turns; "
            "x torch: median of each round's ratio; GPU: sum of its kernels' durations, by "
            "torch.profiler",
            "",
            " ".join(f"{name:{width}}" for name, width in COLUMNS),
            *(_line(name, way) for name, way in report["ways"].items()),
            "",
            _share(report),
            *_notes(report),
            *_left(report["layers"]),
        ]
    )


def _what(report: dict[str, Any]) -> str:
    """Return the line that says what was timed."""
    parts = [
        f"{visible(report['model'])} ({visible(' and '.join(report['inputs']))})",
        "forward and backward in train mode" if report["train"] else "forward in eval mode",
        f"autocast {report['autocast']}" if report["autocast"] else "no autocast",
        "channels last" if report["channels_last"] else "channels first",
    ]
    return ", ".join(parts)


def _line(name: str, way: dict[str, Any]) -> str:
    if "failed" in way:
        return f"{name:18} failed: {way['failed']}"
    forms = {"ms": ".3f", "over_torch": ".2f", "device_ms": ".3f", "relative_error": ".1e"}
    cells = [name, *("-" if way[key] is None else f"{way[key]:{forms[key]}}" for key in forms)]
    widths = (width for _, width in COLUMNS)
    line = " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{line}  wrong numbers" if way["off"] else line


def _share(report: dict[str, Any]) -> str:
    """Return what the transposed convolutions are of the model: what replacing them can gain."""
    share, calls = report["share"], report["calls"]
    part = "-" if share is None else f"{share:.0%}"
    return f"transposed convolutions: {calls} calls a forward, {part} of its GPU time in torch"


def _notes(report: dict[str, Any]) -> list[str]:
    """Return what the errors are relative to, and which are too large."""
    limit, failed = report["limit"], report["no_float64"]
    to = (
        "the model in float64" if failed is None else f"torch: in float64 the model fails, {failed}"
    )
    lines = [f"errors are relative to {to}"]
    if limit is None:
        return [*lines, "numbers are not compared: torch's are not finite"]
    multiple = f"{MULTIPLE} times torch's or {MULTIPLE} roundoffs"
    if failed is not None:
        multiple = f"{MULTIPLE_OF_TORCH} roundoffs"
    return [*lines, f"numbers are wrong above {limit:.1e}, {multiple}"]


def _left(layers: list[dict[str, Any]]) -> list[str]:
    """Return a line for each layer of the replaced model that torch computes, or some calls of."""
    lines = []
    for layer in layers:
        name = visible(layer["name"]) or "the model itself"
        if not layer["emitted"]:
            lines.append(f"stays torch's: {name}: {visible(layer['reason'], 500)}")
        for reason, calls in layer["torch_calls"].items():
            lines.append(f"computed by torch: {name}, {calls} calls: {visible(reason, 500)}")
    return lines
