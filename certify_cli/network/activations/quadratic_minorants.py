"""How deep a neuron falls below a quadratic minorant: the constant c of `bounds.remainder.expansion`'s (3).

    c = - min over the span of  psi(t) = sign (phi(z+t) - phi(z) - slope t) + bend t^2 / 2

for any slope and bend >= 0, from above. The span is cut by knots; on a cell psi'' >= m, so psi is above the parabolas
psi_k + psi'_k tau + m tau^2/2 of both its knots, and each counts on its half. What is lost is of third order in the
cell's width. A jump of phi'' is no obstacle: phi' is its integral.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.numerics.rounding import TINY, UNDERFLOW, UNIT

CELLS = 24
CHUNK = 2**13
"""Entries treated at once, so that all knots stay in the cache."""
SLACK = 64 * UNIT
"""All roundings of one parabola in units of its terms: fewer than thirty operations."""


def minorant_offsets(span: ActivationOnInterval, sign: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """Upper bounds (shape of z), >= 0, of the constants c; sign is 1 or -1. inf where an end is infinite, NaN for NaN.

    Activations without curvature are given no bend: their minorant is lower still, and piecewise linear.
    """
    if span.activation.curvature is None:
        least, most = span.remainders(slope)
        return torch.where(sign > 0, -least, most).clamp(min=0.0)
    shape = span.z.shape
    error = torch.as_tensor(span.error, dtype=torch.float64, device=span.z.device)  # not float32, which rounds down
    parts = [p.expand(shape).reshape(-1) for p in (span.z, error, span.lo, span.hi)]
    parts += [p.expand(shape).reshape(-1) for p in (sign, slope, bend)]
    found = [
        _depths(ActivationOnInterval(span.activation, z, error, lo, hi), *rest)
        for z, error, lo, hi, *rest in zip(*(p.split(CHUNK) for p in parts), strict=True)
    ]
    return torch.cat(found).reshape(shape).clamp(min=0.0)


def _depths(span: ActivationOnInterval, sign: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    phi, z, error = span.activation, span.z, torch.as_tensor(span.error, dtype=torch.float64, device=span.z.device)
    curvature = phi.curvature
    assert curvature is not None
    knots = _knots(span, error)
    t = knots - z
    value, base, slopes = phi.value(knots), phi.value(z), phi.slope(knots)
    # the true z is within `error` of z: it moves phi(z), and t against the true offset, whose difference rounds as well
    off = 2 * error + 4 * UNIT * (z.abs() + knots.abs())
    size = phi.lipschitz + slope.abs() + bend * t.abs()
    height = sign * (value - base - slope * t) + 0.5 * bend * t.square()
    height = height - (phi.value.error(knots) + phi.value.error(z) + size * (off + SLACK * t.abs()))
    height = height - SLACK * (value.abs() + base.abs())
    tilt = sign * (slopes - slope) + bend * t
    flaw = phi.slope.error(knots) + bend * off + SLACK * size
    least, most = curvature.on(knots[:-1], knots[1:])
    low = torch.where(sign > 0, least, -most) + bend
    low = low - SLACK * (low.abs() + bend)
    half = (0.5 + 2.0**-40) * (knots[1:] - knots[:-1])
    left = _least(height[:-1], tilt[:-1] - flaw[:-1], low, half)
    right = _least(height[1:], -tilt[1:] - flaw[1:], low, half)
    terms = height.abs().amax(0) + half.amax(0) * (size.amax(0) + half.amax(0) * low.abs().amax(0))
    floor = torch.minimum(left, right).amin(0) - SLACK * terms - UNDERFLOW
    endless = span.lo.isinf() | span.hi.isinf()
    return torch.where(endless, torch.full_like(floor, math.inf), -floor)


def _knots(span: ActivationOnInterval, error: Tensor) -> Tensor:
    """(CELLS + 1, entries), never decreasing, from z - error + lo to z + error + hi, outward; finite."""
    z = span.z
    lo, hi = (torch.where(end.isinf(), torch.zeros_like(end), end) for end in (span.lo, span.hi))
    far = torch.full_like(z, math.inf)
    pad = 4 * UNIT * (z.abs() + error)
    first = torch.nextafter(z - (error + pad - lo * (1 + 4 * UNIT)), -far)
    last = torch.nextafter(z + (error + pad + hi * (1 + 4 * UNIT)), far)
    steps = torch.linspace(0, 1, CELLS + 1, dtype=z.dtype, device=z.device).unsqueeze(1)
    inner = torch.minimum(torch.maximum(first + (last - first) * steps, first), last)
    inner[0], inner[-1] = first, last
    return inner.cummax(0).values


def _least(height: Tensor, tilt: Tensor, bend: Tensor, width: Tensor) -> Tensor:
    """The least of height + tilt tau + bend tau^2 / 2 over 0 <= tau <= width."""
    vertex = torch.where(bend > 0, -tilt / bend.clamp(min=TINY), width)
    place = torch.minimum(vertex.clamp(min=0.0), width)
    inner = height + place * (tilt + 0.5 * bend * place)
    end = height + width * (tilt + 0.5 * bend * width)
    return torch.minimum(torch.minimum(height, inner), end)
