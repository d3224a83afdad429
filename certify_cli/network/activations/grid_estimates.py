"""An activation on an even grid of each neuron's range: what chooses slopes and weights. Nothing here is a bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.activations.table import Activation
from certify_cli.numerics.rounding import TINY

GRID = 33
NEAR = 1e-3
"""A grid point nearer to p than this part of the range says nothing of the bend there; the curvature at p does."""
BISECTIONS = 10
CHUNK = 2**12
"""Entries treated at once, so that their grids stay in the cache."""
LEAST_WIDTH = 1e-100
"""A narrower range is as wide as this: its square is still a number."""
SOFTNESS = 0.01
"""Grid points whose values are this part of the whole spread above the least one count 1/e as much."""


def kinks(op: Activation) -> list[float]:
    """Where the slope jumps."""
    return [point.abscissa for point in op.slope.critical_points if point.jump]


def is_piecewise_linear(op: Activation) -> bool:
    """Whether an activation is linear from kink to kink, and has kinks."""
    return bool(kinks(op)) and op.slope.relative == op.slope.absolute == 0.0


@dataclass(frozen=True, eq=False)
class SoftMinimiser:
    """Where a minorant touches (batch, size), softly: means over the grid of the offset, its square and phi's rise;
    and the least value itself. At a kink the bound's gradient is a mean of those at both touching points.
    """

    offset: Tensor
    square: Tensor
    increment: Tensor
    value: Tensor

    def where(self, take: Tensor, other: SoftMinimiser) -> SoftMinimiser:
        return SoftMinimiser(
            torch.where(take, other.offset, self.offset),
            torch.where(take, other.square, self.square),
            torch.where(take, other.increment, self.increment),
            torch.where(take, other.value, self.value),
        )


@dataclass(frozen=True, eq=False)
class Grid:
    """phi(z+t) - phi(z) on a grid of each neuron's range, even but for kinks, and at t = 0: (offsets, batch, size).

    Where phi is straight between its kinks these are all there is to know. The ends come first and next to last.
    """

    op: Activation
    z: Tensor
    offsets: Tensor
    increments: Tensor

    @classmethod
    def of(cls, here: ActivationOnInterval) -> Grid:
        """Of the span's range, of the computed pre-activation."""
        op, z, low, high = here.activation, here.z, here.lo, here.hi
        steps = torch.linspace(0, 1, 2 if is_piecewise_linear(op) else GRID, dtype=z.dtype, device=z.device).reshape(
            -1, 1, 1
        )
        even = low + (high - low) * steps
        bent = [(kink - z).clamp(min=low, max=high).unsqueeze(0) for kink in kinks(op)]
        offsets = torch.cat([even[:-1], *bent, even[-1:], torch.zeros_like(z).unsqueeze(0)])
        return cls(op, z, offsets, op.value(z + offsets) - op.value(z))

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The range's."""
        return self.offsets[0], self.offsets[-2]

    @property
    def end_increments(self) -> tuple[Tensor, Tensor]:
        """phi's rise there."""
        return self.increments[0], self.increments[-2]

    def line_offset(self, sign: Tensor, slope: Tensor) -> Tensor:
        """How far sign * phi falls below the line through the sample."""
        return -(sign * (self.increments - slope * self.offsets)).amin(0)

    def soft_minimum(self, v: Tensor, slope: Tensor, weight: Tensor) -> SoftMinimiser:
        """Where v q(t) + weight t^2 / 2 is least, for the line with the given slope: a few entries at a time."""
        shape, flat = v.shape, (t.flatten(1) for t in (self.offsets, self.increments))
        given = (t.reshape(-1).split(CHUNK) for t in (v, slope, weight))
        parts = zip(*(t.split(CHUNK, dim=1) for t in flat), *given, strict=True)
        found = zip(*(_least(*part) for part in parts), strict=True)
        return SoftMinimiser(*(torch.cat(column).reshape(shape) for column in found))

    def expansion_at(self, p: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and bend, both about z, of the expansion about z + p for adjoints of the given sign."""
        first, last = self.ends
        p = torch.minimum(torch.maximum(p, first), last)
        slope = self.op.slope(self.z + p)
        away = self.offsets - p
        near = NEAR * (last - first)
        remainder = self.increments - (self.op.value(self.z + p) - self.op.value(self.z)) - slope * away
        bend = -2 * sign * remainder / torch.maximum(away.square(), near.square() + TINY)
        curvature = -sign * self.op.curvature(self.z + p) if self.op.curvature is not None else torch.zeros_like(p)
        largest = torch.maximum(bend.amax(0), curvature).clamp(min=0.0)
        return slope + sign * largest * p, largest

    def supporting_line(self, p: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Slope of the line below sign * phi that is highest at z + p, and how deep phi falls below it from z on."""
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
        """(batch, size) each: the slope and the weight (for v = 1) that matter as much at the ends of a neuron's range
        as what its chord leaves, and the range's width."""
        (first, last), (fall, rise) = self.ends, self.end_increments
        width = (last - first).clamp(min=LEAST_WIDTH)
        chord = (rise - fall) / width
        left = self.increments - chord * self.offsets
        depth = left.amax(0) - left.amin(0)
        return 4 * depth / width, 8 * depth / width.square(), width


def _least(offsets: Tensor, increments: Tensor, v: Tensor, slope: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The fields of `SoftMinimiser`, (entries,) each; offsets and increments are (places, entries)."""
    values = torch.addcmul(v * increments, (0.5 * weight) * offsets - v * slope, offsets)
    value = values.amin(0)
    spread = (values.amax(0) - value).clamp(min=TINY)
    share = values.sub_(value).mul_((-1 / SOFTNESS) / spread).softmax(0)
    moved = share * offsets
    return moved.sum(0), moved.mul_(offsets).sum(0), share.mul_(increments).sum(0), value
