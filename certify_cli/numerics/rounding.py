"""Directed rounding in float64, by inflation (theory section 10).

A quantity computed from non-negative numbers by k additions, products, quotients and roots has a relative error of at
most gamma_k = k u / (1 - k u); `up` and `down` turn the computed value into a bound. They are not for terms of mixed
sign, which cancel and need an error bound of their own.

A tensor that carries a gradient is not rounded: training differentiates the same formulas, and takes values, no claims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

UNIT = 2.0**-53
"""The unit roundoff u of float64."""

UNDERFLOW = 1e-290
"""Upper bound of the absolute error that underflowing products add to any one sum, or to the norm of any vector."""

TINY = 1e-300
"""Above every result that may be flushed to zero (below 2^-1022), and negligible beside any bound: a safe divisor."""

Number = TypeVar("Number", float, Tensor)


def carries_gradient(*values: float | Tensor) -> bool:
    """Whether training differentiates any of these; every claim is computed without gradients."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def number(value: Tensor) -> float:
    """A tensor of one entry as a Python number; itself if it carries a gradient, so that formulas serve training too.

    Typed as the number that it is everywhere but in training.
    """
    return value if carries_gradient(value) else float(value)  # type: ignore[return-value]


def root_sum_square(values: Sequence[float]) -> float:
    """The root of the sum of squares of non-negative numbers, any of which may carry a gradient; not rounded up."""
    if not carries_gradient(*values):
        return math.hypot(*values)
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values]).norm()


def gamma(k: int) -> float:
    """Upper bound of k u / (1 - k u), the relative error of k roundings (Higham)."""
    if k == 0:
        return 0.0
    if k * UNIT > 0.25:
        raise ValueError(f"{k} roundings are too many for a relative error bound in float64")
    return math.nextafter(k * UNIT / (1.0 - k * UNIT) * (1.0 + 4 * UNIT), math.inf)


def up(value: Number, operations: int = 1) -> Number:
    """Upper bound of a non-negative expression whose computed value took `operations` roundings."""
    factor = 1.0 + 2 * (operations + 1) * UNIT
    if isinstance(value, Tensor):
        return value if value.requires_grad else next_above(value * factor)
    return math.nextafter(value * factor, math.inf)


def next_above(value: Tensor) -> Tensor:
    """The next larger float64 numbers; the values themselves where they carry a gradient."""
    return value if value.requires_grad else torch.nextafter(value, value.new_full((), math.inf))


def next_below(value: Tensor) -> Tensor:
    """The next smaller float64 numbers; the values themselves where they carry a gradient."""
    return value if value.requires_grad else torch.nextafter(value, value.new_full((), -math.inf))


def positive_up(value: Tensor, operations: int = 1) -> Tensor:
    """`up` with zero kept: for terms of a sum to which UNDERFLOW is added.

    `up` makes a subnormal number of zero, and products of such numbers are slow.
    """
    return torch.where(value > 0, up(value, operations), value)


def down(value: Number, operations: int = 1) -> Number:
    """Lower bound, at least 0, of a non-negative expression whose computed value took `operations` roundings."""
    factor = 1.0 - 2 * (operations + 1) * UNIT
    if isinstance(value, Tensor):
        return (value if value.requires_grad else next_below(value * factor)).clamp(min=0.0)
    return max(0.0, math.nextafter(value * factor, -math.inf))


def times(first: Number, *others: Number | float) -> Number:
    """Upper bound of a product of non-negative numbers, rounded up factor by factor.

    A single rounding at the end would miss a partial product that underflows before it meets a large factor.
    """
    product = first
    for factor in others:
        product = up(product * factor)
    return product


def difference_down(first: Tensor, second: Tensor) -> Tensor:
    """Lower bound of the difference of two float64 numbers of any sign; -inf for NaN or +inf."""
    value = first - second
    value = value - 2 * UNIT * value.abs() - UNDERFLOW
    return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def powers_of_two(rows: Tensor) -> Tensor:
    """For each row of (batch, n) the largest power of two that is at most its largest |entry|: (batch,).

    Division by it is exact, and squares then neither overflow nor underflow. 1 for rows without entries, of zeros, or
    with an entry that is not finite.
    """
    if rows.shape[1] == 0:
        return rows.new_ones(len(rows))
    largest = rows.detach().abs().amax(1)
    mantissa, _ = torch.frexp(largest)
    return torch.where((largest > 0) & largest.isfinite(), largest / (2 * mantissa), torch.ones_like(largest))


def power_of_two(values: Tensor) -> float:
    """`powers_of_two` of one tensor of any shape."""
    return float(powers_of_two(values.reshape(1, -1)))


def vector_norm_up(rows: Tensor) -> Tensor:
    """Upper bound of the Euclidean norm along the last axis, free of overflow and underflow."""
    norm = torch.linalg.vector_norm(rows, dim=-1)
    if bool(((norm < 1e-140) | (norm > 1e140)).any()):  # squares may have left the range: scale by the largest entry
        scale = rows.abs().amax(dim=-1, keepdim=True)
        safe = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        norm = torch.linalg.vector_norm(rows / safe, dim=-1) * safe.squeeze(-1)
    return up(norm, rows.shape[-1] + 6)
