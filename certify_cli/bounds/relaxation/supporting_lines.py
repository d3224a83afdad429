"""All lines that support an activation on its range, by a few of them: what an ascent chooses from (theory section 7).

A line below phi is given by its slope and the constant that it needs, the proved extreme of what it leaves
(`ActivationOnInterval.remainders`). Of two lines below, every mean is a line below, with the mean of the constants; and
a slope further
out needs at most its distance times the range's reach more. So a table of a few slopes proves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.relaxation.backward import Lines, chosen
from certify_cli.network.activations.grid_estimates import Grid, is_piecewise_linear, kinks
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.graph import Shape
from certify_cli.network.propagate import Vectors
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up, vector_norm_up

LINES, OF_ONE_KINK = 16, 2
"""Slopes in the table, evenly from the flattest that supports to the steepest. Where phi has one kink and is straight
on both sides, these two support all there is."""

CLOSE = 1e-9
"""Of the range: from places that are nearer than that no secant is taken."""


@dataclass(frozen=True, eq=False)
class Envelopes:
    """Lines below (side 0) and above (side 1) an activation on its ranges, of `items` that are each one of the samples.

    slopes (sides, lines, samples, size), never decreasing by line, and the constants >= 0 that they need; `ends`
    (sides, items, size) each: the least and the largest slope; `reach` (items, size): at least every |t| of the range;
    `scale` (items, size): by how much slopes differ that matter; `far` (items,): at least ||q|| for slopes in between.
    """

    shape: Shape
    sample: Tensor
    slopes: Tensor
    constants: Tensor
    ends: tuple[Tensor, Tensor]
    reach: Tensor
    scale: Tensor
    far: Tensor

    @classmethod
    def of(cls, here: ActivationOnInterval, lines: Lines) -> Envelopes:
        """On a span (samples, size), every sample an item. `lines` there are all there is where phi has no more."""
        grid, (samples, size) = Grid.of(here), here.z.shape
        one_kink = is_piecewise_linear(here.activation) and len(kinks(here.activation)) == 1
        count = OF_ONE_KINK if one_kink else LINES
        slopes, constants = [], []
        for side, (given, needed) in enumerate((lines.below, lines.above)):
            spread = _spread(grid, 1.0 - 2.0 * side, count)
            several = spread[-1] - spread[0] > CLOSE * (spread[-1].abs() + spread[0].abs())  # and no NaN
            slope, constant = (t.reshape(samples, size).repeat(count, 1, 1) for t in (given, needed))
            part, chosen_slopes = here.at(several), spread[:, several]
            error = torch.as_tensor(part.error, dtype=torch.float64, device=part.z.device)
            wide = ActivationOnInterval(part.activation, *(t.repeat(count) for t in (part.z, error, part.lo, part.hi)))
            least, most = wide.remainders(chosen_slopes.reshape(-1))
            slope[:, several] = chosen_slopes
            constant[:, several] = (most if side else -least).reshape(count, -1)
            slopes.append(slope)
            constants.append(constant)
        table = torch.stack(slopes)
        reach = torch.maximum(-here.lo, here.hi)
        far = vector_norm_up(up((here.activation.lipschitz + table.abs().amax((0, 1))) * reach, 3))
        steepness, _, width = grid.scales()
        every = torch.arange(samples, device=here.z.device)
        ends = table[:, 0], table[:, -1]
        return cls(lines.shape, every, table, torch.stack(constants), ends, reach, steepness / width, far)

    def at(self, index: Tensor) -> Envelopes:
        """Items that are those at `index`."""
        least, most = self.ends
        return Envelopes(
            self.shape,
            self.sample[index],
            self.slopes,
            self.constants,
            (least[:, index], most[:, index]),
            self.reach[index],
            self.scale[index],
            self.far[index],
        )

    def lines(self, slopes: Tensor) -> Supporting:
        """With slopes (sides, items, size), those nearest to them that support."""
        return Supporting(self, torch.minimum(torch.maximum(slopes, self.ends[0]), self.ends[1]))

    def needed(self, above: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Proved constants of lines of the given slopes, and about where these touch: (items, size) each.

        above (items, size): whether the line is to be above phi, else below it.
        """
        _, lines, samples, size = self.slopes.shape
        side = above.long()
        least, most = (torch.where(above, end[1], end[0]) for end in self.ends)
        step = (most - least) / (lines - 1)
        line = ((slope - least) / step).nan_to_num(nan=0.0).clamp(min=0, max=lines - 2).long()
        entry = self.sample.unsqueeze(1) * size + torch.arange(size, device=slope.device)
        first = (side * lines + line) * (samples * size) + entry
        second = first + samples * size
        start, end = self.slopes.take(first), self.slopes.take(second)
        low, high = self.constants.take(first), self.constants.take(second)
        inside = torch.minimum(torch.maximum(slope, start), end)
        part = ((inside - start) / (end - start)).nan_to_num(nan=0.0)
        mean = low + part * (high - low) + 16 * UNIT * torch.maximum(low, high)
        beyond = up((slope - inside).abs() * self.reach, 3)
        touch = (high - low) / (end - start) * either(above, -1.0, 1.0)
        return up(mean + beyond, 4).nan_to_num(nan=torch.inf, posinf=torch.inf), torch.minimum(
            torch.maximum(touch.nan_to_num(nan=0.0), -self.reach), self.reach
        )


@dataclass(frozen=True, eq=False)
class Supporting:
    """A `Relaxation` with lines of each item's own, one row an item: slopes (sides, items, size), between the ends."""

    envelopes: Envelopes
    slopes: Tensor

    def back(self, vectors: Vectors) -> Vectors:
        below, above = self.slopes.reshape(2, -1, *self.envelopes.shape)
        return chosen(vectors, below, above)

    def loss(self, vectors: Vectors) -> Tensor:
        v = vectors.value[:, 0].flatten(1)
        constant, _ = self.envelopes.needed(v < 0, self.used(v))
        lost = up((v.abs() * constant).sum(1), 2) * (1 + gamma(v.shape[1] + 4))
        lost = up(lost + vectors.error[:, 0] * self.envelopes.far, 4) + UNDERFLOW
        return lost.unsqueeze(1).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def used(self, v: Tensor) -> Tensor:
        """Which slopes meet v, (items, size)."""
        return torch.where(v < 0, self.slopes[1], self.slopes[0])


def _spread(grid: Grid, side: float, lines: int) -> Tensor:
    """Slopes (lines, samples, size), evenly between those of the envelope of side * phi at the ends of the range."""
    (first, last), (start, end) = grid.ends, grid.end_increments
    outer = []
    for place, rise, sign in ((first, start, side), (last, end, -side)):  # below: the least from the left end
        away = grid.offsets - place
        secants = sign * (grid.increments - rise) / away
        outer.append(sign * secants.masked_fill(away.abs() <= CLOSE * (last - first), torch.inf).amin(0))
    ends = torch.stack(outer)
    steps = torch.linspace(0, 1, lines, dtype=ends.dtype, device=ends.device).reshape(-1, 1, 1)
    return torch.lerp(ends.amin(0), ends.amax(0), steps).cummax(0).values
