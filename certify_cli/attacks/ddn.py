"""A minimum-norm search for attacks, which shows how much larger a certificate could be at best.

Nothing here is a bound: an attack counts only once it has been replayed (`replay`), and records say that a search found
it. The search is DDN (Rony et al., CVPR 2019): gradient steps on the smallest margin, with the perturbation's norm
decoupled from its direction; the norm shrinks while the prediction is flipped and grows while it is not. A bisection
along the ray ends the search.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.attacks.replay import replayed_along
from certify_cli.efforts import Effort
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import TINY

SHRINK = 0.05
"""Relative change of the norm in the first step; it decreases by a cosine schedule."""
BISECTIONS = 30


def nearest_attacks(point: EvaluatedPoints, start: Tensor, guess: Tensor, effort: Effort) -> tuple[Tensor, Tensor]:
    """Replayed attacks of a batch: perturbed points (batch, *shape) and their distances (batch,) from x, rounded up.

    start (batch, *shape): where the search begins; along the gradient for a sample that starts at x itself.
    guess (batch,): an estimate of the distance, such as the certified radius; a start without a positive one is not
    used.

    The result is x itself and NaN where no attack was found. The search runs from `start` against all rivals, then
    against those that are nearest to first order, one at a time. It is unconstrained: points may leave [0, 1].
    """
    order = point.distance_estimate.nan_to_num(nan=torch.inf, posinf=torch.inf).argsort(dim=1)
    best, best_norm = torch.zeros_like(point.x), torch.full_like(guess, torch.inf)
    for rank in range(-1, min(effort.attack_rivals, point.network.classes - 1)):
        target = None if rank < 0 else order[:, rank]
        margin, gradient = _margin(point.network, point.x, point.prediction, target)
        size = gradient.flatten(1).norm(dim=1).clamp(min=TINY)
        along = -gradient * _wide(margin / size.square(), gradient)
        step = start - point.x
        usable = (step.flatten(1) != 0).any(1) & (rank < 0) & (guess > 0) & guess.isfinite()
        attack = _ddn(point, torch.where(_wide(usable, step), step, along), effort.attack_steps, target)
        crossing = _crossing(point, attack)
        nearer = crossing < best_norm
        best, best_norm = torch.where(_wide(nearer, attack), attack, best), torch.minimum(best_norm, crossing)
    return replayed_along(point, best, best_norm)


def _ddn(point: EvaluatedPoints, step: Tensor, steps: int, target: Tensor | None) -> Tensor:
    """The smallest perturbation (batch, *shape) on the way that flips the prediction, or the last one if none does.

    step (batch, *shape): the first perturbation.   target (batch,): rival, or None for the nearest at every step.
    """
    best, best_norm = step.clone(), torch.full_like(step.flatten(1)[:, 0], torch.inf)
    norm = step.flatten(1).norm(dim=1)
    for k in range(steps):
        margin, gradient = _margin(point.network, point.x + step, point.prediction, target)
        flipped = margin < 0
        better = flipped & (step.flatten(1).norm(dim=1) < best_norm)
        best = torch.where(_wide(better, step), step, best)
        best_norm = torch.where(better, step.flatten(1).norm(dim=1), best_norm)
        cooling = 0.5 * (1 + math.cos(math.pi * k / steps))
        shrink = SHRINK * max(cooling, 0.02)
        norm = norm * either(flipped, 1 - shrink, 1 + shrink)
        rate = norm * (0.01 + 0.5 * cooling)
        step = step - gradient * _wide(rate / gradient.flatten(1).norm(dim=1).clamp(min=TINY), step)
        step = step * _wide(norm / step.flatten(1).norm(dim=1).clamp(min=TINY), step)
    return torch.where(_wide(best_norm.isinf(), step), step, best)


def _crossing(point: EvaluatedPoints, step: Tensor) -> Tensor:
    """An estimate (batch,) of the norm at which the prediction changes along each perturbation; inf if it does not."""
    norm = step.flatten(1).norm(dim=1)
    low, high = torch.zeros_like(norm), torch.ones_like(norm)
    flipped = _flipped(point, step, high)
    for _ in range(8):  # outward, up to tenfold, where the perturbation itself does not flip the prediction
        low = torch.where(flipped, low, high)
        high = torch.where(flipped, high, high * 1.34)
        flipped = flipped | _flipped(point, step, high)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        inside = _flipped(point, step, middle)
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return torch.where(flipped, norm * high, torch.full_like(norm, torch.inf))


def _flipped(point: EvaluatedPoints, step: Tensor, scale: Tensor) -> Tensor:
    """Mask (batch,): samples whose prediction at x + scale * step differs, as computed. scale (batch,)."""
    return point.network(point.x + step * _wide(scale, step)).argmax(1) != point.prediction


def _margin(network: Network, x: Tensor, prediction: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """The margin (batch,) towards `target`, or the smallest one over all rivals, and its gradient (batch, *shape)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = network(x)
        own = torch.nn.functional.one_hot(prediction, network.classes).bool()
        rivals = logits.masked_fill(own, -torch.inf)
        rival = rivals.amax(1) if target is None else rivals.gather(1, target.unsqueeze(1)).squeeze(1)
        margin = logits.gather(1, prediction.unsqueeze(1)).squeeze(1) - rival
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    return margin.detach(), gradient


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Values (batch,) in a shape that broadcasts over `like` (batch, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
