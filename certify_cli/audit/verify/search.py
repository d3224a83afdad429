"""A seeded attack inside every certified ball: what it finds contradicts the record."""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.network.graph import Network

STEPS, MOST = 20, 12
"""Steps of an attack, and attacks of one reach."""
INSIDE = 1 - 1e-9
"""A ball's edge is not claimed, and points on it are rounded."""
CLEARLY = 1e-12
"""A margin counts as negative below this part of the logits."""
NEARER = 10.0
"""A claim may be so wrong that steps of its length pass everything by: attacks of shorter reach follow, down
to where there would be none without curvature."""


def attacked(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, seed: int) -> Tensor:
    """(batch,): whether an example within `radius` of x (batch, *shape) is predicted otherwise.

    Steps of shrinking length down the margin to the class that is nearest at each point, once from the sample and once
    from a random place in the ball.
    """
    value, gradient = _margins(network, x, torch.zeros_like(x.flatten(1)), prediction)
    straight = (value / gradient.norm(dim=1)).nan_to_num(nan=0.0, posinf=torch.inf)
    found, reach = torch.zeros(len(x), dtype=torch.bool), radius.clone()
    live = torch.arange(len(x))
    for _ in range(MOST):
        hit = _attacked(network, x[live], prediction[live], reach[live], seed)
        found[live] |= hit
        live = live[~hit & (reach[live] > 2 * straight[live])]
        if not len(live):
            break
        reach[live] = torch.minimum(reach[live] / NEARER, 1e6 * straight[live])
    return found


def _attacked(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, seed: int) -> Tensor:
    found = torch.zeros(len(x), dtype=torch.bool)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.flatten(1).shape, generator=draw, dtype=x.dtype)
    for start in (torch.zeros_like(noise), noise):
        d = _within(start, radius) * 0.5
        for step in range(STEPS):
            values, gradient = _margins(network, x, d, prediction)
            found |= (values < 0) & (d.norm(dim=1) <= radius)
            length = radius * (1.0 if step == 0 else 2.0 / (step + 1))
            d = _within(d - length[:, None] * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300), radius)
        values, _ = _margins(network, x, d, prediction)
        found |= (values < 0) & (d.norm(dim=1) <= radius)
    return found


def _within(d: Tensor, radius: Tensor) -> Tensor:
    return d * (radius * INSIDE / d.norm(dim=1).clamp(min=1e-300)).clamp(max=1.0)[:, None]


def _margins(network: Network, x: Tensor, d: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The least margin (batch,), less what counts as nothing, and its gradient (batch, inputs)."""
    with torch.enable_grad():
        moved = (x.flatten(1) + d).requires_grad_()
        logits = network(moved.reshape(x.shape))
        own = logits.gather(1, prediction[:, None])
        other = logits.scatter(1, prediction[:, None], -torch.inf)
        margin = own[:, 0] - other.amax(1)
        (gradient,) = torch.autograd.grad(margin.sum(), moved)
    return margin.detach() + CLEARLY * logits.detach().abs().amax(1), gradient
