"""Directed rounding in float64, by inflation (theory section 10).

A quantity computed from non-negative numbers by k additions, products, quotients and roots has a relative error of at
most gamma_k = k u / (1 - k u); `up` and `down` turn the computed value into a bound. Terms of mixed sign cancel and
need an error bound of their own: these two functions are not for them.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

UNIT = 2.0**-53
"""The unit roundoff u of float64."""

UNDERFLOW = 1e-290
"""More than the absolute error that underflowing products can add to any one sum, or to the norm of any vector."""

TINY = 1e-300
"""Keeps quotients of estimates numbers; too small to be in any bound."""

Number = TypeVar("Number", float, Tensor)


def gamma(k: int) -> float:
    """Upper bound of k u / (1 - k u), the relative error of k roundings (Higham)."""
    if k == 0:
        return 0.0
    if k * UNIT > 0.25:
        raise ValueError(f"{k} roundings are too many for a relative error bound in float64")
    return math.nextafter(k * UNIT / (1.0 - k * UNIT) * (1.0 + 4 * UNIT), math.inf)


def up(value: Number, operations: int = 1) -> Number:
    """At least the exact value of a non-negative expression that took `operations` roundings to compute."""
    factor = 1.0 + 2 * (operations + 1) * UNIT
    if isinstance(value, Tensor):
        return torch.nextafter(value * factor, torch.full_like(value, math.inf))
    return math.nextafter(value * factor, math.inf)


def positive_up(value: Tensor, operations: int = 1) -> Tensor:
    """`up`, but zero stays zero: for terms of a sum that UNDERFLOW is added to.

    Of zero `up` makes the least number there is, and products of such numbers are slow.
    """
    return torch.where(value > 0, up(value, operations), value)


def down(value: Number, operations: int = 1) -> Number:
    """At most the exact value of a non-negative expression that took `operations` roundings; never below 0."""
    factor = 1.0 - 2 * (operations + 1) * UNIT
    if isinstance(value, Tensor):
        return torch.nextafter(value * factor, torch.full_like(value, -math.inf)).clamp(min=0.0)
    return max(0.0, math.nextafter(value * factor, -math.inf))


def times(first: Number, *others: Number | float) -> Number:
    """Upper bound of a product of non-negative numbers, rounded up factor by factor.

    Rounded once at the end, a product that vanishes half-way and is then multiplied by a large factor would be lost.
    """
    product = first
    for factor in others:
        product = up(product * factor)
    return product


def difference_down(first: Tensor, second: Tensor) -> Tensor:
    """At most the exact difference of two float64 numbers of any sign; -inf where it is no number."""
    value = first - second
    value = value - 2 * UNIT * value.abs() - UNDERFLOW
    return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def powers_of_two(rows: Tensor) -> Tensor:
    """For each row of (batch, n) a power of two, no more than its largest |entry| and more than half of it: (batch,).

    Dividing by it is exact, and squares then neither overflow nor vanish. 1 where no scaling can help: no entry, only
    zeros, or one that is not finite.
    """
    if rows.shape[1] == 0:
        return rows.new_ones(len(rows))
    largest = rows.abs().amax(1)
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
