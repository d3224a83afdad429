"""The largest ball on which a bound keeps every rival's margin positive, for bounds that hold for all rivals at once.

Each ball on which the bound is positive is a proof by itself, and a ball that fails still proves a smaller one
(`AffineLoss.largest`); so the search does not need the bounds to be monotone in the radius. Several bounds can share
one search and its pre-activation ranges: the later bounds are evaluated only where the earlier ones leave little of the
margin.

All samples of a batch are searched at the same time, independently of each other. Radii are taken from a ladder whose
rung k is (1 + tolerance)^k times a length that depends on the sample alone. As far as the bounds are monotone, the
result then depends neither on the first ball nor on previously certified radii. A short ascent can still part at a
rounding error, which on deep networks changes radii by up to a percent; each of them is proved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.bounds.relaxation.intermediate_bounds import follows_nonlinear, narrows, optimised_cost
from certify_cli.bounds.relaxation.optimise import has_slopes
from certify_cli.certificates.ball_bounds import (
    NARROW,
    BallBound,
    linear_bound,
    linear_bound_on_ranges,
    optimised_linear_bound,
)
from certify_cli.certificates.column_plan import ball_plan, column_limits
from certify_cli.certificates.failed_balls import FailedBalls
from certify_cli.certificates.local import searchable
from certify_cli.certificates.radius_bracket import Bracket
from certify_cli.certificates.rivals import ProvedRivals, Rivals, losses_in_parts, rows_at_once, settled_by_ranges
from certify_cli.efforts import BallSearchLimits
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import nonlinear_nodes, pre_activations
from certify_cli.numerics.choose import either
from certify_cli.numerics.deadline import OutOfTime, present
from certify_cli.numerics.rounding import difference_down
from certify_cli.numerics.trees import Batched

STRIDE = 16.0
"""Largest ratio of the next radius to the last one, while no ball has failed."""
ROUGH_BALLS, ROUGH_TOLERANCE = 12, 0.2
"""Balls tried on interval ranges, and the relative accuracy there: they only say where to begin."""
NARROWER = 1.4
"""An estimate of the ratio by which the ranges of linear relaxation enlarge the radius."""
START = 0.2
"""The first ball where no other estimate exists, as a part of the radius to first order."""
OPTIMISED_GAIN, FIRST_TOLERANCE = 1.1, 2e-2
"""An estimate of the ratio by which slopes optimised for each range enlarge the radius; and the relative accuracy of
the search without them that comes first."""
OVERTAKEN = 1.25
"""Slopes are not optimised for each range where the previous radius is so many times larger."""
UNTOLD = 0.1
"""What is taken to be left of a margin that another bound, or a larger ball, has proved, where this bound fails."""


@dataclass(frozen=True, eq=False)
class BallSearchResult(Batched):
    """Certified radii of a batch; (batch,) each.

    radius: rounded down, 0 where nothing is proved.
    rival: the class that decides the radius.
    bound: position of the bound that gave the radius, among those searched with.
    """

    radius: Tensor
    rival: Tensor
    bound: Tensor


def search_balls(
    bounds: tuple[BallBound, ...], model_bounds: ModelBounds, point: EvaluatedPoints, previous: Tensor
) -> BallSearchResult:
    """The largest balls on which at least one of the bounds keeps every margin positive.

    previous (batch,): radii that other methods have certified. The search leaves out smaller balls, so that a sample
    whose radius it cannot enlarge has radius 0.
    """
    radius, rival = torch.zeros_like(previous), point.margin.argmin(1)
    bound = torch.zeros_like(rival)
    able = searchable(point, previous).nonzero()[:, 0]
    if not len(able) or not nonlinear_nodes(point.network):  # affine: margin over norm is exact
        return BallSearchResult(radius, rival, bound)
    samples, floor = point.at(able), previous[able]
    search = _Search(model_bounds, samples, ProvedRivals(model_bounds, samples))
    limits = model_bounds.effort.ball_search
    columns = column_limits(model_bounds) if linear_bound in bounds else None
    if columns is not None:
        plan = ball_plan(columns, model_bounds, search.point, floor)
        best = search.largest(bounds, plan.start, floor, limits.balls, plan.tolerance, plan.ceiling, plan.stride)
    elif linear_bound not in bounds or not _worth_optimising_ranges(search.point, limits):
        best = search.largest(bounds, search.start(bounds, floor), floor, limits.balls, limits.tolerance)
    else:
        best = search.largest(bounds, search.start(bounds, floor), floor / OVERTAKEN, limits.balls, FIRST_TOLERANCE)
        optimised = tuple(optimised_linear_bound if bound is linear_bound else bound for bound in bounds)
        floor = torch.where(best.radius > 0, torch.maximum(floor, best.radius), torch.inf)
        second = search.largest(optimised, OPTIMISED_GAIN * best.radius, floor, limits.balls, limits.tolerance)
        best = best.where(second.radius > best.radius, second)
    radius[able], rival[able], bound[able] = best.radius, best.rival, best.bound
    return BallSearchResult(radius, rival, bound)


def _worth_optimising_ranges(point: EvaluatedPoints, limits: BallSearchLimits) -> bool:
    """Whether slopes optimised for each range are worth their time.

    They seldom are where every activation is piecewise linear, because upper lines then have no choice of slope.
    """
    network, steps = point.network, limits.range_slope_steps
    if not steps or not has_slopes(point) or optimised_cost(network, steps) > limits.range_slope_operations:
        return False
    ops = [network.nodes[k].op for k in nonlinear_nodes(network)]
    curved = any(isinstance(op, Activation) and not op.piecewise_linear for op in ops)
    depth = sum(follows_nonlinear(network, target) for target in pre_activations(network)[:-1])
    return (curved or limits.kinks) and depth >= limits.range_slope_depth


@dataclass(frozen=True, eq=False)
class _Ladder(Batched):
    """Radii unit * (1 + tolerance)^k, (batch,) each, for integers k, their rungs."""

    unit: Tensor
    tolerance: float

    def rung(self, radius: Tensor) -> Tensor:
        """The real number k that belongs to a radius, rounded to nearest: -inf at 0."""
        return (radius / self.unit).log() / math.log1p(self.tolerance)

    def radius(self, rung: Tensor) -> Tensor:
        return self.unit * (rung * math.log1p(self.tolerance)).exp()

    def below(self, radius: Tensor) -> Tensor:
        """The highest rung whose radius is at most `radius`; -inf at 0."""
        rung = self.rung(radius * (1 + self.tolerance / 100)).floor()  # a rung's own radius must not fall a rung
        return torch.where(self.radius(rung) <= radius, rung, rung - 1)


@dataclass(eq=False)
class _LadderSearch:
    """The state of a search on the rungs of a ladder, updated in place. Tensors (batch,).

    bracket: proposes radii, which are rounded to rungs.
    lower: the highest rung that is proved, or that need not be tried.   upper: the lowest rung that failed.
    best: the largest proved radii; 0 where no rung above the first `lower` is proved.
    """

    ladder: _Ladder
    bracket: Bracket
    lower: Tensor
    upper: Tensor
    best: BallSearchResult

    def propose(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of `active` (count,) that have a rung left to try, and their rungs, (remaining count,) each."""
        rung = self.ladder.rung(self.bracket.radius).round().clamp(min=self.lower + 1, max=self.upper - 1)
        self.bracket.radius = radius = self.ladder.radius(rung)
        active = active[
            (self.lower[active] + 1 < self.upper[active]) & radius[active].isfinite() & (radius[active] > 0)
        ]
        return active, rung[active]

    def enter(self, index: Tensor, rung: Tensor, remaining: Tensor, result: BallSearchResult) -> None:
        """Enter the results of the balls at `rung` around the samples `index`; all arguments (count,).

        remaining: part of the margin left; a ball passes if it is positive.   result: the radii certified.

        A failed ball raises the lower end to the rung below its certified radius.
        """
        self.bracket.update(index, remaining)
        passed, ladder = remaining > 0, self.ladder.at(index)
        self.upper[index] = torch.where(passed, self.upper[index], torch.minimum(self.upper[index], rung))
        reached = torch.where(passed, rung, torch.minimum(ladder.below(result.radius), rung - 1))
        certified = torch.where(passed, result.radius, torch.minimum(ladder.radius(reached), result.radius))
        raised = reached > self.lower[index]
        index, result = index[raised], result.at(raised.nonzero()[:, 0])
        self.lower[index], self.best.radius[index] = reached[raised], certified[raised]
        self.best.rival[index], self.best.bound[index] = result.rival, result.bound


@dataclass(frozen=True, eq=False)
class _Search:
    """Searches for the largest balls of a batch of samples."""

    model_bounds: ModelBounds
    point: EvaluatedPoints
    proved: ProvedRivals

    @cached_property
    def failed(self) -> FailedBalls:
        return FailedBalls()

    @cached_property
    def unit(self) -> Tensor:
        """Lengths (batch,) that depend on each sample alone: the unit of its ladder, and its first ball by default."""
        start = START * self.point.distance_estimate.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)
        return torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))

    def start(self, bounds: tuple[BallBound, ...], previous: Tensor) -> Tensor:
        """Radii (batch,) of the first balls, from a rough search by linear relaxation on interval ranges.

        Not where that is what the bounds begin with anyway.

        A previous radius counts as close to the best one if it is large, or if the model is smooth, because better
        bounds than a global Lipschitz constant have then been tried.
        """
        first = torch.where(previous > 0, previous, self.unit)
        close = (previous > 0.5 * self.unit) | (len(self.point.slopes) > 0)
        start = torch.where(close & (previous > 0), previous, self.unit)
        if linear_bound in bounds and not narrows(self.point.network):
            return start
        apart = replace(self)  # what failed on interval ranges says little
        rough = apart.largest((linear_bound_on_ranges,), first, previous, ROUGH_BALLS, ROUGH_TOLERANCE).radius
        between = torch.maximum(NARROWER * rough, (rough * self.unit).sqrt())
        return torch.where(rough > 0, torch.where(close, NARROWER * rough, between), start)

    def largest(
        self,
        bounds: tuple[BallBound, ...],
        start: Tensor,
        floor: Tensor,
        balls: int,
        tolerance: float,
        ceiling: Tensor | None = None,
        stride: float = STRIDE,
    ) -> BallSearchResult:
        """The largest proved balls; radius 0 where none larger than `floor` (batch,) is proved.

        start (batch,): radii of the first balls.   balls: largest number tried.   tolerance: of the ladder.
        ceiling (batch,): radii beyond which none is tried.   stride: see `power_step`.
        """
        ladder = _Ladder(self.unit, tolerance)
        search = _LadderSearch(
            ladder,
            Bracket.around(start, stride, shrink=1.0, steady=True),
            lower=ladder.below(floor),
            upper=torch.full_like(start, torch.inf) if ceiling is None else ladder.below(ceiling) + 1,
            best=_nothing(self.point),
        )
        active = torch.arange(len(start), device=start.device)
        for ball in range(balls):
            active, rung = search.propose(active)
            if not len(active):
                break
            present().step(f"ball {ball + 1}")
            try:
                search.enter(active, rung, *self._evaluate(bounds, active, search.bracket.radius[active]))
            except OutOfTime:
                break
        return search.best

    def _evaluate(
        self, bounds: tuple[BallBound, ...], index: Tensor, radius: Tensor
    ) -> tuple[Tensor, BallSearchResult]:
        """Evaluate the bounds on balls of `radius` (count,) around the samples `index` (count,).

        Returns the part of the margin (count,) that is left, smallest over the rivals that were asked for, each by the
        best of the bounds; and the radii certified, which are smaller than the balls' where that part is not positive.
        """
        point = self.point.at(index)
        ranges = self.failed.narrow(index, interval_ranges(point, self.model_bounds.weights, radius))
        classes = point.network.classes
        asked, nearest = self.proved.unproved(index, radius)
        remaining, result = either(asked, -torch.inf, torch.inf), _nothing(point)
        todo = torch.arange(len(index), device=index.device)
        for number, bound in enumerate(bounds):
            samples, here = point.at(todo), index[todo]
            try:
                ranges, losses = bound(self.model_bounds, samples, ranges)
                settled, first = settled_by_ranges(samples, ranges), one_hot(nearest, classes).bool()
                left = remaining[todo].masked_fill(settled & ~first, torch.inf)
                rivals = Rivals.of((left <= NARROW) | first)
                loss = losses_in_parts(losses, rivals, rows_at_once(self.model_bounds, len(todo)))
            except OutOfTime:
                if not number:
                    raise
                break  # what the bounds before this one have proved holds
            margin, ball = rivals.of_table(samples.margin_low), ranges.radius.unsqueeze(1)
            part = difference_down(margin, loss.on(ranges.radius)) / margin
            proved = torch.where(part > 0, ball, loss.largest(margin, ranges.radius))
            known = self.proved.enter(here, rivals.largest_in(either(settled, 1.0, 0.0) * ball, proved))
            left = rivals.largest_in(left, part)
            left = left.masked_fill((left <= 0) & (known >= ball), UNTOLD)
            remaining[todo] = left
            least, nearest = left.min(1)
            certified = torch.minimum(known.amin(1), ranges.radius)
            better = certified > result.radius[todo]
            result.radius[todo[better]], result.rival[todo[better]] = certified[better], nearest[better]
            result.bound[todo[better]] = number
            lost = (least <= 0).nonzero()[:, 0]
            if len(lost):
                self.failed.keep(here[lost], ranges.at(lost), len(self.point.x))
            narrow = (least <= NARROW).nonzero()[:, 0]
            todo, ranges, nearest = todo[narrow], ranges.at(narrow), nearest[narrow]
            if not len(todo):
                break
        return remaining.amin(1), result


def _nothing(point: EvaluatedPoints) -> BallSearchResult:
    """Radius 0 for every sample, with the runner-up as rival."""
    rival = point.margin.argmin(1)
    return BallSearchResult(torch.zeros_like(point.x.flatten(1)[:, 0]), rival, torch.zeros_like(rival))
