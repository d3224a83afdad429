"""The local bound without a Jacobian: the remainder identity's fast tier (theory section 4), for all rivals at once.

    f(x+d) >= f - ||g|| e - sum over nonlinear l of  sup_{D_l in its range} -<v_l, q_l(D_l)>

with the tangents at the sample, so that v_l and g do not change with the ball; only the ranges do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from certify_cli.bounds.local import Ball, Linearised, span
from certify_cli.bounds.ranges import Ranges
from certify_cli.network.linearised import Slope, Vectors, head, nonlinear_nodes
from certify_cli.network.spans import Span
from certify_cli.numerics.rounding import UNDERFLOW, up, vector_norm_up

SQUARED_ENTRIES = 2**23
"""Largest stacked Gram matrix that is squared entrywise for the free eigenvalue bound (64 MiB a sample)."""


def fast_losses(point: Linearised, ranges: Ranges, pulled: Mapping[int, Vectors], known: Ball | None = None) -> Tensor:
    """Upper bounds (batch, rivals) of how much the margins lose on the ball of `ranges`, the gradient's part included.

    pulled: the margins' adjoints (batch, rivals, *shape) and, at 0, gradients, in the network linearised at the sample.
    Where the ball's Jacobians are known, all layers' quadratic parts are also bounded together, by the free eigenvalue
    bound  lambda_max(A^T diag(w) A)^2 <= w^T (G o G) w  with G = A A^T.
    """
    radius = ranges.radius.unsqueeze(1)
    straight = up(up(pulled[0].size + pulled[0].error, 2) * radius)
    apart, flaws = torch.zeros_like(straight), torch.zeros_like(straight)
    by_head: dict[int, Tensor] = {}
    layers = [k for k in nonlinear_nodes(point.network) if k in pulled]
    for layer in layers:
        here, target = span(point, layer, ranges), head(point.network, layer)
        bottom, top = (end.unsqueeze(1) for end in here.quadratics())
        v, error = pulled[layer].value.flatten(2), pulled[layer].error
        reach = torch.maximum(-here.lo, here.hi)
        low, high = (end.unsqueeze(1) for end in _tangents(here, point.slopes[layer]))
        weights = torch.maximum(-v * bottom, -v * top).clamp(min=0.0)
        each = torch.minimum(up(0.5 * weights * reach.square().unsqueeze(1), 4), torch.maximum(-v * low, -v * high))
        norm = ranges.norm[target].unsqueeze(1)
        together = up(0.5 * weights.amax(2) * norm.square(), 4)
        size = vector_norm_up(torch.maximum(-low, high)).clamp(min=0.0)
        loss = torch.fmin(up(each.clamp(min=0.0).sum(2), v.shape[2] + 2), together)
        apart, flaws = apart + loss, flaws + up(error * size) + UNDERFLOW
        by_head[target] = up(by_head[target] + weights, 1) if target in by_head else weights
    if known is not None and known.jacobians.rows.count**2 <= SQUARED_ENTRIES:
        apart = torch.fmin(up(apart, len(layers)), _together(known, by_head))
    return up(straight + apart + flaws, 4 * len(layers) + 2)


def _together(ball: Ball, weights: Mapping[int, Tensor]) -> Tensor:
    """Upper bounds (batch, rivals) of 1/2 sum w D^2 over all heads, weights (batch, rivals, size) by head."""
    rows = ball.jacobians.rows
    w = torch.cat([weights[t] for t in ball.jacobians.heads], dim=2)
    rest = torch.cat([ball.rest[t] for t in ball.jacobians.heads], dim=1)
    count = w.shape[2]
    form = up((w @ rows.squared * w).sum(2), 2 * count + 4).sqrt().sqrt()
    own = up((w * rest.square().unsqueeze(1)).sum(2), count + 2).sqrt()
    return up(0.5 * (ball.radius.unsqueeze(1) * form + own).square(), 12)


def _tangents(here: Span, slope: Slope) -> tuple[Tensor, Tensor]:
    """What the tangents at the samples leave over the ranges, (batch, size) each."""
    value, error = slope.value.flatten(1), slope.error.flatten(1)  # type: ignore[union-attr]
    least, most = here.remainders(value)
    linear = up(error * torch.maximum(-here.lo, here.hi))  # the computed slope is not phi'(z)
    return -up(linear - least), up(linear + most)
