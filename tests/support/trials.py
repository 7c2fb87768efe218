"""Trials of the fuzzer: a drawn spec, the file that is emitted for it, and what is wrong with that.

Broader than drawing.py, whose specs are those of a fixed suite: extreme geometries, stages,
targets, every form of kernel, and for sizes left to run time a second set of them. Every drawn
spec is valid by construction, so that any error is a finding. `draw_trial` asks its source for
nothing but `choice`, `randint` and `random`, the simplest choice first, so that hypothesis can be
the source and shrink what it draws.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bounding import bounded
from convgen import TARGETS, ConvTransposeSpec
from convgen.compiler import compile_kernel
from convgen.execution.loading import load_module
from convgen.execution.oracle import Array, reference
from convgen.execution.verify import run
from convgen.geometry.tile import Tile
from convgen.rendering.render import KernelSource
from convgen.tables.pointwise import Stage
from drawing import BEST, DTYPES, PRECISIONS, forms

CHANNELS = (1, 3, 2, 4, 5, 16, 17, 20, 33)  # of a group; the blocks of a tile have 16 and more
MOST_WORK = 64  # the interpreter takes some milliseconds for a unit of it
GROUPS = ("dense", "dense", "dense", "grouped", "grouped", "depthwise", "depthwise", "multiplied")
KINDS = ("plain", "plain", "unit", "shuffle", "gaps", "dilated", "padded", "long", "rows")
# Of them the results on small integers are integers, halves and quarters, exact in every dtype.
EXACT = (
    Stage("relu"),
    Stage("leaky_relu", (0.5,)),
    Stage("clamp", (-1.0, 2.0)),
    Stage("clamp", (1.0, 3.0)),
    Stage("add", (1.0,)),
    Stage("mul", (-2.0,)),
)
INEXACT = (
    Stage("tanh"),
    Stage("sigmoid"),
    Stage("leaky_relu", (0.01,)),
    Stage("leaky_relu", (-1.5,)),
    Stage("clamp", (0.3, 0.7)),
    Stage("add", (-0.1,)),
    Stage("mul", (1e-3,)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is tried.

    Attributes:
        emitted: the spec of the file.
        tile: a tile in place of the planner's, or None.
        sizes: the spec with every size known, of the two runs of the file.
        data: seed of the numbers.
    """

    emitted: ConvTransposeSpec
    tile: Tile | None
    sizes: tuple[ConvTransposeSpec, ConvTransposeSpec]
    data: int

    def __str__(self) -> str:
        shapes = " and ".join(
            f"{known.input} to {known.out_channels} channels" for known in self.sizes
        )
        tile = self.tile and f"{self.tile.family} {self.tile.span}, {self.tile}"
        return f"{self.emitted}\n  on {shapes}, data {self.data}\n  tile: {tile or 'planned'}"


def draw_trial(source: random.Random, target: str | None = None) -> Trial:
    """Return a trial; `target` stands in for the drawn one."""
    bare, c_in, c_out = _layer(source, target)
    while _work(_sized(bare, c_in, c_out, _least(bare))) > MOST_WORK:
        bare, c_in, c_out = _layer(source, target)
    known = _sized(bare, c_in, c_out, _input(source, bare, c_in, c_out))
    emitted = _opened(source, known) if source.random() < 0.4 else known
    tile = None
    if source.random() < 0.6:
        served = list(forms(emitted).values())
        tile = source.choice(source.choice(served)[:BEST])
    sizes = (known, _again(source, emitted, known))
    return Trial(emitted=emitted, tile=tile, sizes=sizes, data=source.randint(0, 2**16))


def _layer(source: random.Random, target: str | None) -> tuple[ConvTransposeSpec, int, int]:
    """Return a spec without sizes, and its input and output channels."""
    rank = source.choice((1, 2, 2, 3))
    geometry = _geometry(source, rank)
    groups, c_in, c_out = _channels(source)
    dtype = source.choice(DTYPES)
    named = source.choice((None, *(row.name for row in TARGETS)))
    bare = ConvTransposeSpec(
        rank=rank,
        **geometry,
        groups=groups,
        bias=source.random() < 0.5,
        dtype=dtype,
        precision=source.choice(PRECISIONS) if dtype == "float32" else None,
        layout=source.choice(("channels_first", "channels_last")[: 1 + (rank > 1)]),
        grid=source.choice((None, 1, 2, 3)),
        target=target or named,
        **_stages(source),
    )
    return bare, c_in, c_out


def _geometry(source: random.Random, rank: int) -> dict[str, tuple[int, ...]]:
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation")
    axes = [_axis(source, rank) for _ in range(rank)]
    return dict(zip(names, zip(*axes, strict=True), strict=True))


def _axis(source: random.Random, rank: int) -> tuple[int, int, int, int, int]:
    """Return kernel size, stride, padding, output padding and dilation along an axis."""
    longest, widest = (8, 4, 3)[rank - 1], (8, 4, 3)[rank - 1]
    kind = source.choice(KINDS)
    kernel, stride = source.randint(1, longest), source.randint(1, widest)
    dilation = source.choice((1, 1, 2, 3))
    if kind == "unit":
        kernel, stride, dilation = 1, 1, 1
    elif kind == "shuffle":
        stride = kernel = source.randint(2, widest)
        dilation = 1
    elif kind == "gaps":
        stride = source.choice((2, widest, (37, 7, 4)[rank - 1]))
        kernel = source.randint(1, min(stride - 1, longest))
    elif kind == "dilated":
        dilation = kernel + source.randint(1, 7)
    elif kind == "rows":
        kernel, stride, dilation = source.randint(2, 4), 1, source.choice((1, 1, 2))
    elif kind == "long":
        kernel = source.choice(((16, 33, 65), (7, 9, 11), (4, 5))[rank - 1])
    reach = dilation * (kernel - 1)
    padding = source.choice((0, min(1, reach), source.randint(0, min(reach, 12))))
    if kind == "padded":
        padding = reach + source.randint(1, 9)
    most = max(stride, dilation) - 1
    return kernel, stride, padding, source.choice((0, 0, most, source.randint(0, most))), dilation


def _channels(source: random.Random) -> tuple[int, int, int]:
    """Return groups, input channels and output channels."""
    kind = source.choice(GROUPS)
    if kind in ("depthwise", "multiplied"):
        groups = source.choice((3, 2, 4, 17, 33))
        return groups, groups, groups * (1 if kind == "depthwise" else source.choice((2, 3)))
    groups = 1 if kind == "dense" else source.choice((2, 3, 5))
    return groups, groups * source.choice(CHANNELS), groups * source.choice(CHANNELS)


def _stages(source: random.Random) -> dict[str, tuple[Stage, ...]]:
    """Return stages before and after; half of the specs have none."""
    kind = source.choice(("none", "none", "exact", "any"))
    if kind == "none":
        return {"before": (), "after": ()}
    rows = EXACT if kind == "exact" else EXACT + INEXACT
    counts = source.choice((0, 1, 2)), source.choice((0, 1, 2, 3))
    before, after = (tuple(source.choice(rows) for _ in range(count)) for count in counts)
    return {"before": before, "after": after}


def _least(spec: ConvTransposeSpec) -> tuple[int, ...]:
    """Return batch and spatial sizes that leave one output along each axis, or a few."""
    axes = zip(spec.output_growth, spec.stride, strict=True)
    return (1, *(1 + max(0, -((growth - 1) // stride)) for growth, stride in axes))


def _input(
    source: random.Random, spec: ConvTransposeSpec, c_in: int, c_out: int
) -> tuple[int, ...]:
    """Return batch and spatial sizes: from the least to some tiles, not all of them full."""
    least, most = _least(spec), (160, 14, 6)[spec.rank - 1]
    extra = [source.choice((0, 1, 2, 4))]
    extra += [source.choice((0, 1, most // 2, source.randint(0, most))) for _ in least[1:]]
    while True:
        sizes = tuple(low + more for low, more in zip(least, extra, strict=True))
        if not any(extra) or _work(_sized(spec, c_in, c_out, sizes)) <= MOST_WORK:
            return sizes
        longest = extra.index(max(extra))
        extra[longest] = extra[longest] * 2 // 3


def _work(spec: ConvTransposeSpec) -> int:
    """Return about how many tiles are multiplied or stored."""
    channels = [
        math.ceil((c or 1) // spec.groups / 16) for c in (spec.in_channels, spec.out_channels)
    ]
    outputs = zip(spec.output_spatial, spec.stride, strict=True)
    positions = (spec.batch or 1) * math.prod(-(-(size or 1) // stride) for size, stride in outputs)
    steps = math.prod(spec.kernel_size) * channels[0] + math.prod(spec.stride)
    return spec.groups * channels[1] * steps * math.ceil(positions / 64)


def _sized(
    spec: ConvTransposeSpec, c_in: int, c_out: int, sizes: tuple[int, ...]
) -> ConvTransposeSpec:
    shape = (sizes[0], c_in, *sizes[1:])
    return dataclasses.replace(spec, in_channels=c_in, out_channels=c_out, input=shape)


def _opened(source: random.Random, known: ConvTransposeSpec) -> ConvTransposeSpec:
    """Leave some sizes of `known` to run time."""
    c_in = source.choice((None, known.in_channels))
    c_out = source.choice((None, known.out_channels))
    shape = [source.choice((None, size)) for size in known.input or ()]
    shape[1] = c_in
    return dataclasses.replace(known, in_channels=c_in, out_channels=c_out, input=tuple(shape))


def _again(
    source: random.Random, emitted: ConvTransposeSpec, known: ConvTransposeSpec
) -> ConvTransposeSpec:
    """Return `known` with other sizes where `emitted` leaves them to run time."""
    if emitted == known:
        return known
    c_in, c_out = (emitted.groups * source.choice(CHANNELS) for _ in range(2))
    c_in, c_out = emitted.in_channels or c_in, emitted.out_channels or c_out
    fixed = (emitted.batch, *emitted.spatial)
    fresh = _input(source, emitted, c_in, c_out)
    sizes = tuple(have or new for have, new in zip(fixed, fresh, strict=True))
    return _sized(known, c_in, c_out, sizes)


def compiled(trial: Trial) -> KernelSource:
    """Return the emitted file."""
    return compile_kernel(trial.emitted, tile=trial.tile)


def problem(trial: Trial, source: KernelSource, name: str, folder: Path, device: str) -> str | None:
    """Return what is wrong with the numbers of the file, None if nothing is.

    Raises what the file raises.
    """
    module = load_module(source.text, name, folder)
    numbers = np.random.default_rng(trial.data)
    first, second = trial.sizes
    if {*first.before, *first.after} <= set(EXACT):
        arrays = [numbers.integers(-2, 3, shape).astype(float) for shape in shapes(first)]
        want = held(first, reference(first, *_three(arrays)))
        wrong = run(first, module, device, *arrays) != want
        if wrong.any():
            return f"on integers {_places(wrong)}"
    arrays = [held(second, numbers.standard_normal(shape)) for shape in shapes(second)]
    want, most = bounded(second, *_three(arrays))
    wrong = ~(np.abs(run(second, module, device, *arrays) - want) <= most)  # NaN is wrong, too
    return f"on normal data {_places(wrong)}" if wrong.any() else None


def _three(arrays: list[Array]) -> tuple[Array, Array, Array | None]:
    return arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None


def _places(wrong: Array) -> str:
    places = [tuple(map(int, place)) for place in np.argwhere(wrong)[:3]]
    return f"{wrong.sum()} of {wrong.size} outputs are wrong, the first at {places}"


def shapes(spec: ConvTransposeSpec) -> list[tuple[int, ...]]:
    """Return the shapes of input, weight and, if there is one, bias."""
    assert spec.in_channels
    assert spec.out_channels
    weight = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    sizes = tuple(size or 0 for size in spec.input or ())
    return [sizes, weight, *([(spec.out_channels,)] if spec.bias else [])]


def held(spec: ConvTransposeSpec, array: Array) -> Array:
    """Return `array` as the spec's dtype holds it, in float64."""
    rounded: Array = torch.from_numpy(array).to(getattr(torch, spec.dtype)).double().numpy()
    return rounded
