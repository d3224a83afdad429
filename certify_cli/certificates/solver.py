"""The trust-region problem's minimiser, about: what the ascent needs of it at every step. Nothing here is a bound.

For weights w the loss of `bounds.trust_region` is least at the mu where y = (mu I - (1+tau) Q)^-1 g has the ball's
radius as its length, and at tau = ||rest|| / ||A y|| in the norm of the weights. Both are improved by one Newton step a
call, warm from the call before: any mu and tau give a true bound later. On the rows' side the equation is solved by a
Cholesky factor, beyond it by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from certify_cli.bounds.trust_region import Quadratic

TINY = 1e-300
MARGIN = 1.002
"""How far above the largest eigenvalue (an estimate from below) mu stays."""
COLD = 4
SHORTEST = 0.3
"""mu - (Rayleigh quotient) shrinks to no less than this part of itself in one step."""
INNER = 4
"""Conjugate-gradient steps a call."""
"""Conjugate-gradient steps a call."""


@dataclass(frozen=True, eq=False)
class Solution:
    """y (batch, inputs), what it was solved with, and `form`, at least g^T H^-1 g where the solution is good enough.

    `next_mu` and `next_tau` are better ones to go on with.
    """

    y: Tensor
    mu: Tensor
    tau: Tensor
    form: Tensor
    next_mu: Tensor
    next_tau: Tensor
    top: Tensor

    def where(self, take: Tensor, other: Solution) -> Solution:
        """The other one's items where `take` (batch,) is true."""

        def choose(name: str) -> Tensor:
            mine, theirs = getattr(self, name), getattr(other, name)
            return torch.where(take.unsqueeze(1) if mine.dim() == 2 else take, theirs, mine)

        return Solution(*(choose(item.name) for item in fields(self)))


def solved(quadratic: Quadratic, g: Tensor, radius: Tensor, before: Solution | None) -> Solution:
    """For gradients g (batch, inputs) on balls of `radius` (batch,), warm from `before` or cold."""
    step = _direct if quadratic.by_rows else _iterative
    if before is None:
        top, largest = power(quadratic, None, 8)
        none = torch.zeros_like(largest)
        mu = 1.1 * largest + 0.5 * g.norm(dim=1) / radius.clamp(min=TINY)
        before = Solution(torch.zeros_like(g), mu, none, none, mu, torch.full_like(mu, 1e-3), top)
        for _ in range(COLD - 1):
            before = step(quadratic, g, radius, before)
    return step(quadratic, g, radius, before)


def _direct(quadratic: Quadratic, g: Tensor, radius: Tensor, before: Solution) -> Solution:
    """With S = sqrt(W) A A^T sqrt(W), in single precision:
    H^-1 g = (g + (1+tau) A^T sqrt(W) (mu - (1+tau) S)^-1 sqrt(W) A g) / mu.
    """
    mu, tau = before.next_mu, before.next_tau
    rows, root = quadratic.rows, quadratic.weights.sqrt()
    spread = (1 + tau).unsqueeze(1)
    # scaled by mu, so that nothing leaves the range of single precision
    gram, unit = rows.short
    scaled = (root * (spread / mu.clamp(min=TINY).unsqueeze(1)).sqrt() * unit).float()
    shifted = gram * -scaled.unsqueeze(2)
    shifted *= scaled.unsqueeze(1)
    shifted.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(shifted)
    inside = (root * rows.apply(g) / mu.unsqueeze(1)).float()
    first = torch.cholesky_solve(inside.unsqueeze(2), factor)
    second = torch.cholesky_solve(first, factor).squeeze(2).double()
    first = first.squeeze(2).double()  # sqrt(W) A y, by mu y = g + (1+tau) A^T W A y
    y = g / mu.unsqueeze(1) + spread * rows.transpose(root * first) / mu.unsqueeze(1)
    size = y.norm(dim=1)
    # y^T H^-1 y / ||y||^2 = (1 + ratio) / mu by the same identity: Newton's step on 1/||y|| - 1/radius
    ratio = (1 + tau) * (first * second).sum(1) / mu / size / size
    good = (info == 0) & y.isfinite().all(1) & (ratio >= 0) & (size > 0)
    newton = mu + (size / radius.clamp(min=TINY) - 1) * mu / (1 + ratio)
    curved = first.square().sum(1)
    # y's Rayleigh quotient is no more than the largest eigenvalue: from above, Newton's step could jump past it
    bend = (1 + tau) * curved / size.square().clamp(min=TINY)
    next_mu = torch.where(good, torch.maximum(newton, bend + SHORTEST * (mu - bend)), 1.3 * mu)
    # as if y had the ball's radius already
    full = curved * (radius / size.clamp(min=TINY)).square()
    next_tau = (quadratic.of_rest / full.clamp(min=TINY)).sqrt().clamp(min=1e-9, max=1e9)
    form = torch.where(good, (g * y).sum(1), torch.full_like(mu, torch.inf))
    y = torch.where(good.unsqueeze(1), y, before.y)
    return Solution(y, mu, tau, form, next_mu, torch.where(good, next_tau, tau), before.top)


def _iterative(quadratic: Quadratic, g: Tensor, radius: Tensor, before: Solution) -> Solution:
    top, largest = power(quadratic, before.top, 2)
    tau = before.next_tau
    bottom = (1 + tau) * largest * MARGIN
    mu = torch.maximum(before.next_mu, bottom * MARGIN + TINY)
    y, residual = _conjugate_gradient(quadratic, g, mu, tau, before.y)
    size = y.norm(dim=1)
    form = (g * y).sum(1) + (y * residual).sum(1) + residual.square().sum(1) / (mu - bottom).clamp(min=TINY)
    # y^T H y = g^T y - y^T r, so (1+tau) y^T Q y follows without another product
    bent = mu * size.square() - (g * y).sum(1) + (y * residual).sum(1)
    bend = bent / size.square().clamp(min=TINY)
    next_mu = torch.maximum(bend + (mu - bend) * size / radius.clamp(min=TINY), bottom)
    curved = (bent / (1 + tau) * (radius / size.clamp(min=TINY)).square()).clamp(min=TINY)
    next_tau = (quadratic.of_rest / curved).sqrt().clamp(min=1e-9, max=1e9)
    return Solution(y, mu, tau, form, next_mu, next_tau, top)


def power(quadratic: Quadratic, start: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
    """A few power iterations: direction, and an estimate of the largest eigenvalue from below.

    On the rows' side, in single precision, where there is one; `start` None begins with all ones.
    """
    root = quadratic.weights.sqrt()
    height = root.amax(1, keepdim=True).clamp(min=TINY)
    short = (root / height).float()
    gram, unit = quadratic.rows.short if quadratic.by_rows else (root, 1.0)

    def image(q: Tensor) -> Tensor:
        if not quadratic.by_rows:
            return quadratic.product(q)
        return short * ((short * q).unsqueeze(1) @ gram).squeeze(1)

    if start is None:
        start = short if quadratic.by_rows else torch.ones_like(quadratic.rows.transpose(root))
    q = start / start.norm(dim=1, keepdim=True).clamp(min=TINY)
    value = torch.zeros_like(q[:, 0])
    for _ in range(steps):
        moved = image(q)
        value = moved.norm(dim=1)
        q = torch.where((value > 0).unsqueeze(1), moved / value.clamp(min=1e-30).unsqueeze(1), q)
    return q, value.double() * (height.squeeze(1) * unit).square() if quadratic.by_rows else value


def _conjugate_gradient(quadratic: Quadratic, g: Tensor, mu: Tensor, tau: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """y and its residual g - H y."""

    def times(vectors: Tensor) -> Tensor:
        return mu.unsqueeze(1) * vectors - (1 + tau).unsqueeze(1) * quadratic.product(vectors)

    r = g - times(y)
    p, square = r, r.square().sum(1)
    for _ in range(INNER):
        image = times(p)
        alpha = (square / (p * image).sum(1).clamp(min=TINY)).unsqueeze(1)
        y, r = y + alpha * p, r - alpha * image
        new = r.square().sum(1)
        p, square = r + (new / square.clamp(min=TINY)).unsqueeze(1) * p, new
    return y, r
