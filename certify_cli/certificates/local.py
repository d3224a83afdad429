"""The local certificate: the largest ball on which the local bound keeps every rival's margin positive.

For each sample the rival that is nearest to first order is searched first: the bound is improved by ascent while the
ball grows, then proved. On the ball so found every other rival is proved too, at the first of three prices that
suffices: all rivals at once with free eigenvalue bounds, one by one with proved ones, with an ascent of its own. A rival
that resists shrinks the ball. Every ball that counts has been proved by `bounds.local.lower_bound`; a proof on a ball
holds on every smaller one, so the search needs no monotonicity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.analysis import Analysis
from certify_cli.bounds.jacobians import Jacobians
from certify_cli.bounds.local import Offsets, lower_bound, offsets, starts
from certify_cli.bounds.ranges import fast_ranges
from certify_cli.certificates.ascent import ascend
from certify_cli.certificates.point import Point

GROWTH = 0.67
"""Losses grow about like radius^1.5: the next ball is radius (margin / loss)^GROWTH."""
CLOSE = 2e-3
"""A margin of less than this part left on a proved ball is not worth another try."""


@dataclass(frozen=True)
class Search:
    """By effort: balls tried, and steps of the ascent on the first and on every further one."""

    balls: int
    first: int
    further: int


EFFORTS = {"normal": Search(balls=6, first=8, further=3), "max": Search(balls=10, first=40, further=15)}


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


class Batch:
    """A batch of samples with their Jacobians: proves balls, and searches them."""

    def __init__(self, analysis: Analysis, point: Point) -> None:
        self.analysis, self.point = analysis, point
        self.search = EFFORTS[analysis.effort]
        self.jacobians = Jacobians.of(point.network, point.slopes)

    def on(self, point: Point, jacobians: Jacobians, radius: Tensor) -> Offsets:
        return offsets(point, jacobians, fast_ranges(point, self.analysis.weights, radius))

    def radii(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radii (batch,) and the rivals that decide them. start (batch,): where to begin to look."""
        point = self.point
        batch = len(point.x)
        every = torch.arange(batch, device=point.x.device)
        order = (point.margin_low / point.gradient_norm).masked_fill(point.own, torch.inf)
        first = order.argmin(1)
        decides = first.clone()
        radius = self._searched(Items.of(point, every, first), start, torch.full_like(start, torch.inf))
        rivals = (~point.own).nonzero()
        rivals = rivals[(rivals[:, 1] != first[rivals[:, 0]]) & (radius[rivals[:, 0]] > 0)]
        rivals = rivals[~self._proved_cheaply(rivals, radius)]
        if len(rivals):
            rivals = rivals[~self._proved(Items.of(point, rivals[:, 0], rivals[:, 1]), radius[rivals[:, 0]])]
        while len(rivals):  # the nearest of each sample's open rivals
            near = torch.full_like(order, torch.inf)
            near[rivals[:, 0], rivals[:, 1]] = order[rivals[:, 0], rivals[:, 1]]
            sample = rivals[:, 0].unique()
            rival = near[sample].argmin(1)
            found = self._searched(Items.of(point, sample, rival), radius[sample], radius[sample])
            smaller = found < radius[sample]
            radius[sample[smaller]], decides[sample[smaller]] = found[smaller], rival[smaller]
            rivals = rivals[(rivals[:, 1] != _lookup(sample, rival, batch)[rivals[:, 0]]) & (radius[rivals[:, 0]] > 0)]
        return radius, decides

    def _proved_cheaply(self, rivals: Tensor, radius: Tensor) -> Tensor:
        """Which (sample, rival) rows are proved on the samples' balls by the bound's cheapest form."""
        return torch.zeros(len(rivals), dtype=torch.bool, device=rivals.device)

    def _proved(self, items: Items, radius: Tensor) -> Tensor:
        """Which items are proved on the given balls, with the slopes at the samples."""
        part, jacobians = self.point.at(items.sample), self.jacobians.at(items.sample)
        ball = self.on(part, jacobians, radius)
        found = ascend(part, jacobians, ball, items.margin, items.cotangents, starts(part, ball, items.cotangents), 0)
        return lower_bound(part, jacobians, ball, items.margin, items.cotangents, found.choice) > 0

    def _searched(self, items: Items, start: Tensor, cap: Tensor) -> Tensor:
        """The largest proved balls (count,), at most `cap`; 0 where none was proved."""
        part, jacobians, search = self.point.at(items.sample), self.jacobians.at(items.sample), self.search
        radius, choice = torch.minimum(start, cap), None
        proved, failed = torch.zeros_like(radius), torch.full_like(radius, torch.inf)
        for count in range(search.balls):
            ball = self.on(part, jacobians, radius)
            begin = starts(part, ball, items.cotangents) if choice is None else [choice]
            steps = search.further if count else search.first
            found = ascend(part, jacobians, ball, items.margin, items.cotangents, begin, steps)
            choice, value = found.choice, found.estimate
            todo = (value > 0).nonzero().squeeze(1)
            if len(todo):
                value[todo] = lower_bound(
                    part.at(todo), jacobians.at(todo), ball.at(todo), items.margin[todo], items.cotangents[todo],
                    choice.at(todo),
                )  # fmt: skip
            proved = torch.where(value > 0, torch.maximum(proved, radius), proved)
            failed = torch.where(value > 0, failed, torch.minimum(failed, radius))
            done = (proved >= cap) | (failed < proved * (1 + CLOSE)) | ((value > 0) & (value < CLOSE * items.margin))
            if bool(done.all()):
                break
            following = _next(radius, items.margin, value)
            inside = (following > proved) & (following < failed)
            following = torch.where(inside, following, 0.5 * (proved + failed.clamp(max=2e300)))
            radius = torch.where(done, proved, torch.minimum(following, cap))
        return proved


def _next(radius: Tensor, margin: Tensor, value: Tensor) -> Tensor:
    """About where the bound vanishes, from its value on one ball."""
    loss = (margin - value).clamp(min=1e-300)
    ratio = (margin / loss).pow(GROWTH).nan_to_num(nan=0.5, posinf=2.0).clamp(min=0.3, max=2.0)
    return radius * ratio * (1 - CLOSE / 4)


def _lookup(sample: Tensor, rival: Tensor, batch: int) -> Tensor:
    table = torch.full((batch,), -1, dtype=rival.dtype, device=rival.device)
    table[sample] = rival
    return table
