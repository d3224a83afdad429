"""Where a search takes ranges from columns of the linearised network, and how: decided by predicted costs alone."""

from __future__ import annotations

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.relaxation.intermediate_bounds import ball_cost, range_cost
from certify_cli.efforts import BallSearchLimits
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activations, vjp_cost
from certify_cli.network.row_norms import columns_cost

COSTLY, SEVERAL = 1e10, 2.0
"""Floating-point operations for the rows of a ball from which on columns are thought of; they may cost as much as the
rows of so many balls: a search tries more, and asks for fewer rows afterwards."""
LIVE = 4
"""An estimate of the number of nodes whose columns are held at once."""
FEW = 150
"""Where ranges come from columns, so many units bend on the first ball, to first order. Where rows are dear as well, no
ball is tried on which half of the columns would be needed to first order: by then more are needed than there are."""
COLUMN_STRIDE, DEAR_STRIDE = 3.0, 4.0
"""Largest ratio of the next radius to the last one there: where ranges run away, a ball costs most. Where rows are dear
as well, fewer balls can be afforded, and no ball is far too large."""
COLUMN_TOLERANCE, DEAR_TOLERANCE = 1e-2, 5e-2
"""The relative accuracy where ranges come from columns, and where rows are dear as well: each ball costs much."""


def most_columns(model_bounds: ModelBounds) -> int:
    """How many units of a ball may have a column of their own; 0 where columns do not pay.

    They pay if those of the linearised network, once a sample, cost less than the rows of all units on a few balls, and
    if units are straight but for kinks: units that bend everywhere would each need a column.
    """
    network, limits = model_bounds.network, model_bounds.effort.ball_search
    ops = [network.nodes[k].op for k in nonlinear_nodes(network)]
    rows = ball_cost(network)
    if rows < COSTLY or any(isinstance(op, Activation) and not op.piecewise_linear for op in ops):
        return 0
    if columns_cost(network) > min(limits.column_operations, SEVERAL * rows):
        return 0
    widest = max(node.size for node in network.nodes)
    affordable = limits.bend_operations / vjp_cost(network, len(network.nodes) - 1)
    return int(min(affordable, model_bounds.memory / (8 * LIVE * widest)))


def rows_are_dear(network: Network, limits: BallSearchLimits) -> bool:
    """Whether some pre-activation has more units than the effort can bound one by one."""
    return any(range_cost(network, target) > limits.range_operations for target in pre_activations(network)[:-1])
