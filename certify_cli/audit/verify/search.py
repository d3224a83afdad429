"""A seeded attack inside every certified ball: what it finds contradicts the record."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from certify_cli.audit.verify.rounding import blur
from certify_cli.load.onnx.probes import activating_inputs
from certify_cli.network.graph import Network

STEPS, REACHES = 20, 12
"""Steps of an attack, and attacks of one reach."""
INSIDE = 1 - 1e-9
"""A ball's edge is not claimed, and points on it are rounded."""
NEARER = 10.0
"""A claim may be so wrong that steps of its length pass everything by: attacks of shorter reach follow, down to where
there would be none without curvature; where the margin is flat at the sample, all REACHES."""
STARTS = (0.5, 1.0, 1.0)
"""How far out the random starts lie, as parts of the reach; the sample is another start."""


def attacked(network: Network, x: Tensor, prediction: Tensor, radius: Tensor, seed: int) -> Tensor:
    """(batch,): whether an example within `radius` of x (batch, *shape) is predicted otherwise.

    Steps of shrinking length down the margin to the class that is nearest at each point: from the sample, from random
    places in the ball, and, where the margin is flat at the sample, from where units wake that sleep there.
    """
    value, gradient = _margins(network, x, torch.zeros_like(x.flatten(1)), prediction)
    straight = (value / gradient.norm(dim=1)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    found, reach = torch.zeros(len(x), dtype=torch.bool), radius.clone()
    for row in (~straight.isfinite()).nonzero()[:, 0].tolist():
        found[row] = _from_woken(network, x[row], prediction[row], radius[row])
    live = (~found).nonzero()[:, 0]
    for _ in range(REACHES):
        if not len(live):
            break
        hit = _attacked(network, x[live], prediction[live], reach[live], seed)
        found[live] |= hit
        flat = ~straight[live].isfinite()
        live = live[~hit & (flat | (reach[live] > 2 * straight[live]))]
        reach[live] = torch.minimum(reach[live] / NEARER, 1e6 * straight[live])
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
    """Whether an example is met on the way down from x + d (batch, inputs)."""
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


def _from_woken(network: Network, x: Tensor, prediction: Tensor, radius: Tensor) -> bool:
    """The same from points where units respond that do not at x (*shape), as far as the ball goes."""
    points = activating_inputs(network, x[None].numpy())
    if points is None:
        return False
    moved = torch.from_numpy(np.asarray(points, dtype=np.float64)).flatten(1) - x.flatten()
    many = len(moved)
    d = _within(moved, radius.expand(many))
    rows = x[None].expand(many, *x.shape)
    return bool(_descended(network, rows, prediction.expand(many), radius.expand(many), d).any())


def _within(d: Tensor, radius: Tensor) -> Tensor:
    return d * (radius * INSIDE / d.norm(dim=1).clamp(min=1e-300)).clamp(max=1.0)[:, None]


def _clear(network: Network, x: Tensor, d: Tensor, prediction: Tensor) -> Tensor:
    """(batch,): whether another class is ahead at x + d by more than what rounding may do to the two logits."""
    moved = (x.flatten(1) + d).reshape(x.shape)
    with torch.no_grad():
        logits = network(moved)
    other = logits.scatter(1, prediction[:, None], -torch.inf).argmax(1)
    pair = torch.stack([prediction, other], dim=1)
    behind = logits.gather(1, pair)
    return behind[:, 1] - behind[:, 0] > blur(network, moved).gather(1, pair).sum(1)


def _margins(network: Network, x: Tensor, d: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The least margin (batch,) and its gradient (batch, inputs)."""
    with torch.enable_grad():
        moved = (x.flatten(1) + d).requires_grad_()
        logits = network(moved.reshape(x.shape))
        own = logits.gather(1, prediction[:, None])
        other = logits.scatter(1, prediction[:, None], -torch.inf)
        margin = own[:, 0] - other.amax(1)
        (gradient,) = torch.autograd.grad(margin.sum(), moved)
    return margin.detach(), gradient
