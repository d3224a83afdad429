"""An activation on a grid of each neuron's range: estimates for an optimiser of slopes and weights. No bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.activations.table import Activation
from certify_cli.numerics.rounding import TINY

GRID_POINTS = 33
NEAR = 1e-3
"""Grid points nearer to p than this part of the range are left out of the quadratic coefficient at p."""
BISECTIONS = 10
CHUNK = 2**12
"""Entries per step, so that their grids stay in the cache."""
MIN_WIDTH = 1e-100
"""A narrower range is taken to be as wide as this: its square is still a number."""
SOFTNESS = 0.01
"""Grid points whose values exceed the minimum by this part of the spread of all values weigh 1/e as much."""


@dataclass(frozen=True, eq=False)
class SoftMinimiser:
    """Where a minorant touches, softly: weighted means over the grid, and the minimum itself. All (batch, size).

    offset, square, increment: means of t, t^2 and phi(z+t) - phi(z).   value: the minimum over the grid.
    Means, because at a kink the gradient of the bound is a mean of the gradients at both touching points.
    """

    offset: Tensor
    square: Tensor
    increment: Tensor
    value: Tensor

    def where(self, take: Tensor, other: SoftMinimiser) -> SoftMinimiser:
        """`other` in the entries where `take` holds."""
        return SoftMinimiser(
            torch.where(take, other.offset, self.offset),
            torch.where(take, other.square, self.square),
            torch.where(take, other.increment, self.increment),
            torch.where(take, other.value, self.value),
        )


@dataclass(frozen=True, eq=False)
class Grid:
    """phi(z+t) - phi(z) at grid points t of each neuron's range: `offsets` t and `increments`, (points, *shape of z).

    The points are the first end, even steps, the kinks, the last end and t = 0; for a piecewise linear activation the
    steps are left out, since its extremes are at kinks and ends.
    """

    op: Activation
    z: Tensor
    offsets: Tensor
    increments: Tensor

    @classmethod
    def of(cls, interval: ActivationOnInterval) -> Grid:
        """The grid of an interval around the computed pre-activation."""
        op, z, low, high = interval.activation, interval.z, interval.lo, interval.hi
        count = 2 if op.piecewise_linear else GRID_POINTS
        steps = torch.linspace(0, 1, count, dtype=z.dtype, device=z.device).reshape(-1, *[1] * z.dim())
        even = low + (high - low) * steps
        at_kinks = [(kink - z).clamp(min=low, max=high).unsqueeze(0) for kink in op.kinks]
        offsets = torch.cat([even[:-1], *at_kinks, even[-1:], torch.zeros_like(z).unsqueeze(0)])
        return cls(op, z, offsets, op.value(z + offsets) - op.value(z))

    def at(self, mask: Tensor) -> Grid:
        """The neurons where the mask is true, as vectors."""
        return Grid(self.op, self.z[mask], self.offsets[:, mask], self.increments[:, mask])

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The ends of the range."""
        return self.offsets[0], self.offsets[-2]

    @property
    def end_increments(self) -> tuple[Tensor, Tensor]:
        """phi(z+t) - phi(z) at the ends of the range."""
        return self.increments[0], self.increments[-2]

    def line_offset(self, sign: Tensor, slope: Tensor) -> Tensor:
        """How far sign * phi falls below the line of this slope through the sample."""
        return -(sign * (self.increments - slope * self.offsets)).amin(0)

    def soft_minimum(self, v: Tensor, slope: Tensor, weight: Tensor) -> SoftMinimiser:
        """Soft minimisers of v q(t) + weight t^2 / 2, with q the remainder of the line of this slope."""
        shape, flat = v.shape, (t.flatten(1) for t in (self.offsets, self.increments))
        given = (t.reshape(-1).split(CHUNK) for t in (v, slope, weight))
        parts = zip(*(t.split(CHUNK, dim=1) for t in flat), *given, strict=True)
        columns = zip(*(_soft_minimum(*part) for part in parts), strict=True)
        return SoftMinimiser(*(torch.cat(column).reshape(shape) for column in columns))

    def expansion_at(self, p: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and quadratic coefficient, about z, of the minorant that touches at z + p; sign: of the adjoints."""
        first, last = self.ends
        p = torch.minimum(torch.maximum(p, first), last)
        slope = self.op.slope(self.z + p)
        distance = self.offsets - p
        near = NEAR * (last - first)
        remainder = self.increments - (self.op.value(self.z + p) - self.op.value(self.z)) - slope * distance
        coefficients = -2 * sign * remainder / torch.maximum(distance.square(), near.square() + TINY)
        curvature = -sign * self.op.curvature(self.z + p) if self.op.curvature is not None else torch.zeros_like(p)
        largest = torch.maximum(coefficients.amax(0), curvature).clamp(min=0.0)
        return slope + sign * largest * p, largest

    def supporting_line(self, p: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Slope of the line below sign * phi that is highest at z + p, and its `line_offset`."""
        low, high = (torch.full_like(p, end) for end in self.op.slope_range)
        for _ in range(BISECTIONS):
            slope = 0.5 * (low + high)
            _, index = (sign * (self.increments - slope * self.offsets)).min(0)
            left = self.offsets.gather(0, index.unsqueeze(0)).squeeze(0) < p  # touches left of p: steeper, sign * slope
            steeper = left == (sign > 0)
            low, high = torch.where(steeper, slope, low), torch.where(steeper, high, slope)
        slope = 0.5 * (low + high)
        return slope, self.line_offset(sign, slope)

    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales of slope and weight, and the range's width, (batch, size) each.

        A slope, or a weight for v = 1, of that size changes the minorant at the ends of a neuron's range by as much as
        phi deviates from its chord.
        """
        (first, last), (at_first, at_last) = self.ends, self.end_increments
        width = (last - first).clamp(min=MIN_WIDTH)
        chord = (at_last - at_first) / width
        deviation = self.increments - chord * self.offsets
        spread = deviation.amax(0) - deviation.amin(0)
        return 4 * spread / width, 8 * spread / width.square(), width


def _soft_minimum(offsets: Tensor, increments: Tensor, v: Tensor, slope: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The fields of `SoftMinimiser`, (entries,) each; offsets and increments are (points, entries)."""
    values = torch.addcmul(v * increments, (0.5 * weight) * offsets - v * slope, offsets)
    value = values.amin(0)
    spread = (values.amax(0) - value).clamp(min=TINY)
    share = values.sub_(value).mul_((-1 / SOFTNESS) / spread).softmax(0)
    moment = share * offsets
    return moment.sum(0), moment.mul_(offsets).sum(0), share.mul_(increments).sum(0), value
