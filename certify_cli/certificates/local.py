"""The local certificate: the largest ball on which the local bound keeps every rival's margin positive.

The fast tier bounds all rivals at once and says which is nearest. That rival is searched first: the bound is improved
by ascent while the ball grows, and proved. On the ball so found every other rival is proved too, without an ascent
where that suffices; a rival that resists shrinks the ball. Every ball that counts has been proved by `bounds.fast` or
`bounds.local.lower_bound`; a proof on a ball holds on every smaller one, so the search needs no monotonicity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.analysis import Analysis
from certify_cli.bounds.fast import fast_losses
from certify_cli.bounds.local import Ball, Choice, ball, lower_bound
from certify_cli.bounds.ranges import fast_ranges
from certify_cli.certificates.ascent import Ascended, ascend
from certify_cli.certificates.point import Point
from certify_cli.network.graph import Network
from certify_cli.network.linearised import Vectors, head, nonlinear_nodes, pull
from certify_cli.numerics.rounding import difference_down

RESOLUTION = 0.02
"""How far from each other, relatively, two searches of one sample may end whose roundings differ."""
GROWTH = 0.67
"""Losses grow about like radius^1.5: the next ball is radius (margin / loss)^GROWTH."""
START = 0.5
"""Where to begin, as a part of the radius that there would be without curvature."""
INSIDE = 0.998
"""The next ball is this part of where the bound seems to vanish."""
PROBES = 5
FAST_BALLS = 14
ROUGH = 0.3
CLOSE = 2e-3
"""A margin of less than this part left on a proved ball is not worth another try."""


@dataclass(frozen=True)
class Search:
    """By effort: balls tried, and steps of the ascent on the first and on every further one."""

    balls: int
    first: int
    further: int


EFFORTS: dict[str, Search | None] = {
    "fast": None,
    "normal": Search(balls=5, first=12, further=6),
    "max": Search(balls=10, first=40, further=15),
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

    def ascended(self, more: list[Choice], steps: int, settle: bool = True) -> Ascended:
        """From the ascent's own starts, and `more`."""
        return ascend(self.point, self.ball, self.items.margin, self.items.cotangents, more, steps, settle)

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

    known (batch,): radii certified already; a start for the search. Samples are treated in chunks that fit
    `analysis.memory`; where one sample's Jacobians do not, the fast tier alone decides.
    """
    first_order = (point.margin_low / point.gradient_norm).masked_fill(point.own, torch.inf).amin(1)
    start = torch.maximum(START * first_order, 1.5 * known)
    start = torch.where(start.isfinite() & (start > 0), start, torch.ones_like(start))
    if not nonlinear_nodes(point.network):  # affine: there is no curvature, and nothing to gain
        return torch.zeros_like(start), point.margin.argmin(1)
    able = ((point.margin_low > 0).all(1) & ~known.isinf()).nonzero().squeeze(1)
    radius, rival = torch.zeros_like(start), point.margin.argmin(1)
    footprint = _footprint(point.network)
    for part in able.split(max(1, analysis.memory // footprint)):
        batch = Batch(analysis, point.at(part), jacobians=footprint <= analysis.memory)
        radius[part], rival[part] = batch.radii(start[part])
    return radius, rival


def _footprint(network: Network) -> int:
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

    @cached_property
    def pulled(self) -> dict[int, Vectors]:
        """Adjoints and gradients of the margins towards every class, linearised at the samples."""
        point = self.point
        eye = torch.eye(point.network.classes, dtype=point.x.dtype, device=point.x.device)
        return pull(point.network, eye[point.prediction].unsqueeze(1) - eye.unsqueeze(0), point.slopes)

    def fast(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Balls (batch,) proved without a Jacobian, and about the radius of each rival (batch, classes).

        start (batch,): where to begin; every ball is tried by all rivals at once.
        """
        point = self.point
        proved, failed = torch.zeros_like(start), torch.full_like(start, torch.inf)
        radius, about = start.clone(), torch.full_like(point.margin_low, torch.inf)
        live = torch.arange(len(start), device=start.device)
        for _ in range(FAST_BALLS):
            part, pulled = point.at(live), {k: Vectors(v.value[live], v.error[live]) for k, v in self.pulled.items()}
            here, margin = radius[live], point.margin_low[live]
            loss = fast_losses(part, fast_ranges(part, self.analysis.weights, here), pulled)
            value = difference_down(margin, loss).masked_fill(point.own[live], torch.inf)
            about[live] = _next(here.unsqueeze(1), margin, margin - loss).masked_fill(point.own[live], torch.inf)
            least, most = proved[live], failed[live]
            good = (value > 0).all(1)
            least = torch.where(good, torch.maximum(least, here), least)
            most = torch.where(good, most, torch.minimum(most, here))
            proved[live], failed[live] = least, most
            following = about[live].amin(1)
            inside = (following > least) & (following < most)
            bisected = torch.where(least > 0, (least * most).sqrt(), 0.2 * most)
            radius[live] = torch.where(inside, following, bisected)
            done = (most < least * (1 + CLOSE)) | ~radius[live].isfinite()
            live = live[~done]
            if not len(live):
                break
        return proved, about

    def radii(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radii (batch,) and the rivals that decide them. start (batch,): where to begin to look."""
        point = self.point
        batch = len(point.x)
        every = torch.arange(batch, device=point.x.device)
        radius, order = self.fast(start)
        decides = order.argmin(1)
        if self.search is None:
            return radius, decides
        first = decides.clone()
        found = self._searched(Items.of(point, every, first), order.amin(1), torch.full_like(start, torch.inf))
        rivals = (~point.own).nonzero()
        rivals = rivals[(rivals[:, 1] != first[rivals[:, 0]]) & (found[rivals[:, 0]] > radius[rivals[:, 0]])]
        rivals = rivals[~self._proved_together(rivals, found)]
        if len(rivals):
            rivals = rivals[~self._proved(Items.of(point, rivals[:, 0], rivals[:, 1]), found[rivals[:, 0]])]
        while len(rivals):  # the nearest of each sample's open rivals
            near = torch.full_like(order, torch.inf)
            near[rivals[:, 0], rivals[:, 1]] = order[rivals[:, 0], rivals[:, 1]]
            sample = rivals[:, 0].unique()
            rival = near[sample].argmin(1)
            part = self._searched(Items.of(point, sample, rival), found[sample], found[sample])
            smaller = part < found[sample]
            found[sample[smaller]], decides[sample[smaller]] = part[smaller], rival[smaller]
            treated = _lookup(sample, rival, batch)[rivals[:, 0]]
            rivals = rivals[(rivals[:, 1] != treated) & (found[rivals[:, 0]] > radius[rivals[:, 0]])]
        return torch.maximum(radius, found), decides

    def _proved_together(self, rivals: Tensor, radius: Tensor) -> Tensor:
        """Which (sample, rival) rows are proved on the samples' balls by bounds that cost nothing a rival."""
        sample = rivals[:, 0].unique()
        if not len(sample):
            return torch.zeros(0, dtype=torch.bool, device=rivals.device)
        part = self.point.at(sample)
        known = ball(part, fast_ranges(part, self.analysis.weights, radius[sample]))
        pulled = {k: Vectors(v.value[sample], v.error[sample]) for k, v in self.pulled.items()}
        value = torch.full_like(self.point.margin_low, -torch.inf)
        value[sample] = difference_down(part.margin_low, fast_losses(part, known.ranges, pulled, known))
        return value[rivals[:, 0], rivals[:, 1]] > 0

    def _proved(self, items: Items, radius: Tensor) -> Tensor:
        """Which items are proved on the given balls without an ascent."""
        task = self._task(items, radius)
        return task.proved(task.ascended([], 0)) > 0

    def _searched(self, items: Items, start: Tensor, cap: Tensor) -> Tensor:
        """The largest proved balls (count,), at most `cap`; 0 where none was proved."""
        search = self.search
        assert search is not None
        radius = torch.minimum(start, cap)
        if not bool(cap.isfinite().all()):
            radius = self._probed(items, radius)
        proved, failed = torch.zeros_like(radius), torch.full_like(radius, torch.inf)
        left, short = torch.zeros_like(radius), torch.zeros_like(radius)  # the bound on those two balls
        choice: Choice | None = None
        live = torch.arange(len(radius), device=radius.device)
        for count in range(search.balls):
            task = self._task(items.at(live), radius[live])
            found = task.ascended([] if choice is None else [choice], search.further if count else search.first)
            value, margin, here = task.proved(found), items.margin[live], radius[live]
            good = value > 0
            value = torch.where(good, value, found.estimate.clamp(max=0.0))  # no proof: only where to look next
            left[live] = torch.where(good & (here > proved[live]), value, left[live])
            proved[live] = torch.where(good, torch.maximum(proved[live], here), proved[live])
            short[live] = torch.where(~good & (here < failed[live]), value, short[live])
            failed[live] = torch.where(good, failed[live], torch.minimum(failed[live], here))
            least, most = proved[live], failed[live]
            between = least + (most - least) * (left[live] / (left[live] - short[live]).clamp(min=1e-300))
            following = torch.where((least > 0) & most.isfinite(), between, _next(here, margin, value))
            inside = (following > least) & (following < most)
            following = torch.where(inside, following, 0.5 * (least + most))
            radius[live] = torch.minimum(following * (1 - CLOSE / 4), cap[live])
            done = (least >= cap[live]) | (most < least * (1 + CLOSE)) | (good & (value < CLOSE * margin))
            keep = (~done & radius[live].isfinite() & (radius[live] > least)).nonzero().squeeze(1)
            live, choice = live[keep], found.choice.at(keep)
            if not len(live):
                break
        return proved

    def _probed(self, items: Items, radius: Tensor) -> Tensor:
        """About the ball that needs no ascent, to begin at: from estimates alone."""
        radius = radius.clone()
        inside, outside = torch.zeros_like(radius), torch.full_like(radius, torch.inf)
        live = torch.arange(len(radius), device=radius.device)
        for _ in range(PROBES):
            task = self._task(items.at(live), radius[live])
            value, margin, here = task.ascended([], 0, settle=False).estimate, items.margin[live], radius[live]
            good = value > 0
            inside[live] = torch.where(good, torch.maximum(inside[live], here), inside[live])
            outside[live] = torch.where(good, outside[live], torch.minimum(outside[live], here))
            least, most = inside[live], outside[live]
            following = _next(here, margin, value)
            bisected = torch.where(least > 0, (least * most).sqrt(), 0.2 * most)
            usable = (following > least) & (following < most) & (value > -margin)
            radius[live] = torch.where(usable, following, bisected)
            done = (good & (value < ROUGH * margin)) | (most < (1 + ROUGH) * least)
            live = live[~done]
            if not len(live):
                break
        return torch.where(inside > 0, inside, radius)

    def _task(self, items: Items, radius: Tensor) -> Task:
        """radius: of each item; items of one sample must have one ball."""
        samples, place = items.sample.unique(return_inverse=True)
        first = torch.empty_like(samples).index_copy(0, place, torch.arange(len(place), device=place.device))
        part = self.point.at(samples)
        known = ball(part, fast_ranges(part, self.analysis.weights, radius[first]))
        return Task(self.point.at(items.sample), known.at(place), items)


def _next(radius: Tensor, margin: Tensor, value: Tensor) -> Tensor:
    """About where the bound vanishes, from its value on one ball."""
    loss = (margin - value).clamp(min=1e-300)
    ratio = (margin / loss).pow(GROWTH).nan_to_num(nan=0.5, posinf=2.0).clamp(min=0.3, max=2.0)
    # a factor that asked whether value > 0 would make rounding, and so the batch, decide where the next ball lies
    return radius * ratio * INSIDE


def _lookup(sample: Tensor, rival: Tensor, batch: int) -> Tensor:
    table = torch.full((batch,), -1, dtype=rival.dtype, device=rival.device)
    table[sample] = rival
    return table
