"""How far sums of remainders can carry a pre-activation over a ball, alone and with its linear part (theory section 4).

For one row of (2) in `expansion`, with u_j = max(0, B_ij bottom_j, B_ij top_j), Q = A^T diag(u) A and any tau > 0,

    sum_j B_ij q_j <= 1/2 sum_j u_j D_j^2 + flat      1/2 sum_j u_j D_j^2 <= (1+tau)/2 d^T Q d + (1+1/tau)/2 rest ,

rest = sum_j u_j rest_j^2. Alone the quadratic is at most e^2 lambda_max(Q)/2. With the linear part a . d the two are
rarely largest together: for any mu > L = (1+tau) lambda, lambda >= lambda_max(Q),

    sup_{||d|| <= e}  a . d + (1+tau)/2 d^T Q d  <=  mu e^2/2 + 1/2 a^T (mu - (1+tau) Q)^-1 a
                 a^T (mu - (1+tau) Q)^-1 a  <=  ||a||^2 / mu + (1+tau) a^T Q a / (mu (mu - L)) ,

as 1 / (mu - q) lies below its chord over [0, L]. lambda = (u^T (G o G) u)^(1/2) with G = A A^T, and a^T Q a = sum_j u_j
(A_j . a)^2: no eigenvalue is computed, and a row costs no more than its products with u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.rounding import TINY, up

STEPS = 4
"""Of Newton's method for mu."""
TAUS = (1e-9, 1e9)
NEAREST = 1e-9
"""How close, relatively, mu may come to L."""
SHARE = 0.5
"""A tau may be so large that L is this part of ||a||/e."""


@dataclass(frozen=True, eq=False)
class RemainderSum:
    """One direction of the sums over one source, upper bounds (batch, size) each: `largest` of lambda_max(Q), `along`
    of a^T Q a, `rest`; `whole` of 1/2 sum_j u_j D_j^2 from the ranges alone; `flat`."""

    largest: Tensor
    along: Tensor
    rest: Tensor
    whole: Tensor
    flat: Tensor

    def alone(self, radius: Tensor) -> Tensor:
        """The sums over the balls of `radius` (batch,)."""
        squares = up(0.5 * (radius.unsqueeze(1) * self.largest.sqrt() + self.rest.sqrt()).square(), 8)
        return up(torch.fmin(squares, self.whole) + self.flat)


def together(size: Tensor, radius: Tensor, sums: Sequence[RemainderSum]) -> Tensor:
    """Upper bounds (batch, size) of a . d plus the sums over all sources; size (batch, size) is at least ||a||."""
    e = radius.unsqueeze(1)
    best = up(e * size + sum(s.alone(radius) for s in sums), len(sums) + 2)
    if not sums:
        return best
    flat = up(torch.stack([s.flat for s in sums]).sum(0), len(sums))
    steep = size / e.clamp(min=TINY)
    lone = [(s.rest / s.largest.clamp(min=TINY)).sqrt() / e.clamp(min=TINY) for s in sums]  # best without a . d
    room = SHARE * steep / torch.stack([s.largest for s in sums]).sum(0).clamp(min=TINY) - 1
    for wide in (0.0, 0.5, 1.0):
        taus = [
            torch.where(room > t, t.clamp(min=TAUS[0]).pow(1 - wide) * room.clamp(min=TAUS[0]).pow(wide), t)
            for t in lone
        ]
        best = torch.fmin(best, up(_joint(size, e, sums, [t.clamp(*TAUS) for t in taus]) + flat, 2))
    return best


def _joint(size: Tensor, e: Tensor, sums: Sequence[RemainderSum], taus: Sequence[Tensor]) -> Tensor:
    largest, along, rest = torch.zeros_like(size), torch.zeros_like(size), torch.zeros_like(size)
    for s, tau in zip(sums, taus, strict=True):
        largest = largest + (1 + tau) * s.largest
        along = along + (1 + tau) * torch.fmin(s.along, s.largest * size.square())
        rest = rest + (1 + 1 / tau) * s.rest
    terms = 4 * len(sums)
    largest, along, rest = up(largest, terms), up(along, terms + 3), up(rest, terms)
    gap = _gap(size, e, largest, along)
    mu = largest + gap
    curved = e * (mu * e) + size * (size / mu) + (along / mu).clamp(min=TINY) / gap
    return up(0.5 * (curved + rest), 12)


def _gap(size: Tensor, e: Tensor, largest: Tensor, along: Tensor) -> Tensor:
    """About the best mu - L > 0: Newton's steps on  alpha / mu^2 + beta / gap^2 = e^2  from below; any will do."""
    beta = along / largest.clamp(min=TINY)
    alpha = (size.square() - beta).clamp(min=0.0)
    e = e.clamp(min=TINY)
    gap = torch.maximum(beta.sqrt() / e, (alpha + beta).sqrt() / e - largest)
    gap = torch.maximum(gap, NEAREST * (largest + size / e)).clamp(min=TINY)
    for _ in range(STEPS):
        mu = largest + gap
        first, second = alpha / mu.square(), beta / gap.square()
        onward = (first + second - e.square()).clamp(min=0.0) / (2 * (first / mu + second / gap)).clamp(min=TINY)
        gap = gap + onward.nan_to_num(nan=0.0, posinf=0.0)
    return gap
