"""Times on this machine's GPU for the tuner: tiles of a layer, its gradient, torch's operator.

Beside the stages; needs torch and triton, imported when a function is called. Input: a spec, a
target and tiles; output: medians in milliseconds. What is timed is first compared with torch.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

from ..compiler import compile_kernel
from ..geometry.gradient import input_gradient
from ..geometry.tile import Tile
from ..language.spec import LAYOUTS, MEMORY_FORMATS, ConvTransposeSpec
from ..planning.choices import Choices, key_of
from ..planning.plan import Measured, MeasuredGradient, MeasuredTorch
from ..tables.targets import GpuTarget

MOST_ERROR = 1e-2  # relative; rounding errors are far below it, those of wrong kernels far above


def torch_times(spec: ConvTransposeSpec, device: str) -> MeasuredTorch:
    """Return the times of torch's operator on a device, in TF32 only if the spec's precision is."""
    from triton.testing import do_bench

    from ..execution.loading import laid_out
    from ..execution.standin import concrete
    from .cases import Way
    from .worker import draw, torch_call

    sized = concrete(spec, small=False)
    x, *others = draw(sized, device)
    x = laid_out(x, spec.layout)
    times: dict[str, float] = {}
    for layout in LAYOUTS if spec.rank in MEMORY_FORMATS else (spec.layout,):
        way = Way(name=layout, channels_last=layout == "channels_last")
        call = torch_call(sized, way, x, *others)
        with _as_precise(spec):
            times[layout] = do_bench(call, warmup=5, rep=80, return_mode="median")
        if layout != spec.layout:
            turn = functools.partial(laid_out, x, layout)
            times[layout] += do_bench(turn, warmup=5, rep=40, return_mode="median")
    own, best = times[spec.layout], min(times.values())
    return MeasuredTorch(float(f"{own:.4g}"), float(f"{best:.4g}"))


def gradient_times(
    spec: ConvTransposeSpec, target: GpuTarget, tile: Tile, back_tile: Tile, device: str
) -> tuple[float, float]:
    """Return the times of the input gradient in milliseconds: the kernel's and torch's.

    The kernel has the tile `back_tile`. Its time includes packing the weight, as each training step
    needs it: the optimizer changes the weight.
    """
    import torch
    from triton.testing import do_bench

    from ..execution.cubin import module_name
    from ..execution.loading import laid_out, load_module
    from ..execution.standin import concrete
    from .worker import draw, flipped

    layer = concrete(spec, small=False)
    back = input_gradient(layer)
    grad, turned, _ = draw(back, device)
    weight, x = flipped(back, turned), grad.new_empty(layer.input)
    grad, x = laid_out(grad, spec.layout), laid_out(x, spec.layout)
    # Times by which the gradient's kernel is faster than torch, so that the file has that kernel.
    used = Measured(tile, 0.0, 1, "", MeasuredGradient(back_tile, 0.0, 1.0))
    choices = Choices(target.name, {key_of(spec): used})
    source = compile_kernel(spec, target, choices=choices)
    geometry = (layer.stride, layer.padding, layer.dilation, True, layer.output_padding)
    with tempfile.TemporaryDirectory() as folder:
        module = load_module(source.text, module_name(source), Path(folder))
        calls = (
            lambda: module._input_gradient(grad, weight),
            lambda: torch.ops.aten.convolution_backward(
                grad, x, weight, None, *geometry, layer.groups, (True, False, False)
            )[0],
        )
        with _as_precise(spec):
            _check(calls[0](), calls[1](), f"the gradient's {back_tile} of {spec}")
            times = [do_bench(call, warmup=5, rep=80, return_mode="median") for call in calls]
    return float(f"{times[0]:.4g}"), float(f"{times[1]:.4g}")


def _as_precise(spec: ConvTransposeSpec) -> contextlib.AbstractContextManager[None]:
    """Let torch's convolutions use TF32 in the block only if the spec's precision is TF32."""
    from torch.backends import cudnn

    allowed: contextlib.AbstractContextManager[None] = cudnn.flags(
        enabled=True, allow_tf32=spec.precision == "tf32"
    )
    return allowed


def _check(output: Any, wanted: Any, name: str) -> None:
    """Raise RuntimeError if the relative error of `output` exceeds MOST_ERROR."""
    error = float((output - wanted).norm() / wanted.norm())
    if not error <= MOST_ERROR:
        raise RuntimeError(f"{name} is wrong: relative error {error:.2e}")


class TileTimer:
    """Times the tiles of one spec, all on the same data."""

    def __init__(self, spec: ConvTransposeSpec, target: GpuTarget) -> None:
        from ..execution.loading import laid_out
        from ..execution.standin import concrete
        from .cases import WAYS
        from .worker import draw, torch_call

        self.spec, self.target = spec, target
        self.folder = tempfile.TemporaryDirectory()
        sized = concrete(spec, small=False)
        self.x, self.weight, self.bias = draw(sized, "cuda")
        self.wanted = torch_call(sized, WAYS["default"], self.x, self.weight, self.bias)()
        self.x = laid_out(self.x, spec.layout)

    def milliseconds(self, tile: Tile, repeat: int) -> Any:
        """Return the median time of `tile` in ms, None if the GPU lacks resources to run it.

        `repeat` is the time in ms for which the kernel is called repeatedly. Raises RuntimeError if
        the output is wrong.
        """
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        from ..execution.cubin import module_name
        from ..execution.loading import load_module

        source = compile_kernel(self.spec, self.target, tile)
        module = load_module(source.text, module_name(source), Path(self.folder.name))
        packed = module.pack_weight(self.weight)
        try:
            output = module._launch(self.x, packed, self.bias)
        except OutOfResources:
            return None
        _check(output, self.wanted, f"{tile} of {self.spec}")
        return do_bench(
            # Skip the public function's checks: they can take longer than a tiny layer's kernel.
            lambda: module._launch(self.x, packed, self.bias),
            warmup=5,
            rep=repeat,
            return_mode="median",
        )
