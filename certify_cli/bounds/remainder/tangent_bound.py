"""The local bound without a Jacobian: the remainder identity's fast tier (theory section 4), for all rivals at once.

    f(x+d) >= f - ||g|| e - sum over nonlinear l of  sup_{D_l in its range} -<v_l, q_l(D_l)>

with the tangents at the sample, so that v_l and g do not change with the ball; only the ranges do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import Ranges, span
from certify_cli.bounds.remainder.expansion import MIXED, BallExpansion
from certify_cli.bounds.remainder.trust_region import Quadratic, trust_region_loss
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Slope, Vectors, nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import UNDERFLOW, positive_up, powers_of_two, up, vector_norm_up
from certify_cli.numerics.trees import Batched

SQUARED_ENTRIES = 2**23
"""Largest stacked Gram matrix that is squared entrywise for the free eigenvalue bound (64 MiB a sample)."""


def tangent_losses(
    point: EvaluatedPoints,
    ranges: Ranges,
    adjoints: Mapping[int, Vectors],
    known: BallExpansion | None = None,
    sharp: bool = True,
) -> Tensor:
    """Upper bounds (batch, rivals) of how much the margins lose on the ball of `ranges`, the gradient's part included.

    pulled: the margins' adjoints (batch, rivals, *shape) and, at 0, gradients, in the network linearised at the sample.
    Where the ball's Jacobians are known, all layers' quadratic parts are also bounded together, by the free eigenvalue
    bound  lambda_max(A^T diag(w) A)^2 <= w^T (G o G) w  with G = A A^T. Unless `sharp`, a neuron's remainder is bounded
    by the ranges of phi' and phi'' alone, at a fraction of the price.
    """
    radius = ranges.radius.unsqueeze(1)
    straight = up(up(adjoints[0].size + adjoints[0].error, 2) * radius)
    parts = node_remainders(point, ranges, adjoints, sharp)
    apart, error_terms = torch.zeros_like(straight), torch.zeros_like(straight)
    by_pre_activation: dict[int, Tensor] = {}
    for part in parts:
        together = up(part.weights.amax(2) * up(0.5 * ranges.norm[part.pre_activation].unsqueeze(1).square(), 2), 3)
        apart = apart + torch.fmin(
            up(torch.minimum(part.quadratic, part.interval).sum(2), part.weights.shape[2] + 2), together
        )
        error_terms = error_terms + part.error_term
        by_pre_activation[part.pre_activation] = (
            positive_up(by_pre_activation[part.pre_activation] + part.weights)
            if part.pre_activation in by_pre_activation
            else part.weights
        )
    if known is not None and known.jacobians.rows.count**2 <= SQUARED_ENTRIES:
        apart = torch.fmin(up(apart, len(parts)), joint_quadratic(known, by_pre_activation))
    return up(straight + apart + error_terms, 4 * len(parts) + 2)


@dataclass(frozen=True, eq=False)
class NodeRemainder:
    """What one nonlinear node takes from the margins: at most weights D^2 / 2, or interval, by rival and neuron.

    (batch, rivals, size) each; `quadratic` is weights D^2 / 2 at its largest. `error_term` (batch, rivals): from the
    errors of the adjoints.
    """

    pre_activation: int
    weights: Tensor
    quadratic: Tensor
    interval: Tensor
    error_term: Tensor


def node_remainders(
    point: EvaluatedPoints, ranges: Ranges, adjoints: Mapping[int, Vectors], sharp: bool = True
) -> list[NodeRemainder]:
    """Of every nonlinear node that the margins depend on. Unless `sharp`: see `tangent_losses`."""
    parts = []
    for layer in (k for k in nonlinear_nodes(point.network) if k in adjoints):
        here = span(point, layer, ranges)
        bottom, top = (end.unsqueeze(1) for end in (here.quadratic_coefficients() if sharp else here.curvatures()))
        low, high = (end.unsqueeze(1) for end in _tangents(here, point.slopes[layer], sharp))
        v, error = adjoints[layer].value.flatten(2), adjoints[layer].error
        weights = torch.maximum(-v * bottom, -v * top).clamp(min=0.0)
        interval = torch.maximum(-v * low, -v * high).clamp(min=0.0)
        reach = torch.maximum(-here.lo, here.hi).unsqueeze(1)
        quadratic = up(weights * up(0.5 * reach.square(), 2), 3)
        size = vector_norm_up(torch.maximum(-low, high)).clamp(min=0.0)
        error_term = up(error * size) + UNDERFLOW
        parts.append(NodeRemainder(pre_activation(point.network, layer), weights, quadratic, interval, error_term))
    return parts


@dataclass(frozen=True, eq=False)
class TangentExpansion(Batched):
    """The margins towards one rival each, expanded at the samples: -<gradient, d> + the quadratic + flat.

    `flat` (batch,): what is neither; gradient (batch, inputs) within `error` (batch,).
    """

    quadratic: Quadratic
    flat: Tensor
    gradient: Tensor
    error: Tensor
    radius: Tensor

    def losses(self, mu: Tensor, tau: Tensor) -> Tensor:
        """Upper bounds (batch,), with hints mu and tau (batch,) as in `trust_region_loss`."""
        bent = trust_region_loss(self.quadratic, self.gradient, self.error, self.radius, mu, tau)
        return up(bent + self.flat, 2)


def tangent_expansions(
    known: BallExpansion, parts: Sequence[NodeRemainder], adjoints: Mapping[int, Vectors], sample: Tensor, rival: Tensor
) -> TangentExpansion:
    """Of `rival` (count,) for every `sample` (count,) of the ball's.

    A neuron counts by its quadratic, or where that is much larger, by its interval.
    """
    pre_activations = known.jacobians.pre_activations
    weights = {t: torch.zeros_like(known.ranges.low[t][sample]) for t in pre_activations}
    flat = torch.zeros_like(known.radius[sample])
    for part in parts:
        interval, quadratic = part.interval[sample, rival], part.quadratic[sample, rival]
        even = interval < MIXED * quadratic
        flat = (
            flat + part.error_term[sample, rival] + up(torch.where(even, interval, 0.0).sum(1), interval.shape[1] + 1)
        )
        weights[part.pre_activation] = positive_up(
            weights[part.pre_activation] + part.weights[sample, rival].masked_fill(even, 0.0)
        )
    return TangentExpansion(
        Quadratic(
            known.jacobians.rows.at(sample),
            torch.cat([weights[t] for t in pre_activations], dim=1),
            torch.cat([known.residual[t][sample] for t in pre_activations], dim=1),
        ),
        up(flat, 2 * len(parts)),
        adjoints[0].value[sample, rival].flatten(1),
        adjoints[0].error[sample, rival],
        known.radius[sample],
    )


def joint_quadratic(ball: BallExpansion, weights: Mapping[int, Tensor]) -> Tensor:
    """Upper bounds (batch, rivals) of 1/2 sum w D^2 over all heads, weights (batch, rivals, size) by head."""
    rows = ball.jacobians.rows
    w = torch.cat([weights[t] for t in ball.jacobians.pre_activations], dim=2)
    rest = torch.cat([ball.residual[t] for t in ball.jacobians.pre_activations], dim=1)
    count = w.shape[2]
    unit = powers_of_two(w.flatten(0, 1)).reshape(w.shape[:2])  # no square of a weight may vanish
    w = w / unit.unsqueeze(2)
    form = (up((w @ rows.squared * w).sum(2), 2 * count + 4) + UNDERFLOW).sqrt().sqrt()
    own = (up((w * positive_up(rest.square()).unsqueeze(1)).sum(2), count + 3) + UNDERFLOW).sqrt()
    return up(unit * up(0.5 * (ball.radius.unsqueeze(1) * form + own).square(), 12))


def _tangents(here: ActivationOnInterval, slope: Slope, sharp: bool) -> tuple[Tensor, Tensor]:
    """What the tangents at the samples leave over the ranges, (batch, size) each."""
    value, error = slope.value.flatten(1), slope.error.flatten(1)  # type: ignore[union-attr]
    if sharp:
        least, most = here.remainders(value)
    else:  # the slope's range, less the tangent's slope, times the offset
        low, high = here.slopes()
        below, above = up((value - low).clamp(min=0.0), 2), up((high - value).clamp(min=0.0), 2)
        most = up(torch.maximum(above * here.hi, -below * here.lo), 1)
        least = -up(torch.maximum(below * here.hi, -above * here.lo), 1)
    linear = up(error * torch.maximum(-here.lo, here.hi))  # the computed slope is not phi'(z)
    return -up(linear - least), up(linear + most)
