"""Compiling an emitted file to machine code, with no GPU.

Beside the stages; needs triton but not torch. Input: the text of an emitted file and a compute
capability; output: a `Binary`, the machine code and its resources. Signature, constants and launch
options are those of the launch in the file, read from its text.
"""

from __future__ import annotations

import ast
import functools
import json
import linecache
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rendering.render import RUNTIME, KernelSource
from ..tables.targets import GpuTarget
from .workers import spawn_context

KERNEL = "_kernel"  # suffix of a kernel's name
STAGES = "_num_stages"  # sets the stages of a launch (templates/runtime.py)
HOPPER = 9
_POINTER = "_ptr"
_FLAG = "IS_"  # prefix of boolean arguments, which are compiled as False


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """The machine code of one kernel, and its resources.

    Attributes:
        registers: registers per thread.
        spills: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        num_warps: warps per program.
        cubin: the machine code.
        kernel: name of the kernel in `cubin`.
        key: key of the kernel in Triton's cache: hash of its source, signature, options,
            architecture and Triton version.
        metadata: the JSON object that Triton stores beside the cubin.
    """

    registers: int
    spills: int
    shared: int
    num_warps: int
    cubin: bytes
    kernel: str
    key: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Launch:
    """The launch of a kernel in an emitted file.

    Attributes:
        kernel: name of the kernel.
        arguments: parameters that the launch passes, by their names in the kernel; pointers end in
            `_ptr`, tensor descriptors in `_desc`.
        options: launch options, such as num_warps.
    """

    kernel: str
    arguments: tuple[str, ...]
    options: dict[str, Any]


def module_name(source: KernelSource) -> str:
    """Return the module name for an emitted file; it is unique, so that profiles are readable."""
    return f"convgen_{source.sha256[:16]}"


@functools.lru_cache(maxsize=2)  # a file's kernels are compiled one after the other
def read_launches(text: str) -> tuple[Launch, ...]:
    """Return the launch of each kernel of the emitted file `text`, the layer's first.

    Nobody changes what it returns.
    """
    tree = _parsed(text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if node.name.endswith(KERNEL)]
    calls: dict[str | None, ast.Call] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls.setdefault(_launched(node), node)
    return tuple(_launch(calls[kernel.name], kernel) for kernel in kernels)


@functools.lru_cache(maxsize=2)
def _parsed(text: str) -> ast.Module:
    """Return the tree of an emitted file; nobody changes it."""
    return ast.parse(text)


def _launch(call: ast.Call, kernel: ast.FunctionDef) -> Launch:
    given = kernel.args.args[: len(call.args)]
    options = {str(pair.arg): _option(pair.value) for pair in call.keywords}
    return Launch(kernel.name, tuple(argument.arg for argument in given), options)


def _option(value: ast.expr) -> Any:
    """Return the value of a launch option; of `function(value)`, the planned value."""
    planned = value.args[0] if isinstance(value, ast.Call) else value
    return ast.literal_eval(planned)


def _launched(call: ast.Call) -> str | None:
    """Return the name of the kernel if `call` is `kernel[grid](…)`."""
    value = call.func.value if isinstance(call.func, ast.Subscript) else None
    return value.id if isinstance(value, ast.Name) else None


def compile_text(
    text: str,
    dtype: str,
    name: str,
    capability: int,
    kernel: int = 0,
    runtime: str | None = None,
) -> Binary:
    """Compile a kernel of the emitted file `text` for a compute capability such as 89.

    Sizes left to run time are assumed to be below 2**31, and pointers to be multiples of 16, as
    those of torch's allocator are. Of an autotuned file, the first config is compiled.

    Clears TRITON_INTERPRET in this process; if it was set, triton must not be imported yet.

    Args:
        text: the emitted file.
        dtype: dtype of its spec.
        name: file name for line information.
        capability: 10 * major + minor.
        kernel: number of the kernel in the file: 0 for the layer, then, if they exist, the input's
            gradient, the packing of the weight for each of the two, and the copy of the input.
        runtime: text of the `_runtime.py` from which the file imports; None if it is complete.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    class Stub:
        """A driver that knows its target and launches nothing."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    launch = read_launches(text)[kernel]
    shared = {} if runtime is None else _device_part(runtime, RUNTIME, {})
    names = _device_part(text, name, shared)
    function = names[launch.kernel]
    configs = getattr(function, "configs", None)  # only autotuned kernels have configs
    tensor = MockTensor(getattr(tl, dtype))
    given: dict[str, Any] = {a: tensor if a.endswith(_POINTER) else 2 for a in launch.arguments}
    given |= {a: False for a in launch.arguments if a.startswith(_FLAG)}
    for argument, sizes in _read_boxes(text).items():
        if argument in given:
            box = eval(sizes, dict(names))
            strides = [16] * (len(box) - 1) + [1]  # arbitrary: machine code has no strides
            given[argument] = TensorDescriptor(tensor, box, strides, box)
    arguments = list(given.values())
    options = launch.options | (configs[0].all_kwargs() if configs else {})
    if f"{STAGES}(" in text and capability // 10 == HOPPER and _overtakes(triton.__version__):
        options["num_stages"] = 1
    jit = function.fn if configs else function
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Stub())
    try:
        compiled = jit.warmup(*arguments, grid=(1,), **options)
    finally:
        triton.runtime.driver._active = before
    return _binary(compiled, triton)


def _overtakes(version: str) -> bool:
    """Whether this Triton may let loads overwrite operands of running products (before 3.9)."""
    return tuple(map(int, version.split(".")[:2])) < (3, 9)


def _device_part(text: str, name: str, shared: dict[str, Any]) -> dict[str, Any]:
    """Run the statements of an emitted file that define its kernels; return their names.

    `shared` has what they import from a runtime. The other statements, the wrapper, need torch.
    Line numbers stay, as Triton's key depends on them.
    """
    body = [node for node in _parsed(text).body if _is_for_device(node)]
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names: dict[str, Any] = {**shared, "__name__": Path(name).stem}
    exec(compile(ast.Module(body, []), name, "exec"), names)
    return names


@functools.lru_cache(maxsize=2)
def _read_boxes(text: str) -> dict[str, str]:
    """Return the expression of the box of each descriptor in `text`, by name."""
    found = {}
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = node.value
            if isinstance(made.func, ast.Name) and made.func.id == "TensorDescriptor":
                found[ast.unparse(node.targets[0])] = ast.unparse(made.args[3])
    return found


def _is_for_device(node: ast.stmt) -> bool:
    """Whether a statement imports triton, or defines a constexpr, a config or a jit function."""
    if isinstance(node, ast.Import):
        return all(alias.name.startswith("triton") for alias in node.names)
    if isinstance(node, ast.Assign):
        return any(word in ast.unparse(node.value) for word in ("tl.constexpr(", "triton.Config("))
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(ast.unparse(decorator).startswith("triton.") for decorator in decorators)


def compile_for(source: KernelSource, target: GpuTarget, kernel: int = 0) -> Binary:
    """Compile a kernel of `source` for a target; `kernel` is a number as for `compile_text`."""
    name, capability = f"{module_name(source)}.py", capability_of(target.arch)
    return compile_text(source.text, source.plan.spec.dtype, name, capability, kernel)


def capability_of(arch: str) -> int:
    """Return the compute capability of an architecture as a number: 89 for ``sm_89``."""
    return int(arch.removeprefix("sm_"))


def compilers(spared: int = 0) -> ProcessPoolExecutor:
    """Return an executor with one process per core except `spared` cores, at least one.

    Processes are spawned, not forked: once Triton is set to interpret, a process cannot compile.
    """
    return ProcessPoolExecutor(max(1, cores() - spared), mp_context=spawn_context())


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _binary(compiled: Any, triton: Any) -> Binary:
    """Read the resources of a compiled kernel with the cuobjdump that Triton ships."""
    code, metadata = compiled.asm["cubin"], compiled.metadata
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code)
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    path = next(p for file, p in compiled.metadata_group.items() if file.endswith(".json"))
    return Binary(
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        cubin=code,
        kernel=metadata.name,
        key=compiled.hash,
        metadata=json.loads(Path(path).read_text()),
    )
