"""Slopes of a relaxation chosen for one row, where the linear bound is largest: gradient ascent (alpha-CROWN's idea).

`backward` takes for every neuron the lines that are nearest at the sample, whatever the row. Any slopes are as good a
proof, and on fixed ranges the bound is concave in those of each layer: with d the point of the ball where the
linearised row is least, and t the offset at which the line touches,  d/ds_l = v_l (D_l - t_l). Nothing here is a bound
but the loss that `optimised_loss` returns, which `backward` proves for the slopes found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, activation_on_range
from certify_cli.bounds.relaxation.backward import LinearRelaxation, RelaxedNetwork, pulled_back
from certify_cli.bounds.relaxation.supporting_lines import SlopeTable
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.linear_forms import Forms, WholeForms
from certify_cli.network.propagate import nonlinear_nodes, offsets, pre_activation
from certify_cli.numerics.choose import either
from certify_cli.numerics.momentum import RATE, SLOPE_STEP, MomentumAscent, adjoint_sizes, ascend
from certify_cli.numerics.rounding import TINY
from certify_cli.numerics.trees import Batched

COPIES = 16
"""An estimate of the numbers that an ascent keeps for each neuron and row."""
SHORTER, LONGER = 0.5, 1.4
"""Factors of the rate after a step that lowers the bound, and after one that raises it."""


def has_slopes(point: EvaluatedPoints) -> bool:
    """Whether every nonlinear node is an activation: relaxations of group maps have no slopes to choose."""
    return all(isinstance(point.network.nodes[k].op, Activation) for k in nonlinear_nodes(point.network))


def slope_tables(
    point: EvaluatedPoints, ranges: Ranges, relaxations: Mapping[int, LinearRelaxation]
) -> dict[int, SlopeTable]:
    """The slope tables of relaxed activations on the ranges; every sample is an item."""
    return {
        k: SlopeTable.of(activation_on_range(point, k, ranges), relaxation) for k, relaxation in relaxations.items()
    }


def items_at_once(network: Network, memory: int) -> int:
    """How many rows may have an ascent of their own at the same time."""
    neurons = sum(network.nodes[k].size for k in nonlinear_nodes(network))
    return max(1, memory // (8 * (COPIES * neurons + 8 * max(node.size for node in network.nodes))))


def optimised_loss(
    network: Network,
    changes: Mapping[int, Tensor],
    tables: Mapping[int, SlopeTable],
    slopes: Mapping[int, Tensor],
    cotangents: Tensor,
    steps: int,
    start: int | None = None,
) -> AffineLoss:
    """Upper bound (items, 1) of how much <cotangents, value of node `start`> falls on the items' balls.

    changes: of all nodes before `start`, (items,), as in `RelaxedNetwork`.
    tables, slopes: of all nonlinear nodes before `start`: the items' slope tables, and the slopes (sides, items, size)
    to begin with.   cotangents: (items, *shape of the node).   start: the logits unless given.
    """
    radius = changes[0]
    problem = _Problem(network, radius, tables, WholeForms(cotangents.unsqueeze(1)), start)
    state = problem.at(slopes)
    variables = {
        k: MomentumAscent(slopes[k], SLOPE_STEP * tables[k].scale / adjoint_sizes(v), tables[k].clamped)
        for k, v in state.adjoints.items()
    }

    def evaluate(before: _State) -> _State:
        return problem.at(dict(slopes) | {k: variable.value for k, variable in variables.items()})

    def judge(before: _State, after: _State) -> tuple[Tensor, Tensor]:
        better = after.value > before.value
        return better, either(better, LONGER, SHORTER)

    rate = torch.full_like(radius, RATE)
    states = ascend(variables, state, steps, evaluate, lambda s: s.gradient, judge, rate)
    last = deque(chain([state], states), maxlen=1).pop()
    best = {k: table.lines(last.slopes[k]) for k, table in tables.items()}
    return RelaxedNetwork(network, best, changes).loss(problem.rows, start)


@dataclass(frozen=True, eq=False)
class _State(Batched, along={"slopes": 1, "gradient": 1}):
    """The linear bound of the items at one choice of slopes.

    value: (items,), minus the loss, an estimate.   slopes, gradient: (sides, items, size) by node.
    adjoints: (items, size) by node.
    """

    value: Tensor
    slopes: Mapping[int, Tensor]
    gradient: Mapping[int, Tensor]
    adjoints: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class _Problem:
    """The linear bound of a batch of items, as a function of the slopes of every nonlinear node."""

    network: Network
    radius: Tensor
    tables: Mapping[int, SlopeTable]
    rows: Forms
    start: int | None

    def at(self, slopes: Mapping[int, Tensor]) -> _State:
        lines = {k: e.lines(slopes[k]) for k, e in self.tables.items()}
        last = len(self.network.nodes) - 1 if self.start is None else self.start
        v: dict[int, Tensor] = {}

        def arrived(index: int, forms: Forms) -> None:
            v[index] = forms.whole().values[:, 0].flatten(1)

        at_input = pulled_back(self.network, lines, self.rows, last, arrived, lambda index, size: None)
        inputs = self.network.nodes[0].size
        g = self.radius.new_zeros(len(self.radius), inputs) if at_input is None else at_input.whole().values.flatten(1)
        size = g.norm(dim=1)
        value = -size * self.radius
        used, touch, left = {}, {}, {}
        for k, adjoint in v.items():
            used[k] = lines[k].used(adjoint)
            constant, touch[k] = self.tables[k].needed(adjoint < 0, used[k])
            value = value - (adjoint.abs() * constant).sum(1)
            left[k] = torch.where(adjoint < 0, constant, -constant)
        d = -g * (self.radius / size.clamp(min=TINY)).unsqueeze(1)
        moved = offsets(self.network, d, used, left, self.start)
        gradient = {}
        for k, adjoint in v.items():
            slope = adjoint * (moved[pre_activation(self.network, k)] - touch[k])
            gradient[k] = torch.stack([slope * (adjoint >= 0), slope * (adjoint < 0)])
        return _State(value.nan_to_num(nan=-torch.inf), slopes, gradient, v)
