"""Bounds of sums of remainders on a ball, separately and jointly with the linear part (theory section 4).

For one row of (2) in `expansion`, with u_j the largest of 0 and B_ij times the quadratic coefficients' two bounds,
Q = A^T diag(u) A and any tau > 0,

    sum_j B_ij q_j <= 1/2 sum_j u_j D_j^2 + constant
    1/2 sum_j u_j D_j^2 <= (1+tau)/2 d^T Q d + (1+1/tau)/2 residual ,      residual = sum_j u_j residual_j^2 .

Separately, the quadratic is at most e^2 lambda_max(Q)/2. The linear part a . d and the quadratic are seldom largest at
the same d, so that their joint bound is smaller: for any mu > L = (1+tau) lambda, lambda >= lambda_max(Q),

    sup_{||d|| <= e}  a . d + (1+tau)/2 d^T Q d  <=  mu e^2/2 + 1/2 a^T (mu - (1+tau) Q)^-1 a
                 a^T (mu - (1+tau) Q)^-1 a  <=  ||a||^2 / mu + (1+tau) a^T Q a / (mu (mu - L)) ,

as 1 / (mu - q) lies below its chord over [0, L]. lambda = (u^T (G o G) u)^(1/2) with G = A A^T, and a^T Q a = sum_j u_j
(A_j . a)^2: no eigenvalue is computed, and the cost of a row is that of its products with u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.rounding import TINY, up

STEPS = 4
"""Number of Newton's steps for mu."""
TAUS = (1e-9, 1e9)
"""Smallest and largest tau."""
NEAREST = 1e-9
"""Smallest relative distance of mu from L."""
SHARE = 0.5
"""The largest tau that is tried makes L this part of ||a||/e."""


@dataclass(frozen=True, eq=False)
class RemainderSum:
    """Bounds for sum_j B_ij q_j over one source, or for its negative; upper bounds (batch, size) each.

    eigenvalue: of lambda_max(Q).   row_form: of a^T Q a.   residual: of sum_j u_j residual_j^2.
    square_sum: of 1/2 sum_j u_j D_j^2, from the ranges of D_j alone.   constant: of the part that is not quadratic.
    """

    eigenvalue: Tensor
    row_form: Tensor
    residual: Tensor
    square_sum: Tensor
    constant: Tensor

    def separate(self, radius: Tensor) -> Tensor:
        """Upper bounds (batch, size) of the sums on balls of `radius` (batch,), without the linear part."""
        squares = up(0.5 * (radius.unsqueeze(1) * self.eigenvalue.sqrt() + self.residual.sqrt()).square(), 8)
        return up(torch.fmin(squares, self.square_sum) + self.constant)


def joint(size: Tensor, radius: Tensor, sums: Sequence[RemainderSum]) -> Tensor:
    """Upper bounds (batch, size) of a . d plus the sums over all sources, on balls of `radius` (batch,).

    size: (batch, size), upper bounds of ||a||.
    """
    e = radius.unsqueeze(1)
    best = up(e * size + sum(s.separate(radius) for s in sums), len(sums) + 2)
    if not sums:
        return best
    constant = up(torch.stack([s.constant for s in sums]).sum(0), len(sums))
    steep = size / e.clamp(min=TINY)
    # the best ones without a . d
    apart = [(s.residual / s.eigenvalue.clamp(min=TINY)).sqrt() / e.clamp(min=TINY) for s in sums]
    top = SHARE * steep / torch.stack([s.eigenvalue for s in sums]).sum(0).clamp(min=TINY) - 1
    for wide in (0.0, 0.5, 1.0):  # from these up to the largest tau
        taus = [
            torch.where(top > t, t.clamp(min=TAUS[0]).pow(1 - wide) * top.clamp(min=TAUS[0]).pow(wide), t)
            for t in apart
        ]
        best = torch.fmin(best, up(_joint_at(size, e, sums, [t.clamp(*TAUS) for t in taus]) + constant, 2))
    return best


def _joint_at(size: Tensor, e: Tensor, sums: Sequence[RemainderSum], taus: Sequence[Tensor]) -> Tensor:
    """The joint bound without constants, for one tau (batch, size) per source; e: (batch, 1), the radius."""
    largest, row_form, residual = torch.zeros_like(size), torch.zeros_like(size), torch.zeros_like(size)
    for s, tau in zip(sums, taus, strict=True):
        largest = largest + (1 + tau) * s.eigenvalue
        row_form = row_form + (1 + tau) * torch.fmin(s.row_form, s.eigenvalue * size.square())
        residual = residual + (1 + 1 / tau) * s.residual
    terms = 4 * len(sums)
    largest, row_form, residual = up(largest, terms), up(row_form, terms + 3), up(residual, terms)
    gap = _gap(size, e, largest, row_form)
    mu = largest + gap
    curved = e * (mu * e) + size * (size / mu) + (row_form / mu).clamp(min=TINY) / gap
    return up(0.5 * (curved + residual), 12)


def _gap(size: Tensor, e: Tensor, largest: Tensor, row_form: Tensor) -> Tensor:
    """An estimate of the best gap mu - L > 0, by Newton's steps on  alpha / mu^2 + beta / gap^2 = e^2  from below.

    Every positive gap gives a valid bound.
    """
    beta = row_form / largest.clamp(min=TINY)
    alpha = (size.square() - beta).clamp(min=0.0)
    e = e.clamp(min=TINY)
    gap = torch.maximum(beta.sqrt() / e, (alpha + beta).sqrt() / e - largest)
    gap = torch.maximum(gap, NEAREST * (largest + size / e)).clamp(min=TINY)
    for _ in range(STEPS):
        mu = largest + gap
        first, second = alpha / mu.square(), beta / gap.square()
        step = (first + second - e.square()).clamp(min=0.0) / (2 * (first / mu + second / gap)).clamp(min=TINY)
        gap = gap + step.nan_to_num(nan=0.0, posinf=0.0)
    return gap
