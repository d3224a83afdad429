"""Certificates from a curvature bound that holds on a ball only (theory sections 1 and 5).

The bound on a ball may be far below the one on the whole space, and the claim is the least of its radius and the
ball's. So the ball is a little larger than what is certified already, and is chosen again as the claim grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.hessian import BallCurvature, sharp_on_balls
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.certificates.closed_form import attack_radius, curvature_radius
from certify_cli.certificates.dual import GAIN, Refined, descend
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.numerics.rounding import down, up

STRETCH = 1.5
"""The first ball, in units of the radius certified so far."""
PROMISING = 0.8
"""Descent is worth its steps where the bound on the ball is below this share of the global one."""


def extended_on_balls(
    model_bounds: ModelBounds, point: EvaluatedPoints, sharp: Refined, lower: Tensor, upper: Tensor, steps: int
) -> Refined:
    """The table of radii (batch, classes) with its weakest entries grown on balls; see `tangent.refined`.

    lower, upper (batch, classes): the global bounds of -lambda_min and lambda_max. In each round every sample
    gets one ball, and where that helps the weakest rival, every rival whose radius is less than the ball's gets a bound
    on it: next time a larger ball if all of them reached its edge, else one closer to what was reached.
    """
    radius, ends = sharp.radius.masked_fill(point.own, torch.inf), sharp.ends.clone()
    stretch, every = torch.full_like(radius[:, 0], STRETCH), torch.arange(len(radius), device=radius.device)
    for _ in range(model_bounds.effort.dual_balls if sharp_on_balls(model_bounds) else 0):
        weakest, decider = radius.min(1)
        ball = weakest * stretch
        todo = (weakest > 0) & ball.isfinite() & (stretch > 1 + 10 * GAIN)
        # the weakest rival first: where a ball brings it nothing, the others need not be asked
        sample = todo.nonzero().squeeze(1)
        if not len(sample):
            break
        first = _claimed(model_bounds, point, sample, decider[sample], radius, ball, lower, upper, steps)
        promising = todo.index_copy(0, sample, first.value > weakest[sample] * (1 + GAIN))
        others = (radius < ball.unsqueeze(1)) & (radius > 0) & promising.unsqueeze(1)
        others[every, decider] = False
        sample, rival = others.nonzero().unbind(1)
        rest = _claimed(model_bounds, point, sample, rival, radius, ball, lower, upper, steps)
        for claim in (first, rest):
            radius[claim.sample, claim.rival] = claim.value
        reached = radius.amin(1)
        for claim in (first, rest):
            deciding = claim.useful & (claim.value == reached[claim.sample]) & promising[claim.sample]
            ends[claim.sample[deciding]] = claim.moved[deciding]
        # several rivals at the edge: the one that was weakest stays so, whatever the order of the classes
        radius[every, decider] = torch.where(todo & (reached >= ball), down(ball), radius[every, decider])
        # the claim falls as the ball grows: they meet where nothing more is to be had
        new = torch.where(reached >= ball, STRETCH, (ball / reached).sqrt())
        stretch = torch.where(promising, new, torch.where(todo, 1.0, stretch))
    return Refined(torch.where(point.own, sharp.radius, radius), ends)


@dataclass(frozen=True, eq=False)
class _Claims:
    """For pairs (count,) of a sample and a rival: radii certified on the sample's ball, never above it and never below
    what was known; the last points of the descent; whether the bound on the ball was worth one."""

    sample: Tensor
    rival: Tensor
    value: Tensor
    moved: Tensor
    useful: Tensor


def _claimed(
    model_bounds: ModelBounds,
    point: EvaluatedPoints,
    sample: Tensor,
    rival: Tensor,
    radius: Tensor,
    ball: Tensor,
    lower: Tensor,
    upper: Tensor,
    steps: int,
) -> _Claims:
    known, edge, moved = radius[sample, rival], ball[sample], point.x[sample]
    if not len(sample):
        return _Claims(sample, rival, known, moved, known > edge)
    chosen, which = sample.unique(return_inverse=True)
    m = _curvature(model_bounds, point.at(chosen), ball[chosen], rival, which).lower
    useful = (m < PROMISING * lower[sample, rival]) & lower[sample, rival].isfinite()
    margin, gradient = point.margin_low[sample, rival], point.gradient_norm[sample, rival]
    value = torch.maximum(known, torch.minimum(curvature_radius(margin, gradient, m), edge))
    on = (useful & (value < edge)).nonzero().squeeze(1)
    if len(on) and steps:
        # the other side's bound only says how far to step: as much smaller as this side's is, unproved
        guess = upper[sample, rival] * (m / lower[sample, rival])
        value[on], moved[on] = descend(point, sample[on], rival[on], value[on], m[on], guess[on], steps, edge[on])
    return _Claims(sample, rival, value, moved, useful)


def _curvature(
    model_bounds: ModelBounds, point: EvaluatedPoints, radius: Tensor, rival: Tensor, which: Tensor
) -> BallCurvature:
    """Of the margins of samples `which` towards `rival` (both (count,)), on the balls of `radius` (batch,)."""
    pairs = torch.stack([point.prediction[which], rival], dim=1)
    return BallCurvature(model_bounds, point, interval_ranges(point, model_bounds.weights, radius), pairs, which)


def certified_attack_on_ball(
    model_bounds: ModelBounds, point: EvaluatedPoints, nearest: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Attack radii (batch,), up, along -g, and their rivals (batch,): `nearest`, `target` or what a ball promises.

    A bound of lambda_max on a ball counts only where the attack lies in the ball. An attack radius is between f/||g||
    and twice that, so that the first ball holds any; a later one is as large as the last promise, or half way between.
    """
    straight = (point.margin_high / point.gradient_norm_low).masked_fill(point.own, torch.inf)
    straight = straight.masked_fill(straight.isnan(), torch.inf)
    rival = torch.where(nearest.isfinite(), target, straight.argmin(1))
    every = torch.arange(len(rival), device=rival.device)
    straight = straight[every, rival]
    best, ball = nearest.clone(), torch.minimum(up(2 * straight, 2), nearest)
    for _ in range(model_bounds.effort.attack_balls if sharp_on_balls(model_bounds) else 0):
        index = (ball.isfinite() & (ball > 0) & point.finite).nonzero().squeeze(1)
        if not len(index):
            break
        upper = _curvature(model_bounds, point.at(index), ball[index], rival[index], every[: len(index)]).upper
        margin, gradient = (t[index, rival[index]] for t in (point.margin_high, point.gradient_norm_low))
        found = attack_radius(margin, gradient, upper)
        holds = found <= ball[index]
        best[index] = torch.where(holds, torch.minimum(best[index], found), best[index])
        ball[index] = torch.where(holds, found, 0.5 * (ball[index] + straight[index]))
    return best, rival
