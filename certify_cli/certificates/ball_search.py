"""The largest ball on which bounds keep every rival's margin positive, for bounds that take all rivals at once.

All samples are searched together, each on its own. A ball that passes is a proof by itself, and of one that fails a
smaller one passes (`Fall.largest`), so the search needs no monotonicity. Several bounds in one search share their
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

from certify_cli.bounds.global_bounds.model_bounds import Analysis
from certify_cli.bounds.on_ball.affine_loss import Fall
from certify_cli.bounds.on_ball.interval_ranges import Ranges, fast_ranges
from certify_cli.bounds.on_ball.lipschitz import lipschitz_falls
from certify_cli.bounds.relaxation.backward import Lines, falls, lines
from certify_cli.bounds.relaxation.intermediate_bounds import climbed_cost, reaches, relaxed_ranges
from certify_cli.bounds.relaxation.optimise import climbed, climbs, envelopes
from certify_cli.certificates.local import footprint, searchable
from certify_cli.certificates.radius_bracket import Bracket
from certify_cli.network.activations import Activation
from certify_cli.network.activations.grid_estimates import is_piecewise_linear
from certify_cli.network.evaluated import Point
from certify_cli.network.propagate import heads, nonlinear_nodes
from certify_cli.numerics.rounding import difference_down

STRIDE = 16.0
"""How many times larger the next ball may be."""
ROUGH_BALLS, ROUGH = 12, 0.2
"""Balls tried with ranges that cost next to nothing, and how closely: where to begin."""
NARROWER = 1.4
"""About what narrower ranges add to the radius."""
START = 0.2
"""Where to begin otherwise, as a part of the radius that there would be to first order."""
BALLS = {"fast": 8, "normal": 20, "max": 30}
"""By effort: balls tried at most."""
CLOSE = {"fast": 1e-2, "normal": 1e-3, "max": 1e-4}
"""By effort: how closely, relatively, the largest ball is looked for."""
BUDGET = {"fast": 2e9, "normal": 5e10, "max": math.inf}
"""By effort: floating-point operations that one head's ranges may take, a sample and ball."""
ASCENT = {"fast": 0, "normal": 10, "max": 40}
"""By effort: steps of the ascent for the slopes of lines."""
RANGE_ASCENT, CLIMBS = {"fast": 0, "normal": 5, "max": 10}, {"fast": 0.0, "normal": 3e10, "max": 1e12}
"""By effort: steps of the ascents for lines of every range's own, in a search of its own behind the others; and the
floating-point operations that they may take, a sample and ball."""
DEEP = {"normal": 3, "max": 1}
"""By effort: from how many heads with relaxed ranges on they are climbed for. On five of 200 sigmoids that adds 16 % to
the radius, on three of 100 some 5 %, on a single one next to nothing."""
NARROWER_STILL, NEARLY = 1.1, 2e-2
"""About what these add to the radius, and how closely the largest ball is looked for before them."""
BEHIND = 1.25
"""Where so many times the radius found is less than is known by other methods this is not tried."""
HOPEFUL = -1.0
"""Parts of the margin below zero from which an ascent may come back."""
PLENTY = 0.1
"""Where a bound leaves less than this part of the margin the next bound is asked as well."""

Falls = Callable[[Analysis, Point, Ranges, Tensor], tuple[Fall, Ranges]]
"""(analysis, point, ranges on the balls, cotangents of the margins (batch, classes, classes)) -> how much the margins
fall, (batch, classes), and ranges as narrow or narrower."""


def by_lines(
    analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor, range_steps: int = 0
) -> tuple[Fall, Ranges]:
    """Linear relaxation, on ranges found by it as well; with lines of their own for narrow margins.

    range_steps: of the ascents for the ranges' lines.
    """
    ranges, between = relaxed_ranges(point, ranges, analysis.memory, BUDGET[analysis.effort], range_steps)
    fall = falls(point.network, between, cotangents)
    steps = ASCENT[analysis.effort]
    left = (point.margin_low - fall.on(ranges.radius)) / point.margin_low
    sample, rival = ((left <= PLENTY) & (left > HOPEFUL)).nonzero().unbind(1)
    if steps and len(sample) and climbs(point):
        few, item = sample.unique(return_inverse=True)
        mine = {k: line for k, line in between.items() if isinstance(line, Lines)}
        choice = envelopes(point.at(few), ranges.at(few), {k: line.at(few) for k, line in mine.items()})
        better = climbed(
            point.network,
            ranges.radius[sample],
            {k: e.at(item) for k, e in choice.items()},
            {k: line.slopes[:, sample] for k, line in mine.items()},
            cotangents[sample, rival],
            steps,
        )
        here = Fall(fall.rate[sample, rival].unsqueeze(1), fall.rest[sample, rival].unsqueeze(1))
        least = here.least(better, ranges.radius[sample])
        place = (sample, rival)
        fall = Fall(fall.rate.index_put(place, least.rate[:, 0]), fall.rest.index_put(place, least.rest[:, 0]))
    return fall, ranges


def by_climbed_lines(analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor) -> tuple[Fall, Ranges]:
    """`by_lines`, and lines of its own for every range as well."""
    return by_lines(analysis, point, ranges, cotangents, RANGE_ASCENT[analysis.effort])


def by_lines_alone(analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor) -> tuple[Fall, Ranges]:
    """Linear relaxation on the ranges given."""
    return falls(point.network, lines(point, ranges), cotangents), ranges


def by_slopes(analysis: Analysis, point: Point, ranges: Ranges, cotangents: Tensor) -> tuple[Fall, Ranges]:
    """Local Lipschitz constants; of as many samples at once as fit the memory."""
    fitting = analysis.memory // footprint(point.network)
    every = torch.arange(len(point.x), device=point.x.device)
    parts = every.split(max(1, fitting))
    budget = BUDGET[analysis.effort] if fitting else 0.0
    found = [lipschitz_falls(point.at(i), ranges.at(i), cotangents[i], budget) for i in parts]
    return Fall(torch.cat([f.rate for f in found]), torch.cat([f.rest for f in found])), ranges


@dataclass(frozen=True, eq=False)
class Found:
    """Certified radii (batch,), rounded down, 0 where nothing was found; the rivals that decide them, and which of the
    bounds it was."""

    radius: Tensor
    rival: Tensor
    bound: Tensor

    def raised(self, other: Found) -> Found:
        """The other one's samples where its radii are larger."""
        take = other.radius > self.radius
        return Found(
            torch.where(take, other.radius, self.radius),
            torch.where(take, other.rival, self.rival),
            torch.where(take, other.bound, self.bound),
        )


def largest_balls(bounds: tuple[Falls, ...], analysis: Analysis, point: Point, known: Tensor) -> Found:
    """The largest balls on which one of the bounds holds. known (batch,): radii certified already.

    What is found may be less than what is known.
    """
    radius, rival = torch.zeros_like(known), point.margin.argmin(1)
    bound = torch.zeros_like(rival)
    able = searchable(point, known).nonzero()[:, 0]
    if not len(able) or not nonlinear_nodes(point.network):  # affine: margin over norm is exact
        return Found(radius, rival, bound)
    search, floor = _Search(analysis, point.at(able)), known[able]
    rough = search.largest((by_lines_alone,), torch.where(floor > 0, floor, search.about), floor, ROUGH_BALLS, ROUGH)
    # what is known already may be all there is, where better bounds than a global one have been tried
    near = (floor > 0.5 * search.about) | (len(point.slopes) > 0)
    start = torch.where(near & (floor > 0), floor, search.about)
    between = torch.maximum(NARROWER * rough.radius, (rough.radius * search.about).sqrt())
    start = torch.where(rough.radius > 0, torch.where(near, NARROWER * rough.radius, between), start)
    effort = analysis.effort
    if by_lines not in bounds or not _climbs_for_ranges(search.point, effort):
        found = search.largest(bounds, start, floor, BALLS[effort], CLOSE[effort])
    else:
        found = search.largest(bounds, start, floor / BEHIND, BALLS[effort], NEARLY)
        finer = tuple(by_climbed_lines if bound is by_lines else bound for bound in bounds)
        floor = torch.where(found.radius > 0, torch.maximum(floor, found.radius), torch.inf)
        begin = NARROWER_STILL * found.radius
        found = found.raised(search.largest(finer, begin, floor, BALLS[effort], CLOSE[effort]))
    radius[able], rival[able], bound[able] = found.radius, found.rival, found.bound
    return Found(radius, rival, bound)


def _climbs_for_ranges(point: Point, effort: str) -> bool:
    """Whether lines of every range's own are worth their time. On kinks they seldom are: lines above have no choice."""
    network, steps = point.network, RANGE_ASCENT[effort]
    if not steps or not climbs(point) or climbed_cost(network, steps) > CLIMBS[effort]:
        return False
    ops = [network.nodes[k].op for k in nonlinear_nodes(network)]
    bent = any(isinstance(op, Activation) and not is_piecewise_linear(op) for op in ops)
    depth = sum(reaches(network, target) for target in heads(network)[:-1])
    return (bent or effort == "max") and depth >= DEEP[effort]


@dataclass(frozen=True, eq=False)
class _Ladder:
    """Radii unit * (1 + close)^k, (batch,) each, by their rungs k."""

    unit: Tensor
    close: float

    def at(self, index: Tensor) -> _Ladder:
        return _Ladder(self.unit[index], self.close)

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
    analysis: Analysis
    point: Point

    @cached_property
    def about(self) -> Tensor:
        """Where to begin, (batch,)."""
        start = START * self.point.about.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)
        return torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))

    def largest(self, bounds: tuple[Falls, ...], start: Tensor, floor: Tensor, balls: int, close: float) -> Found:
        """From `start` (batch,) on. Nothing where no ball beyond `floor` (batch,) passes."""
        ladder = _Ladder(self.about, close)
        bracket = Bracket.around(start, STRIDE, inward=1.0, steady=True)
        rival = self.point.margin.argmin(1)
        best = Found(torch.zeros_like(start), rival, torch.zeros_like(rival))
        inside, outside = ladder.below(floor), torch.full_like(start, torch.inf)
        live = torch.arange(len(start), device=start.device)
        for _ in range(balls):
            rung = ladder.rung(bracket.radius).round().clamp(min=inside + 1, max=outside - 1)
            bracket.radius = ladder.radius(rung)
            live = live[
                (inside[live] + 1 < outside[live]) & bracket.radius[live].isfinite() & (bracket.radius[live] > 0)
            ]
            if not len(live):
                break
            left, here = self._tried(bounds, live, bracket.radius[live])
            bracket.told(live, left)
            passed, here_rung, lower = left > 0, rung[live], ladder.at(live)
            outside[live] = torch.where(passed, outside[live], torch.minimum(outside[live], here_rung))
            # a part of a ball that failed counts by the rung below
            reached = torch.where(passed, here_rung, torch.minimum(lower.below(here.radius), here_rung - 1))
            certain = torch.where(passed, here.radius, torch.minimum(lower.radius(reached), here.radius))
            raised = reached > inside[live]
            index = live[raised]
            inside[index], best.radius[index] = reached[raised], certain[raised]
            best.rival[index], best.bound[index] = here.rival[raised], here.bound[raised]
        return best

    def _tried(self, bounds: tuple[Falls, ...], index: Tensor, radius: Tensor) -> tuple[Tensor, Found]:
        """What balls of `radius` leave of the margins to the nearest rivals, as parts; and what that proves."""
        whole = self.point.at(index)
        ranges = fast_ranges(whole, self.analysis.weights, radius)
        eye = torch.eye(whole.network.classes, dtype=radius.dtype, device=radius.device)
        left = torch.full_like(radius, -torch.inf)
        found = Found(torch.zeros_like(radius), whole.margin.argmin(1), torch.zeros_like(index))
        todo = torch.arange(len(index), device=index.device)
        for number, bound in enumerate(bounds):
            point = whole.at(todo)
            cotangents = eye[point.prediction].unsqueeze(1) - eye.unsqueeze(0)
            fall, ranges = bound(self.analysis, point, ranges, cotangents)
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
