"""The driver of bench-model: times a user's model as it is, replaced, compiled, and both.

Needs torch and triton, imported when a function is called. Input: a torch model and the arguments
of its forward; output: measurements, a dictionary of JSON types. All ways run in this process, each
on a copy of the model, in turns, so that a GPU that slows down does so for all of them.
model_report.py judges the measurements and prints them.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import replace_layers, report
from ..errors import SpecError
from ..execution.local_gpu import local_target
from ..network.calls import random_restored, user_code
from ..network.layers import check_module, transposed
from ..network.trace import check_inputs, copied
from ..version import __version__
from .model_report import TORCH
from .model_run import Run, Setting, exact_numbers, moved, placed, relative_error, roundoff, said

REPLACED, BOTH = "replaced", "replaced_compiled"
WAYS = (TORCH, REPLACED, "compiled", BOTH, "backend_convgen")
BACKENDS = {"compiled": "inductor", BOTH: "inductor", "backend_convgen": "convgen"}
WARMUPS = 3  # calls before a way is timed, beside the one whose numbers are compared
PROFILED = 3  # calls that the profiler sees
RECOMPILATIONS = 64  # of a function: the ways share the code of the model's forward
OPERATORS = ("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")


def steps(setting: Setting) -> int:
    """Return how often `measure` calls `advance`."""
    return len(WAYS) + setting.rounds


def machine(device: str) -> dict[str, Any]:
    """Return device, versions and date of a report."""
    from datetime import UTC, datetime

    import torch
    import triton

    gpu = device == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "convgen": __version__,
        "device": torch.cuda.get_device_name() if gpu else device,
        "target": local_target().name if gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
    }


def measure(
    model: Any,
    inputs: Sequence[Any],
    setting: Setting,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[str], object] = lambda item: None,
) -> dict[str, Any]:
    """Time every way of a model, and compare its numbers with those of the model in float64.

    Numbers are compared in eval mode: outputs, and with `train` the gradients of the parameters.

    Args:
        model: a `torch.nn.Module`; it is moved to the device and stays in eval mode.
        inputs: the positional arguments of its forward.
        setting: how every way runs.
        clock: returns seconds.
        advance: called with a label after each of the `steps`.

    Returns:
        `ways`: for each either `ms` (median wall time of a call), `samples` (all), `device_ms` (sum
        of the durations of its kernels) and `relative_error` (None if not finite), or `failed`, a
        message. `layers`: those of the replaced model as `convgen.report` has them. `calls` and
        `share`: how many transposed convolutions torch computes in a forward, and their part of its
        device time. `reference`: "float64", or "torch" if the model does not run in float64, for
        the reason `no_float64`. `roundoff`: that of the coarsest dtype that torch computes in.
        Times on a GPU are None where the profiler sees no kernels.

    Raises:
        SpecError: the model or an input is wrong, or has no transposed convolution.
        ModelError: the model's own code raised, as torch runs it.
    """
    import torch

    check_module(model)
    check_inputs(model, inputs)
    _check_parameters(model, setting)
    gpus = [torch.cuda.current_device()] if setting.device == "cuda" else []
    with random_restored(gpus), torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        with user_code(f"moving the model to {setting.device}"):
            model = placed(model.eval(), setting)
            run = Run([moved(each, setting) for each in inputs], setting)
        want, no_float64 = exact_numbers(model, run)
        got, seen = _as_it_is(model, run)
        models, rows = {}, {}
        for name in WAYS:
            models[name], rows[name] = _prepared(name, model, run, got if want is None else want)
            advance(name)
        _time(models, rows, run, clock, advance)
        layers = report(model if models[REPLACED] is None else models[REPLACED])
    return {
        "calls": seen.calls,
        "share": seen.layers_ms / seen.device_ms if seen.device_ms else None,
        "reference": "float64" if want is not None else "torch",
        "no_float64": no_float64,
        "roundoff": roundoff(model, run),
        "ways": rows,
        "layers": [*layers.as_dict()["layers"]],
    }


def _check_parameters(model: Any, setting: Setting) -> None:
    from torch.nn.parameter import is_lazy

    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise SpecError("model has lazy parameters: let FACTORY run it once first", "model")
    if setting.train and not any(each.requires_grad for each in model.parameters()):
        raise SpecError("train needs a model with parameters that require gradients", "train")


# ---- ways ----


def _as_it_is(model: Any, run: Run) -> tuple[list[Any], _Seen]:
    """Return the numbers of torch's model, and what the profiler sees of its forward."""
    made = copied(model)
    with user_code("the model's forward"):
        numbers = run.numbers(made)
    seen = _profiled(lambda: run.forward(made), run.setting)
    if not seen.calls and not transposed(made):
        raise SpecError("the model has no transposed convolution", "model")
    return numbers, seen


def _prepared(name: str, model: Any, run: Run, want: list[Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model of a way, warmed up, with its row; None if it failed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says which layers stay torch's
            made = _built(name, model, run)
            apart = relative_error(run.numbers(made), want)
            call = run.timed(made)
            for _ in range(WARMUPS):
                call()
            device_ms = _profiled(call, run.setting).device_ms
    except Exception as error:  # of a compiler, or out of memory: the other ways go on
        return None, {"failed": said(error)}
    return made, {
        "device_ms": device_ms,
        "relative_error": apart if math.isfinite(apart) else None,
    }


def _built(name: str, model: Any, run: Run) -> Any:
    import torch

    made = copied(model)
    if name in (REPLACED, BOTH):
        with run.autocast():
            replace_layers(made, example_inputs=tuple(run.inputs))
    return torch.compile(made, backend=BACKENDS[name]) if name in BACKENDS else made


# ---- times ----


def _time(
    models: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    run: Run,
    clock: Callable[[], float],
    advance: Callable[[str], object],
) -> None:
    """Time the models in turns; put medians and samples into the rows."""
    calls = {name: run.timed(model) for name, model in models.items() if model is not None}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1, run.setting.rounds + 1):
        for name, call in [*calls.items()]:
            try:
                _synchronize(run.setting)
                begin = clock()
                call()
                _synchronize(run.setting)
                samples[name].append(round(1e3 * (clock() - begin), 6))
            except Exception as error:
                rows[name] = {"failed": said(error)}
                del calls[name]
        advance(f"round {number}")
    for name in calls:
        rows[name] |= {"ms": statistics.median(samples[name]), "samples": samples[name]}


def _synchronize(setting: Setting) -> None:
    import torch

    if setting.device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the profiler saw of a call: device times in ms, and transposed convolutions."""

    device_ms: float | None
    layers_ms: float
    calls: int


def _profiled(call: Callable[[], object], setting: Setting) -> _Seen:
    """Return what a call does on the device: kernels on a GPU, operators on the CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = setting.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    _synchronize(setting)
    # torch 2.11 warns of cycles without acc_events, though there is only one.
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(PROFILED):
            call()
        _synchronize(setting)
    events = found.events()
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    on_device = [each for each in events if each.device_type == kind]
    time_of = "self_device_time_total" if gpu else "self_cpu_time_total"
    whole = sum(getattr(each, time_of) for each in on_device if not each.is_user_annotation)
    layers = [each for each in events if each.name in OPERATORS and _outermost(each)]
    inside = sum(each.device_time_total if gpu else each.cpu_time_total for each in layers)
    scale = 1e3 * PROFILED  # of microseconds
    return _Seen(whole / scale if whole else None, inside / scale, len(layers) // PROFILED)


def _outermost(event: Any) -> bool:
    """Whether no transposed convolution encloses this one: autocast calls the operator again."""
    while (event := event.cpu_parent) is not None:
        if event.name in OPERATORS:
            return False
    return True
