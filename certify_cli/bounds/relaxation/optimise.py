"""Better lines for one row: slopes chosen neuron by neuron where the linear bound is largest, by gradient ascent.

`backward` takes for every neuron the lines that are nearest at the sample, whatever the row. Any slopes are as good a
proof, and on fixed ranges the bound is concave in those of each layer: with d the point of the ball where the
linearised row is least, and t where the line touches,  d/ds_l = v_l (D_l - t_l).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, span
from certify_cli.bounds.relaxation.backward import LinearRelaxation, relaxation_loss
from certify_cli.bounds.relaxation.supporting_lines import SlopeTable
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, offsets, pre_activation, vjp
from certify_cli.numerics.choose import either
from certify_cli.numerics.momentum import LONGEST, RATE, SLOPE_STEP, MomentumAscent, adjoint_sizes
from certify_cli.numerics.rounding import TINY

SHORTER, LONGER = 0.5, 1.4
"""What becomes of a step after one that does not help, and after one that does."""


def has_slopes(point: EvaluatedPoints) -> bool:
    """Whether every nonlinear node is an activation: planes of group maps have no slopes to choose."""
    return all(isinstance(point.network.nodes[k].op, Activation) for k in nonlinear_nodes(point.network))


def slope_tables(
    point: EvaluatedPoints, ranges: Ranges, between: Mapping[int, LinearRelaxation]
) -> dict[int, SlopeTable]:
    """Of the nodes that are between lines on the ranges, every sample an item."""
    return {k: SlopeTable.of(span(point, k, ranges), line) for k, line in between.items()}


def optimised_loss(
    network: Network,
    radius: Tensor,
    choice: Mapping[int, SlopeTable],
    slopes: Mapping[int, Tensor],
    cotangents: Tensor,
    steps: int,
    start: int | None = None,
) -> AffineLoss:
    """How much <cotangents, value of node `start`> falls on balls of `radius` (items,): (items, 1).

    `choice` of the items, and `slopes` (sides, items, size) to begin with, for all nonlinear nodes before `start`, the
    logits unless given; cotangents (items, *shape of the node).
    """
    problem = _Problem(network, radius, choice, cotangents.unsqueeze(1), start)
    best = dict(slopes)
    most, gradient, v = problem.at(best)
    climbers = {
        k: MomentumAscent(s, SLOPE_STEP * choice[k].scale / adjoint_sizes(v[k])) for k, s in best.items() if k in v
    }
    rate = torch.full_like(most, RATE)
    for count in range(1, steps + 1):
        for k, climber in climbers.items():
            climber.step(gradient[k], (rate * (1 - (count - 1) / steps)).unsqueeze(1), count)
            climber.value = choice[k].lines(climber.value).slopes
        value, found, _ = problem.at(best | {k: c.value for k, c in climbers.items()})
        better = value > most
        rate = (rate * either(better, LONGER, SHORTER)).clamp(max=LONGEST)
        most, take = torch.maximum(value, most), better.unsqueeze(1)
        for k, climber in climbers.items():  # a step that does not help is taken back
            best[k] = climber.value = torch.where(take, climber.value, best[k])
            climber.mean = torch.where(take, climber.mean, 0.0)
            gradient[k] = torch.where(take, found[k], gradient[k])
    return relaxation_loss(network, {k: e.lines(best[k]) for k, e in choice.items()}, problem.cotangents, start)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The linear bound of a batch of items, as a function of the slopes of every nonlinear node."""

    network: Network
    radius: Tensor
    choice: Mapping[int, SlopeTable]
    cotangents: Tensor
    start: int | None

    def at(self, slopes: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """About minus the loss (items,), its gradient (sides, items, size) and the adjoints (items, size)."""
        lines = {k: e.lines(slopes[k]) for k, e in self.choice.items()}
        adjoints = vjp(self.network, self.cotangents, lines, self.start)
        v = {k: adjoints[k].value[:, 0].flatten(1) for k in lines if k in adjoints}
        g = adjoints[0].value[:, 0].flatten(1)
        size = g.norm(dim=1)
        value = -size * self.radius
        used, touch, left = {}, {}, {}
        for k, adjoint in v.items():
            used[k] = lines[k].used(adjoint)
            constant, touch[k] = self.choice[k].needed(adjoint < 0, used[k])
            value = value - (adjoint.abs() * constant).sum(1)
            left[k] = torch.where(adjoint < 0, constant, -constant)
        d = -g * (self.radius / size.clamp(min=TINY)).unsqueeze(1)
        moved = offsets(self.network, d, used, left, self.start)
        gradient = {}
        for k, adjoint in v.items():
            slope = adjoint * (moved[pre_activation(self.network, k)] - touch[k])
            gradient[k] = torch.stack([slope * (adjoint >= 0), slope * (adjoint < 0)])
        return value.nan_to_num(nan=-torch.inf), gradient, v
