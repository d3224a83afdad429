"""The published dual certificate (CRC) as it was run, over-claiming; and curvcert's dual on the same samples.

max over eta of min over d of ||d||^2/2 + eta f(x+d) is at most half the squared distance to f = 0, if the inner
minimum is one: at any other point the same expression is too large. The published code bisects eta 20 times, takes 30
majorise-minimise steps for each, moves eta once more after the last of them, looks at no residual, and asks only about
the runner-up.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.efforts import EFFORTS
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from tests.networks import mlp, points
from tests.soundness.common import certify, dense_stack, every_radius, flips, tensor


def _published(network: Network, x: Tensor, outer: int = 20, inner: int = 30) -> tuple[float, float]:
    """The radius as published, and by the eta that the last inner steps were taken with."""
    logits = network(x)[0]
    y, runner_up = logits.topk(2).indices.tolist()
    with exact_kernels():
        pairs = ModelBounds(network).curvature_pairs
        lower = float(pairs.rows(torch.tensor([y]))[0, runner_up])
        upper = float(pairs.columns(torch.tensor([y]))[0, runner_up])

    def margin(at: Tensor) -> tuple[float, Tensor]:
        at = at.detach().requires_grad_(True)
        z = network(at)[0]
        value = z[y] - z[runner_up]
        return float(value.detach()), torch.autograd.grad(value, at)[0]

    low, high, moved, kept = 0.0, 1 / lower, x, 0.0
    eta = high / 2
    for _ in range(outer):
        for _ in range(inner):
            moved = (x - eta * margin(moved)[1] + eta * upper * moved) / (1 + eta * upper)
        value, kept = margin(moved)[0], eta
        low, high = (eta, high) if value > 0 else (low, eta)
        eta = (low + high) / 2
    square = float((moved - x).square().sum())
    return math.sqrt(square + 2 * eta * value), math.sqrt(max(0.0, square + 2 * kept * value))


def _attacked(network: Network, x: Tensor) -> Tensor:
    """The nearest point with another prediction that the search finds."""
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        found = certify(network, x, "dual")
        return nearest_attacks(point, found.near, found.radius, EFFORTS["max"])[0]


def test_the_runner_up_only() -> None:
    """Margins 0.4 and 0.7, the second rival's gradient a hundred times the first's."""
    network = dense_stack(
        (tensor([0.1, 0.0], [0.0, 10.0]), None),
        from_name("tanh"),
        (tensor([0.0, 0.0], [-1.0, 0.0], [0.0, 1.0]), tensor(0.9, 0.5, 0.2)),
    )
    x = torch.zeros(1, 2, dtype=torch.float64)
    published, steady = _published(network, x)
    for radius in (published, steady):
        assert flips(network, x, tensor([0.0, 0.087]), radius)
    assert all(0 < radius < 0.087 for radius in every_radius(network, x).values())
    assert int(certify(network, x, "dual").rival) == 2


@pytest.mark.parametrize(("seed", "activation"), [(1, "softplus:4"), (7, "softplus:4"), (7, "tanh")])
def test_eta_moved_after_the_last_inner_solve(seed: int, activation: str) -> None:
    """Every inner problem is solved, and yet: the last d is the minimum for another eta than it is used with."""
    network = mlp((4, 12, 2), activation, seed=seed, gain=2.0)
    x = points(network, 1, seed=seed)
    moved = _attacked(network, x)
    distance = float((moved - x).norm())
    published, steady = _published(network, x, outer=3, inner=200)
    assert flips(network, x, moved, published)
    assert steady < distance  # with its own eta the same point is a proof
    assert all(0 < radius < distance for radius in every_radius(network, x).values())


def test_eta_moved_near_the_boundary_with_all_published_steps() -> None:
    """Where the margin is small, 20 halvings leave eta far above the best one: the claim is nine times the distance."""
    network = dense_stack(
        (tensor([1.0]), None), from_name("softplus"), (tensor([-1.0], [0.0]), tensor(1e-8, -math.log(2.0)))
    )
    x = tensor([0.0])
    published, steady = _published(network, x)
    moved = tensor([2.1e-8])
    assert published > 9 * float(moved)
    assert flips(network, x, moved, published)
    assert steady < 2e-8
    assert all(0 < radius <= 2.1e-8 for radius in every_radius(network, x).values())


def test_inner_steps_that_have_not_arrived() -> None:
    """A steep unit far from the sample makes M+ large and every step short: 600 of them go nowhere, and no residual
    says so. At d near 0 the expression is near sqrt(2 f / M-), whatever the gradient is."""
    network = dense_stack(
        (tensor([1.0, 0.0], [0.0, 100.0]), None),
        from_name("softplus"),
        (tensor([-1.0, 1.0], [0.0, 0.0]), tensor(0.0, -3.0)),
    )
    x = tensor([0.0, -1.0])
    boundary = math.log(math.expm1(3.0))  # softplus(boundary) = 3
    for radius in _published(network, x):
        assert flips(network, x, tensor([boundary + 1e-6, -1.0]), radius)
    assert all(0 < radius <= boundary for radius in every_radius(network, x).values())
