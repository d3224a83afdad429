"""The closed form at another point than the sample: the dual certificate's building block (theory section 5).

Where M >= -lambda_min of the Hessian everywhere, f + M/2 ||.||^2 is convex. Its tangent at any d0 yields, for all d,

    f(x+d) >= f~ + <p, d> - M ||d||^2 / 2     with  p = grad f(x+d0) + M d0,
                                                    f~ = f(x+d0) - <grad f(x+d0), d0> - M ||d0||^2 / 2 .

d0 = 0 is the closed form at the sample. Every d0 yields a proof; a good d0 lies where the bound of the sample's own
tangent is smallest, and a majorise-minimise step leads there. Where M holds only on a ball around x, f + M/2 ||.||^2 is
convex there only: d0 must lie in the ball, and no radius larger than the ball's is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.certificates.closed_form import curvature_radius
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import vjp
from certify_cli.numerics.deadline import OutOfTime
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, down, gamma, times, up, vector_norm_up

GAIN = 1e-4
"""No further point is tried after a relative gain of the radius below this."""


def tangent(
    point: EvaluatedPoints, rival: Tensor, moved: Tensor, curvature: Tensor, within: Tensor | float = math.inf
) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), rounded down, from the tangents at the points `moved`; and p (batch, *input shape).

    rival (batch,): class of the margin.   moved (batch, *input shape): x + d0.
    curvature (batch,): M for the margin towards the rival, valid for ||d|| <= within.
    within: radius of the ball (batch,), or inf for everywhere. No larger radius is certified.

    The radius is 0 where f~ is not positive, and where `moved` lies outside the ball.
    """
    there = EvaluatedPoints(point.network, moved)
    eye = torch.eye(point.network.classes, dtype=moved.dtype, device=moved.device)
    cotangents = (eye[point.prediction] - eye[rival]).unsqueeze(1)
    vectors = vjp(point.network, cotangents, there.slopes)[0]
    gradient, gradient_error = vectors.value[:, 0].flatten(1), vectors.error[:, 0]
    step = (moved - point.x).flatten(1)
    n = step.shape[1]
    size = up(vector_norm_up(step))
    # <g, d0> from above: the dot product's rounding, the gradient's error, and the rounding of d0 itself
    inner = (gradient * step).sum(1)
    inner_error = up(gamma(n + 3) * (gradient * step).abs().sum(1) + gradient_error * size, n) + UNDERFLOW
    inner = inner + 2 * UNIT * inner.abs() + inner_error
    quadratic = times(curvature, size, 0.5 * size)
    margin, margin_error = (t.gather(1, rival.unsqueeze(1)).squeeze(1) for t in there.margins_of(point.prediction))
    value = margin - margin_error - inner - quadratic
    value = value - 4 * UNIT * (margin.abs() + margin_error + inner.abs() + quadratic)
    p = gradient + curvature.unsqueeze(1) * step
    rounding = 4 * UNIT * (vector_norm_up(gradient) + curvature * size)
    slope = up(vector_norm_up(p) + gradient_error + rounding, 3)
    radius = curvature_radius(down(value.clamp(min=0.0)), slope, curvature)
    certified = torch.minimum(radius, torch.as_tensor(within, dtype=radius.dtype, device=radius.device))
    return torch.where(there.finite & (size <= within), certified, 0.0), p.reshape(moved.shape)


@dataclass(frozen=True, eq=False)
class Refined:
    """Radii refined by tangents at further points.

    radius (batch, classes): certified for each rival.
    ends (batch, *input shape): where the deciding rival's best tangent was taken; the sharper the bound, the closer to
    the decision boundary.
    """

    radius: Tensor
    ends: Tensor


def refined(point: EvaluatedPoints, radius: Tensor, lower: Tensor, upper: Tensor, steps: int) -> Refined:
    """The table of certified radii with its smallest entries enlarged by tangents at further points.

    radius (batch, classes): certified already.
    lower, upper (batch, classes): upper bounds of -lambda_min and lambda_max of the margins' Hessians everywhere.
    steps: largest number of further points for a rival.
    """
    radius, ends = radius.clone(), point.x.clone()
    decided = torch.full_like(radius[:, 0], torch.inf)
    for todo, rival in weakest_rivals(point, radius) if steps else ():
        best, moved = descend(point, todo, rival, radius[todo, rival], lower[todo, rival], upper[todo, rival], steps)
        radius[todo, rival] = best
        smaller = best < decided[todo]
        decided[todo[smaller]], ends[todo[smaller]] = best[smaller], moved[smaller]
    return Refined(radius, ends)


def descend(
    point: EvaluatedPoints,
    index: Tensor,
    rival: Tensor,
    radius: Tensor,
    lower: Tensor,
    upper: Tensor,
    steps: int,
    within: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Certified radii (count,) from tangents along a projected gradient descent, and the points of the best tangents.

    index, rival (count,): samples and their rivals.   radius (count,): certified already.
    lower, upper (count,): upper bounds of -lambda_min and lambda_max of the margins' Hessians.   steps: at most.
    within (count,): radius of the ball on which these bounds hold; None for everywhere.

    The descent minimises f + M/2 ||.||^2 on the certified ball: its gradient is p, with a Lipschitz constant of at most
    the sum of the two bounds, and its minimum on the ball is the published dual's. A sample stops after a step that
    gains less than GAIN, and all stop when time ends. Steps decide only where tangents are taken, so that any step is
    sound.
    """
    shape = (-1, *[1] * (point.x.dim() - 1))
    best, moved, best_moved = radius.clone(), point.x[index].clone(), point.x[index].clone()
    largest = torch.full_like(best, -torch.inf)
    p = point.gradients.value[index, rival]
    active = torch.arange(len(index), device=index.device)
    for _ in range(steps):
        samples, m = point.at(index[active]), lower[active]
        smoothness = m + upper[active]
        target = smoothness.reshape(shape) * (moved[active] - samples.x) - p
        scale = torch.minimum(1 / smoothness, best[active] / vector_norm_up(target.flatten(1)))
        moved[active] = samples.x + scale.nan_to_num(nan=0.0, posinf=0.0).reshape(shape) * target
        try:
            value, p = tangent(
                samples, rival[active], moved[active], m, torch.inf if within is None else within[active]
            )
        except OutOfTime:
            break
        gained, better = value > best[active] * (1 + GAIN), value > largest[active]
        largest[active[better]], best_moved[active[better]] = value[better], moved[active[better]]
        best[active] = torch.maximum(best[active], value)
        active, p = active[gained], p[gained]
        if not len(active):
            break
    return best, best_moved


def weakest_rivals(point: EvaluatedPoints, radius: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (count,) of a sample and its weakest rival, round by round, until no further rival can decide a sample.

    radius (batch, classes): certified radii, which the caller enlarges in place between two rounds.

    The weakest rival is the one with the smallest radius. A sample takes part in the next round if another rival has
    become its weakest; so few rivals are treated, and the smallest radius of all rivals is the same as if all were. A
    sample whose smallest radius is 0 or infinite takes no part.
    """
    treated = point.own.clone()
    every = torch.arange(len(radius), device=radius.device)
    for _ in range(point.network.classes - 1):
        weakest = radius.masked_fill(point.own, torch.inf).argmin(1)
        smallest = radius[every, weakest]
        todo = (~treated[every, weakest] & (smallest > 0) & smallest.isfinite()).nonzero().squeeze(1)
        if not len(todo):
            return
        rival = weakest[todo]
        treated[todo, rival] = True
        yield todo, rival
