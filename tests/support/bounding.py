"""A bound on the error of an emitted kernel, element by element, that no correct one exceeds.

Input: a spec with its sizes and float64 arrays that its dtype holds; output: the oracle's result in
float64 and how far a kernel may be off it. The bound scales with the sum of |x||w| that an output
is made of, so that zeros, or one wrong product, do not pass; the constants are worst cases of the
rounding steps, so that chance does not fail. Precision lost by a digit or less is not seen here:
test_numerics.py compares with a faithful kernel.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from convgen import ConvTransposeSpec
from convgen.execution.oracle import POINTWISE, Array, reference, scatter
from convgen.tables.pointwise import Stage

# Unit roundoff of what a number is held in.
HELD = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-126, "float64": 2.0**-1022, "float16": 2.0**-24, "bfloat16": 2.0**-126}
# Relative error of a product of two operands that are rounded, or split, as the precision says.
PRODUCT = {
    None: 0.0,
    "ieee": 0.0,
    "tf32": 2.0**-10 + 2.0**-22,  # two operands of 11 bits
    "tf32x3": 2.0**-19,  # what two parts leave of either, and the product of the small parts
    "bf16x3": 2.0**-13,
    "bf16x6": 2.0**-20,
}
STAGE = 8  # roundings of one stage: its exponential, quotient and sum


def bounded(spec: ConvTransposeSpec, x: Array, weight: Array, bias: Array | None) -> list[Array]:
    """Return the oracle's output and the largest error of each of its elements."""
    unit = HELD[spec.element.accumulator]
    staged, error = _through(spec.before, x, np.zeros_like(x), unit)
    if spec.before:  # products take operands of the dtype
        error = error + HELD[spec.dtype] * (np.abs(staged) + error) + TINY[spec.dtype]
    size, weights = np.abs(staged) + error, np.abs(weight)
    terms = math.prod(spec.kernel_size) * weight.shape[0] // spec.groups + 2
    relative = PRODUCT[spec.precision] + 2 * terms * unit
    off = scatter(spec, error + relative * size, weights)
    if bias is not None:
        off = off + 2 * terms * unit * np.abs(bias).reshape(1, -1, *[1] * spec.rank)
    plain = dataclasses.replace(spec, after=())
    y, off = _through(spec.after, reference(plain, x, weight, bias), off, unit)
    return [y, off + HELD[spec.dtype] * (np.abs(y) + off) + TINY[spec.dtype]]


def _through(
    stages: tuple[Stage, ...], value: Array, error: Array, unit: float
) -> tuple[Array, Array]:
    """Return `value` after the stages, and its error: none of them is steeper than its slope."""
    for stage in stages:
        slope = 1.0
        if stage.name in ("mul", "leaky_relu"):
            slope = max(abs(stage.values[0]), float(stage.name == "leaky_relu"))
        before, value = value, POINTWISE[stage.name](value, *stage.values)
        size = np.abs(before) + np.abs(value) + max(map(abs, stage.values), default=1.0)
        error = slope * error + STAGE * unit * size
    return value, error
