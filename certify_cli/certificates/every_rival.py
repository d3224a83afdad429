"""The largest ball on which a bound keeps every rival's margin positive, for bounds that take all rivals at once.

All samples are searched together, each on its own. A ball that passes is a proof by itself, so the search needs no
monotonicity. A bound of this kind is a `Bound`, given to `largest_balls`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.analysis import Analysis
from certify_cli.bounds.local_lipschitz import lipschitz_losses
from certify_cli.bounds.ranges import Ranges, fast_ranges
from certify_cli.bounds.relaxation import Lines, lines, losses, relaxed_ranges
from certify_cli.certificates.bracket import Bracket
from certify_cli.certificates.line_ascent import climbed, climbs
from certify_cli.certificates.local import beginning, footprint, searchable
from certify_cli.certificates.point import Point
from certify_cli.network.linearised import nonlinear_nodes
from certify_cli.numerics.rounding import difference_down

ROUGH_BALLS, ROUGH, ROUGH_STRIDE = 12, 0.2, 16.0
"""Balls tried with ranges that cost next to nothing, how closely, and in what strides: where to begin."""
STRIDE = 4.0
BALLS = {"fast": 8, "normal": 14, "max": 20}
"""By effort: balls tried at most."""
CLOSE = {"fast": 1e-2, "normal": 1e-3, "max": 1e-4}
"""By effort: how closely, relatively, the largest ball is looked for."""
BUDGET = {"fast": 2e9, "normal": 5e10, "max": math.inf}
"""By effort: floating-point operations that one head's ranges may take, a sample and ball."""
ASCENT = {"fast": 0, "normal": 10, "max": 40}
"""By effort: steps of the ascent for the slopes of lines."""
HOPEFUL = -0.3
"""Parts of the margin below zero from which an ascent may come back."""
BEYOND = 1.001
"""The first ball, in units of the radius known: where it fails there is nothing to look for."""

Losses = Callable[[Analysis, Point, Ranges, Tensor], Tensor]
"""(analysis, point, the fast tier's ranges on the balls, cotangents of the margins (batch, classes, classes)) -> upper
bounds (batch, classes) of how much the margins fall on the balls."""


def by_lines(analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor) -> Tensor:
    """Linear relaxation, on ranges found by it as well; with lines of their own for margins that nearly hold."""
    ranges, between = relaxed_ranges(point, ranges, analysis.memory, BUDGET[analysis.effort])
    loss = losses(point, between, ranges.radius, cotangents)
    steps = ASCENT[analysis.effort]
    left = (point.margin_low - loss) / point.margin_low
    sample, rival = ((left <= 0) & (left > HOPEFUL)).nonzero().unbind(1)
    if steps and len(sample) and climbs(point):
        mine = {k: line.at(sample) for k, line in between.items() if isinstance(line, Lines)}
        better = climbed(point.at(sample), ranges.at(sample), mine, cotangents[sample, rival], steps)
        loss[sample, rival] = torch.fmin(loss[sample, rival], better)
    return loss


def by_lines_alone(analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor) -> Tensor:
    """Linear relaxation on the fast tier's ranges."""
    return losses(point, lines(point, ranges), ranges.radius, cotangents)


def by_slopes(analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor) -> Tensor:
    """Local Lipschitz constants; of as many samples at once as fit the memory."""
    fitting = analysis.memory // footprint(point.network)
    every = torch.arange(len(point.x), device=point.x.device)
    parts = every.split(max(1, fitting))
    budget = BUDGET[analysis.effort] if fitting else 0.0
    found = [lipschitz_losses(point.at(i), ranges.at(i), cotangents[i], budget) for i in parts]
    return torch.cat(found)


@dataclass(frozen=True)
class Bound:
    """`losses`, and a cheaper one of its kind that says where to begin."""

    losses: Losses
    rough: Losses


LINEAR = Bound(by_lines, by_lines_alone)
LOCAL_LIPSCHITZ = Bound(by_slopes, by_lines_alone)


def largest_balls(bound: Bound, analysis: Analysis, point: Point, known: Tensor) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), rounded down, and the rivals that decide them; 0 where no more was proved than `known`.

    known (batch,): radii certified already.
    """
    radius, rival = torch.zeros_like(known), point.margin.argmin(1)
    able = searchable(point, known).nonzero()[:, 0]
    if not len(able) or not nonlinear_nodes(point.network):  # affine: margin over norm is exact
        return radius, rival
    search = _Search(analysis, point.at(able))
    floor = BEYOND * known[able]
    start = torch.where(floor > 0, floor, beginning(search.point, floor))
    rough, _ = search.largest(bound.rough, start, floor, ROUGH_BALLS, ROUGH, ROUGH_STRIDE)
    start = torch.where(rough > floor, rough, start)
    effort = analysis.effort
    radius[able], rival[able] = search.largest(bound.losses, start, floor, BALLS[effort], CLOSE[effort], STRIDE)
    return radius, rival


@dataclass(frozen=True, eq=False)
class _Search:
    analysis: Analysis
    point: Point

    def largest(
        self, loss: Losses, start: Tensor, floor: Tensor, balls: int, close: float, stride: float
    ) -> tuple[Tensor, Tensor]:
        """The largest balls found (batch,) and their deciding rivals; none where a ball of `floor` (batch,) fails."""
        bracket = Bracket.around(start, stride)
        decides = self.point.margin.argmin(1)
        live = torch.arange(len(start), device=start.device)
        for _ in range(balls):
            if not len(live):
                break
            left, rival = self.left(loss, live, bracket.radius[live])
            raised = bracket.told(live, left)
            decides[live[raised]] = rival[raised]
            live = bracket.open(live, close)
            live = live[bracket.outside[live] > floor[live]]
        return bracket.inside, decides

    def left(self, loss: Losses, index: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """What balls of `radius` leave of the samples' margins to their nearest rivals, as parts; and those rivals."""
        point = self.point.at(index)
        ranges = fast_ranges(point, self.analysis.weights, radius)
        eye = torch.eye(point.network.classes, dtype=radius.dtype, device=radius.device)
        cotangents = eye[point.prediction].unsqueeze(1) - eye.unsqueeze(0)
        left = difference_down(point.margin_low, loss(self.analysis, point, ranges, cotangents))
        return (left / point.margin_low).masked_fill(point.own, torch.inf).min(1)
