"""Compiling an emitted file to machine code, with no GPU.

Beside the stages; needs triton, which the compiler does not, but no torch. Input: the text of an
emitted file and a compute capability; output: a `Binary`, the machine code and what it takes.
Signature, constants and launch options are those of the file's own launch, read from its text.
"""

from __future__ import annotations

import ast
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

from ..rendering.render import KernelSource
from ..tables.targets import GpuTarget
from .workers import spawn_context

KERNEL = "_kernel"  # what the kernel's name ends with
STAGES = "_num_stages"  # what decides about the stages of a launch, templates/parts/stages.jinja
HOPPER = 9
_POINTER = "_ptr"
_FLAG = "IS_"  # what an argument starts with that is True or False; compiled as False


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """The machine code of one kernel, and what it takes.

    Attributes:
        registers: registers a thread.
        spills: bytes a thread keeps in local memory.
        shared: bytes of shared memory a program.
        num_warps: warps a program.
        cubin: the machine code.
        kernel: the kernel's name in it.
        key: hash under which Triton's cache has it: of the kernel's source, signature, options,
            architecture and Triton itself.
        metadata: what Triton keeps beside it, as it stands in JSON.
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
    """The launch of an emitted file: what its kernel is compiled for.

    Attributes:
        kernel: the kernel's name.
        arguments: those the launch gives, by their names in the kernel; pointers end in `_ptr`,
            tensor descriptors in `_desc`.
        options: launch options, such as num_warps.
    """

    kernel: str
    arguments: tuple[str, ...]
    options: dict[str, Any]


def module_name(source: KernelSource) -> str:
    """Return the name to load a file under, so that a profiler can tell it from others."""
    return f"convgen_{source.sha256[:16]}"


def read_launches(text: str) -> tuple[Launch, ...]:
    """Return the launch of each kernel of the emitted file `text`, the layer's first."""
    tree = ast.parse(text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if node.name.endswith(KERNEL)]
    return tuple(_launch(tree, kernel) for kernel in kernels)


def _launch(tree: ast.Module, kernel: ast.FunctionDef) -> Launch:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    call = next(node for node in calls if _is_launch(node, kernel.name))
    given = kernel.args.args[: len(call.args)]
    options = {str(pair.arg): _option(pair.value) for pair in call.keywords}
    return Launch(kernel.name, tuple(argument.arg for argument in given), options)


def _option(value: ast.expr) -> Any:
    """Return a launch option, as it is planned where a function of the file has the last word."""
    planned = value.args[0] if isinstance(value, ast.Call) else value
    return ast.literal_eval(planned)


def _is_launch(call: ast.Call, kernel: str) -> bool:
    """Whether `call` is `kernel[grid](…)`."""
    value = call.func.value if isinstance(call.func, ast.Subscript) else None
    return isinstance(value, ast.Name) and value.id == kernel


def compile_text(text: str, dtype: str, name: str, capability: int, kernel: int = 0) -> Binary:
    """Compile a kernel of the emitted file `text` for a compute capability such as 89.

    Sizes that the file leaves open are compiled for as numbers below 2**31, pointers as multiples
    of 16, as those that torch allocates are; an autotuned file with the first of its configs.

    Clears TRITON_INTERPRET for this process, so triton must not be imported yet where it is set.

    Args:
        text: the emitted file.
        dtype: its spec's.
        name: what line information calls it.
        capability: ten times the major version plus the minor one.
        kernel: its number in the file: 0 is the layer's; then come that of the input's gradient,
            those that pack the weights of the two, and that of the input's copy, if it has them.
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
    names = _device_part(text, name)
    function = names[launch.kernel]
    configs = getattr(function, "configs", None)  # of a kernel that is tuned, and of no other
    tensor = MockTensor(getattr(tl, dtype))
    given: dict[str, Any] = {a: tensor if a.endswith(_POINTER) else 2 for a in launch.arguments}
    given |= {a: False for a in launch.arguments if a.startswith(_FLAG)}
    for argument, box in _read_boxes(text, names).items():
        if argument in given:
            strides = [16] * (len(box) - 1) + [1]  # any, as the shape: machine code has neither
            given[argument] = TensorDescriptor(tensor, box, strides, box)
    arguments = list(given.values())
    options = launch.options | (configs[0].all_kwargs() if configs else {})
    if f"def {STAGES}(" in text and capability // 10 == HOPPER and _overtakes(triton.__version__):
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
    """Whether that Triton may let loads overwrite what products read, as the file has it."""
    return tuple(map(int, version.split(".")[:2])) < (3, 9)


def _device_part(text: str, name: str) -> dict[str, Any]:
    """Run what of the emitted file `text` the kernel is made of; return the names it defines.

    The rest, the wrapper, needs torch. Lines keep their numbers, which Triton's key depends on.
    """
    tree = ast.parse(text)
    body = [node for node in tree.body if _is_for_device(node)]
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": Path(name).stem}
    exec(compile(ast.Module(body, []), name, "exec"), names)
    return names


def _read_boxes(text: str, names: dict[str, Any]) -> dict[str, list[int]]:
    """Return the boxes of the descriptors that `text` makes, by name; their blocks are `names`."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made, (name,) = node.value, node.targets
            if isinstance(made.func, ast.Name) and made.func.id == "TensorDescriptor":
                found[ast.unparse(name)] = eval(ast.unparse(made.args[3]), dict(names))
    return found


def _is_for_device(node: ast.stmt) -> bool:
    """Whether a statement imports triton, defines one of its constants or configs, or a kernel."""
    if isinstance(node, ast.Import):
        return all(alias.name.startswith("triton") for alias in node.names)
    if isinstance(node, ast.Assign):
        return any(word in ast.unparse(node.value) for word in ("tl.constexpr(", "triton.Config("))
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(ast.unparse(decorator).startswith("triton.") for decorator in decorators)


def compile_for(source: KernelSource, target: GpuTarget, kernel: int = 0) -> Binary:
    """Compile a kernel of `source` for a target; by its number, as of `compile_text`."""
    name, capability = f"{module_name(source)}.py", capability_of(target.arch)
    return compile_text(source.text, source.plan.spec.dtype, name, capability, kernel)


def capability_of(arch: str) -> int:
    """Return the number in the name of an architecture: 89 for ``sm_89``."""
    return int(arch.removeprefix("sm_"))


def compilers(spared: int = 0) -> ProcessPoolExecutor:
    """Return an executor with a process for each core but `spared`, at least one.

    They start afresh: a process that has Triton for interpreting cannot compile.
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
