"""Verified upper bounds of largest eigenvalues: estimate by Lanczos, proof by Cholesky (theory section 2).

A power or Lanczos iteration converges from below and proves nothing, so here it gives only the candidate t. The proof
is that t I - S is positive semidefinite up to a residual, computed a posteriori from the Cholesky factor at hand,
whatever kernel computed it: for B = fl(t I - S) and any L,

    x^T B x = ||L^T x||^2 + x^T (B - L L^T) x >= -||B - L L^T||_F        for every unit x,

so lambda_max(S) <= t + ||B - L L^T||_F (rounding of the residual and of the diagonal included).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.numerics.batched import estimate_dtype
from certify_cli.numerics.deadline import check
from certify_cli.numerics.lanczos import Product, lanczos
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, powers_of_two, times, up

LANCZOS_STEPS = 40
POWER_STEPS, PROMISING = 6, 4
"""Steps of a power iteration that find the matrices whose eigenvalues are largest, and how many of these count."""
BREAKDOWN = 1e-10
FIRST_GAP = 1e-9
"""Relative distance of the first t above the estimate; tenfold after each failed factorisation."""
STRIPS, LEAST_STRIP = 8, 64
"""Strips of rows in which a symmetric product is computed, and the fewest rows of one."""
FIRST_STEP, STEP_GROWTH = 2.0**-16, 6.0
"""Relative growth of t after the first failed factorisation of `shifted_cholesky`, and the factor between growths."""
UNSCALED = (1e-50, 1e50)
"""Range of the largest entry in which squares, and sums of them, neither underflow nor overflow."""


def ritz_estimate(product: Product, start: Tensor, steps: int = LANCZOS_STEPS) -> tuple[Tensor, Tensor]:
    """Lanczos estimates (from below) of the largest eigenvalues of a batch of Hermitian matrices.

    start: (batch, n), any non-zero vectors. Returns (estimate, residual), both (batch,). No bounds.
    """
    unit = start / start.norm(dim=-1, keepdim=True)
    found = lanczos(product, unit, steps, BREAKDOWN, passes=2, residual=True)
    return found.values[:, -1], found.residual


def starting_vectors(batch: int, n: int, like: Tensor) -> Tensor:
    """The same pseudo-random start for every matrix, run and device: (batch, n)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(like.device, like.dtype).expand(batch, n)


def largest_eigenvalue(
    matrices: Tensor, slack: Tensor | float = 0.0, guess: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Upper bounds, rounded up, of the largest eigenvalues of positive semidefinite matrices.

    matrices: (batch, n, n), real symmetric or complex Hermitian up to rounding, float64.
    slack: float or (batch,); the spectral norm of the difference from the exact matrices is at most this.
    guess: (estimate, residual) of `ritz_estimate`, where the caller has a cheaper product; the bound holds for any.
    Returns (batch,), at least 0; inf where the input is not finite.
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
    unresolved = (finite & (frobenius > 0)).nonzero().squeeze(1)
    if unresolved.numel():
        if guess is None:
            some = matrices[unresolved] if len(unresolved) < batch else matrices
            start = starting_vectors(len(unresolved), n, matrices)
            guess = ritz_estimate(lambda q: (some @ q.unsqueeze(-1)).squeeze(-1), start)
        else:
            guess = guess[0][unresolved], guess[1][unresolved]
        estimate = torch.maximum(guess[0], frobenius[unresolved] / (n * math.sqrt(n)))
        gap = torch.clamp(10 * (guess[1] / estimate).square(), min=FIRST_GAP, max=1e-2)
        while unresolved.numel():
            check()
            proved, value = _prove(matrices[unresolved], estimate * (1 + gap))  # a copy: indexing
            bound[unresolved[proved]] = torch.minimum(
                bound[unresolved[proved]], up(value[proved] + slack[unresolved[proved]], 2)
            )
            keep = ~proved & (estimate * (1 + 10 * gap) < bound[unresolved])
            unresolved, estimate, gap = unresolved[keep], estimate[keep], gap[keep] * 10
    return torch.where(finite, bound, torch.full_like(bound, math.inf))


def largest_of_all(matrices: Tensor, slack: Tensor) -> float:
    """Upper bound of the largest eigenvalue in a whole batch: `largest_eigenvalue`, but one candidate for all.

    The candidate comes from the most promising matrices; those that do not factorise with it are taken one by one.
    """
    largest = matrices.abs().amax((1, 2))
    if not bool(((largest > UNSCALED[0]) & (largest < UNSCALED[1])).all()):
        return float(largest_eigenvalue(matrices, slack).max())
    v = starting_vectors(len(matrices), matrices.shape[-1], matrices).unsqueeze(-1)
    for _ in range(POWER_STEPS):
        v = matrices @ (v / v.norm(dim=1, keepdim=True))
    top = v.norm(dim=(1, 2)).topk(min(PROMISING, len(matrices))).indices
    some = matrices[top]
    start = starting_vectors(len(top), matrices.shape[-1], matrices)
    estimate, residual = ritz_estimate(lambda q: (some @ q.unsqueeze(-1)).squeeze(-1), start)
    gap = torch.clamp(10 * (residual / estimate).square(), min=FIRST_GAP, max=1e-2)
    candidate = (estimate * (1 + gap)).max()
    proved, value = _prove(matrices.clone(), candidate.expand(len(matrices)))
    bounds = [up(value[proved] + slack[proved], 2), largest_eigenvalue(matrices[~proved], slack[~proved])]
    return float(torch.cat(bounds).max())


def _prove(matrices: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """For each matrix whether t I - S factorises, and the proved bound of lambda_max(S); overwrites the matrices."""
    n = matrices.shape[-1]
    shifted = matrices.neg_()
    shifted.diagonal(dim1=-2, dim2=-1).add_(t.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(shifted)
    sizes = torch.linalg.matrix_norm(factor).square() + torch.linalg.matrix_norm(shifted)
    if torch.equal(shifted, shifted.mH):
        residual = factor_residual(shifted, factor)
    else:
        residual = torch.linalg.matrix_norm(torch.baddbmm(shifted, factor, factor.mH, alpha=-1))
    # complex products round up to four times as often; the last term is the rounding of t I - S itself
    terms = (n + 2) * (4 if matrices.is_complex() else 1)
    value = t + residual * (1 + gamma(n * n + 8)) + (gamma(terms) + 2 * UNIT) * sizes
    return (info == 0) & value.isfinite(), up(value, 8)


def shifted_cholesky(matrices: Tensor, t: Tensor, tries: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t, L, bound): approximate Cholesky factors L of I - S / t, and the upper bounds of lambda_max(S) they prove.

    matrices: (batch, n, n), real, positive semidefinite up to rounding, float64.
    t: (batch,), the first candidates; each grows until its factorisation succeeds, at most `tries` times.
    bound: (batch,), rounded up; without a factor n times the largest entry, inf where that is not finite.
    Large factors are in single precision, which makes the bound larger by about 1e-6, relative.
    """
    entry = torch.maximum(matrices.amax((1, 2)), -matrices.amin((1, 2)))
    largest = up(matrices.shape[-1] * entry, 2)
    t = torch.where(t.isfinite() & (t > 0), t, largest).clamp(min=UNDERFLOW)
    lower = torch.zeros_like(matrices, dtype=estimate_dtype(matrices.shape[-1]))
    bound = torch.where(largest.isfinite(), largest, torch.full_like(largest, math.inf))
    unresolved, step = largest.isfinite().nonzero().squeeze(1), FIRST_STEP
    for _ in range(tries):
        if not len(unresolved):
            break
        check()
        whole = len(unresolved) == len(matrices)
        factor, good, value = _shifted_cholesky(matrices if whole else matrices[unresolved], t[unresolved])
        lower[unresolved] = factor
        bound[unresolved] = torch.where(good, torch.fmin(value, bound[unresolved]), bound[unresolved])
        unresolved = unresolved[~good]
        t[unresolved] *= 1 + step
        step *= STEP_GROWTH
    return t, lower, bound


def strips(n: int) -> list[tuple[int, int]]:
    """(first, last) of the strips of n rows."""
    step = max(LEAST_STRIP, -(-n // STRIPS))
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def factor_residual(matrices: Tensor, lower: Tensor) -> Tensor:
    """||B - L L^H||_F as computed, (batch,), for lower triangular L and Hermitian B; overwrites B.

    By blocks up to the diagonal ones, mirrored, and up to the columns that L has: about a quarter of the products.
    """
    total = torch.zeros_like(matrices[:, 0, 0].real)
    sides = strips(matrices.shape[-1])
    for first, last in sides:
        for begin, end in sides:
            if begin > first:
                break
            block = matrices[:, first:last, begin:end]
            block.baddbmm_(lower[:, first:last, :end], lower[:, begin:end, :end].mH, alpha=-1)
            total = total + (1 if begin == first else 2) * _square_sum(block)
    return total.sqrt()


def _square_sum(matrices: Tensor) -> Tensor:
    """The sum (batch,) of the squares of all entries' absolute values."""
    entries = torch.view_as_real(matrices) if matrices.is_complex() else matrices
    return entries.square().flatten(1).sum(1)


def symmetric_product(rows: Tensor) -> Tensor:
    """A A^H for A (batch, m, n), exactly Hermitian: by strips of rows up to the diagonal block, mirrored."""
    sides = strips(rows.shape[1])
    if len(sides) == 1:
        found = rows @ rows.mH
    else:
        found = rows.new_empty(len(rows), rows.shape[1], rows.shape[1])
        for first, last in sides:
            found[:, first:last, :last] = rows[:, first:last] @ rows[:, :last].mH
    return mirrored(found)


def mirrored(matrices: Tensor) -> Tensor:
    """Matrices (batch, n, n) whose lower triangle stands for the upper one, too; overwritten."""
    for first, last in strips(matrices.shape[-1]):
        block = matrices[:, first:last, first:last]
        matrices[:, first:last, first:last] = block.tril() + block.tril(-1).mH
        matrices[:, :first, first:last] = matrices[:, first:last, :first].mH
    if matrices.is_complex():
        matrices.diagonal(dim1=1, dim2=2).imag.zero_()
    return matrices


def _shifted_cholesky(matrices: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor of I - S / t, whether it exists, and the bound of lambda_max(S) that it proves.

    The residual is computed in double precision: with E = (I - S/t) - L L^T,  lambda_max(S) <= t (1 + ||E||_F). The
    lower part of S stands for the upper one: mirrored, it is as close to the exact matrix as its entries are.
    """
    n = matrices.shape[-1]
    shifted = matrices / -t.reshape(-1, 1, 1)
    shifted.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(shifted.to(estimate_dtype(n)))
    lower = factor.double()
    sizes = torch.linalg.matrix_norm(lower).square() + torch.linalg.matrix_norm(shifted)
    residual = factor_residual(shifted, lower)
    # the last term: S / t was rounded (its norm is at most that of I - S/t and of I), and so was the difference
    residual = residual * (1 + gamma(n * n + 8)) + (gamma(n + 2) + 4 * UNIT) * (sizes + n)
    value = up(t * (1 + residual), 8)
    return factor, (info == 0) & value.isfinite(), value
