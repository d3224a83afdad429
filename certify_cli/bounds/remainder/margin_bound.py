"""A lower bound of the margin on a ball, from the expansion of its pre-activations (theory section 4, Jacobian tier).

    f(x+d) = f + <g,d> + sum over nonlinear l of <v_l, q_l(D_l)> ,    q_l(t) = phi(z_l+t) - phi(z_l) - s_l t       (1)

with A_l, g and the adjoints v_l of the network linearised at any slopes s, one a neuron. Every neuron gets a quadratic
minorant on its range,

    v q(t) >= -|v| c - w t^2 / 2      with any slope s, any w >= 0, and c the least that makes it true,            (3)

and the quadratic terms in D are bounded by a trust-region problem in d. Slopes and weights are free: `optimise` chooses
them where the sum is largest, for each sample and rival. Tangents with c = 0 are the quadratic remainders of the
theory, lines with w = 0 are linear relaxations; (3) contains both, neuron by neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import span
from certify_cli.bounds.remainder.expansion import BallExpansion
from certify_cli.bounds.remainder.trust_region import Quadratic, trust_region_loss
from certify_cli.network.activations.quadratic_minorants import minorant_offsets
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Slope, nonlinear_nodes, pre_activation, vjp
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import UNDERFLOW, difference_down, positive_up, up, vector_norm_up
from certify_cli.numerics.trees import Batched

LEAST_WEIGHT = 1e-150
"""A smaller one is none: what is next to nothing makes the smallest numbers there are, which are slow."""
LARGEST_BEND = 1e9
"""Weights of more than this times |v| bend no function: the neuron's adjoint is as good as zero."""


@dataclass(frozen=True, eq=False)
class Choice(Batched):
    """What is free in the bound, by nonlinear node: slopes s (batch, size), weights w >= 0 (batch, size); and hints."""

    slopes: Mapping[int, Tensor]
    weights: Mapping[int, Tensor]
    mu: Tensor
    tau: Tensor


def lower_bound(
    point: EvaluatedPoints, ball: BallExpansion, margin: Tensor, cotangents: Tensor, choice: Choice
) -> Tensor:
    """Lower bounds (batch,) of the margins' least values on the ball; -inf where nothing can be said.

    margin (batch,): lower bounds of the margins at the samples. cotangents (batch, classes): the margins' directions.
    """
    network, ranges, jacobians = point.network, ball.ranges, ball.jacobians
    shaped = {k: Slope(s.reshape(-1, *network.nodes[k].shape)) for k, s in choice.slopes.items()}
    adjoints = vjp(network, cotangents.unsqueeze(1), shaped)
    loss = torch.zeros_like(margin)
    weights = {target: torch.zeros_like(ranges.low[target]) for target in jacobians.pre_activations}
    for layer in nonlinear_nodes(network):
        if layer not in adjoints:
            continue
        here, slope = span(point, layer, ranges), choice.slopes[layer]
        v, error = adjoints[layer].value[:, 0].flatten(1), adjoints[layer].error[:, 0]
        weight = choice.weights[layer]
        bend = (weight / v.abs()).nan_to_num(nan=0.0).clamp(min=0.0, max=LARGEST_BEND)
        bend = torch.where(bend * v.abs() > LEAST_WEIGHT, bend, torch.zeros_like(bend))
        depth = minorant_offsets(here, either(v < 0, -1.0, 1.0), slope, bend)
        reach = torch.maximum(-here.lo, here.hi)
        far = vector_norm_up(up((here.activation.lipschitz + slope.abs()) * reach, 3))
        loss = up(loss + up((v.abs() * depth).sum(1), v.shape[1] + 1) + error * far, 4) + UNDERFLOW
        target = pre_activation(network, layer)
        weights[target] = positive_up(weights[target] + bend * v.abs(), 2)
    gradient, error_term = adjoints[0].value[:, 0].flatten(1), adjoints[0].error[:, 0]
    quadratic = Quadratic(
        jacobians.rows,
        torch.cat([weights[t] for t in jacobians.pre_activations], dim=1),
        torch.cat([ball.residual[t] for t in jacobians.pre_activations], dim=1),
    )
    bent = trust_region_loss(quadratic, gradient, error_term, ranges.radius, choice.mu, choice.tau)
    total = up(loss + bent, 2)
    return torch.where(total.isfinite() & margin.isfinite(), difference_down(margin, total), -torch.inf)
