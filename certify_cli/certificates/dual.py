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
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.certificates.closed_form import curvature_radius
from certify_cli.certificates.turns import weakest_in_turn
from certify_cli.network.evaluated import Point
from certify_cli.network.propagate import pull
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, down, gamma, times, up, vector_norm_up

GAIN = 1e-4
"""A relative gain below which no further point is tried."""


def tangent(
    point: Point, rival: Tensor, moved: Tensor, curvature: Tensor, within: Tensor | float = math.inf
) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), down, of x against `rival` (batch,) by the tangent at the points `moved`, and p.

    curvature (batch,): M of the margin towards the rival, valid where ||d|| <= `within` (everywhere if infinite), which
    no claim exceeds. 0 where f~ is not positive, and where the point lies outside.
    """
    there = Point(point.network, moved)
    eye = torch.eye(point.network.classes, dtype=moved.dtype, device=moved.device)
    cotangents = (eye[point.prediction] - eye[rival]).unsqueeze(1)
    vectors = pull(point.network, cotangents, there.slopes)[0]
    gradient, gradient_error = vectors.value[:, 0].flatten(1), vectors.error[:, 0]
    step = (moved - point.x).flatten(1)
    n = step.shape[1]
    size = up(vector_norm_up(step))
    # <g, d0> from above: the dot product's rounding, the gradient's error, and the rounding of d0 itself
    inner = (gradient * step).sum(1)
    flaw = up(gamma(n + 3) * (gradient * step).abs().sum(1) + gradient_error * size, n) + UNDERFLOW
    inner = inner + 2 * UNIT * inner.abs() + flaw
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
class Sharpened:
    """`radius`: the table (batch, classes), improved; `ends`: where the deciding rival's best tangent was taken,
    (batch, *input shape): close to the decision boundary when the bound is sharp."""

    radius: Tensor
    ends: Tensor


def sharpened(point: Point, radius: Tensor, lower: Tensor, upper: Tensor, steps: int) -> Sharpened:
    """The table of radii (batch, classes) with its weakest entries improved by tangents at further points.

    lower, upper (batch, classes): bounds of -lambda_min and lambda_max of the margins' Hessians, valid everywhere.
    """
    radius, ends = radius.clone(), point.x.clone()
    decided = torch.full_like(radius[:, 0], torch.inf)
    for todo, rival in weakest_in_turn(point, radius) if steps else ():
        known = radius[todo, rival]
        best, moved = descended(point, todo, rival, known, lower[todo, rival], upper[todo, rival], steps)
        radius[todo, rival] = best
        nearer = best < decided[todo]
        decided[todo[nearer]], ends[todo[nearer]] = best[nearer], moved[nearer]
    return Sharpened(radius, ends)


def descended(
    point: Point,
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
    live = torch.arange(len(index), device=index.device)
    for _ in range(steps):
        part, m = point.at(index[live]), lower[live]
        smooth = m + upper[live]
        aim = smooth.reshape(shape) * (ends[live] - part.x) - p
        reach = torch.minimum(1 / smooth, best[live] / vector_norm_up(aim.flatten(1)))
        ends[live] = part.x + reach.nan_to_num(nan=0.0, posinf=0.0).reshape(shape) * aim
        value, p = tangent(part, rival[live], ends[live], m, torch.inf if within is None else within[live])
        gained, better = value > best[live] * (1 + GAIN), value > most[live]
        most[live[better]], places[live[better]] = value[better], ends[live[better]]
        best[live] = torch.maximum(best[live], value)
        live, p = live[gained], p[gained]
        if not len(live):
            break
    return best, places
