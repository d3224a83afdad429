"""Margin losses by tangents at the sample, for all rivals at once: the fast tier of the remainder identity (theory 4).

    f(x+d) >= f - ||g|| e - sum over nonlinear l of  sup_{D_l in its range} -<v_l, q_l(D_l)>

with tangents at the sample, so that v_l and g are the same for every ball, and only the ranges of D_l depend on it.
No Jacobian of a pre-activation is needed; where they are computed anyway, the quadratic parts are bounded jointly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import Ranges, activation_on_range
from certify_cli.bounds.remainder.expansion import MIXED, BallExpansion
from certify_cli.bounds.remainder.trust_region import Quadratic, trust_region_loss
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Slope, Vectors, nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import UNDERFLOW, positive_up, powers_of_two, up, vector_norm_up
from certify_cli.numerics.trees import Batched


def tangent_losses(
    point: EvaluatedPoints,
    ranges: Ranges,
    adjoints: Mapping[int, Vectors],
    expansion: BallExpansion | None = None,
    sharp: bool = True,
) -> Tensor:
    """Upper bounds (batch, rivals) of the margins' losses on the balls of `ranges`, the gradient's part included.

    adjoints: of the margins, (batch, rivals, *shape), and at key 0 their gradients, in the network linearised at the
        samples.
    expansion: on the same balls, if computed: then all quadratic parts are also bounded jointly (`joint_quadratic`).
    sharp: False bounds the remainders by the ranges of phi' and phi'' alone, at a fraction of the cost.
    """
    radius = ranges.radius.unsqueeze(1)
    linear_loss = up(up(adjoints[0].size + adjoints[0].error, 2) * radius)
    parts = node_remainders(point, ranges, adjoints, sharp)
    remainder, error_terms = torch.zeros_like(linear_loss), torch.zeros_like(linear_loss)
    by_pre_activation: dict[int, Tensor] = {}
    for part in parts:
        by_norm = up(part.weights.amax(2) * up(0.5 * ranges.norm[part.pre_activation].unsqueeze(1).square(), 2), 3)
        remainder = remainder + torch.fmin(
            up(torch.minimum(part.quadratic, part.interval).sum(2), part.weights.shape[2] + 2), by_norm
        )
        error_terms = error_terms + part.error_term
        by_pre_activation[part.pre_activation] = (
            positive_up(by_pre_activation[part.pre_activation] + part.weights)
            if part.pre_activation in by_pre_activation
            else part.weights
        )
    together = None if expansion is None else joint_quadratic(expansion, by_pre_activation)
    if together is not None:
        remainder = torch.fmin(up(remainder, len(parts)), together)
    return up(linear_loss + remainder + error_terms, 4 * len(parts) + 2)


@dataclass(frozen=True, eq=False)
class NodeRemainder:
    """Upper bounds of the margins' losses by one nonlinear node's remainders.

    pre_activation: of the node.
    weights: w (batch, rivals, size), >= 0: a neuron's loss is at most w D^2 / 2.
    quadratic: (batch, rivals, size), w D^2 / 2 at its largest.
    interval: (batch, rivals, size), the loss bounded by the remainder's interval instead.
    error_term: (batch, rivals), the part of the adjoints' errors.
    """

    pre_activation: int
    weights: Tensor
    quadratic: Tensor
    interval: Tensor
    error_term: Tensor


def node_remainders(
    point: EvaluatedPoints, ranges: Ranges, adjoints: Mapping[int, Vectors], sharp: bool = True
) -> list[NodeRemainder]:
    """The remainders of every nonlinear node that the margins depend on; arguments as in `tangent_losses`."""
    parts = []
    for layer in (k for k in nonlinear_nodes(point.network) if k in adjoints):
        on = activation_on_range(point, layer, ranges)
        bottom, top = (end.unsqueeze(1) for end in (on.quadratic_coefficients() if sharp else on.curvatures()))
        low, high = (end.unsqueeze(1) for end in _tangent_remainders(on, point.slopes[layer], sharp))
        v, error = adjoints[layer].value.flatten(2), adjoints[layer].error
        weights = torch.maximum(-v * bottom, -v * top).clamp(min=0.0)
        interval = torch.maximum(-v * low, -v * high).clamp(min=0.0)
        magnitude = torch.maximum(-on.lo, on.hi).unsqueeze(1)
        quadratic = up(weights * up(0.5 * magnitude.square(), 2), 3)
        size = vector_norm_up(torch.maximum(-low, high)).clamp(min=0.0)
        error_term = up(error * size) + UNDERFLOW
        parts.append(NodeRemainder(pre_activation(point.network, layer), weights, quadratic, interval, error_term))
    return parts


@dataclass(frozen=True, eq=False)
class TangentExpansion(Batched):
    """Losses of one margin per item, expanded at the samples: at most -<gradient, d> + the quadratic / 2 + constant.

    quadratic: of the pre-activations' changes.   constant: (batch,), of the remainders bounded by intervals, up.
    gradient: (batch, inputs), within `error` (batch,) of the exact one.   radius: (batch,), of the balls.
    """

    quadratic: Quadratic
    constant: Tensor
    gradient: Tensor
    error: Tensor
    radius: Tensor

    def losses(self, mu: Tensor, tau: Tensor) -> Tensor:
        """Upper bounds (batch,) of the losses; mu, tau: (batch,), hints as in `trust_region_loss`."""
        quadratic_loss = trust_region_loss(self.quadratic, self.gradient, self.error, self.radius, mu, tau)
        return up(quadratic_loss + self.constant, 2)


def tangent_expansions(
    ball: BallExpansion, parts: Sequence[NodeRemainder], adjoints: Mapping[int, Vectors], sample: Tensor, rival: Tensor
) -> TangentExpansion:
    """Expansions of the margins of samples `sample` (count,) against classes `rival` (count,).

    A neuron enters by its quadratic, or by its interval where the quadratic is much larger.
    """
    pre_activations = ball.jacobians.pre_activations
    weights = {t: torch.zeros_like(ball.ranges.low[t][sample]) for t in pre_activations}
    constant = torch.zeros_like(ball.radius[sample])
    for part in parts:
        interval, quadratic = part.interval[sample, rival], part.quadratic[sample, rival]
        by_interval = interval < MIXED * quadratic
        sums = up(torch.where(by_interval, interval, 0.0).sum(1), interval.shape[1] + 1)
        constant = constant + part.error_term[sample, rival] + sums
        weights[part.pre_activation] = positive_up(
            weights[part.pre_activation] + part.weights[sample, rival].masked_fill(by_interval, 0.0)
        )
    return TangentExpansion(
        Quadratic(
            ball.jacobians.rows.at(sample),
            torch.cat([weights[t] for t in pre_activations], dim=1),
            torch.cat([ball.residual[t][sample] for t in pre_activations], dim=1),
        ),
        up(constant, 2 * len(parts)),
        adjoints[0].value[sample, rival].flatten(1),
        adjoints[0].error[sample, rival],
        ball.radius[sample],
    )


def joint_quadratic(ball: BallExpansion, weights: Mapping[int, Tensor]) -> Tensor | None:
    """Upper bounds (batch, rivals) of 1/2 sum w D^2 over all pre-activations; None where the rows are too many.

    weights: by pre-activation, (batch, rivals, size), >= 0.

    No eigenvalue is computed: lambda_max(A^T diag(w) A)^2 <= w^T (G o G) w  with G = A A^T.
    """
    rows = ball.jacobians.rows
    w = torch.cat([weights[t] for t in ball.jacobians.pre_activations], dim=2)
    residual = torch.cat([ball.residual[t] for t in ball.jacobians.pre_activations], dim=1)
    count = w.shape[2]
    unit = powers_of_two(w.flatten(0, 1)).reshape(w.shape[:2])  # so that no square of a weight underflows
    w = w / unit.unsqueeze(2)
    squared = rows.squared_form(w)
    if squared is None:
        return None
    form = squared.sqrt().sqrt()
    own = (up((w * positive_up(residual.square()).unsqueeze(1)).sum(2), count + 3) + UNDERFLOW).sqrt()
    return up(unit * up(0.5 * (ball.radius.unsqueeze(1) * form + own).square(), 12))


def _tangent_remainders(on: ActivationOnInterval, slope: Slope, sharp: bool) -> tuple[Tensor, Tensor]:
    """Bounds (lower, upper), (batch, size) each, of the remainders of the computed tangents on the ranges."""
    value, error = slope.value.flatten(1), slope.error.flatten(1)  # type: ignore[union-attr]
    if sharp:
        lower, upper = on.remainders(value)
    else:  # (phi' on the range less the tangent's slope) times the offset
        low, high = on.slopes()
        below, above = up((value - low).clamp(min=0.0), 2), up((high - value).clamp(min=0.0), 2)
        upper = up(torch.maximum(above * on.hi, -below * on.lo), 1)
        lower = -up(torch.maximum(below * on.hi, -above * on.lo), 1)
    linear = up(error * torch.maximum(-on.lo, on.hi))  # the computed slope is not exactly phi'(z)
    return -up(linear - lower), up(linear + upper)
