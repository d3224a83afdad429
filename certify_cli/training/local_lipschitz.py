"""Training for local Lipschitz bounds (Huang et al., NeurIPS 2021), for networks with and without curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify_cli.bounds.global_bounds.expansion import weight_blocks
from certify_cli.bounds.on_ball.lipschitz import LinearisedOnBalls, linearised_by_norms
from certify_cli.network.activations import Activation
from certify_cli.network.affine import Scale
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import pre_activation
from certify_cli.training.objectives import BUDGET, Objective, margin_rows, margins_of, worst_entropy

SATURATION = 0.1
"""Weight of the loss towards the upper constant piece of an activation, where that towards the lower one has 1."""


class LocalLipschitz(Objective):
    """Cross-entropy of worst-case logits: every margin less its Lipschitz bound on the ball around the sample.

    The bound is that of `local-lipschitz`: units that are constant on the ball are left out, units that are linear
    there become part of their neighbours' maps.

    radius: of the balls.   weight: of the worst case; the sample itself has the rest.
    every_rival: False lowers the margin towards the runner-up alone, at a fraction of the time.
    sparsity: weight of the mean distance of units from being constant on the ball (`sparsity_loss`).
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        *,
        radius: float,
        weight: float = 1.0,
        sparsity: float = 0.01,
        every_rival: bool = True,
    ) -> None:
        super().__init__(module, input_shape)
        self.radius, self.weight, self.sparsity, self.every_rival = radius, weight, sparsity, every_rival

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.module(x)
        sources = self.linearised(x)
        worst = worst_entropy(logits, y, lambda rivals: worst_margins(sources, y, rivals), self.every_rival)
        loss = (1 - self.weight) * cross_entropy(logits, y) + self.weight * worst
        return loss + self.sparsity * sparsity_loss(sources).to(loss.dtype) if self.sparsity else loss

    def linearised(self, x: Tensor) -> LinearisedOnBalls:
        """The network linearised on the balls around x (batch, *input_shape), with estimates in place of norms."""
        network = self.source.network()
        radius = torch.full((len(x),), self.radius, dtype=torch.float64, device=x.device)
        return linearised_by_norms(EvaluatedPoints(network, x.double()), weight_blocks(network, BUDGET), radius)


def worst_margins(sources: LinearisedOnBalls, y: Tensor, rivals: Tensor) -> Tensor:
    """Lower bounds (batch, rivals) of the margins on the balls, estimates as the norms are; rivals: (batch, rivals)."""
    point = sources.point
    loss = sources.loss(margin_rows(y, rivals, point.network.classes)).on(sources.radius)
    return margins_of(point.evaluation.logits, y, rivals) - loss


def sparsity_loss(sources: LinearisedOnBalls) -> Tensor:
    """Mean over all units, and the batch, of how far pre-activations are from where units are constant on the balls.

    That is max(upper - first kink, 0) of an activation that is constant below its first kink, as ReLU is, and
    SATURATION max(last kink - lower, 0) of one that is constant above its last; 0 for a network of neither.
    """
    network, evaluation = sources.point.network, sources.point.evaluation
    total, units = evaluation.logits.new_zeros(()), 0
    for layer in sources.layers:
        op, target = network.nodes[layer].op, pre_activation(network, layer)
        units += network.nodes[layer].size
        if not isinstance(op, Activation) or not op.kinks:
            continue
        unit = _unit(network, target)
        z = evaluation.values[target].flatten(1)
        below, above = (_constant_towards(op, end) for end in (-math.inf, math.inf))
        if below:
            total = total + unit * (z + sources.high[target] - min(op.kinks)).clamp(min=0.0).sum(1).mean()
        if above:
            total = total + unit * SATURATION * (max(op.kinks) - z - sources.low[target]).clamp(min=0.0).sum(1).mean()
    return total / max(units, 1)


def _unit(network: Network, target: int) -> Tensor | float:
    """What a pre-activation is counted in: the values in front of one common scale, as learned thresholds have it."""
    op = network.nodes[target].op
    return 1.0 / op.weight.abs().sum() if isinstance(op, Scale) and op.weight.numel() == 1 else 1.0


def _constant_towards(op: Activation, end: float) -> bool:
    """Whether a piecewise linear activation is constant towards -inf or inf."""
    return op.piecewise_linear and any(
        point.abscissa == end and point.low == point.high == 0.0 for point in op.slope.critical_points
    )
