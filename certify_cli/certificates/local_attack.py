"""Attack certificates by the local remainder with its signs reversed (theory section 4).

At d = -e g/||g|| the margin is at most  f - ||g|| e + R+(e),  R+ the most that the remainders add on the ball of radius
e. So an adversarial example lies in the ball of every e where that is not positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import Analysis
from certify_cli.bounds.on_ball.interval_ranges import fast_ranges
from certify_cli.bounds.remainder.expansion import ball
from certify_cli.bounds.remainder.tangent_bound import fast_losses
from certify_cli.network.evaluated import Point
from certify_cli.network.propagate import Vectors

BALLS = 10
AHEAD = 1.01
"""Each ball is this much larger than what the last one asks for, so that few are enough."""
FARTHEST = 4.0
"""Beyond this many times the distance that there would be without curvature nothing is promised."""


def promised_locally(analysis: Analysis, point: Point, jacobians: bool) -> tuple[Tensor, Tensor]:
    """Attack radii (batch,) along -g, inf where none is promised, and their rivals (batch,).

    R+ grows with the ball: an e that fails for a rival says how large its next one must be at least. Each ball is tried
    for the rival that may be nearest.
    """
    nearest = (point.margin_high / point.gradient_norm_low).masked_fill(point.own, torch.inf)
    nearest = nearest.nan_to_num(nan=torch.inf, posinf=torch.inf)
    farthest = FARTHEST * nearest.amin(1)
    rival = nearest.argmin(1)
    found = torch.full_like(farthest, torch.inf)
    live = (farthest.isfinite() & (farthest > 0) & point.finite).nonzero()[:, 0]
    for _ in range(BALLS):
        if not len(live):
            break
        part = point.at(live)
        radius, target = nearest[live].min(1)
        ranges = fast_ranges(part, analysis.weights, radius)
        known = ball(part, ranges) if jacobians else None
        added = fast_losses(part, known.ranges if known else ranges, _reversed(part), known)
        high, steep = part.margin_high, part.gradient_norm_low
        wanted = ((high + added) / steep).masked_fill(part.own, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
        done = wanted.gather(1, target.unsqueeze(1)).squeeze(1) <= radius
        found[live[done]], rival[live[done]] = radius[done], target[done]
        nearest[live] = torch.maximum(nearest[live], AHEAD * wanted)
        live = live[~done & (nearest[live].amin(1) < farthest[live])]
    return found, rival


def _reversed(point: Point) -> dict[int, Vectors]:
    """The margins' adjoints with their signs reversed, and a gradient of 0 within its error."""
    found = {k: Vectors(-v.value, v.error) for k, v in point.adjoints.items()}
    return found | {0: Vectors(torch.zeros_like(found[0].value), found[0].error)}
