"""Certificates from a curvature bound that holds on a ball only (theory sections 1 and 5).

The bound on a ball can be much smaller than the one for the whole space, but certifies no radius larger than the
ball's. So the ball is chosen a little larger than the certified radius, and again whenever that radius grows.
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
from certify_cli.numerics.deadline import OutOfTime, present
from certify_cli.numerics.rounding import down, up

STRETCH = 1.5
"""Ratio of the first ball's radius to the certified one."""
PROMISING = 0.8
"""A descent is made where the bound on the ball is below this part of the global one."""


def extended_on_balls(
    model_bounds: ModelBounds, point: EvaluatedPoints, sharp: Refined, lower: Tensor, upper: Tensor, steps: int
) -> Refined:
    """The table of certified radii with its smallest entries enlarged by bounds on balls.

    sharp: radii (batch, classes) certified already, and where their tangents were taken.
    lower, upper (batch, classes): upper bounds of -lambda_min and lambda_max of the margins' Hessians everywhere.
    steps: largest number of further points for a rival.

    Each round takes one ball per sample. Its weakest rival comes first; if the ball enlarges that radius, every other
    rival with a radius smaller than the ball's is bounded on the ball as well. If all radii then equal the ball's, the
    next ball is larger, otherwise closer to the smallest of them.
    """
    radius, ends = sharp.radius.masked_fill(point.own, torch.inf), sharp.ends.clone()
    stretch, every = torch.full_like(radius[:, 0], STRETCH), torch.arange(len(radius), device=radius.device)
    for count in range(model_bounds.effort.dual_balls if sharp_on_balls(model_bounds) else 0):
        present().step(f"ball {count + 1}")
        weakest, decider = radius.min(1)
        ball = weakest * stretch
        todo = (weakest > 0) & ball.isfinite() & (stretch > 1 + 10 * GAIN)
        sample = todo.nonzero().squeeze(1)
        if not len(sample):
            break
        try:
            first = _on_balls(model_bounds, point, sample, decider[sample], radius, ball, lower, upper, steps)
            promising = todo.index_copy(0, sample, first.radius > weakest[sample] * (1 + GAIN))
            is_other = (radius < ball.unsqueeze(1)) & (radius > 0) & promising.unsqueeze(1)
            is_other[every, decider] = False
            sample, rival = is_other.nonzero().unbind(1)
            others = _on_balls(model_bounds, point, sample, rival, radius, ball, lower, upper, steps)
        except OutOfTime:
            break
        for pairs in (first, others):
            radius[pairs.sample, pairs.rival] = pairs.radius
        reached = radius.amin(1)
        for pairs in (first, others):
            deciding = pairs.useful & (pairs.radius == reached[pairs.sample]) & promising[pairs.sample]
            ends[pairs.sample[deciding]] = pairs.moved[deciding]
        # several rivals at the ball's radius: the one that was weakest stays so, whatever the order of the classes
        radius[every, decider] = torch.where(todo & (reached >= ball), down(ball), radius[every, decider])
        # the certified radius decreases as the ball grows: where the two are equal nothing more can be gained
        new = torch.where(reached >= ball, STRETCH, (ball / reached).sqrt())
        stretch = torch.where(promising, new, torch.where(todo, 1.0, stretch))
    return Refined(torch.where(point.own, sharp.radius, radius), ends)


@dataclass(frozen=True, eq=False)
class _PairsOnBalls:
    """Pairs of a sample and a rival with their radii on the sample's ball; (count,) unless stated.

    radius: certified; never smaller than the previous one, and otherwise at most the ball's.
    moved (count, *input shape): the point of the best tangent.
    useful: whether the bound on the ball was small enough for a descent.
    """

    sample: Tensor
    rival: Tensor
    radius: Tensor
    moved: Tensor
    useful: Tensor


def _on_balls(
    model_bounds: ModelBounds,
    point: EvaluatedPoints,
    sample: Tensor,
    rival: Tensor,
    radius: Tensor,
    ball: Tensor,
    lower: Tensor,
    upper: Tensor,
    steps: int,
) -> _PairsOnBalls:
    """Bound the pairs (sample, rival), (count,) each, on the samples' balls.

    radius (batch, classes): certified already.   ball (batch,): radii of the balls.
    lower, upper, steps: see `extended_on_balls`.
    """
    previous, edge, moved = radius[sample, rival], ball[sample], point.x[sample]
    if not len(sample):
        return _PairsOnBalls(sample, rival, previous, moved, previous > edge)
    samples, position = sample.unique(return_inverse=True)
    m = _curvature(model_bounds, point.at(samples), ball[samples], rival, position).lower
    useful = (m < PROMISING * lower[sample, rival]) & lower[sample, rival].isfinite()
    margin, gradient = point.margin_low[sample, rival], point.gradient_norm[sample, rival]
    value = torch.maximum(previous, torch.minimum(curvature_radius(margin, gradient, m), edge))
    todo = (useful & (value < edge)).nonzero().squeeze(1)
    if len(todo) and steps:
        # lambda_max on the ball only decides the length of steps: an unproved estimate, in the ratio of -lambda_min
        guess = upper[sample, rival] * (m / lower[sample, rival])
        value[todo], moved[todo] = descend(
            point, sample[todo], rival[todo], value[todo], m[todo], guess[todo], steps, edge[todo]
        )
    return _PairsOnBalls(sample, rival, value, moved, useful)


def _curvature(
    model_bounds: ModelBounds, point: EvaluatedPoints, radius: Tensor, rival: Tensor, position: Tensor
) -> BallCurvature:
    """Curvature bounds of the margins of the samples at `position` towards `rival`, (count,) each, on their balls.

    radius (batch,): of the balls.
    """
    pairs = torch.stack([point.prediction[position], rival], dim=1)
    return BallCurvature(model_bounds, point, interval_ranges(point, model_bounds.weights, radius), pairs, position)


def certified_attack_on_ball(
    model_bounds: ModelBounds, point: EvaluatedPoints, nearest: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Attack radii (batch,) along -g, rounded up, and their rivals (batch,), improved by bounds on balls.

    nearest, target (batch,): attack radii certified by global bounds, inf where there is none; and their rivals.

    A bound of lambda_max on a ball certifies only attacks that lie in the ball. The closed form lies between f/||g||
    and twice that, so that the first ball contains every attack. The next ball is as large as a certified attack
    radius, or half way to f/||g|| where the ball certified none.
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
        attack = attack_radius(margin, gradient, upper)
        holds = attack <= ball[index]
        best[index] = torch.where(holds, torch.minimum(best[index], attack), best[index])
        ball[index] = torch.where(holds, attack, 0.5 * (ball[index] + straight[index]))
    return best, rival
