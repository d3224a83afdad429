"""Where balls whose ranges come from columns begin, and where they end."""

from __future__ import annotations

import pytest
import torch

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.columns import ColumnLimits, bending_radius, column_cost
from certify_cli.certificates import column_plan
from certify_cli.certificates.column_plan import CLIMB, DEAR_STRIDE, MOST_PART, ball_plan, column_limits
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import pre_activations, vjp_cost
from tests.networks import mlp, points

FLOOR = torch.tensor([1e-3, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("dear", [False, True])
def test_balls_begin_where_few_columns_are_needed(dear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where rows are dear none is tried beyond the radius at which columns would not suffice."""
    monkeypatch.setattr(column_plan, "rows_are_dear", lambda network, limits: dear)
    network = mlp((6, 9, 9, 9, 3), "relu", seed=2)
    with exact_kernels():
        model_bounds, point = ModelBounds(network), EvaluatedPoints(network, points(network, 2))
        monkeypatch.setattr(column_plan, "FEW", 4)
        operations = 4 * vjp_cost(network, len(network.nodes) - 1)
        columns = ColumnLimits(40 * column_cost(network, pre_activations(network)[0]), 2**30)
        plan = ball_plan(columns, model_bounds, point, FLOOR)
        few, most = (bending_radius(point, part) for part in (operations, MOST_PART * columns.operations))
    assert bool((few < most).all())
    if dear:
        assert plan.ceiling is not None
        assert torch.equal(plan.ceiling, most)
        assert torch.equal(plan.start, most / DEAR_STRIDE)
    else:
        assert plan.ceiling is None
        assert torch.equal(plan.start, few)


@pytest.mark.parametrize("operations", [0.0, torch.inf])
def test_a_radius_that_says_nothing_is_no_ceiling(operations: float) -> None:
    """Units at a kink bend on every ball, and with means without end none ever is too large: the search climbs."""
    network = mlp((6, 9, 9, 9, 3), "relu", seed=2)
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 2))
        if operations == 0.0:  # the first units are put at their kinks
            point.evaluation.values[1][:, 0] = 0.0
        plan = ball_plan(ColumnLimits(operations, 2**30), ModelBounds(network), point, FLOOR)
    assert plan.ceiling is None
    assert plan.start.tolist() == [CLIMB * 1e-3, 1.0]


def test_small_networks_have_no_use_for_columns() -> None:
    assert column_limits(ModelBounds(mlp((6, 9, 9, 3), "relu"))) is None
