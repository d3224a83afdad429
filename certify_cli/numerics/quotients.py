"""What float64 leaves of constants that are quotients and roots, as further float64 numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

TAIL = 8
"""Number of parts of a tail: together with the weight they hold 9 times 53 bits."""

PRECISION = 560
"""Bits to which the constants themselves are computed."""


def quotient_tail(weight: Tensor, numerator: Tensor, addends: Sequence[Tensor], root: bool = False) -> Tensor | None:
    """numerator / sum(addends), or numerator / sqrt(sum(addends)), minus its computed value `weight`: (TAIL, *shape).

    Each part is the rest that the parts before leave, rounded to float64: what is left at last is at most 1.01 u^TAIL
    times the error of `weight`. Everything is computed in integers. None where a weight is tiny (below 2^-400), since
    parts would leave float64's range.
    """
    columns = [t.expand(weight.shape).flatten().tolist() for t in (weight, numerator, *addends)]
    if any(abs(w) < 2.0**-400 and (w != 0.0 or n != 0.0) for w, n in zip(*columns[:2], strict=True)):
        return None
    known: dict[tuple[float, ...], list[float]] = {}
    for numbers in zip(*columns, strict=True):
        if numbers not in known:
            known[numbers] = _tail(*numbers, root=root)
    tails = [known[numbers] for numbers in zip(*columns, strict=True)]
    return torch.tensor(tails, dtype=torch.float64).T.reshape(TAIL, *weight.shape)


def _tail(weight: float, numerator: float, *addends: float, root: bool) -> list[float]:
    shift = PRECISION - math.frexp(weight)[1]  # integers are in units of 2^-shift
    top, below_top = numerator.as_integer_ratio()
    bottom = sum(map(Fraction, addends), Fraction(0))
    power = 2 if root else 1
    top, below = abs(top) ** power * bottom.denominator, below_top**power * abs(bottom.numerator)
    whole = (top << power * shift) // below if shift >= 0 else top // (below << -power * shift)
    rest = (-1 if weight < 0 else 1) * (math.isqrt(whole) if root else whole) - int(math.ldexp(weight, shift))
    parts = []
    for _ in range(TAIL):
        parts.append(math.ldexp(float(rest), -shift))
        rest -= int(float(rest))
    return parts


def reciprocal(divisor: Tensor) -> tuple[Tensor, Tensor | None]:
    """1 / divisor with one rounding an entry, which is infinite for 0, and its tail."""
    weight = 1.0 / divisor
    finite = bool((weight.isfinite() & divisor.isfinite()).all())
    return weight, quotient_tail(weight, torch.ones_like(divisor), [divisor]) if finite else None
