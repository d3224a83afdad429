"""Verified upper bounds of operator norms (theory section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from certify_cli.numerics.eigen import largest_eigenvalue, largest_of_all, symmetric_product
from certify_cli.numerics.estimates import norm_estimate
from certify_cli.numerics.rounding import UNIT, carries_gradient, gamma, number, power_of_two, times, up, vector_norm_up

CHUNK_ENTRIES = 2**22
"""Symbol matrices are built in chunks of at most this many complex entries (64 MiB)."""
SYMBOL_OPERATIONS = 2e10
"""Floating-point operations up to which a symbol is taken at every frequency of its torus: one second on two cores."""
DENSITIES = (128, 64, 32, 16)
"""Frequencies of a coarser grid, for each unit of the symbol's degree along an axis: as many as SYMBOL_OPERATIONS
affords, at least the last. The bound is too large by 0.03, 0.12, 0.48 or 1.96 % an axis."""
WAVE_ERROR = 64 * UNIT
"""Upper bound of |computed - exact| of a wave exp(2 pi i r). `waves_at` computes it with an error below 23 u:

- r is a fraction of integers below 2^53, in [0, 1), and its quotient is rounded once: u;
- 2 pi is stored with a relative error below 0.4 u, and the product with it is rounded: the angle is below 2 pi and its
  error below 2 pi (1 + 0.4 + 1) u, that is 15.1 u, and so is the wave's;
- cosine and sine are within four units in the last place of the computed angle's (the libraries of CPUs, where waves
  are computed, stay below one): 8 u of either, hence of the wave, whose modulus is 1. `polar` multiplies them by 1.

The rest of the 64 u covers terms in u^2 and the rounding of the sums that WAVE_ERROR multiplies.
"""


def frobenius_norm(matrix: Tensor) -> float:
    """Upper bound of the Frobenius norm of a real tensor."""
    return number(vector_norm_up(matrix.flatten())) if matrix.numel() else 0.0


def gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A A^T for A (batch, m, n), and upper bounds (batch,) of its rounding error, gamma_(n+2) ||A||_F^2."""
    size = vector_norm_up(matrix.flatten(1))
    return symmetric_product(matrix), up(gamma(matrix.shape[-1] + 2) * size.square(), 3)


def matrix_norm(matrix: Tensor) -> float:
    """Upper bound of the spectral norm of a real (m, n) matrix, by about 1e-9 too large, relative.

    From the Gram matrix of the smaller side, whose largest eigenvalue is proved by Cholesky; its rounding error is
    added before the root. inf if an entry is not finite. Of a matrix that carries a gradient, an estimate from below.
    """
    if carries_gradient(matrix):
        return norm_estimate(matrix)
    if matrix.numel() == 0:
        return 0.0
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if rows.shape[0] == 1:
        return float(vector_norm_up(rows[0]))
    if not bool(rows.any()):
        return 0.0
    if not bool(rows.isfinite().all()):
        return math.inf
    scale = power_of_two(rows)
    return times(gram_norm(*gram((rows / scale).unsqueeze(0))), scale)


def gram_norm(product_: Tensor, slack: Tensor) -> float:
    """Upper bound of ||A|| from A A^T as computed, (1, m, m).   slack: (1,), bounds the spectral norm of its error."""
    return up(math.sqrt(float(largest_eigenvalue(product_, slack))), 2)


def conv_symbol_norm(
    weight: Tensor,
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> float:
    """Upper bound of the norm of a zero-padded convolution on inputs of the given spatial sizes.

    The convolution is a compression of a circulant one on any torus that is large enough for nothing to wrap around.
    The norm of the latter is the largest singular value of its symbol, a (channels out x channels in * phases) matrix
    per frequency. Large images have too many frequencies: there a coarser grid and a factor take their place
    (`_grid_factor`). A strided convolution is a sum over input phases: tap a reads phase (a dil - pad) mod s at offset
    floor((a dil - pad) / s). Sums over taps are written out, so their rounding error is a plain dot product's.

    An entry of the symbol is a sum of at most T = `taps.shape[-1]` products wave * w, w real. With waves within
    WAVE_ERROR of the exact ones, and real and imaginary part each a dot product of T terms in any order, fused or not,
    its error is at most (gamma_T (1 + WAVE_ERROR) + WAVE_ERROR) sum |w|; the parts' errors add up as |wave w| does. A
    complex product by three real ones errs by (sqrt 2 + 1) gamma_(T+3) in a part, which gamma_(4 (T + 2)) covers too.
    The error of the symbol's norm is at most the Frobenius norm of these errors. Dividing by a power of two is exact.
    """
    axes = [
        Axis(n, k, s, p, d) for n, k, s, p, d in zip(sizes, weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    scale = power_of_two(weight)
    weight = weight / scale
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    taps = weight.reshape(groups, out_channels, in_channels, -1)
    tap_phase = [tuple(a.phase[t] for a, t in zip(axes, index, strict=True)) for index in tap_indices(weight.shape[2:])]
    phases = sorted(set(tap_phase))
    members = [[t for t, phase in enumerate(tap_phase) if phase == wanted] for wanted in phases]

    # entrywise: |computed - exact| <= (rounding of the dot product, and of the waves) * sum |w|
    entry_error = (gamma(4 * (taps.shape[-1] + 2)) + WAVE_ERROR) * taps.abs().sum(-1)
    slack = float(entry_error.square().sum((1, 2)).max().sqrt()) * math.sqrt(len(phases))
    slack = up(slack, taps[0].numel() + 8)

    entries = groups * out_channels * in_channels * len(phases)
    sides = sorted((out_channels, in_channels * len(phases)))
    counts = _grid(axes, groups * sides[0] ** 2 * (4.0 * sides[1] + 6.0 * sides[0]))
    factor = 1.0
    for axis, count in zip(axes, counts, strict=True):
        factor = times(factor, 1.0 if count == axis.torus else _grid_factor(axis.degree, count))
    frequencies = _frequencies(counts)
    chunk = max(1, CHUNK_ENTRIES // entries)
    best = 0.0
    for start in range(0, frequencies.shape[0], chunk):
        wave = waves_at(axes, frequencies[start : start + chunk], weight.shape[2:], counts).to(weight.device)
        parts = [torch.einsum("ft,goit->fgoi", wave[:, m], taps[..., m].to(wave.dtype)) for m in members]
        symbol = torch.cat(parts, dim=-1).flatten(0, 1)
        best = max(best, _largest_singular_value(symbol))
    return times(up(best + slack, 2), factor, scale)


def _grid_factor(degree: float, count: int) -> float:
    """Upper bound of sup |p| / max |p| at `count` > 2 `degree` equidistant frequencies, for a symbol's entries p.

    degree: m = (largest - smallest offset) / 2. Let q(t) = Re(e^{i (c - m t)} u^H A(t) v) along one axis, where the
    exponents of e^{i t} then lie in [-m, m] and u, v and c make q(t0) = ||q|| the supremum of the symbol's norm. By the
    inequality of Bernstein and Szegoe, q'^2 + m^2 q^2 <= m^2 ||q||^2, so arccos(q / ||q||) changes by at most m a unit
    of t: q(t) >= ||q|| cos(m |t - t0|) while m |t - t0| <= pi. Some frequency of the grid is within pi / count of t0.
    Hence ||q|| <= max |q| / cos(pi m / count), axis by axis; and the symbol's supremum bounds its value on any torus.
    (Half an integer m: q(2 t) is a trigonometric polynomial of degree 2 m.)
    """
    if degree == 0:
        return 1.0
    if count <= 2 * degree:
        raise ValueError(f"{count} frequencies do not bound a symbol of degree {degree}")
    angle = math.pi * degree / count * (1 + 8 * UNIT)
    return up(1.0 / (math.cos(angle) - 4 * UNIT), 2)


def _grid(axes: Sequence[Axis], operations: float) -> list[int]:
    """The number of frequencies along each axis: its torus, or fewer where all of them take too many operations.

    operations: for one frequency.   An axis without offsets has the same symbol everywhere.
    """
    counts = [1 if axis.degree == 0 else axis.torus for axis in axes]
    for density in DENSITIES:
        if operations * math.prod(counts) / 2 <= SYMBOL_OPERATIONS:
            break
        counts = [min(n, math.ceil(density * axis.degree)) for n, axis in zip(counts, axes, strict=True)]
        counts = [max(1, n) for n in counts]
    return counts


def _largest_singular_value(matrices: Tensor) -> float:
    """Upper bound of the largest norm in a batch of complex (m, n) matrices."""
    rows = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mH
    size = vector_norm_up(torch.view_as_real(rows.resolve_conj()).flatten(1))
    slack = up(gamma(4 * (rows.shape[-1] + 2)) * size.square(), 3)
    if rows.shape[1] > 1:
        return up(math.sqrt(largest_of_all(symmetric_product(rows), slack)), 2)
    return float(size.max())


class Axis:
    """One spatial axis of a convolution: offset and phase of each tap, and a torus on which nothing wraps around."""

    def __init__(self, n: int, k: int, s: int, p: int, d: int) -> None:
        reads = [a * d - p for a in range(k)]
        self.offset = [r // s for r in reads]
        self.phase = [r % s for r in reads]
        outputs = (n + 2 * p - d * (k - 1) - 1) // s + 1
        inputs = -(-n // s)
        # output j reads j + offset, which must not wrap to a true input from either end
        self.torus = max(outputs + max(self.offset), inputs - min(self.offset), 1)

    @property
    def degree(self) -> float:
        """Of the symbol, as a trigonometric polynomial of this axis' frequency up to a factor of modulus 1."""
        return 0.5 * (max(self.offset) - min(self.offset))


def tap_indices(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of the taps of a kernel, row-major."""
    return list(product(*(range(k) for k in kernel)))


def _frequencies(counts: Sequence[int]) -> Tensor:
    """Integer frequencies (count, axes); half of them suffice on the last axis, since the weights are real."""
    ranges = [torch.arange(n) for n in counts[:-1]] + [torch.arange(counts[-1] // 2 + 1)]
    return torch.cartesian_prod(*ranges).reshape(-1, len(counts))


def waves_at(axes: Sequence[Axis], frequencies: Tensor, kernel: Sequence[int], counts: Sequence[int]) -> Tensor:
    """exp(2 pi i sum over axes of frequency * offset / count), (frequencies, taps), within WAVE_ERROR.

    counts: the number of frequencies in a full turn of every axis. Angles are counted in integers, in units of 1 / (the
    counts' least common multiple) of a full turn; these are far below 2^53, as the number of frequencies is about the
    product of the counts. They are converted to float64 before the division, since torch divides integers in float32.
    """
    whole = math.lcm(*counts)
    offsets = [[a.offset[t] for a, t in zip(axes, index, strict=True)] for index in tap_indices(kernel)]
    parts = torch.zeros(frequencies.shape[0], len(offsets), dtype=torch.int64)
    for axis, count in enumerate(counts):
        steps = torch.tensor([o[axis] for o in offsets], dtype=torch.int64)
        parts += torch.remainder(frequencies[:, axis : axis + 1] * steps, count) * (whole // count)
    angles = torch.remainder(parts, whole).to(torch.float64) / whole
    return torch.polar(torch.ones_like(angles), 2 * math.pi * angles)
