"""Lanczos' iteration for batches of Hermitian matrices, with full reorthogonalisation. Nothing here is a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.deadline import check
from certify_cli.numerics.rounding import TINY

TINY_SINGLE = 1e-30
"""What keeps a division in single precision from overflowing."""

Product = Callable[[Tensor], Tensor]
"""Matrix times vector for a whole batch: (batch, n) -> (batch, n)."""


@dataclass(frozen=True, eq=False)
class Lanczos:
    """The result of k steps.

    values: (batch, k), Ritz values, ascending.   vectors: (batch, k, k), their vectors in the basis, one a column.
    basis: (batch, k, n), orthonormal rows, zeros from where the subspace is invariant on.
    residual: (batch,), of the largest Ritz value; 0 unless it was asked for.
    """

    values: Tensor
    vectors: Tensor
    basis: Tensor
    residual: Tensor


def lanczos(
    product: Product, start: Tensor, steps: int, breakdown: float, passes: int = 1, residual: bool = False
) -> Lanczos:
    """At most `steps` steps from `start` (batch, n), of length 1 or 0.

    breakdown: a remainder shorter than this part of the largest diagonal entry is rounding alone, and no direction.
    passes: of the reorthogonalisation.   residual: whether that of the largest Ritz value is computed too.
    """
    steps = min(steps, start.shape[-1])
    basis, alphas, betas = [start], [], []
    last = torch.zeros_like(start[:, 0].real)
    for step in range(steps):
        check()
        w = product(basis[-1])
        alphas.append((basis[-1].conj() * w).sum(-1).real)
        if step + 1 == steps and not residual:
            break
        previous = torch.stack(basis, dim=1)
        for _ in range(passes):
            w = w - ((previous.conj() @ w.unsqueeze(-1)).mT @ previous).squeeze(-2)
        beta = last = w.norm(dim=-1)
        if step + 1 == steps:
            break
        beta = torch.where(beta > breakdown * torch.stack(alphas).abs().amax(0), beta, torch.zeros_like(beta))
        betas.append(beta)
        wide, least = beta.unsqueeze(-1), TINY if beta.dtype == torch.float64 else TINY_SINGLE
        basis.append(torch.where(wide > 0, w / wide.clamp(min=least), torch.zeros_like(w)))
    diagonal = torch.diag_embed(torch.stack(alphas, dim=1))
    if betas:
        off = torch.stack(betas, dim=1)
        diagonal = diagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(diagonal.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    return Lanczos(values, vectors, torch.stack(basis, dim=1), (last * vectors[:, -1, -1]).abs())
