"""A table of supporting lines of an activation on its range, from which an optimiser selects (theory section 7).

A line below phi is given by its slope and its constant, the proved extreme of phi less the line
(`ActivationOnInterval.remainders`). Every mean of two lines below phi is a line below phi, with the mean of their
constants; for a slope outside of the table, the constant grows by at most the distance to the table times the largest
|t| of the range. So a few proved lines give proved constants for all slopes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.relaxation.backward import LinearRelaxation, select_by_sign, selection_rounding
from certify_cli.network.activations.grid_estimates import Grid
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.graph import Shape
from certify_cli.network.linear_forms import Forms
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up
from certify_cli.numerics.trees import Batched

LINES, OF_ONE_KINK = 16, 2
"""Number of slopes in a table, evenly spaced over the slopes of supporting lines; and the same where phi has one kink
and is straight on both sides: there the means of the two extreme lines are all supporting lines."""

CLOSE = 1e-9
"""Secants are taken between points that are further apart than this part of the range."""


@dataclass(frozen=True, eq=False)
class SlopeTable(Batched, constant=("shape", "slopes", "constants"), along={"ends": 1}):
    """Lines below (side 0) and above (side 1) an activation on its ranges.

    An item is a row to be optimised; each belongs to one of the samples, whose lines it shares.

    shape: of the node.   sample: (items,), the sample of each item.
    slopes: (sides, lines, samples, size), non-decreasing by line.
    constants: of the lines, (sides, lines, samples, size), >= 0, rounded up.
    ends: the smallest and the largest slope, (sides, items, size) each.
    magnitude: (items, size), the largest |t| of the range.
    scale: (items, size), the size of a change of slope that matters; an estimate.
    """

    shape: Shape
    sample: Tensor
    slopes: Tensor
    constants: Tensor
    ends: tuple[Tensor, Tensor]
    magnitude: Tensor
    scale: Tensor

    @classmethod
    def of(cls, on: ActivationOnInterval, lines: LinearRelaxation) -> SlopeTable:
        """On the ranges of a node's pre-activation, (samples, size), with every sample an item.

        lines: the relaxation there, used alone where the slopes of all supporting lines are equal.
        """
        grid, samples = Grid.of(on), len(on.z)
        one_kink = on.activation.piecewise_linear and len(on.activation.kinks) == 1
        count = OF_ONE_KINK if one_kink else LINES
        spreads = _spreads(grid, count)
        flattest, steepest = spreads[:, :1], spreads[:, -1:]
        several = steepest - flattest > CLOSE * (steepest.abs() + flattest.abs())  # false for NaN
        some = several.any(0)[0]
        given = lines.slopes, torch.stack([lines.below[1], lines.above[1]])
        lower, upper = on.at(some).remainders_of_lines(*spreads[..., some])
        found = spreads[..., some], torch.stack([-lower, upper])
        slopes, constants = (t.unsqueeze(1).repeat(1, count, 1, 1) for t in given)
        for table, own, proved in zip((slopes, constants), given, found, strict=True):
            table[..., some] = torch.where(several[..., some], proved, own[:, some].unsqueeze(1))
        magnitude = torch.maximum(-on.lo, on.hi)
        steepness, _, width = grid.scales()
        every = torch.arange(samples, device=on.z.device)
        ends = slopes[:, 0], slopes[:, -1]
        return cls(lines.shape, every, slopes, constants, ends, magnitude, steepness / width)

    def clamped(self, slopes: Tensor) -> Tensor:
        """The slopes nearest to `slopes` (sides, items, size) that support."""
        return torch.minimum(torch.maximum(slopes, self.ends[0]), self.ends[1])

    def lines(self, slopes: Tensor) -> OptimisableRelaxation:
        """The relaxation with these slopes (sides, items, size), or the nearest that support."""
        return OptimisableRelaxation(self, self.clamped(slopes))

    def needed(self, above: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Proved constants of lines, up, and estimates of the offsets t where they touch phi: (items, size) each.

        above: (items, size), True for a line above phi, False for one below.   slope: (items, size).
        """
        _, lines, samples, size = self.slopes.shape
        side = above.long()
        flattest, steepest = (torch.where(above, end[1], end[0]) for end in self.ends)
        step = (steepest - flattest) / (lines - 1)
        line = ((slope - flattest) / step).nan_to_num(nan=0.0).clamp(min=0, max=lines - 2).long()
        entry = self.sample.unsqueeze(1) * size + torch.arange(size, device=slope.device)
        first = (side * lines + line) * (samples * size) + entry
        second = first + samples * size
        start, end = self.slopes.take(first), self.slopes.take(second)
        low, high = self.constants.take(first), self.constants.take(second)
        inside = torch.minimum(torch.maximum(slope, start), end)
        part = ((inside - start) / (end - start)).nan_to_num(nan=0.0)
        mean = low + part * (high - low) + 16 * UNIT * torch.maximum(low, high)
        outside = up((slope - inside).abs() * self.magnitude, 3)
        touch = (high - low) / (end - start) * either(above, -1.0, 1.0)
        return up(mean + outside, 4).nan_to_num(nan=torch.inf, posinf=torch.inf), torch.minimum(
            torch.maximum(touch.nan_to_num(nan=0.0), -self.magnitude), self.magnitude
        )


@dataclass(frozen=True, eq=False)
class OptimisableRelaxation:
    """A `Relaxation` with slopes for each item, one row per item.

    slopes: (sides, items, size), between the ends of the table.
    """

    table: SlopeTable
    slopes: Tensor

    def back(self, forms: Forms) -> Forms:
        below, above = self.slopes.reshape(2, -1, *self.table.shape)
        return select_by_sign(forms, below, above)

    def rounding(self, size: Tensor) -> Tensor:
        return selection_rounding(size, self.slopes)

    def loss(self, forms: Forms) -> Tensor:
        v = forms.whole().values[:, 0].flatten(1)
        constant, _ = self.table.needed(v < 0, self.used(v))
        loss = up((v.abs() * constant).sum(1), 2) * (1 + gamma(v.shape[1] + 4)) + UNDERFLOW
        return loss.unsqueeze(1).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def used(self, v: Tensor) -> Tensor:
        """The slopes that the signs of v select, (items, size)."""
        return torch.where(v < 0, self.slopes[1], self.slopes[0])


def _spreads(grid: Grid, lines: int) -> Tensor:
    """Slopes (sides, lines, samples, size), evenly spaced between those of phi's envelope at the two ends of the range.

    Side 0: of the convex envelope below phi; side 1: of the concave one above.   lines: number of slopes.
    """
    (first, last), (start, end) = grid.ends, grid.end_increments
    outer = []
    for end_point, increment in ((first, start), (last, end)):
        distance = grid.offsets - end_point
        close = distance.abs() <= CLOSE * (last - first)
        secants = (grid.increments - increment).div_(distance)
        outer.append((secants.masked_fill(close, torch.inf).amin(0), secants.masked_fill_(close, -torch.inf).amax(0)))
    (left_least, left_most), (right_least, right_most) = outer
    pairs = torch.stack([torch.stack([left_least, right_most]), torch.stack([left_most, right_least])])
    steps = torch.linspace(0, 1, lines, dtype=pairs.dtype, device=pairs.device).reshape(-1, *[1] * first.dim())
    slopes = torch.lerp(pairs.amin(1, keepdim=True), pairs.amax(1, keepdim=True), steps)
    return slopes.cummax(1).values
