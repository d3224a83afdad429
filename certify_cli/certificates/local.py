"""Method `local`: the largest ball on which curvature local to it keeps every rival's margin positive.

1. The tangent bound, for all rivals at once and without a Jacobian, estimates which rival is nearest.
2. The ball of that rival is searched: an optimised margin bound is estimated while the ball grows, then proved.
3. On that ball every other rival is proved, by tangents where that suffices, else by a search of its own, which can
   only make the ball smaller.

Only proofs count: those of `tangent_bound` and of `margin_bound.lower_bound`. A proof on a ball holds on every smaller
one, so the search needs no monotonicity of the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import Ranges, interval_ranges
from certify_cli.bounds.relaxation.intermediate_bounds import intermediate_bounds
from certify_cli.bounds.remainder.expansion import BallExpansion, Linearisation, expand_on_ball
from certify_cli.bounds.remainder.margin_bound import Choice, lower_bound
from certify_cli.bounds.remainder.optimise import Optimised, coarse_estimate, optimise
from certify_cli.bounds.remainder.tangent_bound import node_remainders, tangent_expansions, tangent_losses
from certify_cli.bounds.remainder.trust_region_estimate import estimated_minimiser
from certify_cli.certificates.radius_bracket import HOPELESS, Bracket, power_step
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import difference_down
from certify_cli.numerics.trees import Batched

START = 0.5
"""The first ball, as a part of the radius to first order."""
ROUGH_BALLS, SHARP_BALLS = 14, 2
"""Balls that the tangent bound tries: with ranges of phi'' alone, then with sharp remainders, which cost the most."""
SHARPER = 1.08
"""What sharp remainders add to the radius, an estimate."""
PROBES, MOST_PROBES = 2, 14
"""Balls that are estimated before a search; the second number where none of the first tells anything of the radius."""
ASCENT = 1.08
"""What an ascent adds to the radius, an estimate."""
ROUGH, FAST_CLOSE = 0.3, 1e-2
"""Relative accuracy to which the probes, and the tangent bound, look for the largest ball."""
SAFE = 4e-3
"""Part of the margin taken off an estimate: a proof gives less by about that."""
BACK = (1.0, 0.995, 0.98, 0.94, 0.8)
"""Parts of the estimated radius at which a proof is tried, in this order."""


@dataclass(frozen=True, eq=False)
class RivalPairs(Batched):
    """Pairs of a sample and a rival, with what the margin bound takes.

    sample: position in the batch.   rival: class.   margin: lower bound at the sample; all (count,).
    cotangents (count, classes): one-hot of the prediction less one-hot of the rival.
    """

    sample: Tensor
    rival: Tensor
    margin: Tensor
    cotangents: Tensor

    @classmethod
    def of(cls, point: EvaluatedPoints, sample: Tensor, rival: Tensor) -> RivalPairs:
        eye = torch.eye(point.network.classes, dtype=point.x.dtype, device=point.x.device)
        return cls(sample, rival, point.margin_low[sample, rival], eye[point.prediction[sample]] - eye[rival])


@dataclass(frozen=True, eq=False)
class _PairsOnBalls:
    """Pairs, each with the expansion on a ball of its own; point and expansion hold one row a pair."""

    point: EvaluatedPoints
    expansion: BallExpansion
    pairs: RivalPairs

    def optimised(self, begin: Choice | None, steps: int, enough: Tensor | None = None) -> Optimised:
        """The optimised bound, from `begin` or the ascent's own starts.

        enough (count,): parts of the margin at which the ascent may stop.
        """
        margin = self.pairs.margin
        target = None if enough is None else enough * margin
        return optimise(self.point, self.expansion, margin, self.pairs.cotangents, begin, steps, target)

    def coarse(self) -> Tensor:
        """An estimate (count,) of the bound, as a part of the margin, without an ascent."""
        return self.part(coarse_estimate(self.point, self.expansion, self.pairs.margin, self.pairs.cotangents))

    def part(self, value: Tensor) -> Tensor:
        """A value (count,) as a part of the margin."""
        return value / self.pairs.margin

    def proved(self, found: Optimised) -> Tensor:
        """The proved lower bound (count,) of the margin on the balls: -inf where the estimate is not positive."""
        value = torch.full_like(found.estimate, -torch.inf)
        todo = (found.estimate > 0).nonzero().squeeze(1)
        if len(todo):
            pairs = self.pairs.at(todo)
            expansion, choice = self.expansion.at(todo), found.choice.at(todo)
            value[todo] = lower_bound(self.point.at(todo), expansion, pairs.margin, pairs.cotangents, choice)
        return value


def local_radii(model_bounds: ModelBounds, point: EvaluatedPoints, known: Tensor) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), rounded down, and the rivals that decide them; 0 where nothing was proved.

    known (batch,): radii certified already; where they are infinite nothing is searched. Samples are treated in chunks
    that fit `model_bounds.memory`; where one sample's Jacobians do not fit, the tangent bound alone decides.
    """
    start = beginning(point)
    if not nonlinear_nodes(point.network):  # affine: there is no curvature
        return torch.zeros_like(start), point.margin.argmin(1)
    able = searchable(point, known).nonzero().squeeze(1)
    radius, rival = torch.zeros_like(start), point.margin.argmin(1)
    for part in able.split(max(1, model_bounds.memory // footprint(point.network))) if len(able) else ():
        search = LocalSearch(model_bounds, point.at(part), jacobians=fits(model_bounds))
        radius[part], rival[part] = search.radii(start[part])
    return radius, rival


def searchable(point: EvaluatedPoints, known: Tensor) -> Tensor:
    """(batch,): whether a ball can be found at all: every margin is positive, and the radius known is not infinite."""
    return (point.margin_low > 0).all(1) & ~known.isinf()


def beginning(point: EvaluatedPoints) -> Tensor:
    """Radii (batch,) of the first balls. They must not depend on radii known already, or the radius found would."""
    start = START * point.first_order.amin(1)
    return torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))


def fits(model_bounds: ModelBounds) -> bool:
    """Whether the Jacobians of one sample fit the memory."""
    return footprint(model_bounds.network) <= model_bounds.memory


def footprint(network: Network) -> int:
    """An estimate of the bytes that the Jacobians of one sample, and the tables made from them, take."""
    targets = sorted({pre_activation(network, k) for k in nonlinear_nodes(network)})
    inputs, before, entries, count = network.nodes[0].size, 0, 0, 0
    for target in targets:
        size = network.nodes[target].size
        entries += 3 * size * (inputs + before) + 2 * size * size
        before, count = before + size, count + size
    return 8 * (entries + 4 * min(count, inputs) ** 2 + 80 * count)


class LocalSearch:
    """The search for the largest balls of a batch of samples, and their proofs."""

    def __init__(self, model_bounds: ModelBounds, point: EvaluatedPoints, jacobians: bool = True) -> None:
        self.model_bounds, self.point = model_bounds, point
        self.limits = model_bounds.effort.local if jacobians else None
        self.linearisation: Linearisation | None = None

    def fast(self, start: Tensor, balls: int, sharp: bool) -> tuple[Tensor, Tensor]:
        """Radii (batch,) proved by the tangent bound, for all rivals at once, and an estimate (batch, classes) of each
        rival's radius.

        start (batch,): the first balls.   sharp: see `tangent_losses`.
        """
        bracket = Bracket.around(start)
        estimate = torch.full_like(self.point.margin_low, torch.inf)
        active = torch.arange(len(start), device=start.device)
        for _ in range(balls):
            part, here = self.point.at(active), bracket.radius[active]
            ranges = interval_ranges(part, self.model_bounds.weights, here)
            left = difference_down(part.margin_low, tangent_losses(part, ranges, part.adjoints, sharp=sharp))
            left = (left / part.margin_low).masked_fill(part.own, torch.inf)
            estimate[active] = power_step(here.unsqueeze(1), left).masked_fill(part.own, torch.inf)
            bracket.update(active, left.amin(1))
            active = bracket.unresolved(active, FAST_CLOSE)
            if not len(active):
                break
        return bracket.inside, estimate

    def radii(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radii (batch,) and the rivals that decide them. start (batch,): the first balls."""
        if self.limits is None:
            return self._fast(start)
        point = self.point
        every = torch.arange(len(start), device=start.device)
        begin = self._probe(RivalPairs.of(point, every, point.first_order.argmin(1)), start)
        order = self._estimated_radii(begin)
        decides = order.argmin(1)
        first = decides.clone()
        found = self._search(RivalPairs.of(point, every, first), begin, torch.full_like(start, torch.inf))
        rivals = (~point.own).nonzero()
        rivals = rivals[(rivals[:, 1] != first[rivals[:, 0]]) & (found[rivals[:, 0]] > 0)]
        rivals = rivals[~self._proved_by_tangents(rivals, found)]
        while len(rivals):  # the nearest of each sample's rivals that are not proved yet
            near = torch.full_like(order, torch.inf)
            near[rivals[:, 0], rivals[:, 1]] = order[rivals[:, 0], rivals[:, 1]]
            sample = rivals[:, 0].unique()
            rival = near[sample].argmin(1)
            part = self._search(RivalPairs.of(point, sample, rival), found[sample], found[sample])
            smaller = part < found[sample]
            found[sample[smaller]], decides[sample[smaller]] = part[smaller], rival[smaller]
            treated = _lookup(sample, rival, len(start))[rivals[:, 0]]
            rivals = rivals[(rivals[:, 1] != treated) & (found[rivals[:, 0]] > 0)]
        lost = (found == 0).nonzero()[:, 0]
        if len(lost):
            found[lost], decides[lost] = LocalSearch(self.model_bounds, point.at(lost))._fast(start[lost])
        return found, decides

    def _fast(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """By the tangent bound alone."""
        rough, _ = self.fast(start, ROUGH_BALLS, sharp=False)
        radius, order = self.fast(torch.where(rough > 0, SHARPER * rough, start), SHARP_BALLS, sharp=True)
        return torch.maximum(rough, radius), order.argmin(1)

    def _estimated_radii(self, radius: Tensor) -> Tensor:
        """An estimate (batch, classes) of each rival's radius, from the tangent bound on balls of `radius` (batch,)."""
        every = torch.arange(len(radius), device=radius.device)
        known = self.expand(every, radius)
        low, own = self.point.margin_low, self.point.own
        left = (low - tangent_losses(self.point, known.ranges, self.point.adjoints, known)) / low
        return power_step(radius.unsqueeze(1), left).nan_to_num(nan=0.0).masked_fill(own, torch.inf)

    def _proved_by_tangents(self, rivals: Tensor, radius: Tensor) -> Tensor:
        """Which rows (sample, rival) are proved on the samples' balls by tangents at the samples: by one bound for all
        rivals, or by the trust region, one rival at a time."""
        sample = rivals[:, 0].unique()
        if not len(sample):
            return torch.zeros(0, dtype=torch.bool, device=rivals.device)
        part, known = self.point.at(sample), self.expand(sample, radius[sample])
        low, adjoints = part.margin_low, part.adjoints
        value = difference_down(low, tangent_losses(part, known.ranges, adjoints, known))
        unproved = torch.zeros_like(self.point.own)
        unproved[rivals[:, 0], rivals[:, 1]] = True
        unproved = unproved[sample] & (value <= 0) & (value > HOPELESS * low)
        parts = node_remainders(part, known.ranges, adjoints)
        while bool(unproved.any()):
            some = unproved.any(1).nonzero()[:, 0]
            rival = unproved[some].int().argmax(1)
            unproved[some, rival] = False
            each = tangent_expansions(known, parts, adjoints, some, rival)
            hints = estimated_minimiser(each.quadratic, each.gradient, each.radius, None)
            estimate = 0.5 * (
                hints.mu * each.radius.square() + hints.form + (1 + 1 / hints.tau) * each.quadratic.residual_sum
            )
            todo = (estimate + each.constant < low[some, rival]).nonzero()[:, 0]
            if len(todo):
                losses = each.at(todo).losses(hints.mu[todo], hints.tau[todo])
                value[some[todo], rival[todo]] = difference_down(low[some[todo], rival[todo]], losses)
        whole = torch.full_like(self.point.margin_low, -torch.inf).index_copy(0, sample, value)
        return whole[rivals[:, 0], rivals[:, 1]] > 0

    def _search(self, pairs: RivalPairs, start: Tensor, cap: Tensor) -> Tensor:
        """The largest proved balls (count,), at most `cap` (count,); 0 where none was proved."""
        limits = self.limits
        assert limits is not None
        alone = not bool(cap.isfinite().any())  # each sample's first search: its balls make the linearisation
        bracket = Bracket.around(torch.minimum(start, cap))
        enough = either(cap.isfinite(), 2 * SAFE, torch.inf)
        best: Choice | None = None
        choice: Choice | None = None
        active = torch.arange(len(start), device=start.device)
        for count in range(limits.balls):
            on_balls = self._on_balls(pairs.at(active), bracket.radius[active])
            found = on_balls.optimised(choice, limits.further if count else limits.first, enough[active])
            raised = bracket.update(active, on_balls.part(found.estimate) - SAFE)
            best = found.choice if best is None else best.put(active[raised], found.choice.at(raised.nonzero()[:, 0]))
            bracket.radius = torch.minimum(bracket.radius, cap)
            following = bracket.unresolved(active, limits.close)
            choice = found.choice.at(torch.isin(active, following).nonzero()[:, 0])
            active = following
            if alone and not count:  # of all samples, resolved or not: none may depend on its neighbours
                self._linearise(pairs.sample, torch.where(bracket.radius.isfinite(), bracket.radius, start))
            if not len(active):
                break
        assert best is not None
        return self._prove(pairs, bracket.inside, best)

    def _prove(self, pairs: RivalPairs, radius: Tensor, choice: Choice) -> Tensor:
        """Radii (count,) that are proved, at or a little below `radius`; 0 where none is."""
        proved = torch.zeros_like(radius)
        active = (radius > 0).nonzero()[:, 0]
        for part in BACK:
            if not len(active):
                break
            on_balls = self._on_balls(pairs.at(active), part * radius[active])
            value = on_balls.proved(on_balls.optimised(choice.at(active), 0))
            proved[active] = torch.where(value > 0, part * radius[active], proved[active])
            active = active[value <= 0]
        return proved

    def _probe(self, pairs: RivalPairs, radius: Tensor) -> Tensor:
        """An estimate (batch,) of the radius that an ascent reaches, to begin at. One pair for every sample."""
        self._linearise(pairs.sample, radius)
        bracket = Bracket.around(radius)
        active = torch.arange(len(radius), device=radius.device)
        for count in range(1, MOST_PROBES + 1):
            on_balls = self._on_balls(pairs.at(active), bracket.radius[active])
            left = on_balls.coarse()
            bracket.update(active, left)
            active = bracket.unresolved(active[(left < HOPELESS) | (count < PROBES)], ROUGH)
            if not len(active):
                break
        return ASCENT * bracket.radius

    def _linearise(self, samples: Tensor, radius: Tensor) -> None:
        """A linearisation made for balls of these radii, of all samples in their order."""
        assert len(samples) == len(self.point.x)
        expansion = expand_on_ball(self.point, self._ranges(self.point, radius), like=self.linearisation)
        self.linearisation = expansion.linearisation

    def _ranges(self, part: EvaluatedPoints, radius: Tensor) -> Ranges:
        """Ranges on balls of `radius` (batch,) from which an expansion begins: at `max` those of linear relaxation."""
        ranges = interval_ranges(part, self.model_bounds.weights, radius)
        if self.limits is not None and self.limits.relaxed:
            ranges, _ = intermediate_bounds(part, ranges, self.model_bounds.memory)
        return ranges

    def expand(self, samples: Tensor, radius: Tensor) -> BallExpansion:
        """On balls (count,) of the samples (count,) of the batch, in the linearisation made for the search."""
        part, given = self.point.at(samples), self.linearisation
        if given is not None and len(samples) != len(self.point.x):
            given = given.at(samples)
        return expand_on_ball(part, self._ranges(part, radius), given)

    def _on_balls(self, pairs: RivalPairs, radius: Tensor) -> _PairsOnBalls:
        """radius (count,): of the pairs' balls; pairs of one sample must have one ball."""
        samples, position = pairs.sample.unique(return_inverse=True)
        first = torch.empty_like(samples).index_copy(0, position, torch.arange(len(position), device=position.device))
        expansion = self.expand(samples, radius[first]).at(position)
        return _PairsOnBalls(self.point.at(pairs.sample), expansion, pairs)


def _lookup(sample: Tensor, rival: Tensor, batch: int) -> Tensor:
    table = torch.full((batch,), -1, dtype=rival.dtype, device=rival.device)
    table[sample] = rival
    return table
