"""Numbers as text for people: few digits, rounded in the direction in which the claim stays true."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

DECIMALS = 4
SMALLEST_FIXED = Decimal("0.001")
LARGEST_FIXED = Decimal(1_000_000)

DOWN, UP, NEAREST = ROUND_FLOOR, ROUND_CEILING, ROUND_HALF_EVEN
"""Certified figures are shown rounded down, attack figures up, all else to nearest."""


def number(value: float | None, rounding: str = NEAREST) -> str:
    """`value` with four decimals, or four significant digits where it is very small or large; "-" for None.

    The conversion from float64 to decimal is exact, so that the text never lies on the wrong side of the value.
    """
    if value is None:
        return "-"
    exact = Decimal(value)
    if exact == 0 or SMALLEST_FIXED <= abs(exact) < LARGEST_FIXED:
        return f"{exact.quantize(Decimal(1).scaleb(-DECIMALS), rounding=rounding):f}"
    return f"{Context(prec=DECIMALS, rounding=rounding).create_decimal(exact):.3e}"


def near_one(value: float, rounding: str) -> str:
    """`value` with seven decimals, where the distance from 1 is what counts; a large one as `number` has it."""
    if not value < LARGEST_FIXED:
        return number(value, rounding)
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-7), rounding=rounding):f}"


def share(fraction: float | None, total: int) -> str:
    """A share of `total` samples as percentage and count, such as "43.12 %  (4312 of 10000)"; "-" for None.

    The count is recovered first: 0.4312 as float64 may lie just below 0.4312, and must still be shown as 43.12 %.
    """
    if fraction is None or total == 0:
        return "-"
    count = round(fraction * total)
    percent = (Decimal(100) * count / total).quantize(Decimal("0.01"), rounding=NEAREST)
    return f"{percent:f} %  ({count} of {total})"


def seconds(value: float) -> str:
    """A duration: 0.84 s, 12.3 s, 4 min 05 s."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"
