"""Better lines for one margin: slopes chosen neuron by neuron where the linear bound is largest, by gradient ascent.

`bounds.relaxation` takes for every neuron the lines that are nearest at the sample, whatever the margin. Any slopes are
as good a proof, and on fixed ranges the bound is concave in them (as in `ascent`, without weights): with d the point of
the ball where the linearised margin is least, and t where the line touches,  d/ds_l = v_l (D_l - t_l).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.falls import Fall
from certify_cli.bounds.local import span
from certify_cli.bounds.ranges import Ranges
from certify_cli.bounds.relaxation import Lines, falls
from certify_cli.certificates.ascent import LONGEST, RATE, SLOPE_STEP, Climber, adjoint_sizes, linear_offsets
from certify_cli.certificates.point import Point
from certify_cli.network.activations import Activation
from certify_cli.network.grids import Grid
from certify_cli.network.linearised import Slope, head, nonlinear_nodes, pull
from certify_cli.numerics.rounding import TINY

SHORTER, LONGER = 0.5, 1.4
"""What becomes of a step after one that does not help, and after one that does."""
TOUCHING = 1e-3
"""What is this part of the spread above the least value counts as touching."""


def climbs(point: Point) -> bool:
    """Whether every nonlinear node is an activation: planes of group maps have no slopes to choose."""
    return all(isinstance(point.network.nodes[k].op, Activation) for k in nonlinear_nodes(point.network))


def climbed(point: Point, ranges: Ranges, between: Mapping[int, Lines], cotangents: Tensor, steps: int) -> Fall:
    """How much <cotangents, logits> falls on the balls of `ranges`, (items, 1), one item a sample.

    cotangents (items, classes). `between`: lines on these ranges, to begin with.
    """
    problem = _Problem(point, ranges, cotangents)
    slopes = problem.begin(between)
    value, gradient, v = problem.at(slopes)
    best, most = dict(slopes), value
    climbers = {}
    for k, slope in slopes.items():
        steepness, _, width = problem.grids[k].scales()
        climbers[k] = Climber(slope, SLOPE_STEP * steepness / (adjoint_sizes(v[k]) * width))
    rate = torch.full_like(value, RATE)
    for count in range(1, steps + 1):
        for k, climber in climbers.items():
            climber.step(gradient[k], (rate * (1 - (count - 1) / steps)).unsqueeze(1), count)
        value, found, _ = problem.at({k: c.value for k, c in climbers.items()})
        better = value > most
        rate = (rate * torch.where(better, LONGER, SHORTER)).clamp(max=LONGEST)
        most, take = torch.maximum(value, most), better.unsqueeze(1)
        for k, climber in climbers.items():  # a step that does not help is taken back
            best[k] = climber.value = torch.where(take, climber.value, best[k])
            climber.mean = torch.where(take, climber.mean, 0.0)
            gradient[k] = torch.where(take, found[k], gradient[k])
    return problem.proved(best)


@dataclass(frozen=True, eq=False)
class _Touch:
    """Where v (phi(z+t) - phi(z) - s t) is least, (items, size) each: from `first` to `last`, for phi is often straight
    there, or the line a chord; the least `value`, and what is `left` of phi there, without v."""

    first: Tensor
    last: Tensor
    value: Tensor
    left: Tensor

    @classmethod
    def of(cls, grid: Grid, v: Tensor, slope: Tensor) -> _Touch:
        left = grid.rises - slope * grid.places
        values = v * left
        value = values.amin(0)
        near = values <= value + TOUCHING * (values.amax(0) - value)
        first = grid.places.masked_fill(~near, torch.inf).amin(0)
        last = grid.places.masked_fill(~near, -torch.inf).amax(0)
        return cls(first, last, value, left.gather(0, values.argmin(0, keepdim=True))[0])

    def beyond(self, offset: Tensor) -> Tensor:
        """How far an offset is from where the line touches: between its ends a slope is as good as it can be."""
        return offset - torch.minimum(torch.maximum(offset, self.first), self.last)


class _Problem:
    """The linear bound of a batch of items, as a function of the slopes (items, size) of every nonlinear node."""

    def __init__(self, point: Point, ranges: Ranges, cotangents: Tensor) -> None:
        self.point, self.network, self.radius = point, point.network, ranges.radius
        self.cotangents = cotangents.unsqueeze(1)
        self.spans = {k: span(point, k, ranges) for k in nonlinear_nodes(point.network)}
        self.grids = {k: Grid.of(here) for k, here in self.spans.items()}

    def begin(self, between: Mapping[int, Lines]) -> dict[int, Tensor]:
        """Below or above, as the adjoint of the relaxed network says."""
        pulled = pull(self.network, self.cotangents, between)
        return {
            k: torch.where(pulled[k].value[:, 0] < 0, line.above[0], line.below[0]).flatten(1)
            for k, line in between.items()
            if k in pulled
        }

    def at(self, slopes: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """About minus the loss (items,), its gradient and the adjoints, (items, size) each."""
        shaped = {k: Slope(s.reshape(-1, *self.network.nodes[k].shape)) for k, s in slopes.items()}
        pulled = pull(self.network, self.cotangents, shaped)
        v = {k: pulled[k].value[:, 0].flatten(1) for k in slopes}
        g = pulled[0].value[:, 0].flatten(1)
        size = g.norm(dim=1)
        touch = {k: _Touch.of(self.grids[k], v[k], s) for k, s in slopes.items()}
        d = -g * (self.radius / size.clamp(min=TINY)).unsqueeze(1)
        moved = linear_offsets(self.network, d, slopes, {k: t.left for k, t in touch.items()})
        gradient = {k: v[k] * touch[k].beyond(moved[head(self.network, k)]) for k in slopes}
        value = torch.stack([t.value.sum(1) for t in touch.values()]).sum(0) - size * self.radius
        return value.nan_to_num(nan=-torch.inf), gradient, v

    def proved(self, slopes: Mapping[int, Tensor]) -> Fall:
        lines = {k: Lines.sloped(self.spans[k], self.network.nodes[k].shape, s, s) for k, s in slopes.items()}
        return falls(self.point, lines, self.cotangents)
