"""Certified attacks by the local remainder bound with its signs reversed (theory section 4).

At d = -e g/||g|| the margin is at most f - ||g|| e + R+(e), where R+(e) is an upper bound of the remainders' sum on the
ball of radius e. So the ball of every radius e for which this is not positive contains an adversarial example.
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
"""Largest number of balls tried for a sample."""
AHEAD = 1.01
"""Each ball is larger by this factor than the last one showed to be necessary, so that few balls suffice."""
FARTHEST = 4.0
"""No ball is tried beyond this many times the distance that there would be without curvature."""


def certified_local_attack(model_bounds: ModelBounds, point: EvaluatedPoints, jacobians: bool) -> tuple[Tensor, Tensor]:
    """Attack radii (batch,) along -g, rounded up, inf where none is certified; and their rivals (batch,).

    jacobians: whether the remainders may use the samples' Jacobians, which must then fit the memory.

    R+ grows with the ball: where e fails for a rival, (f + R+(e)) / ||g|| is a lower bound of the next e for it. Each
    ball is tried for the rival whose next e is smallest.
    """
    nearest = (point.margin_high / point.gradient_norm_low).masked_fill(point.own, torch.inf)
    nearest = nearest.nan_to_num(nan=torch.inf, posinf=torch.inf)
    farthest = FARTHEST * nearest.amin(1)
    rival = nearest.argmin(1)
    certified = torch.full_like(farthest, torch.inf)
    active = (farthest.isfinite() & (farthest > 0) & point.finite).nonzero()[:, 0]
    for _ in range(BALLS):
        if not len(active):
            break
        samples = point.at(active)
        radius, target = nearest[active].min(1)
        ranges = interval_ranges(samples, model_bounds.weights, radius)
        expansion = expand_on_ball(samples, ranges) if jacobians else None
        added = tangent_losses(samples, expansion.ranges if expansion else ranges, _reversed(samples), expansion)
        needed = ((samples.margin_high + added) / samples.gradient_norm_low).masked_fill(samples.own, torch.inf)
        needed = needed.nan_to_num(nan=torch.inf, posinf=torch.inf)
        done = needed.gather(1, target.unsqueeze(1)).squeeze(1) <= radius
        certified[active[done]], rival[active[done]] = radius[done], target[done]
        nearest[active] = torch.maximum(nearest[active], AHEAD * needed)
        active = active[~done & (nearest[active].amin(1) < farthest[active])]
    return certified, rival


def _reversed(point: EvaluatedPoints) -> dict[int, Vectors]:
    """The margins' adjoints with their signs reversed, and a gradient of 0 within its error."""
    adjoints = {k: Vectors(-v.value, v.error) for k, v in point.adjoints.items()}
    return adjoints | {0: Vectors(torch.zeros_like(adjoints[0].value), adjoints[0].error)}
