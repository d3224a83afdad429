"""The closed form at another point than the sample: the dual certificate's building block (theory section 5).

Where M bounds -lambda_min of the Hessian on the whole space, f + M/2 ||.||^2 is convex, and its tangent at any d0 gives

    f(x+d) >= f~ + <p, d> - M ||d||^2 / 2     with  p = grad f(x+d0) + M d0,
                                                    f~ = f(x+d0) - <grad f(x+d0), d0> - M ||d0||^2 / 2

for all d. d0 = 0 is the closed form at the sample. Every d0 is a proof by itself; a good one lies where the bound at
the sample is least, which is where a majorise-minimise step leads. Where M holds on a ball around x only, so do
convexity and the minorant: d0 must lie in the ball, and nothing beyond its radius is claimed.
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
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, down, gamma, times, up, vector_norm_up

GAIN = 1e-4
"""A relative gain below which no further point is tried."""


def tangent(
    point: EvaluatedPoints, rival: Tensor, moved: Tensor, curvature: Tensor, within: Tensor | float = math.inf
) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), down, of x against `rival` (batch,) by the tangent at the points `moved`, and p.

    curvature (batch,): M of the margin towards the rival, valid where ||d|| <= `within` (everywhere if infinite), which
    no claim exceeds. 0 where f~ is not positive, and where the point lies outside.
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
    error_term = up(gamma(n + 3) * (gradient * step).abs().sum(1) + gradient_error * size, n) + UNDERFLOW
    inner = inner + 2 * UNIT * inner.abs() + error_term
    bend = times(curvature, size, 0.5 * size)
    margin, error = (t.gather(1, rival.unsqueeze(1)).squeeze(1) for t in there.margins_of(point.prediction))
    level = margin - error - inner - bend
    level = level - 4 * UNIT * (margin.abs() + error + inner.abs() + bend)
    p = gradient + curvature.unsqueeze(1) * step
    rounding = 4 * UNIT * (vector_norm_up(gradient) + curvature * size)
    slope = up(vector_norm_up(p) + gradient_error + rounding, 3)
    radius = curvature_radius(down(level.clamp(min=0.0)), slope, curvature)
    claimed = torch.minimum(radius, torch.as_tensor(within, dtype=radius.dtype, device=radius.device))
    return torch.where(there.finite & (size <= within), claimed, 0.0), p.reshape(moved.shape)


@dataclass(frozen=True, eq=False)
class Refined:
    """`radius`: the table (batch, classes), improved; `ends`: where the deciding rival's best tangent was taken,
    (batch, *input shape): close to the decision boundary when the bound is sharp."""

    radius: Tensor
    ends: Tensor


def refined(point: EvaluatedPoints, radius: Tensor, lower: Tensor, upper: Tensor, steps: int) -> Refined:
    """The table of radii (batch, classes) with its weakest entries improved by tangents at further points.

    lower, upper (batch, classes): bounds of -lambda_min and lambda_max of the margins' Hessians, valid everywhere.
    """
    radius, ends = radius.clone(), point.x.clone()
    decided = torch.full_like(radius[:, 0], torch.inf)
    for todo, rival in weakest_rivals(point, radius) if steps else ():
        known = radius[todo, rival]
        best, moved = descend(point, todo, rival, known, lower[todo, rival], upper[todo, rival], steps)
        radius[todo, rival] = best
        nearer = best < decided[todo]
        decided[todo[nearer]], ends[todo[nearer]] = best[nearer], moved[nearer]
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
    """Best radius of projected gradient steps on f + M/2 ||.||^2 over the certified ball, and the best tangent's point.

    For the samples at `index`, each with its rival, its radius so far, and bounds of its margin's curvature, valid on
    the ball of radius `within` (everywhere if None).

    The gradient there is p, its Lipschitz constant at most M- + M+; the minimum on the ball is the published dual's.
    A sample is left alone once a step gains less than GAIN. Any step is sound: it only says where to look.
    """
    shape = (-1, *[1] * (point.x.dim() - 1))
    best, ends, places = radius.clone(), point.x[index].clone(), point.x[index].clone()
    most = torch.full_like(best, -torch.inf)
    p = point.gradients.value[index, rival]
    active = torch.arange(len(index), device=index.device)
    for _ in range(steps):
        part, m = point.at(index[active]), lower[active]
        smooth = m + upper[active]
        aim = smooth.reshape(shape) * (ends[active] - part.x) - p
        reach = torch.minimum(1 / smooth, best[active] / vector_norm_up(aim.flatten(1)))
        ends[active] = part.x + reach.nan_to_num(nan=0.0, posinf=0.0).reshape(shape) * aim
        value, p = tangent(part, rival[active], ends[active], m, torch.inf if within is None else within[active])
        gained, better = value > best[active] * (1 + GAIN), value > most[active]
        most[active[better]], places[active[better]] = value[better], ends[active[better]]
        best[active] = torch.maximum(best[active], value)
        active, p = active[gained], p[gained]
        if not len(active):
            break
    return best, places


def weakest_rivals(point: EvaluatedPoints, radius: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rivals that can decide a sample, one at a time: samples and rivals, (count,) each.

    Every sample's weakest rival comes first, then the next one if that has become the weakest: the caller raises
    `radius` (batch, classes) in place between two steps. The least radius over all rivals results from few of them. A
    sample whose least radius is 0 or infinite has no further rivals.
    """
    treated = point.own.clone()
    every = torch.arange(len(radius), device=radius.device)
    for _ in range(point.network.classes - 1):
        weakest = radius.masked_fill(point.own, torch.inf).argmin(1)
        found = radius[every, weakest]
        todo = (~treated[every, weakest] & (found > 0) & found.isfinite()).nonzero().squeeze(1)
        if not len(todo):
            return
        rival = weakest[todo]
        treated[todo, rival] = True
        yield todo, rival
