"""Attackers with gradients, restarts and second derivatives never flip a prediction inside its certified ball."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from certify_cli.certificates.certificates import Certificates
from certify_cli.network.graph import Network
from tests.networks import PIECEWISE, SMOOTH, concat_net, conv_net, mlp, points, residual_net
from tests.soundness.common import certify, margins

INSIDE = 1 - 1e-9
RESTARTS = 12
STEPS = 40

SMALL = {**SMOOTH, **PIECEWISE}
EVERY_DAY = {"two layers, tanh", "three layers, gelu", "convolutional", "concatenating", "relu", "max min"}
"""One of each kind with the largest effort; all of them with -m slow."""
BIGGER = {
    "wide, tanh": mlp((40, 120, 80, 10), "tanh", seed=11),
    "wide, softplus": mlp((40, 120, 80, 10), "softplus:5", seed=12),
    "steep, sigmoid": mlp((20, 60, 10), "sigmoid", seed=13, gain=6.0),
    "deep, silu": mlp((12, 20, 20, 20, 20, 20, 5), "silu", seed=14, gain=1.2),
    "two classes, gelu": mlp((10, 30, 30, 2), "gelu_tanh", seed=15, gain=2.5),
    "sine": mlp((6, 25, 4), "sin", seed=16, gain=3.0),
    "convolutional, ten classes": conv_net("gelu", seed=17, classes=10),
    "residual, softplus": residual_net("softplus:4", seed=18, classes=6),
    "concatenating, mish": concat_net("mish", seed=19, classes=6),
}


def _onto_ball(d: Tensor, radius: Tensor) -> Tensor:
    """Every row of d (batch, n) stretched to the given norm."""
    return d * (radius / d.norm(dim=1).clamp(min=1e-300)).unsqueeze(1)


def _descend(network: Network, x: Tensor, prediction: Tensor, rival: Tensor, d: Tensor, radius: Tensor) -> Tensor:
    """The least margin z_y - z_rival that projected gradient descent over the ball finds, per row."""
    best = torch.full_like(radius, torch.inf)
    for step in range(STEPS + 1):
        d = d.detach().requires_grad_(True)
        logits = network(x + d.reshape(x.shape))
        value = (logits.gather(1, prediction[:, None]) - logits.gather(1, rival[:, None])).squeeze(1)
        best = torch.minimum(best, value.detach())
        if step < STEPS:
            (slope,) = torch.autograd.grad(value.sum(), d)
            length = radius * 0.5 / (1 + step / 4)
            moved = d.detach() - _onto_ball(slope, length)
            over = (moved.norm(dim=1) / radius).clamp(min=1.0).unsqueeze(1)
            d = moved / over
    return best


def _hessian_starts(network: Network, x: Tensor, prediction: int, rival: int, radius: float) -> Iterator[Tensor]:
    """Both ways along the eigenvectors of the margin's Hessian, and the closed form's own worst directions."""

    def margin(flat: Tensor) -> Tensor:
        logits = network(flat.reshape(1, *x.shape))[0]
        return logits[prediction] - logits[rival]

    hessian = torch.autograd.functional.hessian(margin, x.flatten())
    values, vectors = torch.linalg.eigh(hessian)
    for column in (0, 1, -1):
        direction = vectors[:, column if len(values) > 1 else 0]
        yield radius * direction
        yield -radius * direction


def _assert_holds(network: Network, x: Tensor, method: str, effort: str) -> Certificates:
    found = certify(network, x, method, effort)
    prediction = network(x).argmax(1)
    kept = ((found.radius > 0) & (found.radius < 1e100)).nonzero().squeeze(1)
    assert len(kept)
    g = torch.Generator().manual_seed(5)
    rows, starts, rivals = [], [], []
    for row in kept.tolist():
        radius = float(found.radius[row]) * INSIDE
        for rival in (i for i in range(network.classes) if i != int(prediction[row])):
            tries = [torch.randn(x[0].numel(), dtype=torch.float64, generator=g) for _ in range(RESTARTS)]
            if rival == int(found.rival[row]):
                tries += list(_hessian_starts(network, x[row], int(prediction[row]), rival, radius))
            rows += [row] * len(tries)
            rivals += [rival] * len(tries)
            starts += tries
    index, rival = torch.tensor(rows), torch.tensor(rivals)
    radius = found.radius[index] * INSIDE
    least = _descend(network, x[index], prediction[index], rival, _onto_ball(torch.stack(starts), radius), radius)
    assert float(least.min()) > 0, f"sample {int(index[least.argmin()])} flips inside its certified ball"
    attacked = ~found.attack.isnan()
    assert bool((found.attack[attacked] > found.radius[attacked]).all())
    flipped = margins(network, found.witness[attacked], prediction[attacked]).amin(1)
    assert bool((flipped < 0).all())
    distance = (found.witness - x).flatten(1).norm(dim=1)[attacked]
    assert bool((distance <= found.attack[attacked]).all())
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("name", list(SMALL))
def test_small_networks_by_lipschitz_constants(name: str) -> None:
    network = SMALL[name]
    _assert_holds(network, points(network, 4, seed=3), "lipschitz", "max")


@pytest.mark.parametrize("name", list(SMALL))
def test_small_networks(name: str) -> None:
    network = SMALL[name]
    _assert_holds(network, points(network, 4, seed=3), "auto", "normal")


@pytest.mark.parametrize("name", [n if n in EVERY_DAY else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_small_networks_with_every_effort(name: str) -> None:
    network = SMALL[name]
    _assert_holds(network, points(network, 4, seed=3), "auto", "max")


@pytest.mark.smoke
@pytest.mark.parametrize("name", list(BIGGER))
def test_bigger_networks(name: str) -> None:
    network = BIGGER[name]
    _assert_holds(network, points(network, 4, seed=4, spread=1.0), "auto", "normal")


@pytest.mark.parametrize("effort", ["fast", "normal", "max"])
@pytest.mark.parametrize("seed", range(4))
def test_shallow_networks_near_the_optimum(seed: int, effort: str) -> None:
    """Two layers of few units, where the bounds are nearly attained: a small mistake would show here first."""
    network = mlp((3, 3, 2), ("softplus", "tanh", "sigmoid", "gelu")[seed], seed=seed, gain=2.0)
    x = points(network, 12, seed=seed)
    found = _assert_holds(network, x, "auto", effort)
    prediction = network(x).argmax(1)
    far = torch.full_like(found.radius, torch.inf)
    angles = torch.nn.functional.normalize(points(network, 4000, seed=9), dim=1)
    for factor in (1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0):
        around = x.unsqueeze(1) + factor * found.radius.reshape(-1, 1, 1) * angles
        logits = network(around.reshape(-1, 3)).reshape(len(x), -1, 2)
        flips = (logits.argmax(2) != prediction.unsqueeze(1)).any(1)
        far = torch.where(flips, far.clamp(max=factor), far)
    assert float(far.min()) > 1.0
    assert float(far.min()) <= 2.0  # and they are within a factor of two of somewhere
