"""Let emitted files use the machine code beside them, and ask Triton's JIT for their kernels.

A process of its own: Triton compiles here. Reads JSON lines `[file, compute capability, folder of
Triton's cache, shape of an input]`, and prints for each: whether Triton found the code of each
kernel that a call launches in its cache, and the sha256 of that of the layer's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from typing import Any

import torch
import triton

from launch_worker import Stub, recorded


def used(path: str, capability: int, cache: str, shape: list[int]) -> dict[str, Any]:
    """Return what Triton found for the file at `path`, of which no earlier job has left anything.

    The module and its kernels are new for each job, and so is the folder of the cache, unless a
    test names the same one again.
    """
    os.environ["TRITON_CACHE_DIR"] = cache
    spec = importlib.util.spec_from_file_location("shipped", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    module._use_precompiled(0)

    kernels = recorded(module)  # the layer's is the file's first
    _, c_out, *_ = module.WEIGHT_SHAPE
    x = torch.empty(shape, device="meta")
    weight = torch.empty(module.WEIGHT_SHAPE, device="meta")
    bias = torch.empty(c_out, device="meta")
    if hasattr(module, "Plan"):
        plan = module._plan_of(x, weight)
        module._launch(plan, x, module._pack(plan, weight), bias)
    else:
        module._launch(x, module.pack_weight(weight), bias)

    found = []
    triton.knobs.compilation.listener = lambda **event: found.append(event["cache_hit"])
    triton.runtime.driver.set_active(Stub(capability))
    compiled = [
        kernel.warmup(*recorder.arguments, grid=(1,), **recorder.options)
        for kernel, recorder in kernels.values()
        if hasattr(recorder, "options")  # what was launched
    ]
    return {"found": found, "sha256": hashlib.sha256(compiled[0].asm["cubin"]).hexdigest()}


def main() -> None:
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    for line in sys.stdin:
        print(json.dumps(used(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
