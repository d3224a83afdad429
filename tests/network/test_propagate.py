"""Tangents and cotangents against autograd; interval adjoints against every slope in the interval."""

from __future__ import annotations

import pytest
import torch

from certify_cli.network.evaluate import evaluate
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import (
    Slope,
    interval_vjp,
    jvp,
    nonlinear_nodes,
    pre_activation,
    pre_activations,
    vjp,
)
from tests.networks import SMOOTH, points


@pytest.mark.parametrize("name", SMOOTH)
def test_pull_is_the_gradient(name: str) -> None:
    network = SMOOTH[name]
    x = points(network, 4)
    found = EvaluatedPoints(network, x).gradients
    gradients, error = found.value, found.error
    y = EvaluatedPoints(network, x).prediction
    x = x.requires_grad_(True)
    out = network(x)
    for i in range(network.classes):
        margin = out[torch.arange(4), y] - out[:, i]
        (oracle,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
        distance = (gradients[:, i] - oracle).flatten(1).norm(dim=1)
        assert (distance <= error[:, i] * 2 + 1e-14).all()
    assert (error < 1e-10).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_push_gives_the_jacobian_of_every_head(name: str) -> None:
    network = SMOOTH[name]
    x = points(network, 1)
    found = evaluate(network, x)
    slopes = {
        k: Slope(network.nodes[k].op.slope(found.values[pre_activation(network, k)])) for k in nonlinear_nodes(network)
    }
    size = network.nodes[0].size
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *network.input_shape)
    images = jvp(network, 0, basis, slopes)
    inner = x.clone().requires_grad_(True)
    values = network.values(inner)
    assert set(images) == set(pre_activations(network))
    for target, vectors in images.items():
        flat = values[target].flatten(1)[0]
        oracle = torch.stack([torch.autograd.grad(v, inner, retain_graph=True)[0].flatten() for v in flat])
        assert torch.allclose(vectors.value.flatten(1).T, oracle, atol=1e-12)
        assert (vectors.error < 1e-11).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_interval_adjoints_contain_the_adjoint_of_every_choice_of_slopes(name: str) -> None:
    network = SMOOTH[name]
    ranges = {k: network.nodes[k].op.slope_range for k in nonlinear_nodes(network)}
    cotangents = torch.eye(network.classes, dtype=torch.float64)
    found = interval_vjp(network, cotangents, ranges)
    assert set(found) == set(ranges)
    for _ in range(30):
        slopes = {}
        for k, (low, high) in ranges.items():
            share = torch.rand(1, *network.nodes[k].shape, dtype=torch.float64).round()
            slopes[k] = Slope(low + (high - low) * share)
        for k, vectors in vjp(network, cotangents.unsqueeze(0), slopes).items():
            if k:
                low, high = found[k]
                assert (vectors.value[0] >= low - 1e-13).all()
                assert (vectors.value[0] <= high + 1e-13).all()


def test_a_node_without_a_slope_is_cut() -> None:
    network = SMOOTH["three layers, softplus"]
    first = nonlinear_nodes(network)[0]
    tangent_expansions = torch.ones(1, *network.input_shape, dtype=torch.float64)
    assert set(jvp(network, 0, tangent_expansions, {})) == {pre_activation(network, first)}
    found = vjp(network, torch.eye(3, dtype=torch.float64).unsqueeze(0), {})
    assert torch.count_nonzero(found[0].value) == 0
