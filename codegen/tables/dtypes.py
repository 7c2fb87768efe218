"""Tables of element types and of float32 precisions.

Stage 0 (data). Input: a name in the language; output: a row. A new dtype or precision is a row.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """An element type, shared by input, weight, bias and output.

    Attributes:
        name: name in the language and in torch, such as `float32`.
        triton: name in `triton.language`.
        itemsize: bytes per element.
        accumulator: `triton.language` type of the sums of products.
        rate: suffix of the `GpuTarget` field with this type's dense rate, `tflops_<rate>`.
    """

    name: str
    triton: str
    itemsize: int
    accumulator: str
    rate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How a float32 product is computed.

    Attributes:
        name: name in the language, equal to `tl.dot`'s `input_precision`.
        rounds: whether kernel and packing round operands to TF32. `tl.dot` itself truncates
            them, which doubles the error and biases the sum.
        interpreted: whether Triton's interpreter supports it; if not, `ieee` is used there.
        rate: suffix of the `GpuTarget` field with the rate of the units it runs on.
        products: hardware matrix products per product.
    """

    name: str
    rounds: bool
    interpreted: bool
    rate: str
    products: int


DTYPES = (
    DType(name="float32", triton="float32", itemsize=4, accumulator="float32", rate="tf32"),
    DType(name="float16", triton="float16", itemsize=2, accumulator="float32", rate="fp16"),
    DType(name="bfloat16", triton="bfloat16", itemsize=2, accumulator="float32", rate="bf16"),
    DType(name="float64", triton="float64", itemsize=8, accumulator="float64", rate="fp64"),
)

PRECISIONS = (
    Precision(name="tf32", rounds=True, interpreted=True, rate="tf32", products=1),
    Precision(name="tf32x3", rounds=False, interpreted=True, rate="tf32", products=3),
    Precision(name="bf16x3", rounds=False, interpreted=False, rate="bf16", products=3),
    Precision(name="bf16x6", rounds=False, interpreted=False, rate="bf16", products=6),
    Precision(name="ieee", rounds=False, interpreted=True, rate="fp32", products=1),
)


@functools.cache
def find_dtype(name: str) -> DType:
    """Return the row of `name`; raises KeyError if there is none."""
    return {row.name: row for row in DTYPES}[name]


@functools.cache
def find_precision(name: str) -> Precision:
    """Return the row of `name`; raises KeyError if there is none."""
    return {row.name: row for row in PRECISIONS}[name]
