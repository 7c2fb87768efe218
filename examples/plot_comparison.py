"""Plot the result of compare_with_torch.py: a bar per case, how many times faster than torch.

    python examples/plot_comparison.py RESULT.json PICTURE.svg "NVIDIA H100, torch 2.11, …"

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file written by compare_with_torch.py")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("caption", help="card, versions and date")
    options = parser.parse_args(arguments)
    from matplotlib import pyplot

    rows = json.loads(options.result.read_text(encoding="utf-8"))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    # Without float64: 4 to 150 times faster, as torch is slow there, it would dwarf other bars.
    dtypes = [d for d in dict.fromkeys(row["dtype"] for row in rows) if d != "float64"]
    width = 0.8 / len(dtypes)
    figure, axis = pyplot.subplots(figsize=(9, 3.2))
    for number, dtype in enumerate(dtypes):
        times = {r["case"]: r["torch_ms"] / r["convgen_ms"] for r in rows if r["dtype"] == dtype}
        positions = [index + (number + 0.5) * width - 0.4 for index in range(len(cases))]
        axis.bar(positions, [times.get(case, 0.0) for case in cases], width, label=dtype)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["1/2", "1x", "2x", "4x", "8x", "16x", "32x"])
    axis.set_xticks(range(len(cases)), [case.rpartition("_")[2] for case in cases])
    axis.set_xlabel("KernelBench level 1 problem")
    axis.set_ylabel("times faster than torch")
    axis.set_title(options.caption, fontsize=9)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
