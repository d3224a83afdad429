"""A verified upper bound of the largest eigenvalue: guess by Lanczos, prove by Cholesky (theory section 2).

A power or Lanczos iteration converges from below and proves nothing. Here it only proposes t; what is proved is that
t I - S is positive semidefinite up to a slack that is computed a posteriori from the Cholesky factor actually
obtained, whatever kernel computed it: for B = fl(t I - S) and any L,

    x^T B x = ||L^T x||^2 + x^T (B - L L^T) x >= -||B - L L^T||_F        for every unit x,

so lambda_max(S) <= t + ||B - L L^T||_F (rounding of the residual and of the diagonal included).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from certify_cli.numerics.batched import estimate_dtype
from certify_cli.numerics.rounding import TINY, UNDERFLOW, UNIT, gamma, powers_of_two, times, up

LANCZOS_STEPS = 40
BREAKDOWN = 1e-10
FIRST_GAP = 1e-9
"""The first t lies this much (relative) above the estimate; each failed factorisation takes a tenfold step."""
STRIP = 512
"""Rows of a matrix that are treated at once."""
FIRST_STEP, STEP_GROWTH = 2.0**-16, 6.0
"""By what part t grows after a first failed factorisation in single precision, and how that part grows."""
UNSCALED = (1e-50, 1e50)
"""Largest entries within which squares, and sums of them, are far from underflow and overflow."""


Product = Callable[[Tensor], Tensor]
"""Matrix times vector for a whole batch: (batch, n) -> (batch, n)."""


def ritz_estimate(product: Product, start: Tensor, steps: int = LANCZOS_STEPS) -> tuple[Tensor, Tensor]:
    """Lanczos estimates (from below) of the largest eigenvalues of a batch of Hermitian matrices.

    start: (batch, n), any non-zero vectors. Returns (estimate, residual), both (batch,). An estimate only: it never
    enters a bound unproved.
    """
    q = start / start.norm(dim=-1, keepdim=True)
    steps = min(steps, start.shape[-1])
    basis = q.new_zeros(len(q), steps, q.shape[-1])
    alphas, betas = [], []
    for step in range(steps):
        basis[:, step] = q
        w = product(q)
        alphas.append((q.conj() * w).sum(-1).real)
        found = basis[:, : step + 1]
        for _ in range(2):  # full reorthogonalisation, twice
            w = w - (found.mT @ (found.conj() @ w.unsqueeze(-1))).squeeze(-1)
        beta = w.norm(dim=-1)
        betas.append(beta)
        if step + 1 < steps:
            # an invariant subspace is found: what is left of w is rounding, and would be no direction at all
            alive = beta > BREAKDOWN * torch.stack(alphas).abs().amax(0)
            betas[-1] = beta = torch.where(alive, beta, torch.zeros_like(beta))
            q = torch.where(alive.unsqueeze(-1), w / beta.clamp(min=TINY).unsqueeze(-1), torch.zeros_like(w))
    diagonal = torch.diag_embed(torch.stack(alphas, dim=1))
    if steps > 1:
        off = torch.stack(betas[:-1], dim=1)
        diagonal = diagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(diagonal)  # a (steps x steps) matrix, not the matrix itself
    return values[:, -1], (betas[-1] * vectors[:, -1, -1]).abs()


def starting_vectors(batch: int, n: int, like: Tensor) -> Tensor:
    """The same pseudo-random start for every matrix, run and device: (batch, n)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(like.device, like.dtype).expand(batch, n)


def largest_eigenvalue(
    matrices: Tensor, slack: Tensor | float = 0.0, guess: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Upper bounds, rounded up, of the largest eigenvalues of positive semidefinite matrices.

    matrices: (batch, n, n), real symmetric or complex Hermitian up to rounding, float64; each differs from the exact
    matrix by at most `slack` (float or (batch,)) in the spectral norm. `guess`: (estimate, residual) of `ritz_estimate`
    where the caller has a cheaper product; it decides how sharp the bound is, never whether it holds. Returns
    (batch,), inf where the input is not finite. Negative results are impossible: the bound is at least 0.
    """
    batch, n, _ = matrices.shape
    real = torch.float64
    slack = torch.as_tensor(slack, dtype=real, device=matrices.device).expand(batch)
    entries = torch.view_as_real(matrices.resolve_conj()) if matrices.is_complex() else matrices
    scale = powers_of_two(entries.flatten(1))
    if bool(((scale < UNSCALED[0]) | (scale > UNSCALED[1])).any()):  # a Frobenius norm would be 0 or inf
        guess = None if guess is None else (guess[0] / scale, guess[1] / scale)
        scaled = matrices / scale.reshape(-1, 1, 1)
        return times(largest_eigenvalue(scaled, up(slack / scale) + n * UNDERFLOW, guess), scale)
    frobenius = up(torch.linalg.matrix_norm(matrices).to(real), n * n + 4)
    bound = up(frobenius + slack, 2)  # always true; the proof below replaces it where it succeeds
    finite = frobenius.isfinite()
    open_ = (finite & (frobenius > 0)).nonzero().squeeze(1)
    if open_.numel():
        if guess is None:
            some = matrices[open_] if len(open_) < batch else matrices
            start = starting_vectors(len(open_), n, matrices)
            guess = ritz_estimate(lambda q: (some @ q.unsqueeze(-1)).squeeze(-1), start)
        else:
            guess = guess[0][open_], guess[1][open_]
        estimate = torch.maximum(guess[0], frobenius[open_] / (n * math.sqrt(n)))
        gap = torch.clamp(10 * (guess[1] / estimate).square(), min=FIRST_GAP, max=1e-2)
        while open_.numel():
            proved, value = _prove(matrices[open_], estimate * (1 + gap))  # a copy: indexing
            bound[open_[proved]] = torch.minimum(bound[open_[proved]], up(value[proved] + slack[open_[proved]], 2))
            keep = ~proved & (estimate * (1 + 10 * gap) < bound[open_])
            open_, estimate, gap = open_[keep], estimate[keep], gap[keep] * 10
    return torch.where(finite, bound, torch.full_like(bound, math.inf))


def _prove(matrices: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """For each matrix whether t I - S factorises, and then a proved upper bound of lambda_max(S). Overwrites them."""
    n = matrices.shape[-1]
    shifted = matrices.neg_()
    shifted.diagonal(dim1=-2, dim2=-1).add_(t.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(shifted)
    sizes = torch.linalg.matrix_norm(factor).square() + torch.linalg.matrix_norm(shifted)
    flaw = torch.linalg.matrix_norm(torch.baddbmm(shifted, factor, factor.mH, alpha=-1))
    # complex products round up to four times as often; the last term is the rounding of t I - S itself
    terms = (n + 2) * (4 if matrices.is_complex() else 1)
    value = t + flaw * (1 + gamma(n * n + 8)) + (gamma(terms) + 2 * UNIT) * sizes
    return (info == 0) & value.isfinite(), up(value, 8)


def shifted_cholesky(matrices: Tensor, t: Tensor, tries: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t, L, bound): factors L of about I - S / t, and the upper bounds of lambda_max(S) that they prove.

    Large factors are in single precision, which costs the bound about 1e-6 of itself.

    matrices (batch, n, n): real, positive semidefinite up to rounding, float64; t (batch,): where to begin. Where there
    is no factor t grows, `tries` times at most; then the bound is n times the largest entry, inf if that is no number.
    """
    most = up(matrices.shape[-1] * matrices.abs().amax((1, 2)), 2)
    t = torch.where(t.isfinite() & (t > 0), t, most).clamp(min=UNDERFLOW)
    lower = torch.zeros_like(matrices, dtype=estimate_dtype(matrices.shape[-1]))
    bound = torch.where(most.isfinite(), most, torch.full_like(most, math.inf))
    open_, step = most.isfinite().nonzero().squeeze(1), FIRST_STEP
    for _ in range(tries):
        if not len(open_):
            break
        whole = len(open_) == len(matrices)
        factor, good, value = _shifted_cholesky(matrices if whole else matrices[open_], t[open_])
        lower[open_] = factor
        bound[open_] = torch.where(good, torch.fmin(value, bound[open_]), bound[open_])
        open_ = open_[~good]
        t[open_] *= 1 + step
        step *= STEP_GROWTH
    return t, lower, bound


def _distance(matrices: Tensor, lower: Tensor) -> Tensor:
    """About ||B - L L^T||_F, (batch,), for lower triangular L and a B that is mirrored below strips; overwrites it.

    By strips of rows, each as far as the diagonal: a third of the products that the whole takes.
    """
    n, total = matrices.shape[-1], torch.zeros_like(matrices[:, 0, 0])
    for first in range(0, n, STRIP):
        last = min(first + STRIP, n)
        strip = matrices[:, first:last, :last]
        strip.baddbmm_(lower[:, first:last, :last], lower[:, :last, :last].mT, alpha=-1)
        below = strip[:, :, :first].square().sum((1, 2))
        total = total + 2 * below + strip[:, :, first:].square().sum((1, 2))
    return total.sqrt()


def _shifted_cholesky(matrices: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor of I - S / t, whether there is one, and the bound of lambda_max(S) that it proves.

    The residual is taken in double precision: with E = (I - S/t) - L L^T,  lambda_max(S) <= t (1 + ||E||_F). What
    of S lies above a strip is taken from below: mirrored, it is as near to the exact matrix as its entries are.
    """
    n = matrices.shape[-1]
    shifted = matrices / -t.reshape(-1, 1, 1)
    shifted.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(shifted.to(estimate_dtype(n)))
    lower = factor.double()
    sizes = lower.square().sum((1, 2)) + torch.linalg.matrix_norm(shifted)
    flaw = _distance(shifted, lower)
    # the last term: S / t was rounded (its norm is at most that of I - S/t and of I), and so was the difference
    flaw = flaw * (1 + gamma(n * n + 8)) + (gamma(n + 2) + 4 * UNIT) * (sizes + n)
    value = up(t * (1 + flaw), 8)
    return factor, (info == 0) & value.isfinite(), value
