"""Where a search takes ranges from columns of the linearised network, and how: decided by predicted costs alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.columns import ColumnLimits, bending_radius
from certify_cli.bounds.relaxation.intermediate_bounds import RangeLimits, ball_cost, range_cost
from certify_cli.efforts import BallSearchLimits
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activations, vjp_cost
from certify_cli.network.row_norms import columns_cost

COSTLY, SEVERAL = 1e10, 2.0
"""Floating-point operations for the rows of a ball from which on columns are thought of; they may cost as much as the
rows of so many balls: a search tries more, and asks for fewer rows afterwards."""
ROW_PART = 0.6
"""Where rows are dear, those of pre-activations are asked for up to this part of the way through the network, by the
cost of a row: there a row costs less than the column that it may spare."""
FEW = 75
"""Where ranges come from columns, the units that bend on the first ball to first order take as much as so many columns
through the whole network."""
MOST_PART = 0.35
"""Where rows are dear as well, no ball is tried on which to first order columns would take this part of what they may:
by then they take all of it, as ranges are wider than to first order."""
COLUMN_STRIDE, DEAR_STRIDE = 2.5, 3.0
"""Largest ratio of the next radius to the last one there: where ranges run away, a ball costs most. Where rows are dear
as well, the first ball is smaller than the largest one by that much, and seldom fails."""
CLIMB = 16.0
"""The same where no ball can have columns, which begins with so many times the certified radius."""
COLUMN_TOLERANCE, DEAR_TOLERANCE = 2e-2, 5e-2
"""The relative accuracy where ranges come from columns, and where rows are dear as well: each ball costs much."""


def column_limits(model_bounds: ModelBounds) -> ColumnLimits | None:
    """What the columns of units that bend on a ball may take; None where columns do not pay.

    They pay if those of the linearised network, once a sample, cost less than the rows of all units on a few balls, and
    if units are straight but for kinks: units that bend everywhere would each need a column.
    """
    network, limits = model_bounds.network, model_bounds.effort.ball_search
    ops = [network.nodes[k].op for k in nonlinear_nodes(network)]
    rows = ball_cost(network)
    if rows < COSTLY or any(isinstance(op, Activation) and not op.piecewise_linear for op in ops):
        return None
    if columns_cost(network) > min(limits.column_operations, SEVERAL * rows):
        return None
    return ColumnLimits(limits.bend_operations, model_bounds.memory)


def rows_are_dear(network: Network, limits: BallSearchLimits) -> bool:
    """Whether some pre-activation has more units than the effort can bound one by one."""
    return any(range_cost(network, target) > limits.range_operations for target in pre_activations(network)[:-1])


def range_limits(model_bounds: ModelBounds, point: EvaluatedPoints, radius: Tensor) -> RangeLimits:
    """What the ranges on balls of `radius` (batch,) may cost: columns only where, to first order, they suffice."""
    network, limits = point.network, model_bounds.effort.ball_search
    columns = column_limits(model_bounds)
    if columns is None or not bool((radius <= bending_radius(point, MOST_PART * columns.operations)).all()):
        return RangeLimits(limits.range_operations)
    if not rows_are_dear(network, limits):
        return RangeLimits(limits.range_operations, columns=columns)
    return RangeLimits(limits.range_operations, ROW_PART * vjp_cost(network, len(network.nodes) - 1), columns)


@dataclass(frozen=True)
class BallPlan:
    """How balls are tried whose ranges come from columns. Tensors (batch,).

    start: the first ones.   ceiling: radii beyond which none is tried, or None.   tolerance, stride: of the search.
    """

    start: Tensor
    ceiling: Tensor | None
    tolerance: float
    stride: float


def ball_plan(columns: ColumnLimits, model_bounds: ModelBounds, point: EvaluatedPoints, floor: Tensor) -> BallPlan:
    """The plan of a search; floor (batch,): radii that are certified.

    Where units that have to bend on every ball take all that columns may, the search climbs from the certified radius,
    without columns.
    """
    network = point.network
    dear = rows_are_dear(network, model_bounds.effort.ball_search)
    few = FEW * vjp_cost(network, len(network.nodes) - 1)
    found = bending_radius(point, MOST_PART * columns.operations if dear else min(few, columns.operations))
    told = found.isfinite() & (found > 0)
    climb = torch.where(floor > 0, CLIMB * floor, 1.0)
    if not bool(told.all()):
        return BallPlan(torch.where(told, found, climb), None, DEAR_TOLERANCE, CLIMB)
    if dear:
        return BallPlan(found / DEAR_STRIDE, found, DEAR_TOLERANCE, DEAR_STRIDE)
    return BallPlan(found, None, COLUMN_TOLERANCE, COLUMN_STRIDE)
