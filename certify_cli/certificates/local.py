"""Method `local`: the largest ball on which a curvature bound of that ball keeps every rival's margin positive.

1. The tangent bound, which takes all rivals at once and needs no Jacobian, estimates the nearest rival.
2. The ball of that rival is searched with estimates of the optimised margin bound, and then proved.
3. Every other rival is proved on that ball: by tangents where they suffice, else by a search of its own, which can only
   make the ball smaller.

Only `tangent_losses`, tangent expansions and `margin_bound.lower_bound` prove anything; estimates say where to look. A
proof on a ball holds on every smaller one, so the search does not need the bounds to be monotone in the radius.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.bounds.remainder.expansion import BallExpansion
from certify_cli.bounds.remainder.margin_bound import Choice, lower_bound
from certify_cli.bounds.remainder.optimise import Optimised, coarse_estimate, optimise
from certify_cli.bounds.remainder.tangent_bound import node_remainders, tangent_expansions, tangent_losses
from certify_cli.bounds.remainder.trust_region_estimate import estimated_minimiser
from certify_cli.certificates.expansions import Expansions
from certify_cli.certificates.radius_bracket import HOPELESS, Bracket, power_step
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.choose import either
from certify_cli.numerics.deadline import OutOfTime, present
from certify_cli.numerics.rounding import difference_down
from certify_cli.numerics.trees import Batched

START = 0.5
"""The first ball, as a part of the radius to first order."""
ROUGH_BALLS, SHARP_BALLS = 14, 2
"""Balls tried with the tangent bound: from ranges of phi'' alone, then with sharp remainders, which cost the most."""
SHARP_GAIN = 1.08
"""An estimate of the ratio by which sharp remainders enlarge the radius."""
PROBES, MOST_PROBES = 2, 14
"""Balls estimated before a search: at least and at most; more than PROBES only while the values are below HOPELESS."""
ASCENT_GAIN = 1.08
"""An estimate of the ratio by which an ascent enlarges the radius."""
PROBE_TOLERANCE, FAST_TOLERANCE = 0.3, 1e-2
"""Relative accuracy of the radius in the probes, and in the search with the tangent bound."""
RESERVE = 4e-3
"""Part of the margin by which estimates are lowered, because a proof yields less than the estimate by about that."""
RETREATS = (1.0, 0.995, 0.98, 0.94, 0.8)
"""Parts of the estimated radius at which a proof is tried, in this order."""


@dataclass(frozen=True, eq=False)
class RivalPairs(Batched):
    """Pairs of a sample and a rival, and the arguments of the margin bound that belong to them.

    sample (count,): position in the batch.
    rival (count,): class.
    margin (count,): lower bound of the margin at the sample.
    cotangents (count, classes): one-hot of the prediction minus one-hot of the rival.
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
    """Pairs with one ball each; `point` and `expansion` have one row per pair."""

    point: EvaluatedPoints
    expansion: BallExpansion
    pairs: RivalPairs

    def optimised(self, begin: Choice | None, steps: int, enough: Tensor | None = None) -> Optimised:
        """The optimised bound, by an ascent from `begin` or, without it, from the default starts.

        enough (count,): parts of the margin at which the ascent may stop.
        """
        margin = self.pairs.margin
        target = None if enough is None else enough * margin
        return optimise(self.point, self.expansion, margin, self.pairs.cotangents, begin, steps, target)

    def coarse(self) -> Tensor:
        """An estimate (count,) of the bound as a part of the margin, without an ascent."""
        return self.relative(coarse_estimate(self.point, self.expansion, self.pairs.margin, self.pairs.cotangents))

    def relative(self, value: Tensor) -> Tensor:
        """Values (count,) as parts of the margins."""
        return value / self.pairs.margin

    def proved(self, optimised: Optimised) -> Tensor:
        """Proved lower bounds (count,) of the margins on the balls; -inf where the estimate is not positive."""
        value = torch.full_like(optimised.estimate, -torch.inf)
        todo = (optimised.estimate > 0).nonzero().squeeze(1)
        if len(todo):
            pairs = self.pairs.at(todo)
            expansion, choice = self.expansion.at(todo), optimised.choice.at(todo)
            value[todo] = lower_bound(self.point.at(todo), expansion, pairs.margin, pairs.cotangents, choice)
        return value


def local_radii(model_bounds: ModelBounds, point: EvaluatedPoints, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), rounded down, and the rivals (batch,) that decide them; 0 where nothing is proved.

    previous (batch,): radii that other methods have certified; infinite ones are not searched.

    Samples are treated in chunks that fit `model_bounds.memory`. Where the Jacobians of one sample do not fit, the
    tangent bound alone decides. When time ends, radii are those that are proved by then.
    """
    start = first_balls(point)
    radius, rival = torch.zeros_like(start), point.margin.argmin(1)
    if not nonlinear_nodes(point.network):  # affine: there is no curvature
        return radius, rival
    able = searchable(point, previous).nonzero().squeeze(1)
    for chunk in able.split(max(1, model_bounds.memory // footprint(point.network))) if len(able) else ():
        search = LocalSearch(model_bounds, point.at(chunk), jacobians=fits(model_bounds))
        try:
            radius[chunk], rival[chunk] = search.radii(start[chunk])
        except OutOfTime:
            break
    return radius, rival


def searchable(point: EvaluatedPoints, previous: Tensor) -> Tensor:
    """Mask (batch,): samples with positive margins whose previously certified radius is not infinite already."""
    return (point.margin_low > 0).all(1) & ~previous.isinf()


def first_balls(point: EvaluatedPoints) -> Tensor:
    """Radii (batch,) of the first balls.

    They do not depend on previously certified radii, so that the result of the search does not either.
    """
    start = START * point.first_order.amin(1)
    return torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))


def fits(model_bounds: ModelBounds) -> bool:
    """Whether the Jacobians of one sample fit the memory."""
    return footprint(model_bounds.network) <= model_bounds.memory


def footprint(network: Network) -> int:
    """An estimate, in bytes, of the Jacobians of one sample and the tables made from them."""
    targets = sorted({pre_activation(network, k) for k in nonlinear_nodes(network)})
    inputs, entries, count = network.nodes[0].size, 0, 0
    for target in targets:
        size = network.nodes[target].size
        entries += 3 * size * (inputs + count) + 2 * size * size
        count += size
    return 8 * (entries + 4 * min(count, inputs) ** 2 + 80 * count)


class LocalSearch:
    """The search for the largest balls of a batch of samples, and their proofs.

    jacobians: whether the samples' Jacobians fit the memory; without them the tangent bound alone is used.
    """

    def __init__(self, model_bounds: ModelBounds, point: EvaluatedPoints, jacobians: bool = True) -> None:
        self.model_bounds, self.point = model_bounds, point
        self.limits = model_bounds.effort.local if jacobians else None
        self.expansions = Expansions(model_bounds, point, self.limits is not None and self.limits.relaxed_ranges)

    def fast(self, start: Tensor, balls: int, sharp: bool) -> tuple[Tensor, Tensor]:
        """Radii that the tangent bound proves for all rivals, and estimates of each rival's radius.

        start: (batch,), radii of the first balls.   balls: largest number tried.   sharp: see `tangent_losses`.
        Returns radii (batch,), and estimates (batch, classes), inf at the prediction; an estimate is no bound.
        """
        bracket = Bracket.around(start)
        estimate = torch.full_like(self.point.margin_low, torch.inf)
        active = torch.arange(len(start), device=start.device)
        for count in range(balls):
            present().step(f"ball {count + 1} by tangents")
            samples, radius = self.point.at(active), bracket.radius[active]
            try:
                ranges = interval_ranges(samples, self.model_bounds.weights, radius)
                losses = tangent_losses(samples, ranges, samples.adjoints, sharp=sharp)
            except OutOfTime:
                break
            remaining = difference_down(samples.margin_low, losses)
            remaining = (remaining / samples.margin_low).masked_fill(samples.own, torch.inf)
            estimate[active] = power_step(radius.unsqueeze(1), remaining).masked_fill(samples.own, torch.inf)
            bracket.update(active, remaining.amin(1))
            active = bracket.unresolved(active, FAST_TOLERANCE)
            if not len(active):
                break
        return bracket.lower.radius, estimate

    def radii(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radii (batch,) and the rivals that decide them. start (batch,): radii of the first balls."""
        if self.limits is None:
            return self._by_tangents(start)
        point = self.point
        every = torch.arange(len(start), device=start.device)
        begin = self._probe(RivalPairs.of(point, every, point.first_order.argmin(1)), start)
        order = self._estimated_radii(begin)
        first = order.argmin(1)
        radius = self._search(RivalPairs.of(point, every, first), begin, torch.full_like(start, torch.inf))
        radius, decides = self._prove_other_rivals(radius, first, order)
        failed = (radius == 0).nonzero()[:, 0]
        if len(failed):
            radius[failed], decides[failed] = LocalSearch(self.model_bounds, point.at(failed))._by_tangents(
                start[failed]
            )
        return radius, decides

    def _prove_other_rivals(self, radius: Tensor, first: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """The radii (batch,) lowered until every rival is proved, and the rivals (batch,) that decide them.

        If time ends before all rivals of a sample are proved, its radius is 0.

        radius (batch,): proved for the rivals `first` (batch,).
        order (batch, classes): estimates of each rival's radius; smaller ones are treated first.
        """
        point, radius, decides = self.point, radius.clone(), first.clone()
        rivals = (~point.own).nonzero()
        rivals = rivals[(rivals[:, 1] != first[rivals[:, 0]]) & (radius[rivals[:, 0]] > 0)]
        rivals = rivals[~self._proved_by_tangents(rivals, radius)]
        while len(rivals):  # in each round the nearest unproved rival of each sample
            unproved = torch.full_like(order, torch.inf)
            unproved[rivals[:, 0], rivals[:, 1]] = order[rivals[:, 0], rivals[:, 1]]
            sample = rivals[:, 0].unique()
            rival = unproved[sample].argmin(1)
            try:
                proved = self._search(RivalPairs.of(point, sample, rival), radius[sample], radius[sample])
            except OutOfTime:
                radius[sample] = 0.0
                break
            smaller = proved < radius[sample]
            radius[sample[smaller]], decides[sample[smaller]] = proved[smaller], rival[smaller]
            treated = _lookup(sample, rival, len(radius))[rivals[:, 0]]
            rivals = rivals[(rivals[:, 1] != treated) & (radius[rivals[:, 0]] > 0)]
        return radius, decides

    def _by_tangents(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Radii (batch,) and deciding rivals by the tangent bound alone."""
        rough, _ = self.fast(start, ROUGH_BALLS, sharp=False)
        radius, order = self.fast(torch.where(rough > 0, SHARP_GAIN * rough, start), SHARP_BALLS, sharp=True)
        return torch.maximum(rough, radius), order.argmin(1)

    def _estimated_radii(self, radius: Tensor) -> Tensor:
        """Estimates (batch, classes) of each rival's radius, from the tangent bound on balls of `radius` (batch,)."""
        every = torch.arange(len(radius), device=radius.device)
        expansion = self.expansions.at(every, radius)
        low, own = self.point.margin_low, self.point.own
        remaining = (low - tangent_losses(self.point, expansion.ranges, self.point.adjoints, expansion)) / low
        return power_step(radius.unsqueeze(1), remaining).nan_to_num(nan=0.0).masked_fill(own, torch.inf)

    def _proved_by_tangents(self, rivals: Tensor, radius: Tensor) -> Tensor:
        """Mask (count,) of the pairs proved on the samples' balls by tangents at the samples.

        rivals (count, 2): sample and rival.   radius (batch,): of the samples' balls.

        The tangent bound takes all rivals at once; where it fails, a trust-region bound takes one rival at a time.
        """
        sample = rivals[:, 0].unique()
        if not len(sample):
            return torch.zeros(0, dtype=torch.bool, device=rivals.device)
        samples, expansion = self.point.at(sample), self.expansions.at(sample, radius[sample])
        low, adjoints = samples.margin_low, samples.adjoints
        value = difference_down(low, tangent_losses(samples, expansion.ranges, adjoints, expansion))
        unproved = torch.zeros_like(self.point.own)
        unproved[rivals[:, 0], rivals[:, 1]] = True
        unproved = unproved[sample] & (value <= 0) & (value > HOPELESS * low)
        remainders = node_remainders(samples, expansion.ranges, adjoints)
        while bool(unproved.any()):
            index = unproved.any(1).nonzero()[:, 0]
            rival = unproved[index].int().argmax(1)
            unproved[index, rival] = False
            tangents = tangent_expansions(expansion, remainders, adjoints, index, rival)
            hints = estimated_minimiser(tangents.quadratic, tangents.gradient, tangents.radius, None)
            estimate = 0.5 * (
                hints.mu * tangents.radius.square() + hints.form + (1 + 1 / hints.tau) * tangents.quadratic.residual_sum
            )
            todo = (estimate + tangents.constant < low[index, rival]).nonzero()[:, 0]
            if len(todo):
                losses = tangents.at(todo).losses(hints.mu[todo], hints.tau[todo])
                value[index[todo], rival[todo]] = difference_down(low[index[todo], rival[todo]], losses)
        whole = torch.full_like(self.point.margin_low, -torch.inf).index_copy(0, sample, value)
        return whole[rivals[:, 0], rivals[:, 1]] > 0

    def _search(self, pairs: RivalPairs, start: Tensor, cap: Tensor) -> Tensor:
        """Radii (count,) of the largest proved balls, at most `cap` (count,); 0 where none is proved.

        start (count,): radii of the first balls.   cap: inf for each sample's first search, whose first round of balls
        also yields the linearisation for all later ones.
        """
        limits = self.limits
        assert limits is not None
        is_first = not bool(cap.isfinite().any())
        bracket = Bracket.around(torch.minimum(start, cap))
        enough = either(cap.isfinite(), 2 * RESERVE, torch.inf)
        best: Choice | None = None
        choice: Choice | None = None
        active = torch.arange(len(start), device=start.device)
        for count in range(limits.balls):
            present().step(f"ball {count + 1}")
            on_balls = self._on_balls(pairs.at(active), bracket.radius[active])
            optimised = on_balls.optimised(
                choice, limits.further_steps if count else limits.first_steps, enough[active]
            )
            raised = bracket.update(active, on_balls.relative(optimised.estimate) - RESERVE)
            improved = optimised.choice.at(raised.nonzero()[:, 0])
            best = optimised.choice if best is None else best.put(active[raised], improved)
            bracket.radius = torch.minimum(bracket.radius, cap)
            following = bracket.unresolved(active, limits.tolerance)
            choice = optimised.choice.at(torch.isin(active, following).nonzero()[:, 0])
            active = following
            if is_first and not count:  # of all samples, resolved or not: none may depend on others of its batch
                self.expansions.linearise(torch.where(bracket.radius.isfinite(), bracket.radius, start))
            if not len(active):
                break
        assert best is not None
        return self._prove(pairs, bracket.lower.radius, best)

    def _prove(self, pairs: RivalPairs, radius: Tensor, choice: Choice) -> Tensor:
        """Radii (count,) that are proved, equal to `radius` or a little smaller; 0 where none is."""
        proved = torch.zeros_like(radius)
        active = (radius > 0).nonzero()[:, 0]
        for part in RETREATS:
            if not len(active):
                break
            on_balls = self._on_balls(pairs.at(active), part * radius[active])
            value = on_balls.proved(on_balls.optimised(choice.at(active), 0))
            proved[active] = torch.where(value > 0, part * radius[active], proved[active])
            active = active[value <= 0]
        return proved

    def _probe(self, pairs: RivalPairs, radius: Tensor) -> Tensor:
        """Estimates (batch,) of the radii that an ascent reaches, where a search begins.

        pairs: one for each sample, in order.   radius (batch,): of the first balls.
        """
        self.expansions.linearise(radius)
        bracket = Bracket.around(radius)
        active = torch.arange(len(radius), device=radius.device)
        for count in range(1, MOST_PROBES + 1):
            remaining = self._on_balls(pairs.at(active), bracket.radius[active]).coarse()
            bracket.update(active, remaining)
            active = bracket.unresolved(active[(remaining < HOPELESS) | (count < PROBES)], PROBE_TOLERANCE)
            if not len(active):
                break
        return ASCENT_GAIN * bracket.radius

    def _on_balls(self, pairs: RivalPairs, radius: Tensor) -> _PairsOnBalls:
        """The pairs on balls of `radius` (count,), which must be equal for pairs of one sample."""
        samples, position = pairs.sample.unique(return_inverse=True)
        first = torch.empty_like(samples).index_copy(0, position, torch.arange(len(position), device=position.device))
        expansion = self.expansions.at(samples, radius[first]).at(position)
        return _PairsOnBalls(self.point.at(pairs.sample), expansion, pairs)


def _lookup(sample: Tensor, rival: Tensor, batch: int) -> Tensor:
    """Table (batch,) of each sample's rival; -1 for samples that are not in `sample`. sample, rival: (count,)."""
    table = torch.full((batch,), -1, dtype=rival.dtype, device=rival.device)
    table[sample] = rival
    return table
