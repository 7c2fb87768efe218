"""Table of pointwise stages: the functions allowed before and after the layer in a pipeline.

Stage 0 (data). Input: a stage's name; output: its parameters and its expressions in Triton and
torch. To add a stage, add a row here and one in `oracle.POINTWISE`. In an expression `{x}` stands
for the value, the other fields for the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A numeric parameter of a stage; `default` None means that it is required."""

    name: str
    default: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointwise:
    """A row: a function of one value.

    Attributes:
        name: name in the language; torch's name if torch has the function.
        triton: expression in a kernel. NaN passes through, as in torch.
        torch: expression in torch, for the fallback of the emitted module.
        parameters: parameters in positional order, with torch's names.
        helper: name of the `@triton.jit` function in `parts/helpers.jinja` that `triton` calls.
        keeps_zero: whether f(0) = 0, so that masked elements need no second mask.
    """

    name: str
    triton: str
    torch: str
    parameters: tuple[Parameter, ...] = ()
    helper: str | None = None
    keeps_zero: bool = False


POINTWISE = (
    Pointwise(
        name="relu",
        triton="tl.where({x} < 0, 0.0, {x})",  # tl.maximum would turn NaN into 0
        torch="F.relu({x})",
        keeps_zero=True,
    ),
    Pointwise(
        name="leaky_relu",
        triton="tl.where({x} > 0, {x}, {x} * {negative_slope})",
        torch="F.leaky_relu({x}, {negative_slope})",
        parameters=(Parameter(name="negative_slope", default=0.01),),
        keeps_zero=True,
    ),
    Pointwise(
        name="tanh",
        triton="tanh({x})",
        torch="torch.tanh({x})",
        helper="tanh",
        keeps_zero=True,
    ),
    Pointwise(name="sigmoid", triton="tl.sigmoid({x})", torch="torch.sigmoid({x})"),
    Pointwise(
        name="clamp",
        triton="clamp({x}, {min}, {max})",
        torch="torch.clamp({x}, {min}, {max})",
        parameters=(Parameter(name="min"), Parameter(name="max")),
        helper="clamp",
    ),
    Pointwise(
        name="add",
        triton="{x} + {other}",
        torch="{x} + {other}",
        parameters=(Parameter(name="other"),),
    ),
    Pointwise(
        name="mul",
        triton="{x} * {other}",
        torch="{x} * {other}",
        parameters=(Parameter(name="other"),),
        keeps_zero=True,
    ),
)


def find_pointwise(name: str) -> Pointwise:
    """Return the row of `name`; raises KeyError if there is none."""
    return {row.name: row for row in POINTWISE}[name]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a pipeline: a row of `POINTWISE` by name, and its parameters' values in order."""

    name: str
    values: tuple[float, ...] = ()

    @property
    def row(self) -> Pointwise:
        """The row of `POINTWISE` with this stage's name."""
        return find_pointwise(self.name)

    def text(self, pattern: str, x: str) -> str:
        """Return `pattern`, an expression of the row, with `x` and the parameters filled in."""
        names = (parameter.name for parameter in self.row.parameters)
        texts = (repr(value).replace("e+", "e") for value in self.values)  # as ruff spells it
        numbers = dict(zip(names, texts, strict=True))
        return pattern.format(x=x, **numbers)

    def __str__(self) -> str:
        numbers = ", ".join(map(repr, self.values))
        return f"{self.name}({numbers})" if numbers else self.name
