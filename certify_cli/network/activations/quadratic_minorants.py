"""Offsets of quadratic minorants: the constant c of `bounds.remainder.expansion`'s (3), from above.

    c = - min over the interval of  psi(t) = sign (phi(z+t) - phi(z) - slope t) + quadratic t^2 / 2

for any slope and quadratic coefficient >= 0. The interval is cut by knots. On a cell psi'' >= m, so psi is above the
parabolas psi_k + psi'_k tau + m tau^2/2 of both its knots, each of which is used on its half. The loss is of third
order in the cell's width. phi'' may jump: phi' is its integral all the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.numerics.rounding import TINY, UNDERFLOW, UNIT

CELLS = 24
CHUNK = 2**13
"""Entries per step, so that all knots stay in the cache."""
SLACK = 64 * UNIT
"""Bounds all roundings of one parabola, relative to its terms: fewer than thirty operations."""


def minorant_offsets(interval: ActivationOnInterval, sign: Tensor, slope: Tensor, quadratic: Tensor) -> Tensor:
    """Upper bounds (shape of z), >= 0, of the constants c; sign is 1 or -1. inf where an end is infinite, NaN for NaN.

    For activations without curvature the quadratic coefficient is ignored: the bound is that of the straight line.
    """
    if interval.activation.curvature is None:
        lower, upper = interval.remainders(slope)
        return torch.where(sign > 0, -lower, upper).clamp(min=0.0)
    shape = interval.z.shape
    error = torch.as_tensor(interval.error, dtype=torch.float64, device=interval.z.device)  # float32 would round down
    parts = [p.expand(shape).reshape(-1) for p in (interval.z, error, interval.lo, interval.hi)]
    parts += [p.expand(shape).reshape(-1) for p in (sign, slope, quadratic)]
    offsets = [
        _offsets(ActivationOnInterval(interval.activation, z, error, lo, hi), *minorant)
        for z, error, lo, hi, *minorant in zip(*(p.split(CHUNK) for p in parts), strict=True)
    ]
    return torch.cat(offsets).reshape(shape).clamp(min=0.0)


def _offsets(interval: ActivationOnInterval, sign: Tensor, slope: Tensor, quadratic: Tensor) -> Tensor:
    phi, z = interval.activation, interval.z
    error = torch.as_tensor(interval.error, dtype=torch.float64, device=z.device)
    curvature = phi.curvature
    assert curvature is not None
    knots = _knots(interval, error)
    t = knots - z
    value, base, slopes = phi.value(knots), phi.value(z), phi.slope(knots)
    # the true z is within `error` of z: it moves phi(z), and t against the true offset, whose difference rounds as well
    shift = 2 * error + 4 * UNIT * (z.abs() + knots.abs())
    size = phi.lipschitz + slope.abs() + quadratic * t.abs()
    psi = sign * (value - base - slope * t) + 0.5 * quadratic * t.square()
    psi = psi - (phi.value.error(knots) + phi.value.error(z) + size * (shift + SLACK * t.abs()))
    psi = psi - SLACK * (value.abs() + base.abs())
    psi_slope = sign * (slopes - slope) + quadratic * t
    slope_error = phi.slope.error(knots) + quadratic * shift + SLACK * size
    lower, upper = curvature.on(knots[:-1], knots[1:])
    m = torch.where(sign > 0, lower, -upper) + quadratic
    m = m - SLACK * (m.abs() + quadratic)
    half = (0.5 + 2.0**-40) * (knots[1:] - knots[:-1])
    left = _parabola_minimum(psi[:-1], psi_slope[:-1] - slope_error[:-1], m, half)
    right = _parabola_minimum(psi[1:], -psi_slope[1:] - slope_error[1:], m, half)
    terms = psi.abs().amax(0) + half.amax(0) * (size.amax(0) + half.amax(0) * m.abs().amax(0))
    minimum = torch.minimum(left, right).amin(0) - SLACK * terms - UNDERFLOW
    unbounded = interval.lo.isinf() | interval.hi.isinf()
    return torch.where(unbounded, torch.full_like(minimum, math.inf), -minimum)


def _knots(interval: ActivationOnInterval, error: Tensor) -> Tensor:
    """(CELLS + 1, entries), never decreasing, from z - error + lo to z + error + hi, outward; finite."""
    z = interval.z
    lo, hi = (torch.where(end.isinf(), torch.zeros_like(end), end) for end in (interval.lo, interval.hi))
    infinity = torch.full_like(z, math.inf)
    pad = 4 * UNIT * (z.abs() + error)
    first = torch.nextafter(z - (error + pad - lo * (1 + 4 * UNIT)), -infinity)
    last = torch.nextafter(z + (error + pad + hi * (1 + 4 * UNIT)), infinity)
    steps = torch.linspace(0, 1, CELLS + 1, dtype=z.dtype, device=z.device).unsqueeze(1)
    inner = torch.minimum(torch.maximum(first + (last - first) * steps, first), last)
    inner[0], inner[-1] = first, last
    return inner.cummax(0).values


def _parabola_minimum(value: Tensor, slope: Tensor, curvature: Tensor, width: Tensor) -> Tensor:
    """Minimum of value + slope tau + curvature tau^2 / 2 over 0 <= tau <= width; rounding is the caller's concern."""
    vertex = torch.where(curvature > 0, -slope / curvature.clamp(min=TINY), width)
    tau = torch.minimum(vertex.clamp(min=0.0), width)
    inner = value + tau * (slope + 0.5 * curvature * tau)
    end = value + width * (slope + 0.5 * curvature * width)
    return torch.minimum(torch.minimum(value, inner), end)
