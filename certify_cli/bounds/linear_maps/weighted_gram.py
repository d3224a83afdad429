"""lambda_max(T^T diag(w) T) for many weight vectors w >= 0 at once, rounded up (theory sections 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.efforts import Budget
from certify_cli.numerics.eigen import largest_eigenvalue, ritz_estimate, starting_vectors
from certify_cli.numerics.estimates import Maps, weighted_gram_estimates
from certify_cli.numerics.rounding import (
    TINY,
    UNDERFLOW,
    UNIT,
    carries_gradient,
    gamma,
    power_of_two,
    times,
    up,
    vector_norm_up,
)

CHUNK_ENTRIES = 2**22
"""Matrices are proved in chunks of at most this many entries (32 MiB, and a few times that while proving)."""
SLIGHT = 1e-100
"""Weights below this part of the largest one enter by their trace alone."""
PERRON_STEPS = 30
"""Number of matrix products in a Perron bound."""
PERRON_ENTRIES = 2**25
"""Largest Gram matrix of the rows that a Perron bound forms; beyond it the trace is the bound (256 MiB)."""


def weighted_gram_norms(matrix: Tensor, weights: Tensor, budget: Budget, error: float = 0.0) -> Tensor:
    """Upper bounds (count,) of lambda_max(T^T diag(w) T) for w (count, rows) >= 0.

    matrix: T (rows, columns), within `error` of the exact one in the Frobenius norm.
    weights: w (count, rows), >= 0; the bounds are inf where a weight or an entry of T is not finite.

    Eigenvalues are proved where the budget allows it, on the smaller side: the rows with a positive weight, or the
    columns. Beyond the budget a Perron bound takes one matrix product a step: every positive vector p gives
    lambda_max(D G D) <= max_i (|G| w o p)_i / p_i with G = T T^T, D = diag(sqrt(w)) (Collatz and Wielandt).
    Where matrix or weights carry a gradient, the results are estimates from below.
    """
    if carries_gradient(matrix, weights):
        return weighted_gram_estimates(Maps.of(matrix), weights)
    count, (rows, columns) = len(weights), matrix.shape
    if not bool(weights.isfinite().all()) or not bool(matrix.isfinite().all()):
        return torch.full((count,), torch.inf, dtype=torch.float64, device=weights.device)
    if not bool((weights > 0).any()):
        return torch.zeros(count, dtype=torch.float64, device=weights.device)
    largest, scale, height = weights.amax(1), power_of_two(matrix), power_of_two(weights)
    matrix, weights = matrix / scale, weights / height  # so that no square or product overflows, or vanishes
    # weights that only rounding made positive would bring denormal numbers: their trace is added instead
    slight = weights < SLIGHT * weights.amax(1, keepdim=True)
    trace = up(torch.where(slight, weights, 0.0) @ up(matrix.square().sum(1), columns + 2), rows + 2)
    weights = torch.where(slight, 0.0, weights)
    active = int((weights > 0).sum(1).max())
    side = min(active, columns)
    forming = 2.0 * rows * columns**2 if columns < active else 0.0
    if count * (3.0 * side**3 + forming) <= budget.eigenvalues:
        value = _proved(matrix, weights, side, columns < active)
    else:
        value = _perron(matrix, weights)
    value = times(up(value + trace + UNDERFLOW, 2), height, scale, scale)
    # (sqrt(lambda) + sqrt(max w) error)^2 covers a matrix that is not exact
    return value if error == 0.0 else up((value.sqrt() + largest.sqrt() * error).square(), 6)


def _proved(matrix: Tensor, weights: Tensor, side: int, by_columns: bool) -> Tensor:
    rows, columns = matrix.shape
    squares = up(matrix.square().sum(1), columns + 2)
    size = up(weights @ squares, rows + 2)  # >= ||diag(sqrt w) T||_F^2
    # the product's own rounding; by rows, every entry also has two square roots and two scalings
    slack = up((gamma(rows + 3) if by_columns else gamma(columns + 2) + 8 * UNIT) * size, 4)
    gram = None if by_columns else matrix @ matrix.T
    # all weights share one product per step, instead of reading a matrix for each
    if gram is None:
        estimate, residual = ritz_estimate(
            lambda q: (weights * (q @ matrix.T)) @ matrix, starting_vectors(len(weights), columns, matrix)
        )
    else:
        roots = weights.sqrt()
        estimate, residual = ritz_estimate(
            lambda q: roots * ((roots * q) @ gram), starting_vectors(len(weights), rows, matrix)
        )
    chunk = max(1, CHUNK_ENTRIES // side**2)
    bounds = []
    for part in (slice(i, i + chunk) for i in range(0, len(weights), chunk)):
        w = weights[part]
        if gram is None:
            product = (matrix.T.unsqueeze(0) * w.unsqueeze(1)) @ matrix
        else:
            index = w.argsort(dim=1, descending=True)[:, :side]
            root = w.gather(1, index).sqrt()
            product = gram[index.unsqueeze(2), index.unsqueeze(1)]
            product *= root.unsqueeze(2)
            product *= root.unsqueeze(1)
        bounds.append(largest_eigenvalue(product, slack[part], (estimate[part], residual[part])))
    return torch.cat(bounds)


def _perron(matrix: Tensor, weights: Tensor) -> Tensor:
    rows, columns = matrix.shape
    squares = up(matrix.square().sum(1), columns + 2)
    trace = up(weights @ squares, rows + 2)
    if rows * rows > PERRON_ENTRIES:
        return trace
    length = vector_norm_up(matrix)
    gram = (matrix @ matrix.T).abs()
    gram += (gamma(columns + 2) * length).unsqueeze(1) * length.unsqueeze(0)  # from here on at least |G|
    p = torch.ones_like(weights)
    best = trace
    for _ in range(PERRON_STEPS):
        image = (weights * p) @ gram
        best = torch.minimum(best, up((image / p).amax(1), rows + 6))
        p = image / image.amax(1, keepdim=True).clamp(min=TINY) + 1e-12  # any positive vector gives a bound
    return best
