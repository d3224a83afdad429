"""Points, rivals, sampled directions and attacks inside balls, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import pre_activations
from tests.networks import (
    points,
)


def on_the_sphere(network: Network, count: int, seed: int) -> Tensor:
    d = points(network, count, seed, 1.0)
    return d / d.flatten(1).norm(dim=1).reshape(-1, *[1] * (d.dim() - 1))


def towards_extremes(network: Network, x: Tensor, seed: int) -> Tensor:
    """Directions in which one unit of one head moves fastest: a range that is too narrow is met there first."""
    g = torch.Generator().manual_seed(seed)
    x = x.clone().requires_grad_(True)
    with torch.enable_grad():
        values = network.values(x)
        target = pre_activations(network)[int(torch.randint(len(pre_activations(network)), (1,), generator=g))]
        flat = values[target].flatten(1)
        (d,) = torch.autograd.grad(flat[:, int(torch.randint(flat.shape[1], (1,), generator=g))].sum(), x)
    size = d.flatten(1).norm(dim=1).clamp(min=1e-30).reshape(-1, *[1] * (d.dim() - 1))
    return d / size * (1 if seed % 2 else -1)


def directions(network: Network, x: Tensor, count: int) -> list[Tensor]:
    """Random ones, and those in which one unit moves fastest: (batch, *shape) of norm 1."""
    return [
        on_the_sphere(network, len(x), seed) if seed % 3 == 0 else towards_extremes(network, x, seed)
        for seed in range(count)
    ]


def pairs(point: EvaluatedPoints) -> tuple[Tensor, Tensor, Tensor]:
    """Every sample with every rival: sample, margin (lower bound), cotangents."""
    sample, rival = (~point.own).nonzero().unbind(1)
    eye = torch.eye(point.network.classes, dtype=torch.float64)
    return sample, point.margin_low[sample, rival], eye[point.prediction[sample]] - eye[rival]


def attacked(network: Network, x: Tensor, cotangents: Tensor, radius: Tensor, steps: int = 12) -> Tensor:
    """The least value of <cotangents, logits> met in the balls, (items,): six starts, then steps that end on the
    sphere and steps that do not."""
    g = torch.Generator().manual_seed(2)
    wide = (1, -1, *[1] * (x.dim() - 1))
    e = radius.reshape(wide)

    def onto(d: Tensor) -> Tensor:
        size = d.flatten(2).norm(dim=2).clamp(min=1e-300).reshape(*d.shape[:2], *[1] * (x.dim() - 1))
        return d / size * e * (1 - 1e-14)

    d = onto(torch.randn(6, *x.shape, generator=g, dtype=torch.float64))
    d[0] = 0.0
    least = torch.full_like(radius, torch.inf)
    for step in range(steps):
        with torch.enable_grad():
            moved = (x + d).flatten(0, 1).requires_grad_(True)
            value = (network(moved) * cotangents.repeat(len(d), 1)).sum(1)
            (gradient,) = torch.autograd.grad(value.sum(), moved)
        least = torch.minimum(least, value.detach().reshape(len(d), -1).amin(0))
        downhill = onto(-gradient.reshape(d.shape))
        # steps to the sphere are exact where the margin is concave along them
        d = downhill if step % 3 != 2 else d + (2 / (step + 2)) * (downhill - d)
    return least


def pgd(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, steps: int = 100) -> Tensor:
    """Perturbations of norm at most `radius` after PGD on the smallest margin, from the sample's own point."""
    shape = (-1, *[1] * (x.dim() - 1))
    d = torch.zeros_like(x)
    best, best_margin = d, torch.full((len(x),), torch.inf, dtype=x.dtype)
    for step in range(steps + 1):
        moved = (x + d).requires_grad_(True)
        logits = network(moved)
        own = torch.nn.functional.one_hot(prediction, network.classes).bool()
        margin = logits.gather(1, prediction.unsqueeze(1)).squeeze(1) - logits.masked_fill(own, -torch.inf).amax(1)
        better = margin.detach() < best_margin
        best = torch.where(better.reshape(shape), d, best)
        best_margin = torch.where(better, margin.detach(), best_margin)
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(margin.sum(), moved)
        size = gradient.flatten(1).norm(dim=1).clamp(min=1e-30).reshape(shape)
        rate = (2.5 * radius / steps * (1 + 3 * (step < steps // 3))).reshape(shape)
        d = d - rate * gradient / size
        length = d.flatten(1).norm(dim=1).clamp(min=1e-30)
        d = d * (radius / length).clamp(max=1.0).reshape(shape)
    return best
