"""Promised attacks exist: the remainder with reversed signs never promises what a replay does not find."""

from __future__ import annotations

import pytest
import torch

from certify_cli.attacks.replay import replayed_along
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.local_attack import certified_local_attack
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from tests.networks import CURVED, SMOOTH, mlp, points
from tests.soundness.common import certify

NEAR = {"gentle": mlp((6, 12, 9, 3), "softplus:1", seed=3), "bends": mlp((6, 12, 9, 3), "tanh", seed=5)}


def near_the_boundary(network: Network) -> torch.Tensor:
    """Twelve samples that a small step takes to another class: bisected between points of two classes."""
    x = 3 * points(network, 400, seed=3)
    classes = network(x).argmax(1)
    first, second = x[classes == classes.mode().values][:12], x[classes != classes.mode().values][:12]
    count = min(len(first), len(second))
    first, second = first[:count], second[:count]
    for _ in range(5):
        middle = 0.5 * (first + second)
        same = (network(middle).argmax(1) == network(first).argmax(1)).unsqueeze(1)
        first, second = torch.where(same, middle, first), torch.where(same, second, middle)
    return first


def along_the_gradient(
    network: Network, point: EvaluatedPoints, radius: torch.Tensor, rival: torch.Tensor
) -> torch.Tensor:
    """The margin towards `rival` at `radius` along -g."""
    g = point.gradients.value[torch.arange(len(rival)), rival].flatten(1)
    d = (-g / g.norm(dim=1, keepdim=True) * radius.unsqueeze(1)).reshape(point.x.shape)
    logits = network(point.x + d)
    every = torch.arange(len(rival))
    return logits[every, point.prediction] - logits[every, rival]


@pytest.mark.parametrize("jacobians", [False, True])
@pytest.mark.parametrize("name", [*NEAR, "three layers, gelu", "residual", "shared heads"])
def test_every_promise_is_kept_where_it_is_made(name: str, jacobians: bool) -> None:
    network = NEAR.get(name) or CURVED[name]
    with exact_kernels():
        point = EvaluatedPoints(network, near_the_boundary(network) if name in NEAR else points(network, 12))
        radius, rival = certified_local_attack(ModelBounds(network), point, jacobians)
        made = radius.isfinite()
        if name in NEAR:
            assert float(made.double().mean()) > 0.4  # not idle
        if bool(made.any()):
            part = point.at(made.nonzero()[:, 0])
            margin = along_the_gradient(network, part, radius[made], rival[made])
            assert bool((margin <= 1e-12).all())
            _, norm = replayed_along(part, -part.gradients.value[torch.arange(len(part.x)), rival[made]], radius[made])
            assert torch.allclose(norm, radius[made], rtol=1e-6)


def test_jacobians_promise_more_and_nearer() -> None:
    network = NEAR["gentle"]
    with exact_kernels():
        point, model_bounds = EvaluatedPoints(network, near_the_boundary(network)), ModelBounds(network)
        plain, _ = certified_local_attack(model_bounds, point, False)
        sharp, _ = certified_local_attack(model_bounds, point, True)
    both = plain.isfinite() & sharp.isfinite()
    assert int(sharp.isfinite().sum()) >= int(plain.isfinite().sum())
    assert bool((sharp[both] <= 1.02 * plain[both]).all())


def test_the_method_promises_no_less_than_curvature() -> None:
    for name in ("three layers, softplus", "residual, gelu"):
        network = SMOOTH[name]
        x = points(network, 10)
        one, other = certify(network, x, "curvature"), certify(network, x, "local")
        assert bool((other.attack <= one.attack)[one.attack.isfinite()].all())
        assert bool((other.attack > other.radius)[other.attack.isfinite()].all())
