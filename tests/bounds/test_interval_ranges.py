"""No sampled perturbation moves a pre-activation out of its range, on any network, at any radius and effort."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges, pre_activation_bounds
from certify_cli.efforts import EFFORTS
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network
from certify_cli.network.propagate import interval_jvp, nonlinear_nodes, pre_activation, pre_activations
from tests.adversary import on_the_sphere, towards_extremes
from tests.networks import PIECEWISE, SMOOTH, activation_first, conv_net, mlp, points, pooled_net

NETWORKS = SMOOTH | PIECEWISE | {"max pooling": pooled_net(), "activation first": activation_first()}


def offsets(network: Network, x: Tensor, d: Tensor) -> dict[int, Tensor]:
    before, after = network.values(x), network.values(x + d)
    return {target: (after[target] - before[target]).flatten(1) for target in pre_activations(network)}


@pytest.mark.smoke
@pytest.mark.parametrize("effort", ["fast", "normal", "max"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_sampled_offset_leaves_its_range(name: str, effort: str) -> None:
    network = NETWORKS[name]
    with exact_kernels():
        x = points(network, 16)
        point, weights = EvaluatedPoints(network, x), ModelBounds(network, EFFORTS[effort]).weights
        for radius in (0.0, 1e-9, 0.03, 1.0, 30.0):
            ranges = interval_ranges(point, weights, torch.full((16,), radius, dtype=torch.float64))
            for seed in range(12):
                d = on_the_sphere(network, 16, seed) if seed % 3 == 0 else towards_extremes(network, x, seed)
                moved = offsets(network, x, d * radius * (1 - 1e-14))
                for target, offset in moved.items():
                    slack = 1e-13 * (1 + offset.abs() + point.evaluation.values[target].flatten(1).abs())
                    assert (offset >= ranges.low[target] - slack).all()
                    assert (offset <= ranges.high[target] + slack).all()
                    assert (offset.norm(dim=1) <= ranges.norm[target] + slack.norm(dim=1)).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_ranges_grow_with_the_ball_and_vanish_with_it(name: str) -> None:
    network = NETWORKS[name]
    with exact_kernels():
        point, weights = EvaluatedPoints(network, points(network, 8)), ModelBounds(network).weights
        found = [
            interval_ranges(point, weights, torch.full((8,), r, dtype=torch.float64)) for r in (0.0, 1e-6, 1e-5, 1.0)
        ]
    for target in pre_activations(network):
        assert float(found[0].norm[target].max()) < 1e-250
        for small, large in pairwise(found):
            slack = 1e-12 * large.high[target].abs().amax()  # rounding of values near saturation
            assert (small.low[target] >= large.low[target] - slack).all()
            assert (small.high[target] <= large.high[target] + slack).all()
        moves = found[1].norm[target] > 1e-200  # behind units that are all off nothing does
        assert moves.any()
        ratio = (found[2].norm[target] / found[1].norm[target])[moves]
        assert ((ratio > 9) & (ratio < 11)).all()  # to first order they are proportional to the radius


def test_the_first_layer_is_exact() -> None:
    network = mlp((6, 9, 3))
    weight = network.nodes[1].op.weight  # type: ignore[attr-defined]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 3))
        ranges = interval_ranges(
            point, ModelBounds(network).weights, torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
        )
    exact = torch.tensor([[0.1], [1.0], [7.0]], dtype=torch.float64) * weight.norm(dim=1)
    assert (ranges.high[1] >= exact * (1 - 1e-15)).all()
    assert torch.allclose(ranges.high[1], exact, rtol=1e-12)
    assert torch.equal(ranges.low[1], -ranges.high[1])


def test_a_saturated_unit_moves_no_further_than_its_limit() -> None:
    """tanh at +4 can fall by 2 and hardly rise: one-sided ranges, far narrower than slopes give."""
    b = Builder((1,))
    one = torch.ones(1, 1, dtype=torch.float64)
    h = b.add("act", from_name("tanh"), b.add("fc0", Dense(one), 0))
    network = b.build(b.add("fc1", Dense(torch.tensor([[1.0], [-1.0]], dtype=torch.float64)), h))
    with exact_kernels():
        point = EvaluatedPoints(network, torch.tensor([[4.0]], dtype=torch.float64))
        ranges = interval_ranges(point, ModelBounds(network).weights, torch.tensor([5.0], dtype=torch.float64))
    rise = 1 - math.tanh(4.0)
    fall = math.tanh(-1.0) - math.tanh(4.0)
    last = len(network.nodes) - 1
    assert ranges.high[last][0, 0] == pytest.approx(math.tanh(9.0) - math.tanh(4.0), rel=1e-9)
    assert 0 < ranges.high[last][0, 0] <= rise * (1 + 1e-9)
    assert ranges.low[last][0, 0] == pytest.approx(fall, rel=1e-9)
    assert ranges.high[last][0, 1] == pytest.approx(-fall, rel=1e-9)


def test_convolutions_written_out_or_walked_agree() -> None:
    """Without matrices (a budget of nothing) the intervals go through |W| on foot: the same or wider, never wrong."""
    from certify_cli.bounds.global_bounds.expansion import weight_blocks
    from certify_cli.efforts import Budget

    network = conv_net("tanh")
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 6))
        radius = torch.full((6,), 0.2, dtype=torch.float64)
        written = interval_ranges(point, weight_blocks(network, Budget(1e12, 1e12)), radius)
        walked = interval_ranges(point, weight_blocks(network, Budget(0.0, 0.0)), radius)
    for target in pre_activations(network):
        assert (walked.high[target] >= written.high[target] * (1 - 1e-12)).all()
        assert walked.norm[target].mean() <= written.norm[target].mean() * 2


def test_interval_push_holds_every_image() -> None:
    network = NETWORKS["residual"]
    with exact_kernels():
        for source in (0, *nonlinear_nodes(network)):
            node = network.nodes[source]
            low = -torch.rand(5, *node.shape, dtype=torch.float64)
            high = torch.rand(5, *node.shape, dtype=torch.float64) - 0.2
            high = torch.maximum(high, low)
            found = interval_jvp(network, source, low, high, pre_activations(network))
            matrices = ModelBounds(network).weights
            for target, (bottom, top) in found.items():
                for _ in range(20):
                    v = low + (high - low) * torch.randint(2, low.shape)
                    image = v.flatten(1) @ matrices[target, source].matrix.T
                    assert (image >= bottom.flatten(1) - 1e-14).all()
                    assert (image <= top.flatten(1) + 1e-14).all()


def test_samples_that_are_no_numbers_stay_alone() -> None:
    """NaN and overflow widen their own ranges and nobody else's, and an infinite ball is no error."""
    for network in (NETWORKS["convolutional"], NETWORKS["residual, gelu"], NETWORKS["max pooling"]):
        with exact_kernels():
            x = points(network, 4)
            weights = ModelBounds(network).weights
            radius = torch.tensor([0.1, 0.1, torch.inf, 0.1], dtype=torch.float64)
            alone = interval_ranges(EvaluatedPoints(network, x), weights, radius)
            spoilt = x.clone()
            spoilt[1], spoilt[3] = torch.nan, 1e308
            beside = interval_ranges(EvaluatedPoints(network, spoilt), weights, radius)
            point = EvaluatedPoints(network, spoilt)
            for k in nonlinear_nodes(network):
                low, high = pre_activation_bounds(point, beside, k)
                assert not low.isnan().any()
                assert not high.isnan().any()
                assert low[1].eq(-torch.inf).all()
                assert high[1].eq(torch.inf).all()
        for target in pre_activations(network):
            assert torch.allclose(beside.low[target][0], alone.low[target][0], rtol=1e-12)
            for part in (beside.low, beside.high, beside.norm):
                assert not part[target].isnan().any()
            assert (beside.low[target] <= 0).all()
            assert (beside.high[target] >= 0).all()


def test_pre_activations_stand_around_the_sample() -> None:
    network = NETWORKS["residual"]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 3))
        ranges = interval_ranges(point, ModelBounds(network).weights, torch.full((3,), 0.1, dtype=torch.float64))
        for k in nonlinear_nodes(network):
            low, high = pre_activation_bounds(point, ranges, k)
            z = point.evaluation.values[pre_activation(network, k)]
            assert low.shape == high.shape == z.shape
            assert (low <= z + ranges.low[pre_activation(network, k)].reshape(z.shape)).all()
            assert (high >= z + ranges.high[pre_activation(network, k)].reshape(z.shape)).all()
