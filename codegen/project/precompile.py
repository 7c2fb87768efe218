"""Precompiled kernels: `aot` of `[tool.convgen]` ships machine code beside the generated files.

Part of a build; needs triton, but no torch and no GPU. Input: a `Table` and the text of each
generated file; output: a `Cubin` for each file and architecture, which the file passes to Triton at
run time.

Triton compiles in separate processes, because this one may be a build backend with Triton settings
of its own, which must not affect the code. Every build compiles and compares bytes, even
`build --check`: the hashes stored with the code are not signed, so whoever replaces the code can
replace its hashes too.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ProjectError
from ..execution.cubin import capability_of, compile_text, cores, read_launches
from ..rendering.render import RUNTIME
from ..tables.targets import TARGETS, find_target
from .table import Kernel, Table

CUBIN = ".cubin"
# A build appends this to the machine code, so that later builds recognise the file as generated.
_SEAL = re.compile(rb"\nconvgen sha256 ([0-9a-f]{64})\n\Z")
# The only environment variables that the compiler processes get: others can change the code.
_ENVIRONMENT = (
    *("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR"),
    *("SYSTEMROOT", "TEMP", "TMP", "USERPROFILE"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One generated file to compile for one architecture."""

    kernel: Kernel
    arch: str

    @property
    def path(self) -> Path:
        """Path of the machine code: beside the generated file, for example ``up.sm_90.cubin``."""
        return self.kernel.path.with_name(f"{self.kernel.path.stem}.{self.arch}{CUBIN}")


@dataclass(frozen=True, slots=True)
class Cubin:
    """A file of machine code, and its manifest row, which the generated file needs to load it.

    It has the code of all kernels of a generated file one after the other, of the sizes and in the
    order that the row says.
    """

    content: bytes
    row: dict[str, Any]


def is_sealed(content: bytes) -> bool:
    """Whether `content` ends with the line that builds append to machine code."""
    return _SEAL.search(content) is not None


def seal_is_intact(content: bytes) -> bool:
    """Whether `content` is machine code, unchanged since a build wrote it."""
    found = _SEAL.search(content)
    return found is not None and _digest(content[: found.start()]) == found[1].decode()


def jobs(table: Table) -> list[Job]:
    """Return the jobs of `aot`: each file with each architecture that the package uses it on."""
    return [
        Job(kernel, arch)
        for kernel in table.kernels
        for arch in table.aot
        if _serves(kernel, arch, table)
    ]


def _serves(kernel: Kernel, arch: str, table: Table) -> bool:
    """Whether the package may pick the file of `kernel` on a GPU of `arch` (package.py.jinja)."""

    def distance(other: Kernel) -> tuple[int, int]:
        planned = find_target(other.target)
        missing = max(0, planned.shared_per_block - _shared(arch))
        return missing, abs(capability_of(planned.arch) - capability_of(arch))

    rivals = [other for other in table.kernels if other.name == kernel.name]
    return distance(kernel) == min(map(distance, rivals))


def _shared(arch: str) -> int:
    """Return the shared memory that a block can have on an architecture, in bytes."""
    return max(target.shared_per_block for target in TARGETS if target.arch == arch)


def precompile(table: Table, texts: dict[Path, str]) -> dict[Path, Cubin]:
    """Return the machine code files that `table` asks for, by path.

    Args:
        table: the project's table.
        texts: text of each generated file, by path.

    Raises:
        ProjectError: triton is not installed, or a kernel cannot be precompiled.
    """
    wanted = jobs(table)
    if not wanted:
        return {}
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # None for a folder without __init__.py
        raise ProjectError(
            f"cannot make or check the machine code that aot asks for ({len(wanted)} files): this "
            "needs triton, which is not installed; add it to requires of [build-system]",
            "aot",
        )
    for job in wanted:
        if job.kernel.spec.autotune != "none":
            raise ProjectError(
                f"aot cannot precompile {job.kernel.name}: autotune="
                f"{job.kernel.spec.autotune} compiles at run time, on the GPU",
                "aot",
            )
    return {job.path: cubin for job, cubin in zip(wanted, _compiled(wanted, texts), strict=True)}


def _python() -> str:
    """Return version and platform of this Python: Triton's cache key depends on its build."""
    return f"{sys.implementation.cache_tag} {sys.platform} {platform.machine()}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _compiled(jobs: list[Job], texts: dict[Path, str]) -> list[Cubin]:
    """Compile `jobs` in parallel; return a `Cubin` for each, in order."""
    shares = min(cores(), len(jobs))
    with ThreadPoolExecutor(shares or 1) as pool:
        mine = (jobs[share::shares] for share in range(shares))
        parts = list(pool.map(lambda share: _run(share, texts), mine))
    return [parts[n % shares][n // shares] for n in range(len(jobs))]


def _run(jobs: list[Job], texts: dict[Path, str]) -> list[Cubin]:
    """Compile `jobs` in one process with Triton's default settings and an empty cache."""
    lines = [
        [
            *(texts[job.kernel.path], job.kernel.spec.dtype, job.kernel.path.name, job.arch),
            texts.get(job.kernel.path.with_name(RUNTIME)),
        ]
        for job in jobs
    ]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "convgen.project.precompile"],
                input="\n".join(map(json.dumps, lines)),
                capture_output=True,
                text=True,
                encoding="utf-8",
                env=environment | {"TRITON_CACHE_DIR": cache},
                check=False,
            )
    except OSError as error:
        raise ProjectError(f"cannot precompile: {error.strerror}", "aot") from None
    results = done.stdout.splitlines()
    if done.returncode != 0 or len(results) != len(jobs):
        job = jobs[min(len(results), len(jobs) - 1)]
        reason = (done.stderr.strip().splitlines() or ["the compiler process was killed"])[-1]
        raise ProjectError(f"cannot precompile {job.kernel.path.name} for {job.arch}: {reason}")
    pairs = zip(jobs, map(json.loads, results), strict=True)
    return [_cubin(job, texts[job.kernel.path], result) for job, result in pairs]


def _cubin(job: Job, text: str, result: dict[str, Any]) -> Cubin:
    code = b"".join(map(base64.b64decode, result.pop("cubins")))
    limit = _shared(job.arch)
    shared = max(kernel["metadata"]["shared"] for kernel in result["kernels"])
    if shared > limit:
        raise ProjectError(
            f"{job.kernel.name}, planned for {job.kernel.target}, takes {shared} bytes of shared "
            f"memory and {job.arch} has {limit}: remove {job.arch} from aot, or add a GPU of "
            "that architecture to target",
            "aot",
        )
    content = code + f"\nconvgen sha256 {_digest(code)}\n".encode()
    source = {"source": job.kernel.path.name, "source_sha256": _digest(text.encode())}
    made = {"arch": job.arch, "python": _python(), **result}
    return Cubin(content, source | made | {"sha256": _digest(content)})


def main() -> None:
    """Compile JSON lines `[text, dtype, name, architecture, runtime]`; print a line for each.

    The last of a line is the text of `_runtime.py`, None if files share none.
    """
    import triton

    # Line information would contain paths of this machine. It is disabled through the knob because
    # TRITON_DISABLE_LINE_INFO in the environment would become part of the cache key, and the key
    # must equal the one that Triton computes at run time.
    triton.knobs.propagate_env = False
    triton.knobs.compilation.disable_line_info = True
    for line in sys.stdin:
        text, dtype, name, arch, runtime = json.loads(line)
        kernels, codes = [], []
        for number in range(len(read_launches(text))):
            binary = compile_text(text, dtype, name, capability_of(arch), number, runtime)
            # extern_libs has paths of this machine; the launcher does not read it.
            metadata = binary.metadata | {"extern_libs": []}
            row = {"kernel": binary.kernel, "key": binary.key, "size": len(binary.cubin)}
            kernels.append(row | {"metadata": metadata})
            codes.append(base64.b64encode(binary.cubin).decode())
        result = {"triton": triton.__version__, "kernels": kernels, "cubins": codes}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
