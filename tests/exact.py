"""Oracles in rational arithmetic: what a matrix of float64 numbers stretches a vector by, and its rows' norms.

A float64 number is an integer times a power of two, so sums of products are exact in Python's integers. The stretch
||A v|| / ||v|| of any v is at most the spectral norm of A; of the singular vector that LAPACK finds it is the norm but
for a relative error of the order of u, so a bound below it is a bound below the norm, whatever LAPACK's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """values * 2^power, the values Python's integers in an array."""

    values: NDArray[Any]
    power: int

    @classmethod
    def of(cls, array: Floats) -> Exact:
        """Exactly the (finite) numbers of an array."""
        mantissa, exponent = np.frexp(array)
        whole = np.rint(np.ldexp(mantissa, 53)).astype(np.int64)
        least = int(exponent[whole != 0].min(initial=0)) if whole.any() else 0
        shifts = np.where(whole != 0, exponent - least, 0)
        return cls(whole.astype(object) << shifts.astype(object), least - 53)

    def times(self, factors: Exact) -> Exact:
        """Entrywise."""
        return Exact(self.values * factors.values, self.power + factors.power)

    def norms_squared(self) -> list[Fraction]:
        """Of the rows."""
        return [scaled(int((row * row).sum()), 2 * self.power) for row in self.values]

    def absolute_sums(self) -> list[Fraction]:
        """Of the rows."""
        return [scaled(int(abs(row).sum()), self.power) for row in self.values]

    def stretch_squared(self, vector: Floats) -> Fraction:
        """||A v||^2 / ||v||^2 for v the vector rounded to 50 bits behind the point."""
        v = np.array([int(x) for x in np.rint(np.ldexp(vector, 50))], dtype=object)
        image = self.values @ v
        return scaled(int((image * image).sum()), 2 * self.power) / int((v * v).sum())


def scaled(number: int, power: int) -> Fraction:
    return Fraction(number << power) if power >= 0 else Fraction(number, 1 << -power)


def leading(matrix: Floats) -> tuple[float, Floats, Floats]:
    """The largest singular value and its left and right singular vectors, by LAPACK: about."""
    scale = float(np.abs(matrix).max())
    if scale == 0.0:
        return 0.0, np.eye(1, matrix.shape[0])[0], np.eye(1, matrix.shape[1])[0]
    u, s, vt = np.linalg.svd(matrix / scale)
    return float(s[0]) * scale, u[:, 0], vt[0]


def excess(bound: float, squared: Fraction) -> float:
    """(bound - t) / t of a finite bound, t being the root of `squared` > 0: negative just where the bound is too small.

    It is (bound^2 / t^2 - 1) / (bound / t + 1), whose small factor is exact.
    """
    over = Fraction(bound) ** 2 / squared - 1
    return float(over) / (1 + float(over + 1) ** 0.5)


def convolution_matrix(
    weight: Floats,
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Floats:
    """The matrix (outputs, inputs) of a zero-padded convolution, entry by entry from its definition: output j of an
    axis reads input j * stride + tap * dilation - padding."""
    per_group, kernel = weight.shape[0] // groups, weight.shape[2:]
    axes = list(zip(sizes, kernel, stride, padding, dilation, strict=True))
    counts = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    outputs, inputs = int(np.prod(counts)), int(np.prod(sizes))
    matrix = np.zeros((weight.shape[0], outputs, groups * weight.shape[1], inputs))
    for tap in np.ndindex(*kernel):
        reads = [np.arange(c) * s + t * d - p for c, (_, _, s, p, d), t in zip(counts, axes, tap, strict=True)]
        grid = np.stack(np.meshgrid(*reads, indexing="ij"), axis=-1).reshape(outputs, -1)
        inside = ((grid >= 0) & (grid < np.array(sizes))).all(1)
        source = np.ravel_multi_index(tuple(grid[inside].T), tuple(sizes))
        for group in range(groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            columns = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
            block = matrix[rows, :, columns]
            block[:, np.flatnonzero(inside), :, source] = weight[(rows, slice(None), *tap)]
    return matrix.reshape(weight.shape[0] * outputs, -1)
