"""The target that is nearest to this machine's GPU.

Beside the stages, for code that runs kernels; the compiler never queries a device. Input: torch's
current CUDA device; output: a `GpuTarget`.
"""

from __future__ import annotations

import math

from ..errors import MachineError
from ..tables.targets import TARGETS, GpuTarget


def local_target() -> GpuTarget:
    """Return the target nearest to the current CUDA device; raises MachineError without one."""
    import torch

    if not torch.cuda.is_available():
        raise MachineError("this needs a CUDA GPU, and torch sees none")
    found = torch.cuda.get_device_properties()
    return nearest_target(
        (found.major, found.minor), found.multi_processor_count, found.L2_cache_size
    )


def nearest_target(capability: tuple[int, int], sms: int, l2_bytes: int) -> GpuTarget:
    """Return the target of the nearest architecture; of several, that of the nearest size."""

    def distance(target: GpuTarget) -> tuple[int, float]:
        major, minor = target.compute_capability
        apart = abs(10 * major + minor - 10 * capability[0] - capability[1])
        sizes = ((target.sms, sms), (target.l2_bytes, l2_bytes))
        return apart, sum(abs(math.log(row / size)) for row, size in sizes)

    return min(TARGETS, key=distance)
