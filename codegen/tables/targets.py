"""Table of GPUs: the hardware facts that the planner reads.

Stage 0 (data). Input: a GPU's name in the language, such as ``rtx4090``; output: its ``GpuTarget``.

Nothing here runs on a GPU or is measured at compile time: each figure is published, or is an
estimate that the comment of its row calls one.

To add a GPU, add one row to ``TARGETS``, with a comment that cites where its figures come from:

* the limits per SM and per block follow from the compute capability; take them from the CUDA C++
  Programming Guide, table "Technical Specifications per Compute Capability",
  https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html
* the rates follow from the product; take them from its whitepaper or datasheet, *dense* (half of
  a figure marked "with sparsity") and *with FP32 accumulation*. GeForce parts run FP16 with FP32
  accumulation at half the FP16-accumulation rate that is usually advertised for them.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Final

from ..errors import SpecError, shown, text_of
from ..values import check_integer, entries_of, number_of

_KB: Final = 1024
_MB: Final = 1024 * 1024
_WARP_SIZE: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTarget:
    """One GPU, as the planner sees it.

    Attributes:
        name: The GPU's name in the language.
        product: The GPU's marketing name.
        compute_capability: CUDA compute capability, (major, minor).
        sms: Streaming multiprocessors enabled on the product.
        threads_per_sm: Most threads resident on one SM.
        blocks_per_sm: Most thread blocks resident on one SM.
        registers_per_sm: 32-bit registers in one SM's register file.
        registers_per_thread: Most 32-bit registers one thread can hold.
        shared_per_sm: Shared memory of one SM, in bytes.
        shared_per_block: Most shared memory one block can opt in to, in bytes.
        l2_bytes: L2 cache size, in bytes.
        dram_gbps: Peak device memory bandwidth, in GB/s (1 GB = 1e9 bytes).
        l2_gbps: Sustained L2 read bandwidth, in GB/s (1 GB = 1e9 bytes). An estimate.
        tflops_tf32: Peak dense tensor core rate for TF32 inputs and FP32 accumulation, in
            TFLOP/s (1e12 floating-point operations per second, a multiply-add being two).
        tflops_fp16: The same for FP16 inputs and FP32 accumulation, in TFLOP/s.
        tflops_bf16: The same for BF16 inputs and FP32 accumulation, in TFLOP/s.
        tensor_share: Fraction of the silicon's tensor core rate that the product reaches with
            FP32 accumulation: half on GeForce. Nsight Compute's sm__throughput is scaled to the
            silicon's rate, so that a saturated pipe reads this fraction (measured: Triton's issue
            10851, 47 % on an RTX 4060; llm.c's issue 377, 50 % on an RTX 4090).
        tflops_fp32: Peak CUDA core FP32 rate, in TFLOP/s.
        tflops_fp64: Peak FP64 rate of tensor cores or CUDA cores, whichever is higher, in
            TFLOP/s.
    """

    name: str
    product: str
    compute_capability: tuple[int, int]
    sms: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int
    registers_per_thread: int
    shared_per_sm: int
    shared_per_block: int
    l2_bytes: int
    dram_gbps: float
    l2_gbps: float
    tflops_tf32: float
    tflops_fp16: float
    tflops_bf16: float
    tflops_fp32: float
    tflops_fp64: float
    tensor_share: float = 1.0

    def __post_init__(self) -> None:
        """Check every field: a row may be a user's, and its texts stand in emitted files."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(field, value))

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether matrix instructions (wgmma, tcgen05) read operands from shared memory."""
        return self.compute_capability[0] in (9, 10)

    @property
    def has_tensor_memory(self) -> bool:
        """Whether accumulators of matrix instructions (tcgen05) are in tensor memory."""
        return self.compute_capability[0] == 10

    @property
    def is_hopper(self) -> bool:
        """Whether it is a Hopper, whose matrix instructions (wgmma) run asynchronously."""
        return self.compute_capability[0] == 9

    @property
    def overlaps_loads(self) -> bool:
        """Whether loads overlap with products: on GeForce and L40S, whose matrix units are slow."""
        return self.compute_capability in ((8, 6), (8, 9), (12, 0))

    @property
    def arch(self) -> str:
        """The compiler's name for the architecture, such as ``sm_89``."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"

    @property
    def warps_per_sm(self) -> int:
        """Most warps resident on one SM."""
        return self.threads_per_sm // _WARP_SIZE


def _checked(field: dataclasses.Field[Any], value: object) -> object:
    """Return the value of a `GpuTarget` field as exactly its type; raises SpecError."""
    where = f"{field.name} of a GpuTarget"
    if field.type in (int, "int"):
        return check_integer(where, value, 1, 2**62)
    if field.name == "compute_capability":
        entries = entries_of(value)
        if entries is None or len(entries) != 2:
            raise SpecError(f"{where} must be (major, minor), got {shown(value)}", field.name)
        return tuple(check_integer(where, entry, 0, 99) for entry in entries)
    if field.type in (float, "float"):
        number = number_of(value)
        if number is None or number <= 0:
            raise SpecError(
                f"{where} must be a finite positive number, got {shown(value)}", field.name
            )
        return number
    text = text_of(value)
    if text is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.()+-]{0,63}", text):
        raise SpecError(
            f"{where} must be a text of 1 to 64 ASCII letters, digits and ' _.()+-', "
            f"got {shown(value)}",
            field.name,
        )
    return text


# Common to all rows:
# * threads, blocks, registers and shared memory per SM, per block and per thread: the CUDA C++
#   Programming Guide's table that the module docstring names.
# * l2_gbps: NVIDIA publishes no sustained L2 bandwidth, so every value is an estimate. It starts
#   from a measurement where a public one exists, "gpu-benches" being the results committed in
#   https://github.com/RRZE-HPC/gpu-benches (gpu-l2-cache, unless the row says otherwise).
# * tflops_fp64 of the parts without FP64 tensor cores is 1/64 of tflops_fp32.
# Rows are laid out by hand, one group of fields to a line, so that they compare as a table.
# fmt: off
TARGETS: Final[tuple[GpuTarget, ...]] = (
    # NVIDIA Ada GPU Architecture whitepaper, GeForce RTX 4090 specification table:
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    # FP16 with FP16 accumulation is 330.3. l2_gbps: estimate; an L40 (same die, 142 SMs) sustains
    # 5200 in gpu-benches.
    GpuTarget(
        name="rtx4090", product="NVIDIA GeForce RTX 4090", compute_capability=(8, 9), sms=128,
        threads_per_sm=1536, blocks_per_sm=24, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=100 * _KB, shared_per_block=99 * _KB, l2_bytes=72 * _MB,
        dram_gbps=1008.0, l2_gbps=5000.0,
        tflops_tf32=82.6, tflops_fp16=165.2, tflops_bf16=165.2,
        tflops_fp32=82.6, tflops_fp64=1.29, tensor_share=0.5,
    ),
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, Appendix A, GeForce RTX 3090:
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf
    # FP16 with FP16 accumulation is 142. l2_gbps: estimate; an A40 (same die) sustains 2500 in
    # gpu-benches (gpu-cache), scaled by boost clock, 1695/1740 MHz.
    GpuTarget(
        name="rtx3090", product="NVIDIA GeForce RTX 3090", compute_capability=(8, 6), sms=82,
        threads_per_sm=1536, blocks_per_sm=16, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=100 * _KB, shared_per_block=99 * _KB, l2_bytes=6 * _MB,
        dram_gbps=936.0, l2_gbps=2400.0,
        tflops_tf32=35.6, tflops_fp16=71.0, tflops_bf16=71.0,
        tflops_fp32=35.6, tflops_fp64=0.56, tensor_share=0.5,
    ),
    # NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM column (rates, bandwidth), and NVIDIA
    # A100 Tensor Core GPU Architecture whitepaper (SMs, L2):
    # https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
    # FP64 is the tensor core rate. l2_gbps: estimate; an A100 80GB sustains 5400 in gpu-benches.
    GpuTarget(
        name="a100", product="NVIDIA A100 SXM4 80GB", compute_capability=(8, 0), sms=108,
        threads_per_sm=2048, blocks_per_sm=32, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=164 * _KB, shared_per_block=163 * _KB, l2_bytes=40 * _MB,
        dram_gbps=2039.0, l2_gbps=5400.0,
        tflops_tf32=156.0, tflops_fp16=312.0, tflops_bf16=312.0,
        tflops_fp32=19.5, tflops_fp64=19.5,
    ),
    # NVIDIA L40S datasheet, specification table (the dense figure of each "dense | sparse" pair;
    # 142 RT cores, one per SM). Unlike GeForce, FP32 accumulation runs at full rate. The datasheet
    # gives no L2 size, and some secondary sources list 48 MB. 96 MB is the full AD102 cache of the
    # NVIDIA Ada GPU Architecture whitepaper, and what the L40 (same die and SM count) shows when
    # measured: https://arxiv.org/abs/2606.22588. l2_gbps: estimate, the L40's in gpu-benches.
    GpuTarget(
        name="l40s", product="NVIDIA L40S", compute_capability=(8, 9), sms=142,
        threads_per_sm=1536, blocks_per_sm=24, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=100 * _KB, shared_per_block=99 * _KB, l2_bytes=96 * _MB,
        dram_gbps=864.0, l2_gbps=5200.0,
        tflops_tf32=183.0, tflops_fp16=362.05, tflops_bf16=362.05,
        tflops_fp32=91.6, tflops_fp64=1.43,
    ),
    # NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5 columns, and NVIDIA Hopper
    # Tuning Guide (L2, shared memory): https://docs.nvidia.com/cuda/hopper-tuning-guide/index.html
    # FP64 is the tensor core rate. l2_gbps: estimate, the H200's scaled by L2 size, 50/60 MB.
    GpuTarget(
        name="h100", product="NVIDIA H100 SXM5 80GB", compute_capability=(9, 0), sms=132,
        threads_per_sm=2048, blocks_per_sm=32, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=228 * _KB, shared_per_block=227 * _KB, l2_bytes=50 * _MB,
        dram_gbps=3352.0, l2_gbps=8100.0,
        tflops_tf32=494.7, tflops_fp16=989.4, tflops_bf16=989.4,
        tflops_fp32=66.9, tflops_fp64=66.9,
    ),
    # NVIDIA H200 Tensor Core GPU datasheet, H200 SXM column (bandwidth); the compute rates are the
    # H100 SXM5's, which the datasheet repeats rounded. It gives no L2 size; the CUDA runtime
    # reports 60 MB, all of the GH100 cache, where the H100 enables 50 MB of it.
    # l2_gbps: estimate; an H200 sustains 9700 in gpu-benches.
    GpuTarget(
        name="h200", product="NVIDIA H200 SXM 141GB", compute_capability=(9, 0), sms=132,
        threads_per_sm=2048, blocks_per_sm=32, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=228 * _KB, shared_per_block=227 * _KB, l2_bytes=60 * _MB,
        dram_gbps=4800.0, l2_gbps=9700.0,
        tflops_tf32=494.7, tflops_fp16=989.4, tflops_bf16=989.4,
        tflops_fp32=66.9, tflops_fp64=66.9,
    ),
    # NVIDIA Blackwell datasheet (GB200 NVL72 and HGX B200), per-GPU column of HGX B200: 7.7 TB/s
    # (other B200 systems: 8 TB/s), FP32 75, FP64 37, FP16/BF16 4.5 and TF32 2.2 PFLOP/s with
    # sparsity (TF32 here is half of FP16, 1.125 dense, before that rounding). L2 and shared
    # memory: NVIDIA Blackwell Tuning Guide, https://docs.nvidia.com/cuda/blackwell-tuning-guide/
    # SMs: the CUDA runtime reports 148. l2_gbps: estimate, the H200's scaled by SMs, 148/132.
    GpuTarget(
        name="b200", product="NVIDIA B200 SXM (HGX)", compute_capability=(10, 0), sms=148,
        threads_per_sm=2048, blocks_per_sm=32, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=228 * _KB, shared_per_block=227 * _KB, l2_bytes=126 * _MB,
        dram_gbps=7700.0, l2_gbps=10900.0,
        tflops_tf32=1125.0, tflops_fp16=2250.0, tflops_bf16=2250.0,
        tflops_fp32=75.0, tflops_fp64=37.0,
    ),
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, Appendix A, GeForce RTX 5090:
    # https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    # FP16 with FP16 accumulation is 419. l2_gbps: estimate; 8700 reported for an RTX PRO 6000
    # Blackwell (same die), scaled by SMs, 170/188:
    # https://chipsandcheese.com/p/blackwell-nvidias-massive-gpu
    GpuTarget(
        name="rtx5090", product="NVIDIA GeForce RTX 5090", compute_capability=(12, 0), sms=170,
        threads_per_sm=1536, blocks_per_sm=24, registers_per_sm=65536, registers_per_thread=255,
        shared_per_sm=100 * _KB, shared_per_block=99 * _KB, l2_bytes=96 * _MB,
        dram_gbps=1792.0, l2_gbps=7900.0,
        tflops_tf32=104.8, tflops_fp16=209.5, tflops_bf16=209.5,
        tflops_fp32=104.8, tflops_fp64=1.64, tensor_share=0.5,
    ),
)
# fmt: on

DEFAULT_TARGET: Final = "rtx4090"
ARCHITECTURES: Final = tuple(
    sorted({target.arch for target in TARGETS}, key=lambda arch: int(arch.removeprefix("sm_")))
)


def find_target(name: str) -> GpuTarget:
    """Look a GPU up by its name in the language.

    Args:
        name: The GPU's name, such as ``rtx4090``.

    Returns:
        The row of ``TARGETS`` with that name.

    Raises:
        KeyError: If no row has that name.
    """
    text = text_of(name)
    for target in TARGETS:
        if target.name == text:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise KeyError(f"no target is called {name!r}, only {known}")
