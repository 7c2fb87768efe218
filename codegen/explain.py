"""The report of `convgen explain`: every stage of a plan in figures and words.

Beside the stages. Input: a `KernelPlan`; output: `Section`s, each a stage's name with (name, value)
rows, which the command line prints as text or JSON.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .geometry.gradient import gradient_refusal
from .geometry.groups import Grouping
from .kernels.packing import packed_grouping, packed_taps
from .planning.caveats import caveats_of
from .planning.costs import L2_PART, l2_ms, multiplied
from .planning.forms import form_of
from .planning.input_copy import copied_bytes, copy_text, tile_text
from .planning.plan import Candidate, KernelPlan, MeasuredTorch
from .planning.resources import use_of
from .symbolic.scribe import Scribe
from .symbolic.sizes import AXES
from .tables.targets import GpuTarget

STAGES = ("spec", "phases", "index", "plan", "candidates", "wrapper")
OF_KERNEL = STAGES[1:]  # each kernel of a file has its own
MOST_PHASES = 16  # phases listed for an axis
MOST_CANDIDATES = 8  # tiles listed


@dataclass(frozen=True, slots=True)
class Section:
    """The name of a stage and its (name, value) rows."""

    stage: str
    rows: tuple[tuple[str, object], ...]


def explain(plan: KernelPlan, stage: str | None = None) -> tuple[Section, ...]:
    """Return the sections of `plan`, or only that of `stage`; of several kernels, those of each."""
    makers = {
        "spec": _spec,
        "phases": _phases,
        "index": _index,
        "plan": _plan,
        "candidates": _candidates,
        "wrapper": _wrapper,
    }
    wanted = [name for name in STAGES if stage in (None, name)]
    return tuple(
        Section(f"{name}{_of_kernel(plan, kernel, name)}", tuple(makers[name](kernel)))
        for name in wanted
        for kernel in (plan.kernels if name in OF_KERNEL else [plan])
    )


def _of_kernel(plan: KernelPlan, kernel: KernelPlan, stage: str) -> str:
    """Return what a section's name says of a kernel, if a file has several."""
    if not plan.others or stage not in OF_KERNEL:
        return ""
    sizes = ", large inputs" * bool(kernel.least) + ", small inputs" * bool(kernel.most)
    sizes += f", {_shape(kernel.rung)}" if kernel.rung else ""
    return f"{sizes}, {kernel.spec.layout}" if kernel.spec.rank > 1 else sizes or ", other sizes"


Rows = Iterator[tuple[str, object]]


def _spec(plan: KernelPlan) -> Rows:
    spec = plan.file_spec
    yield "spec", str(spec)
    yield "input", _shape((spec.batch, spec.in_channels, *spec.spatial))
    yield "output", _shape((spec.batch, spec.out_channels, *spec.output_spatial))
    exact = spec.precision is None or not plan.family.products
    yield "dtype", spec.dtype if exact else f"{spec.dtype}, products {spec.precision}"
    yield "layout", spec.layout


def _shape(sizes: tuple[int | None, ...]) -> str:
    return " x ".join("?" if size is None else str(size) for size in sizes)


def _phases(plan: KernelPlan) -> Rows:
    for letter, axis in zip(AXES[plan.spec.rank], plan.phases, strict=True):
        empty = sum(1 for phase in axis if not phase.taps)
        count = "1 phase" if axis.stride == 1 else f"{axis.stride} phases"
        yield f"axis {letter}", f"{count}, {empty} without taps"
        for phase in itertools.islice(axis, MOST_PHASES):
            reads = [
                (phase.first_tap + j * axis.tap_step, phase.shift - j * axis.input_step)
                for j in range(min(phase.taps, MOST_PHASES))
            ]
            taps = [f"k{kernel} from m{shift:+d}" for kernel, shift in reads]
            output = f"o{letter} = {axis.stride}*m + {phase.residue}"
            yield f"  {output}", ", ".join(taps) or "no tap: bias and stages only"
    if plan.grouping is not None:
        yield from _groups(plan.grouping)


def _groups(grouping: Grouping) -> Rows:
    if grouping.unrolled:
        yield (
            "groups",
            f"on the last axis: {grouping.span} neighbouring inputs, and those beside them, give "
            f"{grouping.width} neighbouring outputs; for each output, kernel index and input:",
        )
        for output, sums in enumerate(grouping.sums):
            yield f"  output {output}", ", ".join(f"k{k} from {place:+d}" for place, k in sums)
        return
    yield (
        "groups",
        f"on the last axis: for each tap, {grouping.width} neighbouring outputs read "
        f"{grouping.span} neighbouring inputs; for each output, its kernel indices:",
    )
    for tap, outputs in enumerate(grouping.table):
        yield f"  tap {tap}", " ".join(str(list(inputs)) for inputs in outputs)


def _index(plan: KernelPlan) -> Rows:
    sizes = plan.sizes
    body = plan.family.context(plan, sizes, Scribe(sizes.space))
    for name, access in (("x", body.x), ("w", body.w), ("y", body.y)):
        if access.boxed:
            yield f"{name} access", "boxes of the tensor, one per tap and step"
            yield f"{name} mask", "none: outside the tensor a box reads zero"
            continue
        step = f"and {access.step} in each step" if access.step and not access.step_lines else None
        lines = [access.base, *access.lanes, *access.step_lines, step, *access.mask_lines]
        yield f"{name} access", "\n".join(line for line in lines if line)
        yield f"{name} mask", "needed" if access.masked else "none: all indices are in range"


def _plan(plan: KernelPlan) -> Rows:
    cost, target, tile = plan.cost, plan.target, plan.tile
    problem = plan.problem
    form = form_of(plan.spec, plan.phases, problem, tile, plan.families)
    family, use = plan.family, use_of(plan.spec, form, tile, target)
    if plan.nominal:
        yield "note", "sizes are left to run time: figures are for nominal ones"
    yield "target", f"{target.product}, {target.arch}, {target.sms} SMs"
    yield "family", f"{family.name}: {family.method}"
    if caveats := caveats_of(plan):
        yield "caveat", " ".join(caveats)
    yield "tile", tile_text(plan)
    yield "why this tile", _why_tile(plan)
    yield "grid", plan.grid_text
    yield "why this grid", plan.grid_reason
    yield "programs", cost.programs
    yield (
        "occupancy",
        (
            f"{cost.occupancy} programs per SM, estimated ({cost.occupancy * tile.num_warps} of "
            f"{target.warps_per_sm} warps; about {use.expected} registers per thread, "
            f"{use.shared} bytes of shared memory per program)"
        ),
    )
    yield "waves", f"{cost.waves:.2f} over {target.sms} SMs x {cost.occupancy} programs"
    yield "tail", f"{100 * cost.tail:.0f} % of the last wave is empty"
    yield "FLOPs", f"{cost.flops / 1e9:.3f} GFLOP"
    if family.products:
        done = multiplied(plan.spec, problem, form, tile, cost)
        yield (
            "multiplied",
            f"{done / 1e9:.3f} GFLOP, with masked positions, padded channels and zeros of groups",
        )
    yield (
        "bytes",
        f"{cost.dram_bytes / 1e6:.3f} MB at least; programs request {cost.l2_bytes / 1e6:.3f} MB",
    )
    yield (
        "L2",
        (
            f"{l2_ms(cost.l2_bytes, target):.4f} ms at {target.l2_gbps:.0f} GB/s, an estimate; "
            f"L1 serves {100 * (1 - L2_PART):.0f} % of what programs request"
        ),
    )
    if tile.relayout:
        yield (
            "copy",
            f"{2 * copied_bytes(plan.spec, problem) / 1e6:.3f} MB more, to copy the input"
            f"{copy_text(plan.spec)}; model and measured times include it",
        )
    yield "roofline", f"{cost.roofline_ms:.4f} ms, bound by {cost.bound}"
    yield "model", f"{cost.model_ms:.4f} ms (orders tiles; a prediction, not a measurement)"
    share = 100 * cost.roofline_ms / cost.model_ms
    yield (
        "roofline share",
        f"{share:.0f} %: roofline / model time; use a measured time for the kernel's real share",
    )
    if target.tensor_share < 1 and family.products and _on_tensor_cores(plan):
        yield "sm__throughput", _counter(target)


def _on_tensor_cores(plan: KernelPlan) -> bool:
    """Whether products of TF32 or 16-bit operands are summed in float32."""
    rate = (plan.spec.product or plan.spec.element).rate
    return rate in ("tf32", "fp16", "bf16")


def _counter(target: GpuTarget) -> str:
    """Return what Nsight Compute's counter reads on a card that runs below its silicon's rate."""
    share = f"{100 * target.tensor_share:.0f} %"
    return (
        f"a saturated tensor pipe reads about {share} on this card: the counter is scaled to the "
        f"silicon's full rate, of which the card reaches {share} with float32 sums; use the "
        "roofline share instead"
    )


def _why_tile(plan: KernelPlan) -> str:
    best = plan.ranking[0]
    if plan.measured is not None:
        return (
            f"measured: {plan.measured.ms:.4f} ms, the fastest of {plan.measured.tried} tried on "
            f"{plan.measured.device}; the model "
            + ("agrees" if plan.tile == best.tile else f"would take {best.tile}")
            + _beside_torch(plan.measured.torch)
        )
    if plan.tile != best.tile:
        return "given by the caller"
    others = [c for c in plan.ranking if _blocks(c) != _blocks(best)]
    text = f"lowest model time of {len(plan.ranking)} tiles that fit registers and shared memory"
    if others:
        text += f"; the next blocks, {others[0].tile}, take {others[0].cost.model_ms:.4f} ms"
    return text


def _beside_torch(torch: MeasuredTorch | None) -> str:
    if torch is None:
        return ""
    best = f"{torch.best_ms:.4f} ms in the better layout"
    return f"; torch's operator takes {torch.ms:.4f} ms, {best}"


def _blocks(candidate: Candidate) -> tuple[int, int, int]:
    tile = candidate.tile
    return tile.block_m, tile.block_n, tile.block_k


def _candidates(plan: KernelPlan) -> Rows:
    copies = any(candidate.tile.relayout for candidate in plan.ranking)
    more = " (a copy of the input must gain more than that)" if copies else ""
    yield (
        "order",
        (
            f"model time in steps of 1 %{more}; within a step fewer bytes requested, smaller "
            "tiles, deeper pipelines first"
        ),
    )
    for candidate in plan.ranking[:MOST_CANDIDATES]:
        cost = candidate.cost
        yield (
            f"{candidate.tile.family} {candidate.tile}",
            (
                f"{cost.model_ms:.4f} ms, {cost.programs} programs, {cost.waves:.2f} waves, "
                f"{cost.l2_bytes / 1e6:.1f} MB requested"
            ),
        )
    for family in plan.families:
        best = [c for c in plan.ranking if c.tile.family == family.name][:1]
        for candidate in best:
            yield f"family {family.name}", f"{candidate.cost.model_ms:.4f} ms with {candidate.tile}"
        if not best:
            reason = family.refusal(plan.spec) or "no tile fits the target"
            yield f"family {family.name}", f"not for this layer: {reason}"


def _wrapper(plan: KernelPlan) -> Rows:
    spec = plan.spec
    problem = plan.problem
    layout = "" if spec.rank == 1 else f" in {spec.layout}"
    copies = f"none if the input is dense{layout}; one if it is not"
    if plan.family.boxes(plan.sizes) is not None:
        copies += ", or if input or packed weight do not start at a multiple of 16 bytes"
    workspace = "no workspace"
    if plan.tile.relayout:
        copies = (
            f"one of every input,{copy_text(spec)}: the copy and this kernel are faster "
            f"together; one more if the input is not dense{layout}"
        )
        workspace = f"a workspace of {copied_bytes(spec, problem)} bytes for the copy of the input"
    yield "copies", copies
    if plan.reads_raw_weight:
        yield "memory", f"the output; {workspace}"
        yield "weight", "read in torch's layout: nothing is packed, so every edit of it is seen"
    else:
        yield "memory", f"the output, and {_packed_bytes(plan)} bytes of packed weight; {workspace}"
        yield (
            "weight",
            "packed at every call by a separate kernel, so that every edit of it is seen; "
            "a frozen layer keeps the packed weight",
        )
    yield "batch", "the result of a sample depends neither on the other samples nor on their number"
    if spec.before or spec.after:
        yield "gradients", "torch's, of the layer recomputed; input and weight are kept"
    else:
        yield "gradients", "torch's convolution_backward; input and weight are kept if needed"
    yield "gradient of the input", _gradient(plan)
    yield "torch.func, forward-mode gradients", "torch's own operator"


def _gradient(plan: KernelPlan) -> str:
    """Return who computes the gradient of the input, and why."""
    reason = gradient_refusal(plan.spec)
    if reason is not None:
        return f"torch's: {reason}"
    found = None if plan.measured is None else plan.measured.gradient
    if plan.measured is None or found is None:
        return f"torch's: no kernel was measured for it on {plan.target.name}"
    times = f"{found.ms:.4f} ms, torch's {found.torch_ms:.4f} ms on {plan.measured.device}"
    if plan.gradient is None:
        return f"torch's, which is faster: a kernel took {times}"
    return (
        f"a kernel in the file, which is faster: {times}; family {plan.gradient.family}, "
        f"{plan.gradient.tile}; torch's with create_graph=True"
    )


def _packed_bytes(plan: KernelPlan) -> int:
    """Return the bytes of the packed weight, with the zeros of groups."""
    spec, problem = plan.spec, plan.problem
    pairs = problem.in_channels * problem.out_channels // spec.groups
    if (grouping := packed_grouping(plan)) is not None:
        pairs *= grouping.lanes * grouping.span
    return pairs * packed_taps(plan) * spec.element.itemsize
