"""What every way of bench-model calls, and the numbers that come of it.

Needs torch, imported when a function is called. Input: a torch model, the arguments of its forward
and a setting; output: calls to time, and tensors to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ..errors import visible
from ..network.preference import allows_tf32
from ..network.trace import copied


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How every way runs.

    Attributes:
        device: "cuda", or "cpu" for Triton's interpreter.
        autocast: "float16" or "bfloat16" for autocast of that dtype, None without.
        channels_last: model and inputs are in channels_last.
        train: what is timed is forward and backward in train mode, not forward in eval mode.
        rounds: how often each way is timed.
    """

    device: str
    autocast: str | None = None
    channels_last: bool = False
    train: bool = False
    rounds: int = 50


@dataclass(frozen=True, slots=True)
class Run:
    """What every way is called with, and how."""

    inputs: list[Any]
    setting: Setting

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a call."""
        import torch

        if self.setting.autocast is None:
            return nullcontext()
        found: AbstractContextManager[Any] = torch.autocast(
            self.setting.device, getattr(torch, self.setting.autocast)
        )
        return found

    def forward(self, model: Any) -> Any:
        """Return what a forward without gradients returns."""
        import torch

        with torch.no_grad(), self.autocast():
            return model(*self.inputs)

    def gradients(self, model: Any) -> tuple[list[Any], list[Any]]:
        """Return outputs, and gradients of the parameters that have one.

        The loss is the sum of the outputs' squares, over the root of their number: without that
        gradients in float16 overflow, over their number itself they underflow.
        """
        import torch

        with self.autocast():
            outputs = _floats(model(*self.inputs))
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in outputs]
        loss = sum(each.abs().square().sum() / each.numel() ** 0.5 for each in wide)
        parameters = [each for each in model.parameters() if each.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return outputs, [each for each in found if each is not None]

    def numbers(self, model: Any) -> list[Any]:
        """Return what is compared: outputs in eval mode, and all gradients as one vector."""
        import torch

        torch.manual_seed(0)  # for a model that draws random numbers
        model.eval()
        if not self.setting.train:
            return _floats(self.forward(model))
        outputs, gradients = self.gradients(model)
        vector = torch.cat([each.flatten().double() for each in gradients])
        return [*(each.detach() for each in outputs), vector]

    def timed(self, model: Any) -> Callable[[], object]:
        """Return what is timed, with the model in the mode for it."""
        model.train(self.setting.train)
        call = self.gradients if self.setting.train else self.forward
        return lambda: call(model)


def _floats(output: Any) -> list[Any]:
    """Return the floating-point and complex tensors of an output; raises TypeError without any."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    leaves = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    found = [each for each in leaves if each.is_floating_point() or each.is_complex()]
    if not found:
        raise TypeError("it returns no floating-point tensor, alone or in a tuple, list or dict")
    return found


def placed(model: Any, setting: Setting) -> Any:
    """Move a model to the device and layout of a setting."""
    model.to(setting.device)
    for each in (*model.parameters(), *model.buffers()) if setting.channels_last else ():
        each.data = _in_channels_last(each.data)
    return model


def moved(value: Any, setting: Setting) -> Any:
    """Return an input on the device and in the layout of a setting."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        return value
    moved = value.detach().to(setting.device)
    return _in_channels_last(moved) if setting.channels_last else moved


def _in_channels_last(tensor: Any) -> Any:
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kind = formats.get(tensor.dim())
    return tensor if kind is None else tensor.contiguous(memory_format=kind)


# ---- numbers ----


def exact_numbers(model: Any, run: Run) -> tuple[list[Any] | None, str | None]:
    """Return the numbers of the model in float64; if it has none, None and the reason."""
    from torch import Tensor

    inputs = [
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in run.inputs
    ]
    exact = Run(inputs, replace(run.setting, autocast=None))
    try:
        return exact.numbers(copied(model).double()), None
    except Exception as error:  # whatever a model does with another dtype
        return None, said(error)


def relative_error(got: list[Any], want: list[Any]) -> float:
    """Return the largest error of tensors, each relative to the norm of what it should be.

    A NaN counts as the largest.

    Raises:
        ValueError: the tensors are not as many as they should be, or of another shape.
    """
    if [each.shape for each in got] != [each.shape for each in want]:
        raise ValueError("the outputs have other shapes than the model's own")
    import torch

    errors = []
    for each, model in zip(got, want, strict=True):
        exact = model.to(torch.complex128 if model.is_complex() else torch.float64)
        apart, norm = float((each - exact).norm()), float(exact.norm())
        errors.append(apart / norm if norm else apart)
    return float(max(errors, key=lambda error: (math.isnan(error), error)))


def roundoff(model: Any, run: Run) -> float:
    """Return the unit roundoff of the coarsest dtype that torch computes a way in."""
    import torch

    tensors = (*model.parameters(), *(x for x in run.inputs if isinstance(x, torch.Tensor)))
    dtypes = {each.dtype for each in tensors if each.is_floating_point()}
    if run.setting.autocast is not None:
        dtypes.add(getattr(torch, run.setting.autocast))
    if torch.float32 in dtypes and allows_tf32():
        dtypes.add(torch.float16)  # TF32 has as many bits
    return float(max((torch.finfo(each).eps for each in dtypes), default=0.0)) / 2


def said(error: Exception) -> str:
    """Return an exception as a line of a report."""
    return f"{type(error).__name__}: {visible(' '.join(str(error).split()), 300)}"
