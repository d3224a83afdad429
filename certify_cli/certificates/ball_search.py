"""The largest ball on which bounds keep every rival's margin positive, for bounds that take all rivals at once.

All samples are searched together, each on its own. A ball that passes is a proof by itself, and of one that fails a
smaller one passes (`AffineLoss.largest`), so the search needs no monotonicity. Several bounds in one search share their
ranges, the later ones being asked only where the earlier ones leave little.

Radii are looked for on a ladder, rung k being (1 + close)^k times a length of the sample's own: where a search ends
does not depend on where it began, nor on what was known before, as far as the bounds are monotone: an ascent of few
steps may part for a rounding, and its radii then differ by up to a percent on deep networks. Each is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, interval_ranges
from certify_cli.bounds.on_ball.lipschitz import lipschitz_loss
from certify_cli.bounds.relaxation.backward import LinearRelaxation, relax_all, relaxation_loss
from certify_cli.bounds.relaxation.intermediate_bounds import follows_nonlinear, intermediate_bounds, optimised_cost
from certify_cli.bounds.relaxation.optimise import has_slopes, optimised_loss, slope_tables
from certify_cli.certificates.local import footprint, searchable
from certify_cli.certificates.radius_bracket import Bracket
from certify_cli.efforts import BallSearchLimits
from certify_cli.network.activations import Activation
from certify_cli.network.activations.grid_estimates import is_piecewise_linear
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import nonlinear_nodes, pre_activations
from certify_cli.numerics.rounding import difference_down
from certify_cli.numerics.trees import Batched

STRIDE = 16.0
"""How many times larger the next ball may be."""
ROUGH_BALLS, ROUGH = 12, 0.2
"""Balls tried on interval ranges, and the relative accuracy there: they only say where to begin."""
NARROWER = 1.4
"""What narrower ranges add to the radius, an estimate."""
START = 0.2
"""The first ball otherwise, as a part of the radius to first order."""
NARROWER_STILL, NEARLY = 1.1, 2e-2
"""What slopes of every range's own add to the radius, an estimate; and the relative accuracy of the search before."""
BEHIND = 1.25
"""Where another method's radius is so many times larger, these are not tried."""
HOPEFUL = -1.0
"""The least bound, as a part of the margin at the sample, that an ascent may still make positive."""
PLENTY = 0.1
"""Where a bound leaves less than this part of the margin, the next bound is evaluated as well."""

BallBound = Callable[[ModelBounds, EvaluatedPoints, Ranges, Tensor], tuple[AffineLoss, Ranges]]
"""(analysis, point, ranges on the balls, cotangents of the margins (batch, classes, classes)) -> how much the margins
fall, (batch, classes), and ranges as narrow or narrower."""


def linear_bound(
    model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges, cotangents: Tensor, range_steps: int = 0
) -> tuple[AffineLoss, Ranges]:
    """Linear relaxation, on ranges found by it as well; with lines of their own for narrow margins.

    range_steps: of the ascents for the ranges' lines.
    """
    ranges, between = intermediate_bounds(
        point, ranges, model_bounds.memory, model_bounds.effort.ball_search.range_operations, range_steps
    )
    fall = relaxation_loss(point.network, between, cotangents)
    steps = model_bounds.effort.ball_search.slope_steps
    left = (point.margin_low - fall.on(ranges.radius)) / point.margin_low
    sample, rival = ((left <= PLENTY) & (left > HOPEFUL)).nonzero().unbind(1)
    if steps and len(sample) and has_slopes(point):
        few, item = sample.unique(return_inverse=True)
        mine = {k: line for k, line in between.items() if isinstance(line, LinearRelaxation)}
        choice = slope_tables(point.at(few), ranges.at(few), {k: line.at(few) for k, line in mine.items()})
        better = optimised_loss(
            point.network,
            ranges.radius[sample],
            {k: e.at(item) for k, e in choice.items()},
            {k: line.slopes[:, sample] for k, line in mine.items()},
            cotangents[sample, rival],
            steps,
        )
        here = AffineLoss(fall.rate[sample, rival].unsqueeze(1), fall.constant[sample, rival].unsqueeze(1))
        least = here.minimum(better, ranges.radius[sample])
        place = (sample, rival)
        fall = AffineLoss(
            fall.rate.index_put(place, least.rate[:, 0]), fall.constant.index_put(place, least.constant[:, 0])
        )
    return fall, ranges


def optimised_linear_bound(
    model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges, cotangents: Tensor
) -> tuple[AffineLoss, Ranges]:
    """`linear_bound`, and lines of its own for every range as well."""
    return linear_bound(model_bounds, point, ranges, cotangents, model_bounds.effort.ball_search.range_slope_steps)


def linear_bound_on_ranges(
    model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges, cotangents: Tensor
) -> tuple[AffineLoss, Ranges]:
    """Linear relaxation on the ranges given."""
    return relaxation_loss(point.network, relax_all(point, ranges), cotangents), ranges


def lipschitz_bound(
    model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges, cotangents: Tensor
) -> tuple[AffineLoss, Ranges]:
    """Local Lipschitz constants; of as many samples at once as fit the memory."""
    fitting = model_bounds.memory // footprint(point.network)
    every = torch.arange(len(point.x), device=point.x.device)
    parts = every.split(max(1, fitting))
    budget = model_bounds.effort.ball_search.range_operations if fitting else 0.0
    found = [lipschitz_loss(point.at(i), ranges.at(i), cotangents[i], budget) for i in parts]
    return AffineLoss(torch.cat([f.rate for f in found]), torch.cat([f.constant for f in found])), ranges


@dataclass(frozen=True, eq=False)
class BallSearchResult(Batched):
    """Certified radii (batch,), rounded down, 0 where nothing was found; the rivals that decide them, and which of the
    bounds it was."""

    radius: Tensor
    rival: Tensor
    bound: Tensor


def search_balls(
    bounds: tuple[BallBound, ...], model_bounds: ModelBounds, point: EvaluatedPoints, known: Tensor
) -> BallSearchResult:
    """The largest balls on which one of the bounds holds. known (batch,): radii certified already.

    What is found may be less than what is known.
    """
    radius, rival = torch.zeros_like(known), point.margin.argmin(1)
    bound = torch.zeros_like(rival)
    able = searchable(point, known).nonzero()[:, 0]
    if not len(able) or not nonlinear_nodes(point.network):  # affine: margin over norm is exact
        return BallSearchResult(radius, rival, bound)
    search, floor = _Search(model_bounds, point.at(able)), known[able]
    rough = search.largest(
        (linear_bound_on_ranges,), torch.where(floor > 0, floor, search.beginning), floor, ROUGH_BALLS, ROUGH
    )
    # what is known already may be all there is, where better bounds than a global one have been tried
    near = (floor > 0.5 * search.beginning) | (len(point.slopes) > 0)
    start = torch.where(near & (floor > 0), floor, search.beginning)
    between = torch.maximum(NARROWER * rough.radius, (rough.radius * search.beginning).sqrt())
    start = torch.where(rough.radius > 0, torch.where(near, NARROWER * rough.radius, between), start)
    limits = model_bounds.effort.ball_search
    if linear_bound not in bounds or not _worth_optimising_ranges(search.point, limits):
        found = search.largest(bounds, start, floor, limits.balls, limits.close)
    else:
        found = search.largest(bounds, start, floor / BEHIND, limits.balls, NEARLY)
        finer = tuple(optimised_linear_bound if bound is linear_bound else bound for bound in bounds)
        floor = torch.where(found.radius > 0, torch.maximum(floor, found.radius), torch.inf)
        begin = NARROWER_STILL * found.radius
        finer_found = search.largest(finer, begin, floor, limits.balls, limits.close)
        found = found.where(finer_found.radius > found.radius, finer_found)
    radius[able], rival[able], bound[able] = found.radius, found.rival, found.bound
    return BallSearchResult(radius, rival, bound)


def _worth_optimising_ranges(point: EvaluatedPoints, limits: BallSearchLimits) -> bool:
    """Whether lines of every range's own are worth their time. On kinks they seldom are: lines above have no choice."""
    network, steps = point.network, limits.range_slope_steps
    if not steps or not has_slopes(point) or optimised_cost(network, steps) > limits.range_slope_operations:
        return False
    ops = [network.nodes[k].op for k in nonlinear_nodes(network)]
    bent = any(isinstance(op, Activation) and not is_piecewise_linear(op) for op in ops)
    depth = sum(follows_nonlinear(network, target) for target in pre_activations(network)[:-1])
    return (bent or limits.kinks) and depth >= limits.range_slope_depth


@dataclass(frozen=True, eq=False)
class _Ladder(Batched):
    """Radii unit * (1 + close)^k, (batch,) each, by their rungs k."""

    unit: Tensor
    close: float

    def rung(self, radius: Tensor) -> Tensor:
        """About where a radius is, a real number: -inf at 0."""
        return (radius / self.unit).log() / math.log1p(self.close)

    def radius(self, rung: Tensor) -> Tensor:
        return self.unit * (rung * math.log1p(self.close)).exp()

    def below(self, radius: Tensor) -> Tensor:
        """The highest rung that is no larger; -inf at 0."""
        rung = self.rung(radius * (1 + self.close / 100)).floor()  # a rung's own radius must not fall a rung
        return torch.where(self.radius(rung) <= radius, rung, rung - 1)


@dataclass(frozen=True, eq=False)
class _Search:
    model_bounds: ModelBounds
    point: EvaluatedPoints

    @cached_property
    def beginning(self) -> Tensor:
        """Where to begin, (batch,)."""
        start = START * self.point.distance_estimate.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)
        return torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))

    def largest(
        self, bounds: tuple[BallBound, ...], start: Tensor, floor: Tensor, balls: int, close: float
    ) -> BallSearchResult:
        """From `start` (batch,) on. Nothing where no ball beyond `floor` (batch,) passes."""
        ladder = _Ladder(self.beginning, close)
        bracket = Bracket.around(start, STRIDE, inward=1.0, steady=True)
        rival = self.point.margin.argmin(1)
        best = BallSearchResult(torch.zeros_like(start), rival, torch.zeros_like(rival))
        inside, outside = ladder.below(floor), torch.full_like(start, torch.inf)
        active = torch.arange(len(start), device=start.device)
        for _ in range(balls):
            rung = ladder.rung(bracket.radius).round().clamp(min=inside + 1, max=outside - 1)
            bracket.radius = ladder.radius(rung)
            active = active[
                (inside[active] + 1 < outside[active])
                & bracket.radius[active].isfinite()
                & (bracket.radius[active] > 0)
            ]
            if not len(active):
                break
            left, here = self._tried(bounds, active, bracket.radius[active])
            bracket.update(active, left)
            passed, here_rung, lower = left > 0, rung[active], ladder.at(active)
            outside[active] = torch.where(passed, outside[active], torch.minimum(outside[active], here_rung))
            # a part of a ball that failed counts by the rung below
            reached = torch.where(passed, here_rung, torch.minimum(lower.below(here.radius), here_rung - 1))
            certain = torch.where(passed, here.radius, torch.minimum(lower.radius(reached), here.radius))
            raised = reached > inside[active]
            index = active[raised]
            inside[index], best.radius[index] = reached[raised], certain[raised]
            best.rival[index], best.bound[index] = here.rival[raised], here.bound[raised]
        return best

    def _tried(self, bounds: tuple[BallBound, ...], index: Tensor, radius: Tensor) -> tuple[Tensor, BallSearchResult]:
        """What balls of `radius` leave of the margins to the nearest rivals, as parts; and what that proves."""
        whole = self.point.at(index)
        ranges = interval_ranges(whole, self.model_bounds.weights, radius)
        eye = torch.eye(whole.network.classes, dtype=radius.dtype, device=radius.device)
        left = torch.full_like(radius, -torch.inf)
        found = BallSearchResult(torch.zeros_like(radius), whole.margin.argmin(1), torch.zeros_like(index))
        todo = torch.arange(len(index), device=index.device)
        for number, bound in enumerate(bounds):
            point = whole.at(todo)
            cotangents = eye[point.prediction].unsqueeze(1) - eye.unsqueeze(0)
            fall, ranges = bound(self.model_bounds, point, ranges, cotangents)
            remains = difference_down(point.margin_low, fall.on(ranges.radius)) / point.margin_low
            least, rival = remains.masked_fill(point.own, torch.inf).min(1)
            proved = fall.largest(point.margin_low, ranges.radius).masked_fill(point.own, torch.inf).amin(1)
            proved = torch.where(least > 0, ranges.radius, proved)
            left[todo] = torch.fmax(left[todo], least)
            better = proved > found.radius[todo]
            found.radius[todo[better]], found.rival[todo[better]] = proved[better], rival[better]
            found.bound[todo[better]] = number
            near = (least <= PLENTY).nonzero()[:, 0]
            todo, ranges = todo[near], ranges.at(near)
            if not len(todo):
                break
        return left, found
