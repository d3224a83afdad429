"""The largest value of -<g, d> + 1/2 sum w D^2 on a ball, when D is A d up to a known rest: an upper bound.

With |D - A d| <= rho entrywise, for every tau > 0,  D^2 <= (1 + tau) (A d)^2 + (1 + 1/tau) rho^2.  What remains is a
trust-region problem, bounded by its dual (theory section 4): for every mu with
H = mu I - (1+tau) A^T diag(w) A >= lam I, lam > 0, and every y,

    sup_{||d|| <= e}  -<g,d> + (1+tau)/2 d^T A^T diag(w) A d  <=  mu e^2/2 + 1/2 g^T H^-1 g
                                            g^T H^-1 g        <=  g^T y + y^T r + ||r||^2 / lam ,      r = g - H y.

mu, tau and y decide how sharp it is, never whether it holds; lam comes from a proved eigenvalue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.jacobians import Rows
from certify_cli.numerics.eigen import largest_eigenvalue
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, down, gamma, times, up, vector_norm_up

NEAREST = 1e-7
"""How close, relatively, mu may come to the largest eigenvalue: beyond, the proof of lam drowns in rounding."""
LEAST_TAU = 1e-9


@dataclass(frozen=True, eq=False)
class Quadratic:
    """sum_i w_i D_i^2 with |D - A d| <= rest: rows A, weights w >= 0 (batch, count), rest (batch, count), upper bounds.

    `rest` covers the rows' own errors on the ball in question.
    """

    rows: Rows
    weights: Tensor
    rest: Tensor

    def product(self, d: Tensor) -> Tensor:
        """A^T diag(w) A d, (batch, inputs)."""
        return self.rows.transpose(self.weights * self.rows.apply(d))

    @property
    def of_rest(self) -> Tensor:
        """sum w rest^2, up, (batch,)."""
        return up((self.weights * self.rest.square()).sum(1), self.weights.shape[1] + 3)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """A matrix with the eigenvalues of A^T diag(w) A (but for zeros), on the smaller side, and its rounding."""
        batch, count = self.weights.shape
        squares = torch.cat([up(s.square(), 2).expand(batch, -1) for s in self.rows.sizes], dim=1)
        size = up((self.weights * squares).sum(1), count + 3)
        if self.by_rows:
            root = self.weights.sqrt()
            matrix = self.rows.gram(batch) * root.unsqueeze(2)
            matrix *= root.unsqueeze(1)
            return matrix, up((gamma(self.rows.inputs + 2) + 8 * UNIT) * size, 4) + UNDERFLOW
        parts = self.weights.split([block.shape[1] for block in self.rows.blocks], dim=1)
        total = torch.zeros(batch, self.rows.inputs, self.rows.inputs, dtype=torch.float64, device=self.weights.device)
        for block, part in zip(self.rows.blocks, parts, strict=True):
            total += (block * part.unsqueeze(2)).mT @ block
        return total, up(gamma(count + len(parts) + 3) * size, 4) + UNDERFLOW

    @property
    def by_rows(self) -> bool:
        return self.rows.count <= self.rows.inputs


def trust_region_loss(
    quadratic: Quadratic, gradient: Tensor, error: Tensor, radius: Tensor, mu: Tensor, tau: Tensor
) -> Tensor:
    """Upper bounds (batch,) of sup -<g,d> + 1/2 sum w D^2 over ||d|| <= radius; inf where something overflows.

    gradient (batch, inputs) within `error` (batch,) of the exact g. mu, tau (batch,): hints (see the module).
    """
    batch, n = gradient.shape
    matrix, slack = quadratic.matrix()
    of_rest = quadratic.of_rest
    bare = of_rest == 0  # not so for NaN (no weight times an infinite rest), which must not pass for no rest
    tau = torch.where(bare, torch.zeros_like(tau), tau.nan_to_num(nan=1.0).clamp(min=LEAST_TAU, max=1e9))
    wanted = (mu / (1 + tau)).clamp(min=0.0)
    # such that the first t tried is just below `wanted`, and further ones are quickly far above it
    below = wanted * (1 - NEAREST) / 1.01
    guess = below, 0.03163 * below
    largest = times(largest_eigenvalue(matrix, slack, guess), up(1 + tau, 2))
    mu = torch.maximum(mu, largest * (1 + NEAREST) + UNDERFLOW)
    least = down(mu - largest, 1)  # both are float64 numbers: one subtraction
    y = _solve(quadratic, matrix, gradient, mu, tau)
    size = vector_norm_up(y)
    image = quadratic.product(y)
    residual = gradient - (mu.unsqueeze(1) * y - (1 + tau).unsqueeze(1) * image)
    squares = torch.cat([s.square().expand(batch, -1) for s in quadratic.rows.sizes], dim=1)
    trace = up((quadratic.weights * squares).sum(1), squares.shape[1] + 6)
    terms = n + quadratic.rows.count + 8
    rounding = gamma(terms) * (vector_norm_up(gradient) + (mu + (1 + tau) * trace) * size)
    r = up(vector_norm_up(residual) + rounding, 6) + UNDERFLOW
    inner = (gradient * y).sum(1)
    inner = inner + gamma(n + 3) * (gradient * y).abs().sum(1) + UNDERFLOW  # its own rounding, and a little more
    form = up(inner.clamp(min=0.0) + size * r + r * r / least, 6)
    rest = torch.where(bare, torch.zeros_like(tau), times(of_rest, up(1 + 1 / tau.clamp(min=LEAST_TAU), 2)))
    total = up(0.5 * (times(mu, radius, radius) + form + rest) + times(error, radius), 6)
    good = total.isfinite() & (least > 0) & mu.isfinite()
    return torch.where(good, total, torch.full_like(total, torch.inf))


def _solve(quadratic: Quadratic, matrix: Tensor, gradient: Tensor, mu: Tensor, tau: Tensor) -> Tensor:
    """About H^-1 g: any answer will do."""
    factor = (1 + tau).reshape(-1, 1, 1)
    shifted = matrix * -factor
    shifted.diagonal(dim1=1, dim2=2).add_(mu.unsqueeze(1))
    lower, _ = torch.linalg.cholesky_ex(shifted)
    if not quadratic.by_rows:
        y = torch.cholesky_solve(gradient.unsqueeze(2), lower).squeeze(2)
    else:
        root = quadratic.weights.sqrt()
        inside = root * quadratic.rows.apply(gradient)
        solved = torch.cholesky_solve(inside.unsqueeze(2), lower).squeeze(2)
        y = (gradient + (1 + tau).unsqueeze(1) * quadratic.rows.transpose(root * solved)) / mu.unsqueeze(1)
    return y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
