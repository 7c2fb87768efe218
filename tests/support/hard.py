"""Layers that ask for far more than a check can take; run as a script, it measures `verify` of all.

    python tests/support/hard.py [TEXT]

prints exit code, seconds and memory of each layer that has TEXT in it, or of all, and exits with 1
if one takes more than a minute or 2 GB, or is not verified. On two idle cores it takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

HARD = (
    "ConvTranspose2d(64, 64, 256, stride=256)",
    "ConvTranspose2d(64, 64, 16)",
    "ConvTranspose2d(1, 1, 1, padding=3000)",
    "ConvTranspose2d(1, 1, 1, stride=4096)",
    "ConvTranspose2d(1, 1, 2, dilation=1048576)",
    "ConvTranspose2d(1, 1, 1, padding=100000)",
    "ConvTranspose1d(64, 64, 4096, dtype=bfloat16)",
    "ConvTranspose1d(64, 64, 4096, stride=4096, output_padding=4095, dtype=float64)",
    "ConvTranspose1d(3, 5, 1, padding=1048576, input=(1, 3, 2097153))",
    "ConvTranspose1d(65536, 65536, 4096, groups=65536)",
    "ConvTranspose2d(64, 64, 3, input=(8, 64, 524288, 524288), layout=channels_last, target=h100)",
    "ConvTranspose2d(64, 64, 3, padding=1048576, stride=7, precision=ieee)",
    "ConvTranspose2d(64, 64, 9, dilation=1048576, padding=1048576, precision=bf16x6)",
    "ConvTranspose2d(64, 64, 16, stride=2, precision=bf16x3, layout=channels_last)",
    "ConvTranspose2d(1, 1, 64, stride=(1, 4096), output_padding=(0, 4095), precision=tf32x3)",
    "ConvTranspose2d(1048576, 1048576, 3, input=(1, 1048576, 2, 2))",
    "ConvTranspose2d(64, 64, 2, stride=2, input=(1048576, 64, 1, 1), dtype=float16)",
    "ConvTranspose2d(2, None, (1, 7), (3, 16), groups=2, input=(1048576, 2, 4194304, 4096))",
    "ConvTranspose2d(6, 10, (4, 1), (4, 6), (63, 0), groups=2, input=(None, 6, 100, None), "
    "layout=channels_last, dilation=(1, 2), dtype=float64, grid=3, target=rtx5090)",
    "relu | ConvTranspose2d(64, 64, 32, groups=64, dtype=float16) | clamp(-1, 1)",
    "ConvTranspose3d(64, 64, 40, stride=2)",
    "ConvTranspose3d(64, 64, (16, 16, 256), stride=(3, 5, 4096), dilation=7, grid=1)",
    "ConvTranspose3d(8, 8, 2, stride=4096, groups=8, dtype=float16)",
    "ConvTranspose3d(16, 16, 32, groups=16, precision=ieee, dilation=(1, 2, 65536))",
    "ConvTranspose3d(kernel_size=40, dtype=float64, layout=channels_last, autotune=blocks)",
)


def verified(spec: str) -> tuple[int, float, float, str]:
    """Run `verify` in a process of its own; return exit code, seconds, MiB at most, its output."""
    command = [sys.executable, "-m", "convgen", "verify", spec]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - start, usage.ru_maxrss / 1024, output


def main() -> None:
    """Measure the layers that the argument asks for."""
    text, failed = sys.argv[1] if len(sys.argv) > 1 else "", False
    for spec in HARD:
        if text in spec:
            code, seconds, memory, output = verified(spec)
            print(f"{code} {seconds:5.1f} s {memory:5.0f} MiB  {spec}\n{output}", flush=True)
            failed |= code != 0 or seconds > 60 or memory > 2048
    sys.exit(failed)


if __name__ == "__main__":
    main()
