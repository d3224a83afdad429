"""Digits are exact: at the largest digits, the longest dot products, and for numbers of very unequal size."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from certify_cli.numerics.digits import (
    LIMIT,
    ROUNDED,
    SPARE,
    Digits,
    carried,
    digit_bits,
    digits_of,
    planes_of,
    product,
    total,
)
from certify_cli.numerics.quotients import TAIL, quotient_tail, reciprocal
from certify_cli.numerics.rounding import UNIT

NUMBERS = st.floats(-(2.0**990), 2.0**990, allow_nan=False, width=64)


def exact(digits: Digits) -> list[Fraction]:
    """The numbers that the planes stand for."""
    columns = zip(*(plane.flatten().tolist() for plane in digits.planes), strict=True)
    places = range(digits.first, digits.last + 1)
    return [
        sum((int(d) * Fraction(2) ** (-digits.bits * j) for d, j in zip(column, places, strict=True)), Fraction(0))
        for column in columns
    ]


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4), st.sampled_from((14, 19, 20, 26)))
def test_float64_numbers_have_exact_digits(numbers: list[float], bits: int) -> None:
    found = digits_of(column(*numbers), bits, 2000 // bits)
    assert exact(found) == [Fraction(n) for n in numbers]
    assert all(float(plane.min()) >= -(2 ** (bits - 1)) for plane in found.planes)
    assert all(float(plane.max()) < 2 ** (bits - 1) for plane in found.planes)
    assert found.rounded().tolist() == numbers


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=3, max_size=3), st.integers(-60, 60))
def test_what_is_cut_off_is_half_a_unit(numbers: list[float], last: int) -> None:
    bits = 20
    unit = Fraction(2) ** (-bits * last)
    most = unit / 2 * (1 + Fraction(2) ** (1 - bits))
    whole = digits_of(column(*numbers), bits, 100)
    for found in (digits_of(column(*numbers), bits, last), whole.cut(last)):
        assert found.last <= last
        assert all(abs(z - Fraction(n)) <= most for z, n in zip(exact(found), numbers, strict=True))
    sums = total([whole, digits_of(column(*numbers[::-1]), bits, 100)], last)
    assert all(
        abs(z - Fraction(a) - Fraction(b)) <= most for z, a, b in zip(exact(sums), numbers, numbers[::-1], strict=True)
    )


@settings(deadline=None)
@given(st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=6), st.integers(14, 26))
def test_carrying_keeps_the_number(integers: list[int], bits: int) -> None:
    columns = {place: column(float(n)) for place, n in enumerate(integers, -3)}
    found = carried(columns, bits, 10)
    assert exact(found) == [sum((n * Fraction(2) ** (-bits * j) for j, n in enumerate(integers, -3)), Fraction(0))]
    z = exact(found)[0]
    assert abs(Fraction(float(found.rounded())) - z) <= Fraction(ROUNDED) * abs(z)


@pytest.mark.parametrize("bits", [14, 20, 26])
@pytest.mark.parametrize("sign", [1, -1])
def test_carrying_at_the_limit(bits: int, sign: int) -> None:
    """Every plane as large as it may be, so that carries run through all of them."""
    columns = {place: column(sign * LIMIT) for place in range(5)}
    whole = sum((sign * int(LIMIT) * Fraction(2) ** (-bits * j) for j in range(5)), Fraction(0))
    assert exact(carried(columns, bits, 4)) == [whole]


@pytest.mark.parametrize("products", [1, 2, 3, 9, 511, 512, 4608, 25088])
def test_products_of_the_largest_digits_are_exact(products: int) -> None:
    """All digits at their largest, of one sign, in all places, at the longest dot product for the base."""
    bits = digit_bits(products)
    most = 2 ** (bits - 1)
    assert SPARE * products * most**2 <= 2**53
    assert bits == 26 or SPARE * (products + 1) * (2 * most) ** 2 > 2**53
    for sign in (1, -1):
        value = Digits([torch.full((1, products), -float(most), dtype=torch.float64)] * 4, 0, bits)
        factors = [(place, torch.full((1, products), sign * float(most), dtype=torch.float64)) for place in range(7)]
        found = product(factors, value, lambda plane, stacked: stacked @ plane.T, products, 20)
        one = sum((Fraction(2) ** (-bits * j) for j in range(4)), Fraction(0)) * -most
        other = sum((Fraction(2) ** (-bits * j) for j in range(7)), Fraction(0)) * sign * most
        assert exact(found) == [products * one * other]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(-3, 12), st.integers(1, 300))
def test_a_product_is_within_a_unit_of_its_last_place(seed: int, last: int, products: int) -> None:
    g = torch.Generator().manual_seed(seed)
    bits = digit_bits(products)
    numbers = [torch.randn(2, products, dtype=torch.float64, generator=g) for _ in range(4)]
    h = total([digits_of(n * 2.0 ** (-50 * k), bits, 40) for k, n in enumerate(numbers)], 40)
    weight = torch.randn(3, products, dtype=torch.float64, generator=g)
    weight = weight * 2.0 ** torch.randint(-60, 2, weight.shape, generator=g).double()
    offset = torch.randn(3, dtype=torch.float64, generator=g)
    plus = digits_of(offset, bits, last + 1).map(lambda plane: plane.expand(2, 3))
    found = product(planes_of(weight, bits), h, lambda w, planes: planes @ w.T, products, last, plus)
    z, w = exact(h), [[Fraction(v) for v in row] for row in weight.tolist()]
    wanted = [
        sum((a * b for a, b in zip(row, z[k * products : (k + 1) * products], strict=True)), Fraction(c))
        for k in range(2)
        for row, c in zip(w, offset.tolist(), strict=True)
    ]
    assert all(abs(a - b) < Fraction(2) ** (-bits * last) for a, b in zip(exact(found), wanted, strict=True))


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e305])
def test_numbers_that_have_no_digits_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="digits are for numbers"):
        list(planes_of(column(1.0, number), 20))


@pytest.mark.parametrize("root", [False, True])
def test_tails_hold_what_float64_leaves(root: bool) -> None:
    g = torch.Generator().manual_seed(1)
    numerator, variance = (torch.randn(200, dtype=torch.float64, generator=g) for _ in range(2))
    numerator = numerator * 10.0 ** torch.randint(-20, 20, (200,), generator=g).double()
    numerator[:5] = column(0.0, -1.0, 1.0, 1e-60, 1e200)
    variance = variance.abs() * 10.0 ** torch.randint(-9, 20, (200,), generator=g).double()
    variance[5:7] = column(0.0, 1.0)
    if not root:
        variance = variance * torch.where(torch.rand(200, generator=g) < 0.5, -1, 1)
    eps = torch.full_like(variance, 1e-5)
    bottom = variance + eps
    weight = numerator / (bottom.sqrt() if root else bottom)
    tail = quotient_tail(weight, numerator, [variance, eps], root)
    assert tail is not None
    with mpmath.workprec(1000):
        for row, parts in enumerate(tail.T.tolist()):
            below = mpmath.mpf(variance[row].item()) + mpmath.mpf(eps[row].item())
            constant = mpmath.mpf(numerator[row].item()) / (mpmath.sqrt(below) if root else below)
            stored = mpmath.mpf(weight[row].item())
            left = abs(mpmath.fsum([stored, *parts]) - constant)
            assert left <= abs(stored) * 6 * mpmath.mpf(UNIT) ** (TAIL + 1)


def test_a_reciprocal_is_exact_where_the_divisor_is_a_power_of_two() -> None:
    weight, tail = reciprocal(column(4.0, -0.125, 3.0))
    assert tail is not None
    assert weight.tolist() == [0.25, -8.0, 1 / 3]
    assert not tail[:, :2].any()
    assert Fraction(1 / 3) + sum(map(Fraction, tail[:, 2].tolist())) - Fraction(1, 3) < Fraction(1, 2**450)


@pytest.mark.parametrize("divisor", [0.0, 1e300, float("inf")])
def test_constants_that_are_infinite_or_tiny_have_no_tail(divisor: float) -> None:
    assert reciprocal(column(2.0, divisor))[1] is None
