"""The cost model of tensor-core programs: the time of a program of gather, window or polyphase.

Stage 4, plan. Input: a spec, a `Form` of it, a `Tile` and a `GpuTarget`; output: nanoseconds of an
SM. planning/costs.py documents the measurements to which the figures are fitted, and computes the
time of a call from them.
"""

from __future__ import annotations

from ..geometry.boxes import is_run
from ..geometry.tile import Tile
from ..language.spec import ConvTransposeSpec
from ..planning.costs import STEP, rate
from ..planning.family import Form
from ..tables.targets import GpuTarget
from .matrix_registers import WGMMA_ROWS, comes_in_vectors

# Nanoseconds of an SM per input element that a step loads, by bytes of an element. In
# channels_first also by span, because a tap's shift breaks the alignment of loads longer than that.
LOAD_POSITIONS = {
    8: {1: 0.16, 2: 0.14, 4: 0.05},
    4: {1: 0.088, 2: 0.068, 4: 0.022},
    2: {1: 0.051, 2: 0.04, 4: 0.034},
}
# Factor on that for span 2 in rows of odd extent, where every other row starts in the middle of a
# pair. Fitted to two layers in float32 and float16, 136 tiles, on the same card; span 4 shows no
# slowdown there.
ODD_PAIRS = {8: 1.0, 4: 2.2, 2: 1.6}
LOAD_CHANNELS = {8: 0.08, 4: 0.045, 2: 0.014}
LOAD_COPY = {4: 0.025, 2: 0.0071}  # of a copy in channels_last (input_copy.py)
LOAD_BOX = {4: 0.021, 2: 0.0032}  # boxes (window.py); those of float32 are rounded in registers
APART = 4.0  # factor on LOAD_CHANNELS if a group's channels are not a multiple of 16 bytes
TURNED = 1.9  # factor on LOAD_BOX if a box is not contiguous: Triton reorders it in registers
# Nanoseconds of an SM per weight byte that a step loads, by pointers and in boxes; and per box, for
# its barrier.
LOAD_WEIGHT = 0.0025
LOAD_BOX_WEIGHT = 0.0047
BOX = 26.0
# Nanoseconds of an SM per output element: single outputs along a row; along the channels, by bytes
# of an element; along the channels in the window family; groups of a row.
STORE = 0.027
STORE_CHANNELS = {8: 0.3, 4: 0.15, 2: 0.058}
STORE_BOX = 0.016
STORE_GROUPS = {8: 0.16, 4: 0.066, 2: 0.051}
# With strided stores, several programs fill a cache line; more channels per tile, more open lines.
STORE_STRIDED = 0.3  # nanoseconds per output element in a tile of STRIDED_N channels
STRIDED_N = 16
STORE_STRIDED_GROWTH = 0.41  # exponent of BLOCK_N / STRIDED_N
# On targets with wgmma, row-blocked gather tiles of stride 1 run slower than the rest of the model
# predicts, by this factor; row-blocked polyphase tiles do not.
UNROLLED = 1.1
# Sustained share of the tensor cores' peak rate. On Hopper the time of the loads is added to that
# of the products. SUSTAINED_OLD, by compute capability, is that of `mma.sync`: the instructions of
# tiles below WGMMA_ROWS positions on Hopper and of all tiles on A100 (whose figure is a guess).
SUSTAINED = 1.0
SUSTAINED_OLD = {9: 0.34, 10: 0.34, 8: 0.75}
# GeForce and L40S (sm_86, sm_89, sm_120): their tensor cores take twice the cycles per instruction,
# during which a warp issues the next loads; a saturated RTX 4060 reaches 0.957 of its peak (triton
# issue 10851). Products and loads overlap: the time is the OVERLAP-norm of the two, a little more
# than the longer one.
SUSTAINED_SLOW = 0.95
OVERLAP = 4


def program_ns(
    spec: ConvTransposeSpec, form: Form, tile: Tile, target: GpuTarget, steps: float
) -> float:
    """Return the time that a program of `steps` steps takes of its SM, in nanoseconds."""
    loads, store = steps * _load_ns(spec, form, tile), _store_ns(spec, form, tile)
    flops = 2 * form.products * tile.block_m * form.columns(tile) * form.depth(tile)
    products = steps * flops / (rate(spec, target) * 1e-9 / target.sms)
    if target.overlaps_loads:
        both = (products / SUSTAINED_SLOW) ** OVERLAP + (loads + store) ** OVERLAP
        return float(both ** (1 / OVERLAP))
    new = target.multiplies_from_shared and tile.block_m >= WGMMA_ROWS
    sustained = SUSTAINED if new else SUSTAINED_OLD[target.compute_capability[0]]
    single = form.rows > 1 and form.span == 1 and spec.stride[-2] == 1 and not form.boxed
    slower = UNROLLED if single and target.multiplies_from_shared else 1.0
    return slower * (products / sustained + loads + store)


def _load_ns(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float:
    """Return the time that a step's loads and overhead take of an SM, in nanoseconds."""
    depth, size = form.depth(tile), spec.element.itemsize
    inputs = form.inputs * tile.block_m * depth
    weights = form.weights * form.columns(tile) * depth * size
    if form.boxed:
        turned = 1.0 if is_run(form.box(tile)) else TURNED
        boxes = BOX * (form.inputs + form.weights)
        return STEP + boxes + inputs * LOAD_BOX[size] * turned + weights * LOAD_BOX_WEIGHT
    if form.relayout:
        load = LOAD_COPY[size]
    elif spec.layout == "channels_last":
        load = LOAD_CHANNELS[size] * (1.0 if comes_in_vectors(spec) else APART)
    else:
        load = LOAD_POSITIONS[size][form.span]
        if form.span == 2 and _is_odd(spec.input):
            load *= ODD_PAIRS[size]
    return STEP + inputs * load + weights * LOAD_WEIGHT


def _is_odd(extents: tuple[int | None, ...] | None) -> bool:
    """Whether the input's rows have an odd extent above 1 (rows of 1 have no pair to load)."""
    last = extents[-1] if extents else None
    return last is not None and last > 1 and last % 2 == 1


def _store_ns(spec: ConvTransposeSpec, form: Form, tile: Tile) -> float:
    """Return the time that a program's stores take of its SM, in nanoseconds."""
    size, last = spec.element.itemsize, spec.layout == "channels_last"
    if last:
        store = STORE_BOX if form.boxed else STORE_CHANNELS[size]
    elif form.family.grouped:
        store = STORE_GROUPS[size]
    elif spec.stride[-1] > 1:
        store = STORE_STRIDED * (tile.block_n / STRIDED_N) ** STORE_STRIDED_GROWTH
    else:
        store = STORE
    return form.rows * tile.block_m * form.columns(tile) * store
