"""Attack points within a ball: where robust training evaluates its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

STRIDE = 2.5
"""The steps together are so many times as long as the radius, so that they can reach and follow the sphere."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (batch, classes) and labels (batch,) to losses (batch,)."""


def entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies (batch,)."""
    return cross_entropy(logits, labels, reduction="none")


def negative_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit less the label's, (batch,)."""
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf)
    return others.amax(1) - logits.gather(1, own).squeeze(1)


def on_ball(steps: Tensor, radius: float) -> Tensor:
    """Steps (batch, *shape), those outside the ball of this radius brought back to its sphere."""
    norm = steps.flatten(1).norm(dim=1).clamp(min=torch.finfo(steps.dtype).tiny)
    return steps * (radius / norm).clamp(max=1.0).reshape(-1, *[1] * (steps.dim() - 1))


def attack_points(
    module: nn.Module, x: Tensor, labels: Tensor, radius: float, steps: int, loss: Loss = entropies
) -> Tensor:
    """Points (batch, *shape) of the balls around x where the loss is large: projected gradient ascent, normalised.

    The module is evaluated in evaluation mode; each of its parts is left in the mode that it was in.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        moved = torch.zeros_like(x)
        for _ in range(steps):
            moved.requires_grad_(True)
            gradient = _gradient(module, x, moved, labels, loss)
            if bool((flat := ~gradient.flatten(1).any(1)).any()):  # logits so far apart that the loss is rounded to 0
                steep = _gradient(module, x, moved, labels, negative_margins)
                gradient = torch.where(flat.reshape(-1, *[1] * (x.dim() - 1)), steep, gradient)
            length = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
            step = gradient / length.reshape(-1, *[1] * (x.dim() - 1))
            moved = on_ball(moved.detach() + STRIDE * radius / steps * step, radius)
        return (x + moved).detach()
    finally:
        for part, training in modes.items():
            part.training = training


def _gradient(module: nn.Module, x: Tensor, moved: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    (gradient,) = torch.autograd.grad(loss(module(x + moved), labels).sum(), moved)
    return gradient
