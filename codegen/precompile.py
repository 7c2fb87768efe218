"""Precompiled kernels: `aot` of `[tool.convgen]`, machine code beside the files it was made of.

Part of a build; needs triton, but no torch and no GPU. Input: a `Table`, and the text of each
file; output: a `Cubin` for each file and architecture, which the file hands to Triton at run time.

Triton compiles in processes of their own: build backends may hold anything, and what they set for
Triton must not reach the code. Code that lies there already, made by the same Triton of the same
text, is not made again.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import ProjectError
from .table import Kernel, Table
from .targets import TARGETS, find_target

CUBIN = ".cubin"


@dataclass(frozen=True, slots=True)
class Job:
    """A file to compile for an architecture."""

    kernel: Kernel
    arch: str
    text: str

    @property
    def path(self) -> Path:
        """Where the machine code goes: beside the file, ``up.sm_90.cubin``."""
        return self.kernel.path.with_name(f"{self.kernel.path.stem}.{self.arch}{CUBIN}")

    @property
    def sha256(self) -> str:
        """Hash of the file's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code, and its row in the manifest: what the file needs to use it."""

    code: bytes
    row: dict[str, Any]


def jobs(table: Table, texts: dict[Path, str]) -> list[Job]:
    """Return what `aot` asks for: each file for the architectures that it may be chosen on."""
    return [
        Job(kernel, arch, texts.get(kernel.path, ""))
        for kernel in table.kernels
        for arch in table.aot
        if _serves(kernel, arch, table)
    ]


def _serves(kernel: Kernel, arch: str, table: Table) -> bool:
    """Whether the package may choose the file of `kernel` on a GPU of `arch` (package.py.jinja)."""

    def distance(other: Kernel) -> tuple[int, int]:
        planned = find_target(other.target)
        missing = max(0, planned.shared_per_block - _shared(arch))
        return missing, abs(_number(planned.arch) - _number(arch))

    rivals = [other for other in table.kernels if other.name == kernel.name]
    return distance(kernel) == min(map(distance, rivals))


def _shared(arch: str) -> int:
    """Return the bytes of shared memory that a block can have on an architecture."""
    return max(target.shared_per_block for target in TARGETS if target.arch == arch)


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def precompile(
    table: Table, texts: dict[Path, str], there: dict[str, dict[str, Any]]
) -> dict[Path, Cubin]:
    """Return the machine code that `table` asks for, by the path that it goes to.

    Args:
        table: the project's.
        texts: the files' text.
        there: rows of the manifest that lies there, by the name of the machine code's file.

    Raises:
        ProjectError: Triton is not here, or a kernel cannot be precompiled.
    """
    wanted = jobs(table, texts)
    if not wanted:
        return {}
    if importlib.util.find_spec("triton") is None:
        raise ProjectError(
            "aot of [tool.convgen] needs triton, which is not installed here; "
            "name it in requires of [build-system]",
            "aot",
        )
    for job in wanted:
        if job.kernel.spec.autotune != "none":
            raise ProjectError(
                f"aot cannot precompile {job.kernel.name}: autotune="
                f"{job.kernel.spec.autotune} compiles on the GPU at hand",
                "aot",
            )
    version = importlib.metadata.version("triton")
    made = {job.path: _reused(job, there.get(job.path.name, {}), version) for job in wanted}
    missing = [job for job in wanted if made[job.path] is None]
    made |= {job.path: cubin for job, cubin in zip(missing, _compiled(missing), strict=True)}
    return {path: cubin for path, cubin in made.items() if cubin is not None}


def _reused(job: Job, row: dict[str, Any], version: str) -> Cubin | None:
    """Return what lies there if it was made by this Triton of the same text, and is unedited."""
    if (row.get("source_sha256"), row.get("triton")) != (job.sha256, version):
        return None
    try:
        code = job.path.read_bytes()
    except OSError:
        return None
    return Cubin(code, row) if hashlib.sha256(code).hexdigest() == row.get("sha256") else None


def _compiled(jobs: list[Job]) -> list[Cubin]:
    """Compile `jobs`, side by side."""
    from .cubin import cores

    shares = min(cores(), len(jobs))
    with ThreadPoolExecutor(shares or 1) as pool:
        parts = list(pool.map(_run, (jobs[share::shares] for share in range(shares))))
    return [parts[n % shares][n // shares] for n in range(len(jobs))]


def _run(jobs: list[Job]) -> list[Cubin]:
    """Compile `jobs` in a process whose Triton is as it comes, with a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    lines = [
        [job.text, job.kernel.spec.dtype, job.kernel.path.name, _number(job.arch)] for job in jobs
    ]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "convgen.precompile"],
            input="\n".join(map(json.dumps, lines)),
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment | {"TRITON_CACHE_DIR": cache},
            check=False,
        )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode != 0:
        job = jobs[len(results)]
        reason = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
        raise ProjectError(f"cannot precompile {job.kernel.path.name} for {job.arch}: {reason}")
    return [_cubin(job, result) for job, result in zip(jobs, results, strict=True)]


def _cubin(job: Job, result: dict[str, Any]) -> Cubin:
    code = base64.b64decode(result.pop("cubin"))
    shared, limit = result["metadata"]["shared"], _shared(job.arch)
    if shared > limit:
        raise ProjectError(
            f"{job.kernel.name}, planned for {job.kernel.target}, takes {shared} bytes of shared "
            f"memory and {job.arch} has {limit}: leave {job.arch} out of aot, or add a GPU of "
            "that architecture to target",
            "aot",
        )
    row = {"source": job.kernel.path.name, "source_sha256": job.sha256, "arch": job.arch}
    return Cubin(code, row | result | {"sha256": hashlib.sha256(code).hexdigest()})


def main() -> None:
    """Compile JSON lines `[text, dtype, name, capability]` from stdin; print a line for each."""
    import triton

    from .cubin import compile_text

    # Lines would be told with paths of the machine that compiles. Set so it is no part of the key,
    # as the environment's TRITON_DISABLE_LINE_INFO would be: the key must be what a GPU asks for.
    triton.knobs.propagate_env = False
    triton.knobs.compilation.disable_line_info = True
    for line in sys.stdin:
        binary = compile_text(*json.loads(line))
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
