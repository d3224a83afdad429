"""No Hessian at a point of the ball exceeds its bounds, which shrink with the ball and never exceed the global ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.hessian import BallCurvature
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.efforts import EFFORTS
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from tests.adversary import on_the_sphere
from tests.networks import SMOOTH, activation_first, mlp, points

NETWORKS = {name: net for name, net in SMOOTH.items() if name != "linear"} | {"activation first": activation_first()}


def on_ball(model_bounds: ModelBounds, point: EvaluatedPoints, pairs: Tensor, radius: float) -> BallCurvature:
    radii = torch.full((len(point.x),), radius, dtype=torch.float64)
    return BallCurvature(
        model_bounds, point, interval_ranges(point, model_bounds.weights, radii), pairs, torch.arange(len(radii))
    )


def some_pairs(network: Network, count: int) -> Tensor:
    first = torch.arange(count) % network.classes
    return torch.stack([first, (first + 1 + torch.arange(count) % (network.classes - 1)) % network.classes], dim=1)


def hessians(network: Network, x: Tensor, pairs: Tensor) -> Tensor:
    """(batch, inputs, inputs) of z_a - z_b, each sample with its own pair, by double backward."""
    x = x.flatten(1).requires_grad_(True)
    out = network(x.reshape(-1, *network.input_shape))
    margin = out.gather(1, pairs[:, :1]) - out.gather(1, pairs[:, 1:])
    (gradient,) = torch.autograd.grad(margin.sum(), x, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return torch.stack(rows, dim=1)


SLOW = {
    ("convolutional", "fast"),
    ("convolutional, mish", "fast"),
    ("convolutional, mish", "max"),
    ("batch norms, silu", "fast"),
}
"""What takes long and has a like of it among the others."""
EACH = [
    pytest.param(name, effort, marks=pytest.mark.slow if (name, effort) in SLOW else ())
    for name in NETWORKS
    for effort in ("fast", "max")
]


@pytest.mark.parametrize(("name", "effort"), EACH)
def test_no_hessian_on_the_ball_exceeds_the_bounds(name: str, effort: str) -> None:
    network = NETWORKS[name]
    model_bounds = ModelBounds(network, EFFORTS[effort])
    count = 6
    pairs = some_pairs(network, count)
    x = points(network, count, spread=1.0)
    inputs = network.nodes[0].size
    for radius in (1e-6, 0.1, 0.7, 5.0):
        with exact_kernels():
            found = on_ball(model_bounds, EvaluatedPoints(network, x), pairs, radius)
            lower, upper = found.lower, found.upper
        for seed in range(6 if inputs > 20 else 12):
            share = (seed % 3) / 2  # the centre, half way, the sphere
            there = x + radius * share * on_the_sphere(network, count, seed)
            values = torch.linalg.eigvalsh(hessians(network, there, pairs))
            assert (-values[:, 0] <= lower + 1e-12).all()
            assert (values[:, -1] <= upper + 1e-12).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_grow_with_the_ball_up_to_the_global_one(name: str) -> None:
    network = NETWORKS[name]
    model_bounds = ModelBounds(network, EFFORTS["max"])
    point, pairs = EvaluatedPoints(network, points(network, 8)), some_pairs(network, 8)
    with exact_kernels():
        everywhere = model_bounds.curvature_pairs.rows(pairs[:, 0]).gather(1, pairs[:, 1:]).squeeze(1)
        bounds = [on_ball(model_bounds, point, pairs, r).lower for r in (0.0, 0.01, 0.1, 1.0, 1e6, torch.inf)]
    for small, large in pairwise(bounds):
        assert (small <= large * (1 + 1e-3)).all()  # eigenvalues are proved to a relative 1e-3 or better
    assert (bounds[-1] <= everywhere).all()
    assert (bounds[0] < 0.9 * everywhere).any()


def test_on_a_tiny_ball_two_layers_have_the_hessian_itself() -> None:
    """At radius 0 the bound is lambda_max of the signed part of the one Hessian there is."""
    network = mlp((6, 12, 3), "tanh", seed=7)
    model_bounds = ModelBounds(network, EFFORTS["max"])
    pairs = some_pairs(network, 5)
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 5))
        bound = on_ball(model_bounds, point, pairs, 0.0).lower
    first, last = network.nodes[1].op.weight, network.nodes[3].op.weight  # type: ignore[attr-defined]
    z = point.evaluation.values[1].tanh()
    bends = -2 * z * (1 - z.square())
    w = (-(last[pairs[:, 0]] - last[pairs[:, 1]]) * bends).clamp(min=0.0)
    oracle = torch.linalg.eigvalsh(first.T @ (w.unsqueeze(2) * first))[:, -1]
    assert (bound >= oracle * (1 - 1e-12)).all()
    assert (bound <= oracle * (1 + 1e-3)).all()


def test_samples_that_are_no_numbers_keep_the_global_bound_to_themselves() -> None:
    network = NETWORKS["residual, gelu"]
    model_bounds = ModelBounds(network, EFFORTS["max"])
    x, pairs = points(network, 4), some_pairs(network, 4)
    with exact_kernels():
        alone = on_ball(model_bounds, EvaluatedPoints(network, x), pairs, 0.1).lower
        spoilt = x.clone()
        spoilt[1], spoilt[2] = torch.nan, 1e308
        beside = on_ball(model_bounds, EvaluatedPoints(network, spoilt), pairs, 0.1).lower
    assert beside.isfinite().all()
    assert torch.allclose(alone[[0, 3]], beside[[0, 3]], rtol=1e-3)
    assert (beside[1] >= alone[1]).all()
