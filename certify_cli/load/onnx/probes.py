"""Inputs on which a loaded network is compared with its file: images, other sizes, and inputs for inactive neurons.

A neuron that is on one side of a kink on every compared input shows none of its weights, so inputs are sought that
bring it to the other side.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Network

IMAGES = 3
SIZES = (1.0, 10.0, 1e2, 1e4)
"""Sizes of the inputs of both signs."""
ENTRIES = 2**27
"""Largest number of entries of the values at all nodes and inputs together: 1 GiB."""
ACTIVATED, STEPS = 64, 3
"""Approximate number of inactive neurons for which inputs are sought, and Newton steps for each."""
WORK, GROUPED = 3e9, 30
"""Multiplications that this search may take (large networks have fewer neurons activated; each subgraph is checked
separately anyway), and the cost of one in a grouped convolution, relative to a plain one."""


def images(shape: tuple[int, ...]) -> np.ndarray:
    """IMAGES samples (n, *shape) of numbers in [0, 1] that every stored type represents."""
    return np.random.default_rng(0).integers(0, 129, size=(IMAGES, *shape)) / 128.0


def probes(network: Network, samples: np.ndarray) -> np.ndarray:
    """Inputs (n, *shape): the samples, inputs of many sizes, and ones for neurons inactive on all of these."""
    random = np.random.default_rng(2)
    shape = samples.shape[1:]
    parts = [samples]
    for size in SIZES:
        positive = size * random.random(shape)
        parts.append(np.stack([size * random.uniform(-1, 1, shape), positive, -positive]))
    points = np.concatenate(parts)
    added = activating_inputs(network, points)
    return points if added is None else np.concatenate([points, added])


def rows_at_once(network: Network) -> int:
    """Number of inputs whose values at all nodes fit into ENTRIES, at least IMAGES."""
    return max(IMAGES, ENTRIES // sum(node.size for node in network.nodes))


def activating_inputs(network: Network, points: np.ndarray) -> np.ndarray | None:
    """Inputs on which neurons respond that are on one side of a kink on all of `points` (n, *shape); None without any.

    By Newton steps from the first point towards the other side of the kink; of many such neurons, for some of every
    layer.
    """
    points = points[: rows_at_once(network)]
    with torch.no_grad():
        values = network.values(torch.from_numpy(points))
    goals: list[tuple[int, int, float]] = []
    work = sum(
        node.op.products * node.size * (GROUPED if getattr(node.op, "groups", 1) > 1 else 1)
        for node in network.nodes
        if isinstance(node.op, AffineOp)
    )
    number = min(ACTIVATED, rows_at_once(network), WORK / (3 * STEPS * max(1, work)))
    activations = [index for index, node in enumerate(network.nodes) if isinstance(node.op, Activation)]
    for index in activations:
        op, before = network.nodes[index].op, network.nodes[index].inputs[0]
        assert isinstance(op, Activation)
        z = values[before].flatten(1)
        for kink in op.kinks or (0.0,):
            for side in (1.0, -1.0):
                inactive = (side * (z - kink) <= 0).all(0).nonzero()[:, 0]
                count = min(math.ceil(number / (2 * len(activations))), len(inactive))
                chosen = inactive[torch.linspace(0, len(inactive) - 1, count, dtype=torch.float64).long()]
                # as far beyond the kink as the first point is before it, so that the neuron weighs as much as others
                goals += [(before, int(u), kink + side * (1.0 + float((z[0, u] - kink).abs()))) for u in chosen]
    del values
    kept = np.linspace(0, len(goals) - 1, min(len(goals), math.ceil(number))).astype(int)
    return _newton(network, [goals[i] for i in kept], points[:1]) if goals else None


def _newton(network: Network, goals: list[tuple[int, int, float]], start: np.ndarray) -> np.ndarray | None:
    """From one point, inputs at which each goal (node, neuron, value it should take) is met approximately."""
    x = torch.from_numpy(start).repeat(len(goals), *[1] * (start.ndim - 1))
    target = torch.tensor([value for *_, value in goals], dtype=torch.float64)
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            values = network.values(x)
            units = torch.stack([values[node][row].flatten()[unit] for row, (node, unit, _) in enumerate(goals)])
            (gradient,) = torch.autograd.grad(units.sum(), x)
        flat = gradient.flatten(1)
        step = flat * ((target - units) / flat.square().sum(1).clamp(min=1e-300))[:, None]
        x = (x + step.reshape(x.shape)).detach()
    moved = x[x.flatten(1).isfinite().all(1)]
    return moved.numpy() if len(moved) else None
