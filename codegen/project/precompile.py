"""Precompiled kernels: `aot` of `[tool.convgen]`, machine code beside the files it was made of.

Part of a build; needs triton, but no torch and no GPU. Input: a `Table`, and the text of each
file; output: a `Cubin` for each file and architecture, which the file hands to Triton at run time.

Triton compiles in processes of their own: build backends may hold anything, and what they set for
Triton must not reach the code. Every build compiles, also one that only checks, and compares bytes:
the hashes beside the code have no key, so whoever swaps the code can write them anew.
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
from ..execution.cubin import capability_of, compile_text, cores
from ..tables.targets import TARGETS, find_target
from .table import Kernel, Table

CUBIN = ".cubin"
# What a build appends to the machine code: by it a later one knows the file for its own.
_SEAL = re.compile(rb"\nconvgen sha256 ([0-9a-f]{64})\n\Z")
# All that compilers are told of the environment: they read far more, which would reach the code.
_ENVIRONMENT = (
    *("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR"),
    *("SYSTEMROOT", "TEMP", "TMP", "USERPROFILE"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A file to compile for an architecture."""

    kernel: Kernel
    arch: str

    @property
    def path(self) -> Path:
        """Where the machine code goes: beside the file, ``up.sm_90.cubin``."""
        return self.kernel.path.with_name(f"{self.kernel.path.stem}.{self.arch}{CUBIN}")


@dataclass(frozen=True, slots=True)
class Cubin:
    """A file of machine code, and its row in the manifest: what the kernel needs to use it."""

    content: bytes
    row: dict[str, Any]


def is_sealed(content: bytes) -> bool:
    """Whether a file has the end that a build gives to machine code."""
    return _SEAL.search(content) is not None


def seal_is_intact(content: bytes) -> bool:
    """Whether a file is machine code as a build wrote it."""
    found = _SEAL.search(content)
    return found is not None and _digest(content[: found.start()]) == found[1].decode()


def jobs(table: Table) -> list[Job]:
    """Return what `aot` asks for: each file for the architectures that it may be chosen on."""
    return [
        Job(kernel, arch)
        for kernel in table.kernels
        for arch in table.aot
        if _serves(kernel, arch, table)
    ]


def _serves(kernel: Kernel, arch: str, table: Table) -> bool:
    """Whether the package may choose the file of `kernel` on a GPU of `arch` (package.py.jinja)."""

    def distance(other: Kernel) -> tuple[int, int]:
        planned = find_target(other.target)
        missing = max(0, planned.shared_per_block - _shared(arch))
        return missing, abs(capability_of(planned.arch) - capability_of(arch))

    rivals = [other for other in table.kernels if other.name == kernel.name]
    return distance(kernel) == min(map(distance, rivals))


def _shared(arch: str) -> int:
    """Return the bytes of shared memory that a block can have on an architecture."""
    return max(target.shared_per_block for target in TARGETS if target.arch == arch)


def precompile(table: Table, texts: dict[Path, str]) -> dict[Path, Cubin]:
    """Return the machine code that `table` asks for, by the path that it goes to.

    Args:
        table: the project's.
        texts: the files' text.

    Raises:
        ProjectError: Triton is not here, or a kernel cannot be precompiled.
    """
    wanted = jobs(table)
    if not wanted:
        return {}
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a mere folder of that name has none
        raise ProjectError(
            f"cannot make or check the machine code that aot asks for ({len(wanted)} files): it "
            "needs triton, which is not installed here; name it in requires of [build-system]",
            "aot",
        )
    for job in wanted:
        if job.kernel.spec.autotune != "none":
            raise ProjectError(
                f"aot cannot precompile {job.kernel.name}: autotune="
                f"{job.kernel.spec.autotune} compiles on the GPU at hand",
                "aot",
            )
    return {job.path: cubin for job, cubin in zip(wanted, _compiled(wanted, texts), strict=True)}


def _python() -> str:
    """Return the kind of Python that Triton is built for; its key depends on that build."""
    return f"{sys.implementation.cache_tag} {sys.platform} {platform.machine()}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _compiled(jobs: list[Job], texts: dict[Path, str]) -> list[Cubin]:
    """Compile `jobs`, side by side."""
    shares = min(cores(), len(jobs))
    with ThreadPoolExecutor(shares or 1) as pool:
        mine = (jobs[share::shares] for share in range(shares))
        parts = list(pool.map(lambda share: _run(share, texts), mine))
    return [parts[n % shares][n // shares] for n in range(len(jobs))]


def _run(jobs: list[Job], texts: dict[Path, str]) -> list[Cubin]:
    """Compile `jobs` in a process whose Triton is as it comes, with a cache of its own."""
    lines = [
        [texts[job.kernel.path], job.kernel.spec.dtype, job.kernel.path.name, job.arch]
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
        reason = (done.stderr.strip().splitlines() or ["the compiler was stopped"])[-1]
        raise ProjectError(f"cannot precompile {job.kernel.path.name} for {job.arch}: {reason}")
    pairs = zip(jobs, map(json.loads, results), strict=True)
    return [_cubin(job, texts[job.kernel.path], result) for job, result in pairs]


def _cubin(job: Job, text: str, result: dict[str, Any]) -> Cubin:
    code = base64.b64decode(result.pop("cubin"))
    shared, limit = result["metadata"]["shared"], _shared(job.arch)
    if shared > limit:
        raise ProjectError(
            f"{job.kernel.name}, planned for {job.kernel.target}, takes {shared} bytes of shared "
            f"memory and {job.arch} has {limit}: leave {job.arch} out of aot, or add a GPU of "
            "that architecture to target",
            "aot",
        )
    content = code + f"\nconvgen sha256 {_digest(code)}\n".encode()
    source = {"source": job.kernel.path.name, "source_sha256": _digest(text.encode())}
    made = {"arch": job.arch, "python": _python(), **result}
    return Cubin(content, source | made | {"size": len(code), "sha256": _digest(content)})


def main() -> None:
    """Compile JSON lines `[text, dtype, name, architecture]` from stdin; print a line for each."""
    import triton

    # Lines would be told with paths of the machine that compiles. Set so it is no part of the key,
    # as the environment's TRITON_DISABLE_LINE_INFO would be: the key must be what a GPU asks for.
    triton.knobs.propagate_env = False
    triton.knobs.compilation.disable_line_info = True
    for line in sys.stdin:
        text, dtype, name, arch = json.loads(line)
        binary = compile_text(text, dtype, name, capability_of(arch))
        # The launcher does not read this one, a path of the machine that compiles.
        metadata = binary.metadata | {"extern_libs": []}
        result = {
            "triton": triton.__version__,
            "kernel": binary.kernel,
            "key": binary.key,
            "metadata": metadata,
            "cubin": base64.b64encode(binary.cubin).decode(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
