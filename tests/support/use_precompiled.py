"""Let an emitted file use the machine code beside it, and ask Triton's JIT for its kernel.

A process of its own: Triton compiles here. Arguments: the file, a compute capability, an input's
shape. Prints JSON: whether Triton found the code of each kernel that a call launches in its cache,
the sha256 of that of the layer's, the seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time

import torch
import triton

from launch_worker import Stub, recorded


def main() -> None:
    path, capability = sys.argv[1], int(sys.argv[2])
    spec = importlib.util.spec_from_file_location("shipped", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    module._use_precompiled(0)

    kernels = recorded(module)  # the layer's is the file's first
    _, c_out, *_ = module.WEIGHT_SHAPE
    x = torch.empty([int(size) for size in sys.argv[3].split(",")], device="meta")
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
    start = time.perf_counter()
    compiled = [
        kernel.warmup(*recorder.arguments, grid=(1,), **recorder.options)
        for kernel, recorder in kernels.values()
        if hasattr(recorder, "options")  # what was launched
    ]
    seconds = time.perf_counter() - start
    code = hashlib.sha256(compiled[0].asm["cubin"]).hexdigest()
    print(json.dumps({"found": found, "sha256": code, "seconds": seconds}))


if __name__ == "__main__":
    main()
