"""Attack certificates by the local remainder with its signs reversed (theory section 4).

At d = -e g/||g|| the margin is at most  f - ||g|| e + R+(e),  R+ the most that the remainders add on the ball of radius
e. So an adversarial example lies in the ball of every e where that is not positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.bounds.remainder.expansion import expand_on_ball
from certify_cli.bounds.remainder.tangent_bound import tangent_losses
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Vectors

BALLS = 10
AHEAD = 1.01
"""Each ball is this much larger than what the last one asks for, so that few are enough."""
FARTHEST = 4.0
"""Beyond this many times the distance that there would be without curvature nothing is promised."""


def certified_local_attack(model_bounds: ModelBounds, point: EvaluatedPoints, jacobians: bool) -> tuple[Tensor, Tensor]:
    """Attack radii (batch,) along -g, inf where none is promised, and their rivals (batch,).

    R+ grows with the ball: an e that fails for a rival says how large its next one must be at least. Each ball is tried
    for the rival that may be nearest.
    """
    nearest = (point.margin_high / point.gradient_norm_low).masked_fill(point.own, torch.inf)
    nearest = nearest.nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest_change = FARTHEST * nearest.amin(1)
    rival = nearest.argmin(1)
    found = torch.full_like(largest_change, torch.inf)
    active = (largest_change.isfinite() & (largest_change > 0) & point.finite).nonzero()[:, 0]
    for _ in range(BALLS):
        if not len(active):
            break
        part = point.at(active)
        radius, target = nearest[active].min(1)
        ranges = interval_ranges(part, model_bounds.weights, radius)
        known = expand_on_ball(part, ranges) if jacobians else None
        added = tangent_losses(part, known.ranges if known else ranges, _reversed(part), known)
        high, steep = part.margin_high, part.gradient_norm_low
        wanted = ((high + added) / steep).masked_fill(part.own, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
        done = wanted.gather(1, target.unsqueeze(1)).squeeze(1) <= radius
        found[active[done]], rival[active[done]] = radius[done], target[done]
        nearest[active] = torch.maximum(nearest[active], AHEAD * wanted)
        active = active[~done & (nearest[active].amin(1) < largest_change[active])]
    return found, rival


def _reversed(point: EvaluatedPoints) -> dict[int, Vectors]:
    """The margins' adjoints with their signs reversed, and a gradient of 0 within its error."""
    found = {k: Vectors(-v.value, v.error) for k, v in point.adjoints.items()}
    return found | {0: Vectors(torch.zeros_like(found[0].value), found[0].error)}
