"""Lower bounds of margins on a ball, from the expansion of the pre-activations (theory section 4, Jacobian tier).

    f(x+d) = f + <g,d> + sum over nonlinear l of <v_l, q_l(D_l)> ,    q_l(t) = phi(z_l+t) - phi(z_l) - s_l t       (1)

with A_l, g and the adjoints v_l of the network linearised at any slopes s, one per neuron. Every neuron has a quadratic
minorant on its range,

    v q(t) >= -|v| c - w t^2 / 2      with any slope s, any w >= 0, and c the smallest for which it holds,         (3)

and the quadratic terms in D are bounded by a trust-region problem in d. Every choice of slopes and weights gives a
bound; `optimise` maximises it over them, for each sample and rival. Tangents with c = 0 are the quadratic remainders of
the theory, lines with w = 0 are linear relaxations; (3) has both as special cases, neuron by neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import activation_on_range
from certify_cli.bounds.remainder.expansion import BallExpansion
from certify_cli.bounds.remainder.trust_region import Quadratic, trust_region_loss
from certify_cli.network.activations.quadratic_minorants import minorant_offsets
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Slope, nonlinear_nodes, pre_activation, vjp
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import UNDERFLOW, difference_down, positive_up, up, vector_norm_up
from certify_cli.numerics.trees import Batched

SMALLEST_WEIGHT = 1e-150
"""Smaller weights are set to 0: they would lead to denormal numbers, which are slow."""
LARGEST_COEFFICIENT = 1e9
"""Largest quadratic coefficient w / |v| of a minorant; a larger one belongs to an adjoint that is practically 0."""


@dataclass(frozen=True, eq=False)
class Choice(Batched):
    """The free parameters of the bound.

    slopes: s by nonlinear node, (batch, size).   weights: w by nonlinear node, (batch, size), >= 0.
    mu, tau: (batch,), hints for `trust_region_loss`.
    """

    slopes: Mapping[int, Tensor]
    weights: Mapping[int, Tensor]
    mu: Tensor
    tau: Tensor


def lower_bound(
    point: EvaluatedPoints, ball: BallExpansion, margin: Tensor, cotangents: Tensor, choice: Choice
) -> Tensor:
    """Lower bounds (batch,) of the margins on the balls; -inf where a value overflows.

    margin: (batch,), lower bounds of the margins at the samples.
    cotangents: (batch, classes), the margins as functions of the logits.
    """
    network, ranges, jacobians = point.network, ball.ranges, ball.jacobians
    shaped = {k: Slope(s.reshape(-1, *network.nodes[k].shape)) for k, s in choice.slopes.items()}
    adjoints = vjp(network, cotangents.unsqueeze(1), shaped)
    loss = torch.zeros_like(margin)
    weights = {target: torch.zeros_like(ranges.low[target]) for target in jacobians.pre_activations}
    for layer in nonlinear_nodes(network):
        if layer not in adjoints:
            continue
        on, slope = activation_on_range(point, layer, ranges), choice.slopes[layer]
        v, error = adjoints[layer].value[:, 0].flatten(1), adjoints[layer].error[:, 0]
        weight = choice.weights[layer]
        coefficient = (weight / v.abs()).nan_to_num(nan=0.0).clamp(min=0.0, max=LARGEST_COEFFICIENT)
        coefficient = torch.where(coefficient * v.abs() > SMALLEST_WEIGHT, coefficient, torch.zeros_like(coefficient))
        constant = minorant_offsets(on, either(v < 0, -1.0, 1.0), slope, coefficient)
        magnitude = torch.maximum(-on.lo, on.hi)
        q_norm = vector_norm_up(up((on.activation.lipschitz + slope.abs()) * magnitude, 3))
        loss = up(loss + up((v.abs() * constant).sum(1), v.shape[1] + 1) + error * q_norm, 4) + UNDERFLOW
        target = pre_activation(network, layer)
        weights[target] = positive_up(weights[target] + coefficient * v.abs(), 2)
    gradient, error_term = adjoints[0].value[:, 0].flatten(1), adjoints[0].error[:, 0]
    quadratic = Quadratic(
        jacobians.rows,
        torch.cat([weights[t] for t in jacobians.pre_activations], dim=1),
        torch.cat([ball.residual[t] for t in jacobians.pre_activations], dim=1),
    )
    quadratic_loss = trust_region_loss(quadratic, gradient, error_term, ranges.radius, choice.mu, choice.tau)
    total = up(loss + quadratic_loss, 2)
    return torch.where(total.isfinite() & margin.isfinite(), difference_down(margin, total), -torch.inf)
