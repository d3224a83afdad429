"""Reads numbers from text by one strict rule for every option, setting and record: plain ASCII decimals only.

Python's int() and float() also accept underscores, surrounding spaces, a leading plus, "nan", "inf" and the digits of
every script. Under one strict rule no text is read as different numbers, or accepted by one reader and refused by the
next. Sizes in bytes are written here, too.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

LONGEST = 64
"""Largest number of characters of a number."""
_NUMBER = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)


def decimal(text: str) -> float:
    """The float64 nearest to a decimal such as 0.5, -2 or 1e-3.

    ValueError for any other text, for one too large for a float64, and for one that is not 0 and would become 0.
    """
    if len(text) > LONGEST or _NUMBER.fullmatch(text) is None:
        raise ValueError("not a plain decimal number")
    value = float(text)
    mantissa = re.split("[eE]", text)[0]
    if not math.isfinite(value) or (value == 0 and mantissa.strip("-0.")):
        raise ValueError("beyond the range of a float64")
    return value


def integer(text: str) -> int:
    """An integer of at most 18 digits. ValueError for any other text."""
    if _INTEGER.fullmatch(text) is None:
        raise ValueError("not a plain integer of at most 18 digits")
    return int(text)


def ratio(text: str) -> float:
    """The float64 nearest to a decimal without a sign, or to a fraction of two such as 36/255 (rounded once).

    ValueError otherwise.
    """
    numerator, slash, denominator = text.partition("/")
    if numerator.startswith("-") or denominator.startswith("-"):
        raise ValueError("negative")
    above = decimal(numerator)
    if not slash:
        return above
    below = decimal(denominator)
    if below == 0:
        raise ValueError("divided by zero")
    try:
        value = float(Fraction(numerator) / Fraction(denominator))
    except OverflowError as error:
        raise ValueError("beyond the range of a float64") from error
    if value == 0 and above != 0:
        raise ValueError("beyond the range of a float64")
    return value


def binary_size(count: float) -> str:
    """Bytes as text: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"
