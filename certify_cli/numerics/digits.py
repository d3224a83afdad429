"""Numbers of many digits, for values whose float64 rounding would be multiplied by too much (theory section 16).

A number is written in base 2^bits with integer digits in [-2^(bits-1), 2^(bits-1)), place j counting 2^(-bits j). Each
place of a tensor of numbers is a float64 tensor, a plane. A sum of k products of two digits is an integer of at most
k 2^(2 bits - 2): up to 2^53 it is exact in float64 in whatever order it is summed, so that torch's own dot products and
convolutions of planes are. What is left to do is to carry, which is exact too; the only rounding is to cut a number off
behind a place, by at most half a unit of it and a 2^(1-bits) of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from certify_cli.numerics.rounding import UNIT

LIMIT = 2.0**53 - 2.0**40
"""Integers up to here, and what is carried to them, are float64 numbers; digits have 14 to 26 bits."""

LARGEST = 2.0**1000

SPARE = 4
"""So many products of planes may be added up before a carry, whatever the length of a dot product."""


def digit_bits(products: int) -> int:
    """The largest digits of which SPARE dot products of `products` terms are exact."""
    return (55 - math.ceil(math.log2(SPARE * (products + 1)))) // 2


@dataclass(frozen=True, eq=False)
class Digits:
    """sum_j planes[j] 2^(-bits (first + j)); planes of one shape, at least one."""

    planes: list[Tensor]
    first: int
    bits: int

    @property
    def last(self) -> int:
        return self.first + len(self.planes) - 1

    def places(self) -> Iterator[tuple[int, Tensor]]:
        return enumerate(self.planes, self.first)

    def cut(self, last: int) -> Digits:
        """Without the places behind `last`: an error of half a unit of it and a 2^(1-bits) of that."""
        kept = max(last - self.first + 1, 0)
        return Digits(self.planes[:kept] or [self.planes[0] * 0], self.first if kept else last, self.bits)

    def map(self, function: Callable[[Tensor], Tensor]) -> Digits:
        """The function of every plane: for one that only moves digits, or replaces some by zeros."""
        return Digits([function(plane) for plane in self.planes], self.first, self.bits)

    def rounded(self) -> Tensor:
        """The nearest float64 numbers but for an error of 3 u |value|, and underflow.

        Summed from the last place on, the sum so far never exceeds half a unit, and hence 1.0001 |value|, by more than
        the digits behind; so the last two sums err by u |value| each, and all others by 2^(1-bits) of that.
        """
        total = torch.zeros_like(self.planes[0])
        for place, plane in reversed(list(self.places())):
            total = total + scaled(plane, -self.bits * place)
        return total


ROUNDED = 3 * UNIT
"""Relative error of `Digits.rounded`."""


def scaled(x: Tensor, exponent: int) -> Tensor:
    """x 2^exponent, exact in float64's range; in steps, since the power alone may leave it."""
    while abs(exponent) > 1000:
        step = math.copysign(1000, exponent)
        x, exponent = x * 2.0**step, exponent - int(step)
    return x * 2.0**exponent


def first_place(largest: float, bits: int) -> int:
    """The first place of numbers up to `largest`."""
    return (bits - 1 - math.frexp(largest)[1]) // bits


def planes_of(x: Tensor, bits: int) -> Iterator[tuple[int, Tensor]]:
    """Digits of float64 numbers up to LARGEST, plane by plane until nothing is left; 2^(bits-1) may occur.

    The remainder is exact, since the difference of a number to the nearest integer has no more bits than the number;
    it is at most half a unit of the last place that was given.
    """
    largest = float(x.abs().max())
    if not largest <= LARGEST:
        raise ValueError(f"digits are for numbers up to {LARGEST:.3g}, not for {largest:g}")
    place = first_place(largest, bits)
    while True:
        plane = scaled(x, bits * place).round()
        yield place, plane
        x = x - scaled(plane, -bits * place)
        if not bool(x.any()):
            return
        place += 1


def digits_of(x: Tensor, bits: int, last: int) -> Digits:
    """Float64 numbers in digits, cut off behind place `last`."""
    return carried(dict(takewhile(lambda pair: pair[0] <= last, planes_of(x, bits))) or {last: x * 0}, bits, last)


def carried(columns: dict[int, Tensor], bits: int, last: int) -> Digits:
    """The sum of planes of integers, whose magnitudes are at most LIMIT, by place; cut off behind `last`."""
    base, highest = 2.0**bits, min(columns)
    zeros = torch.zeros_like(columns[highest])
    place, carry, planes = max(columns), zeros, list[Tensor]()
    while place >= highest or bool(carry.any()):
        plane = columns.get(place, zeros) + carry
        carry = (plane + base / 2).mul_(1 / base).floor_()
        if place <= last:
            planes.append(plane.sub_(carry, alpha=base))
        place -= 1
    while len(planes) > 1 and not bool(planes[-1].any()):
        planes.pop()
    first = min(max(columns), last) - len(planes) + 1
    return Digits(planes[::-1], first, bits) if planes else Digits([zeros], last, bits)


def total(parts: Iterable[Digits], last: int) -> Digits:
    """The sum of a few numbers, cut off behind place `last`."""
    columns: dict[int, Tensor] = {}
    for part in parts:
        bits = part.bits
        for place, plane in part.places():
            columns[place] = columns[place] + plane if place in columns else plane
    return carried(columns, bits, last)


def product(
    factors: Iterable[tuple[int, Tensor]],
    value: Digits,
    apply: Callable[[Tensor, Tensor], Tensor],
    products: int,
    last: int,
    offset: Digits | None = None,
) -> Digits:
    """A bilinear map of digits, plus an offset: with an error below one unit of place `last`, cutting included.

    factors: planes by place, with digits up to 2^(bits-1); only as many are asked for as are needed.
    apply: (plane of the factors, stacked planes of the value) -> their images, stacked, integers each of which is a sum
        of `products` products of digits.

    Of the pairs of places only those up to a few behind `last` are multiplied. One that is left out is at most
    products 4^(bits-1) <= 2^51 units of the sum of its places; there are at most as many for each sum as the value has
    planes, and the sums behind add a little: an eighth of a unit of `last`, by the choice of `behind`.
    """
    bits, stacked = value.bits, torch.stack(value.planes)
    behind = last + math.ceil((51 + math.log2(len(stacked)) + 3) / bits) - 1
    room = int(LIMIT / (products * 4.0 ** (bits - 1) + 2.0**bits))
    columns = {} if offset is None else dict(offset.places())
    added = 0
    for place, plane in factors:
        kept = min(behind - place - value.first + 1, len(stacked))
        if kept <= 0:
            columns = columns or {last: apply(0 * plane, stacked[:1])[0]}
            break
        if added == room:
            columns, added = dict(carried(columns, bits, max(columns)).places()), 0
        for at, image in enumerate(apply(plane, stacked[:kept]), place + value.first):
            columns[at] = columns[at] + image if at in columns else image
        added += 1
    return carried(columns, bits, last)
