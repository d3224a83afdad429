"""A seeded attack inside every certified ball. An adversarial example that it finds contradicts the record."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from certify_cli.audit.verify.rounding import logit_error
from certify_cli.load.onnx.probes import activating_inputs
from certify_cli.network.graph import Network

STEPS = 20
"""Steps of an attack."""
BALLS = 12
"""Balls in which a sample is attacked at most, each SHRINKING times smaller than the one before."""
INSIDE = 1 - 1e-9
"""Part of the radius within which attacks stay: a claim leaves out the boundary of its ball, and points are rounded."""
SHRINKING = 10.0
"""A claim may be so wrong that steps of its length jump over every adversarial example. Smaller balls follow, down to
the radius that the margin over its gradient gives; where the gradient is zero at the sample, all BALLS."""
STARTS = (0.5, 1.0, 1.0)
"""Distances of the random starts from the sample, as parts of the ball's radius; the sample is another start."""


def attacked(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, seed: int) -> Tensor:
    """Whether an adversarial example is found within `radius` (batch,) of each sample x (batch, *shape): (batch,).

    Gradient steps of shrinking length down the smallest margin: from the sample, from random points in the ball, and,
    where the gradient is zero at the sample, from points at which inactive units become active.
    """
    value, gradient = _margins(network, x, torch.zeros_like(x.flatten(1)), prediction)
    straight = (value / gradient.norm(dim=1)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    found, size = torch.zeros(len(x), dtype=torch.bool), radius.clone()
    for row in (~straight.isfinite()).nonzero()[:, 0].tolist():
        found[row] = _from_active_units(network, x[row], prediction[row], radius[row])
    active = (~found).nonzero()[:, 0]
    for _ in range(BALLS):
        if not len(active):
            break
        hit = _attacked(network, x[active], prediction[active], size[active], seed)
        found[active] |= hit
        flat = ~straight[active].isfinite()
        active = active[~hit & (flat | (size[active] > 2 * straight[active]))]
        size[active] = torch.minimum(size[active] / SHRINKING, 1e6 * straight[active])
    return found


def _attacked(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    found = torch.zeros(len(x), dtype=torch.bool)
    starts = [torch.zeros_like(x.flatten(1))]
    for part in STARTS:
        noise = torch.randn(x.flatten(1).shape, generator=draw, dtype=x.dtype)
        starts.append(noise * (part * INSIDE * radius / noise.norm(dim=1).clamp(min=1e-300))[:, None])
    for start in starts:
        left = (~found).nonzero()[:, 0]
        if not len(left):
            break
        found[left] = _descended(network, x[left], prediction[left], radius[left], start[left])
    return found


def _descended(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, d: Tensor) -> Tensor:
    """Whether each descent from x + d, d (batch, inputs), meets an adversarial example: (batch,)."""
    found = torch.zeros(len(x), dtype=torch.bool)
    for step in range(STEPS + 1):
        values, gradient = _margins(network, x, d, prediction)
        hits = (~found & (values < 0) & (d.norm(dim=1) <= radius)).nonzero()[:, 0]
        if len(hits):
            found[hits] = _clear(network, x[hits], d[hits], prediction[hits])
        if step < STEPS:
            length = radius * (1.0 if step == 0 else 2.0 / (step + 1))
            d = _within(d - length[:, None] * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300), radius)
    return found


def _from_active_units(network: Network, x: Tensor, prediction: Tensor, radius: Tensor) -> bool:
    """Whether a descent meets an example that starts where units inactive at x (*shape) are active, in the ball."""
    points = activating_inputs(network, x[None].numpy())
    if points is None:
        return False
    moved = torch.from_numpy(np.asarray(points, dtype=np.float64)).flatten(1) - x.flatten()
    many = len(moved)
    d = _within(moved, radius.expand(many))
    rows = x[None].expand(many, *x.shape)
    return bool(_descended(network, rows, prediction.expand(many), radius.expand(many), d).any())


def _within(d: Tensor, radius: Tensor) -> Tensor:
    """d (batch, inputs), shortened to just within `radius`."""
    return d * (radius * INSIDE / d.norm(dim=1).clamp(min=1e-300)).clamp(max=1.0)[:, None]


def _clear(network: Network, x: Tensor, d: Tensor, prediction: Tensor) -> Tensor:
    """Whether another class is ahead at x + d by more than the rounding of the two logits: (batch,)."""
    moved = (x.flatten(1) + d).reshape(x.shape)
    with torch.no_grad():
        logits = network(moved)
    other = logits.scatter(1, prediction[:, None], -torch.inf).argmax(1)
    pair = torch.stack([prediction, other], dim=1)
    behind = logits.gather(1, pair)
    return behind[:, 1] - behind[:, 0] > logit_error(network, moved).gather(1, pair).sum(1)


def _margins(network: Network, x: Tensor, d: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest margin (batch,) at x + d and its gradient (batch, inputs)."""
    with torch.enable_grad():
        moved = (x.flatten(1) + d).requires_grad_()
        logits = network(moved.reshape(x.shape))
        own = logits.gather(1, prediction[:, None])
        other = logits.scatter(1, prediction[:, None], -torch.inf)
        margin = own[:, 0] - other.amax(1)
        (gradient,) = torch.autograd.grad(margin.sum(), moved)
    return margin.detach(), gradient
