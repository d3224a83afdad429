"""The local certificate: the largest ball on which the local bound keeps every rival's margin positive.

The fast tier bounds all rivals at once and says which is nearest. That rival is searched first: the bound is improved
by ascent while the ball grows, and proved. On the ball so found every other rival is proved too, without an ascent
where that suffices; a rival that resists shrinks the ball. Every ball that counts has been proved by `tangent_bound`
or by `expansion.lower_bound`; a proof on a ball holds on every smaller one, so the search needs no monotonicity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import Analysis
from certify_cli.bounds.on_ball.interval_ranges import Ranges, fast_ranges
from certify_cli.bounds.relaxation.intermediate_bounds import relaxed_ranges
from certify_cli.bounds.remainder.expansion import Ball, Choice, Frame, ball, lower_bound
from certify_cli.bounds.remainder.optimise import Ascended, ascend, rough
from certify_cli.bounds.remainder.tangent_bound import fast_losses, node_parts, tangents
from certify_cli.bounds.remainder.trust_region_estimate import solved
from certify_cli.certificates.radius_bracket import HOPELESS, Bracket, power_step
from certify_cli.network.evaluated import Point
from certify_cli.network.graph import Network
from certify_cli.network.propagate import head, nonlinear_nodes
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import difference_down

START = 0.5
"""Where to begin, as a part of the radius that there would be without curvature."""
ROUGH_BALLS, SHARP_BALLS = 14, 2
"""Balls that the fast tier tries, with ranges of phi'' alone and with the sharp remainders that cost the most there."""
SHARPER = 1.08
"""About what these add to the radius."""
PROBES, MOST_PROBES = 2, 14
"""Balls probed before a search, and where none of them says anything of the radius."""
ASCENT = 1.08
"""About what an ascent adds to the radius."""
ROUGH, FAST_CLOSE = 0.3, 1e-2
"""How closely, relatively, probes and the fast tier find what they look for."""
SAFE = 4e-3
"""Estimates count less this part of the margin: what their proofs give is less by about that."""
BACK = (1.0, 0.995, 0.98, 0.94, 0.8)
"""Parts of the radius found to which a search goes back for its proof."""


@dataclass(frozen=True)
class Search:
    """By effort: balls tried at most, steps of the ascent on the first and on every further one, and how closely,
    relatively, it looks for the largest ball."""

    balls: int
    first: int
    further: int
    close: float


EFFORTS: dict[str, Search | None] = {
    "fast": None,
    "normal": Search(balls=8, first=16, further=8, close=1e-2),
    "max": Search(balls=14, first=40, further=20, close=2e-3),
}


@dataclass(frozen=True, eq=False)
class Items:
    """Pairs of a sample and a rival: `sample` indexes the batch; all (count,) but cotangents (count, classes)."""

    sample: Tensor
    rival: Tensor
    margin: Tensor
    cotangents: Tensor

    @classmethod
    def of(cls, point: Point, sample: Tensor, rival: Tensor) -> Items:
        eye = torch.eye(point.network.classes, dtype=point.x.dtype, device=point.x.device)
        return cls(sample, rival, point.margin_low[sample, rival], eye[point.prediction[sample]] - eye[rival])

    def at(self, index: Tensor) -> Items:
        return Items(self.sample[index], self.rival[index], self.margin[index], self.cotangents[index])


@dataclass(frozen=True, eq=False)
class Task:
    """Items on balls of their own, with what the bound needs of them."""

    point: Point
    ball: Ball
    items: Items

    def ascended(self, begin: Choice | None, steps: int, enough: Tensor | None = None) -> Ascended:
        """From `begin`, or the ascent's own starts; `enough` (items,) are parts of the margin to stop at."""
        least = None if enough is None else enough * self.items.margin
        return ascend(self.point, self.ball, self.items.margin, self.items.cotangents, begin, steps, least)

    def left(self, value: Tensor) -> Tensor:
        """As a part of the margin."""
        return value / self.items.margin

    def proved(self, found: Ascended) -> Tensor:
        """The bound itself (count,): every proof comes through here. -inf where the estimate has no hope."""
        value = torch.full_like(found.estimate, -torch.inf)
        todo = (found.estimate > 0).nonzero().squeeze(1)
        if len(todo):
            value[todo] = lower_bound(
                self.point.at(todo),
                self.ball.at(todo),
                self.items.margin[todo],
                self.items.cotangents[todo],
                found.choice.at(todo),
            )
        return value


def local_radii(analysis: Analysis, point: Point, known: Tensor) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), rounded down, and the rivals that decide them; 0 where nothing was proved.

    known (batch,): radii certified already. Samples are treated in chunks that fit
    `analysis.memory`; where one sample's Jacobians do not, the fast tier alone decides.
    """
    start = beginning(point)
    if not nonlinear_nodes(point.network):  # affine: there is no curvature, and nothing to gain
        return torch.zeros_like(start), point.margin.argmin(1)
    able = searchable(point, known).nonzero().squeeze(1)
    radius, rival = torch.zeros_like(start), point.margin.argmin(1)
    for part in able.split(max(1, analysis.memory // footprint(point.network))) if len(able) else ():
        batch = Batch(analysis, point.at(part), jacobians=fits(analysis))
        radius[part], rival[part] = batch.radii(start[part])
    return radius, rival


def searchable(point: Point, known: Tensor) -> Tensor:
    """(batch,): whether there is a ball to look for, beyond the radii known (batch,)."""
    return (point.margin_low > 0).all(1) & ~known.isinf()


def beginning(point: Point) -> Tensor:
    """Where a search begins, (batch,): of what is known already it must not depend, nor then where it ends."""
    start = START * point.first_order.amin(1)
    return torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))


def fits(analysis: Analysis) -> bool:
    """Whether the Jacobians of one sample fit the memory that there is."""
    return footprint(analysis.network) <= analysis.memory


def footprint(network: Network) -> int:
    """About the bytes that the Jacobians of one sample, and what is computed from them, take."""
    targets = sorted({head(network, k) for k in nonlinear_nodes(network)})
    inputs, before, entries, count = network.nodes[0].size, 0, 0, 0
    for target in targets:
        size = network.nodes[target].size
        entries += 3 * size * (inputs + before) + 2 * size * size
        before, count = before + size, count + size
    return 8 * (entries + 4 * min(count, inputs) ** 2 + 80 * count)


class Batch:
    """A batch of samples: proves balls, and searches them."""

    def __init__(self, analysis: Analysis, point: Point, jacobians: bool = True) -> None:
        self.analysis, self.point = analysis, point
        self.search = EFFORTS[analysis.effort] if jacobians else None
        self.frame: Frame | None = None

    def fast(self, start: Tensor, balls: int, sharp: bool) -> tuple[Tensor, Tensor]:
        """Balls (batch,) proved without a Jacobian, and about the radius of each rival (batch, classes).

        start (batch,): where to begin; every ball is tried by all rivals at once.
        """
        bracket = Bracket.around(start)
        about = torch.full_like(self.point.margin_low, torch.inf)
        live = torch.arange(len(start), device=start.device)
        for _ in range(balls):
            part, here = self.point.at(live), bracket.radius[live]
            ranges = fast_ranges(part, self.analysis.weights, here)
            left = difference_down(part.margin_low, fast_losses(part, ranges, part.adjoints, sharp=sharp))
            left = (left / part.margin_low).masked_fill(part.own, torch.inf)
            about[live] = power_step(here.unsqueeze(1), left).masked_fill(part.own, torch.inf)
            bracket.told(live, left.amin(1))
            live = bracket.open(live, FAST_CLOSE)
            if not len(live):
                break
        return bracket.inside, about

    def radii(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radii (batch,) and the rivals that decide them. start (batch,): where to begin to look."""
        if self.search is None:
            return self._fast(start)
        point = self.point
        every = torch.arange(len(start), device=start.device)
        begin = self._probed(Items.of(point, every, point.first_order.argmin(1)), start)
        order = self._ordered(begin)
        decides = order.argmin(1)
        first = decides.clone()
        found = self._searched(Items.of(point, every, first), begin, torch.full_like(start, torch.inf))
        rivals = (~point.own).nonzero()
        rivals = rivals[(rivals[:, 1] != first[rivals[:, 0]]) & (found[rivals[:, 0]] > 0)]
        rivals = rivals[~self._proved_by_tangents(rivals, found)]
        while len(rivals):  # the nearest of each sample's open rivals
            near = torch.full_like(order, torch.inf)
            near[rivals[:, 0], rivals[:, 1]] = order[rivals[:, 0], rivals[:, 1]]
            sample = rivals[:, 0].unique()
            rival = near[sample].argmin(1)
            part = self._searched(Items.of(point, sample, rival), found[sample], found[sample])
            smaller = part < found[sample]
            found[sample[smaller]], decides[sample[smaller]] = part[smaller], rival[smaller]
            treated = _lookup(sample, rival, len(start))[rivals[:, 0]]
            rivals = rivals[(rivals[:, 1] != treated) & (found[rivals[:, 0]] > 0)]
        lost = (found == 0).nonzero()[:, 0]
        if len(lost):
            found[lost], decides[lost] = Batch(self.analysis, point.at(lost))._fast(start[lost])
        return found, decides

    def _fast(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The fast tier alone."""
        rough, _ = self.fast(start, ROUGH_BALLS, sharp=False)
        radius, order = self.fast(torch.where(rough > 0, SHARPER * rough, start), SHARP_BALLS, sharp=True)
        return torch.maximum(rough, radius), order.argmin(1)

    def _ordered(self, radius: Tensor) -> Tensor:
        """About the radius of each rival (batch, classes), by the balls of the given radii."""
        every = torch.arange(len(radius), device=radius.device)
        known = self.ball(every, radius)
        low, own = self.point.margin_low, self.point.own
        left = (low - fast_losses(self.point, known.ranges, self.point.adjoints, known)) / low
        return power_step(radius.unsqueeze(1), left).nan_to_num(nan=0.0).masked_fill(own, torch.inf)

    def _proved_by_tangents(self, rivals: Tensor, radius: Tensor) -> Tensor:
        """Which (sample, rival) rows are proved on the samples' balls: by a bound that costs nothing a rival, or by the
        trust region of tangents at the samples, a rival at a time."""
        sample = rivals[:, 0].unique()
        if not len(sample):
            return torch.zeros(0, dtype=torch.bool, device=rivals.device)
        part, known = self.point.at(sample), self.ball(sample, radius[sample])
        low, pulled = part.margin_low, part.adjoints
        value = difference_down(low, fast_losses(part, known.ranges, pulled, known))
        open_ = torch.zeros_like(self.point.own)
        open_[rivals[:, 0], rivals[:, 1]] = True
        open_ = open_[sample] & (value <= 0) & (value > HOPELESS * low)
        parts = node_parts(part, known.ranges, pulled)
        while bool(open_.any()):
            some = open_.any(1).nonzero()[:, 0]
            rival = open_[some].int().argmax(1)
            open_[some, rival] = False
            each = tangents(known, parts, pulled, some, rival)
            hints = solved(each.quadratic, each.gradient, each.radius, None)
            about = 0.5 * (hints.mu * each.radius.square() + hints.form + (1 + 1 / hints.tau) * each.quadratic.of_rest)
            todo = (about + each.flat < low[some, rival]).nonzero()[:, 0]
            if len(todo):
                losses = each.at(todo).losses(hints.mu[todo], hints.tau[todo])
                value[some[todo], rival[todo]] = difference_down(low[some[todo], rival[todo]], losses)
        whole = torch.full_like(self.point.margin_low, -torch.inf).index_copy(0, sample, value)
        return whole[rivals[:, 0], rivals[:, 1]] > 0

    def _searched(self, items: Items, start: Tensor, cap: Tensor) -> Tensor:
        """The largest proved balls (count,), at most `cap`; 0 where none was proved."""
        search = self.search
        assert search is not None
        alone = not bool(cap.isfinite().any())  # each sample's first search: its balls make the frame
        bracket = Bracket.around(torch.minimum(start, cap))
        enough = either(cap.isfinite(), 2 * SAFE, torch.inf)
        best: Choice | None = None
        choice: Choice | None = None
        live = torch.arange(len(start), device=start.device)
        for count in range(search.balls):
            task = self._task(items.at(live), bracket.radius[live])
            found = task.ascended(choice, search.further if count else search.first, enough[live])
            raised = bracket.told(live, task.left(found.estimate) - SAFE)
            best = found.choice if best is None else best.put(live[raised], found.choice.at(raised.nonzero()[:, 0]))
            bracket.radius = torch.minimum(bracket.radius, cap)
            following = bracket.open(live, search.close)
            choice = found.choice.at(torch.isin(live, following).nonzero()[:, 0])
            live = following
            if alone and not count:  # of all samples, done or not: none may depend on its neighbours
                self._reframe(items.sample, torch.where(bracket.radius.isfinite(), bracket.radius, start))
            if not len(live):
                break
        assert best is not None
        return self._confirmed(items, bracket.inside, best)

    def _confirmed(self, items: Items, radius: Tensor, choice: Choice) -> Tensor:
        """The balls that are proved, at or a little below `radius`; 0 where none is."""
        proved = torch.zeros_like(radius)
        live = (radius > 0).nonzero()[:, 0]
        for part in BACK:
            if not len(live):
                break
            task = self._task(items.at(live), part * radius[live])
            value = task.proved(task.ascended(choice.at(live), 0))
            proved[live] = torch.where(value > 0, part * radius[live], proved[live])
            live = live[value <= 0]
        return proved

    def _probed(self, items: Items, radius: Tensor) -> Tensor:
        """About the ball that an ascent reaches, to begin at: from estimates alone. One item for every sample."""
        self._reframe(items.sample, radius)
        bracket = Bracket.around(radius)
        live = torch.arange(len(radius), device=radius.device)
        for count in range(1, MOST_PROBES + 1):
            task = self._task(items.at(live), bracket.radius[live])
            left = task.left(rough(task.point, task.ball, task.items.margin, task.items.cotangents))
            bracket.told(live, left)
            live = bracket.open(live[(left < HOPELESS) | (count < PROBES)], ROUGH)
            if not len(live):
                break
        return ASCENT * bracket.radius

    def _reframe(self, samples: Tensor, radius: Tensor) -> None:
        """A frame made for these balls, of all samples in their order."""
        assert len(samples) == len(self.point.x)
        self.frame = ball(self.point, self._ranges(self.point, radius), like=self.frame).frame

    def _ranges(self, part: Point, radius: Tensor) -> Ranges:
        """Where a search on balls of `radius` (batch,) begins: at `max` with what linear relaxation knows as well."""
        ranges = fast_ranges(part, self.analysis.weights, radius)
        if self.analysis.effort == "max":
            ranges, _ = relaxed_ranges(part, ranges, self.analysis.memory)
        return ranges

    def ball(self, samples: Tensor, radius: Tensor) -> Ball:
        """Balls (count,) of the samples (count,) of the batch, in the frame that the search made."""
        part = self.point.at(samples)
        frame = self.frame if self.frame is None or len(samples) == len(self.point.x) else self.frame.at(samples)
        return ball(part, self._ranges(part, radius), frame)

    def _task(self, items: Items, radius: Tensor) -> Task:
        """radius: of each item; items of one sample must have one ball."""
        samples, place = items.sample.unique(return_inverse=True)
        first = torch.empty_like(samples).index_copy(0, place, torch.arange(len(place), device=place.device))
        return Task(self.point.at(items.sample), self.ball(samples, radius[first]).at(place), items)


def _lookup(sample: Tensor, rival: Tensor, batch: int) -> Tensor:
    table = torch.full((batch,), -1, dtype=rival.dtype, device=rival.device)
    table[sample] = rival
    return table
