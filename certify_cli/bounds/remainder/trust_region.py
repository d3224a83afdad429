"""The largest value of -<g, d> + 1/2 sum w D^2 on a ball, when D is A d up to a known rest: an upper bound.

With |D - A d| <= rho entrywise, for every tau > 0,  D^2 <= (1 + tau) (A d)^2 + (1 + 1/tau) rho^2.  What remains is a
trust-region problem, bounded by its dual (theory section 4): for every mu with
H = mu I - (1+tau) A^T diag(w) A >= lam I, lam > 0, and every y,

    sup_{||d|| <= e}  -<g,d> + (1+tau)/2 d^T A^T diag(w) A d  <=  mu e^2/2 + 1/2 g^T H^-1 g
                                            g^T H^-1 g        <=  g^T y + y^T r + ||r||^2 / lam ,      r = g - H y.

mu, tau and y decide how sharp it is, never whether it holds; lam comes from a proved eigenvalue. One Cholesky factor,
in single precision, gives both: what it leaves of the matrix is measured in double precision
(`eigen.shifted_cholesky`), and
conjugate gradients preconditioned by it find y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import Rows
from certify_cli.numerics.eigen import shifted_cholesky
from certify_cli.numerics.rounding import TINY, UNDERFLOW, UNIT, down, gamma, powers_of_two, times, up, vector_norm_up

NEAREST = 2.0**-16
"""How close, relatively, mu may come to the largest eigenvalue: beyond, the proof of lam drowns in rounding."""
TRIES = 7
CACHE = 2**24
"""Bytes of the matrices treated at once."""
LEAST_TAU = 1e-9
STEPS = 2
"""Of conjugate gradients; the preconditioner differs from H by about NEAREST."""


@dataclass(frozen=True, eq=False)
class Quadratic:
    """sum_i w_i D_i^2 with |D - A d| <= rest: rows A, weights w >= 0 (batch, count), rest (batch, count), upper bounds.

    `rest` covers the rows' own errors on the ball in question.
    """

    rows: Rows
    weights: Tensor
    rest: Tensor

    def at(self, index: Tensor) -> Quadratic:
        """Of the samples at `index`."""
        return Quadratic(self.rows.at(index), self.weights[index], self.rest[index])

    def product(self, d: Tensor) -> Tensor:
        """A^T diag(w) A d, (batch, inputs)."""
        return self.rows.transpose(self.weights * self.rows.apply(d))

    @property
    def of_rest(self) -> Tensor:
        """sum w rest^2, up, (batch,)."""
        return up((self.weights * up(self.rest.square())).sum(1), self.weights.shape[1] + 5) + UNDERFLOW

    @property
    def bare(self) -> Tensor:
        """Where no weight meets a rest, (batch,); not so for NaN (no weight times an infinite rest)."""
        return ((self.weights == 0) | (self.rest == 0)).all(1)

    @property
    def trace(self) -> Tensor:
        """Of A^T diag(w) A, up, (batch,)."""
        squares = torch.cat([up(s.square(), 2).expand(len(self.weights), -1) for s in self.rows.sizes], dim=1)
        return up((self.weights * squares).sum(1), self.weights.shape[1] + 3) + UNDERFLOW

    def matrix(self) -> tuple[Tensor, Tensor]:
        """A matrix with the eigenvalues of A^T diag(w) A (but for zeros), on the smaller side, and its rounding."""
        batch, count = self.weights.shape
        if self.by_rows:
            root = self.weights.sqrt()
            matrix = self.rows.gram(batch) * root.unsqueeze(2)
            matrix *= root.unsqueeze(1)
            return matrix, up((gamma(self.rows.inputs + 2) + 8 * UNIT) * self.trace, 4) + UNDERFLOW
        parts = self.weights.split([block.shape[1] for block in self.rows.blocks], dim=1)
        total = torch.zeros(batch, self.rows.inputs, self.rows.inputs, dtype=torch.float64, device=self.weights.device)
        for block, part, supports in zip(self.rows.blocks, parts, self.rows.supports, strict=True):
            supports.add_form(total, block, part)
        return total, up(gamma(2 * count + len(parts) + 3) * self.trace, 4) + UNDERFLOW

    @property
    def by_rows(self) -> bool:
        return self.rows.count <= self.rows.inputs


def trust_region_loss(
    quadratic: Quadratic, gradient: Tensor, error: Tensor, radius: Tensor, mu: Tensor, tau: Tensor
) -> Tensor:
    """Upper bounds (batch,) of sup -<g,d> + 1/2 sum w D^2 over ||d|| <= radius; inf where something overflows.

    gradient (batch, inputs) within `error` (batch,) of the exact g. mu, tau (batch,): hints (see the module).
    """
    side = min(quadratic.rows.count, quadratic.rows.inputs)
    at_once = max(1, CACHE // (8 * side * side))
    if len(gradient) > at_once:  # matrices that the allocator hands out again, and caches hold in part
        every = torch.arange(len(gradient), device=gradient.device)
        parts = [(quadratic.at(i), gradient[i], error[i], radius[i], mu[i], tau[i]) for i in every.split(at_once)]
        return torch.cat([trust_region_loss(*part) for part in parts])
    n = gradient.shape[1]
    matrix, slack = quadratic.matrix()
    of_rest = quadratic.of_rest
    bare = quadratic.bare & of_rest.isfinite()
    tau = torch.where(bare, torch.zeros_like(tau), tau.nan_to_num(nan=1.0).clamp(min=LEAST_TAU, max=1e9))
    t, lower, proved = shifted_cholesky(matrix, mu / (1 + tau) * (1 - 2 * NEAREST), TRIES)
    largest = times(up(proved + slack, 2), up(1 + tau, 2))
    mu = torch.fmax(mu, largest * (1 + NEAREST) + UNDERFLOW)
    least = down(mu - largest, 1)  # both are float64 numbers: one subtraction
    y = _solve(_Factor(quadratic, t, lower), gradient, mu, tau)
    size = vector_norm_up(y)
    residual = gradient - (mu.unsqueeze(1) * y - (1 + tau).unsqueeze(1) * quadratic.product(y))
    rounding = gamma(n + quadratic.rows.count + 8) * (
        vector_norm_up(gradient) + (mu + (1 + tau) * quadratic.trace) * size
    )
    r = up(vector_norm_up(residual) + rounding, 6) + UNDERFLOW
    inner = (gradient * y).sum(1)
    inner = inner + gamma(n + 3) * (gradient * y).abs().sum(1) + UNDERFLOW  # its own rounding, and a little more
    form = up(inner.clamp(min=0.0) + size * r + up(r * up(r / least)), 6)  # r^2 could vanish before the division
    rest = torch.where(bare, torch.zeros_like(tau), times(of_rest, up(1 + 1 / tau.clamp(min=LEAST_TAU), 2)))
    total = up(0.5 * (times(mu, radius, radius) + form + rest) + times(error, radius), 6)
    good = total.isfinite() & (least > 0) & mu.isfinite()
    return torch.where(good, total, torch.full_like(total, torch.inf))


@dataclass(frozen=True, eq=False)
class _Factor:
    """L L^T, about I - S / t, S being the quadratic's matrix. Nothing it gives is a bound."""

    quadratic: Quadratic
    t: Tensor
    lower: Tensor

    def solve(self, r: Tensor) -> Tensor:
        """About (I - A^T diag(w) A / t)^-1 r, (batch, inputs) both."""
        if not self.quadratic.by_rows:
            return self._on_side(r)
        root, rows = self.quadratic.weights.sqrt(), self.quadratic.rows
        inside = self._on_side(root * rows.apply(r))
        return r + rows.transpose(root * inside) / self.t.unsqueeze(1)

    def _on_side(self, r: Tensor) -> Tensor:
        size = r.abs().amax(1, keepdim=True).clamp(min=TINY)  # nothing may leave the range of single precision
        single = (r / size).to(self.lower.dtype).unsqueeze(2)
        return torch.cholesky_solve(single, self.lower).squeeze(2).to(r.dtype) * size


def _solve(factor: _Factor, gradient: Tensor, mu: Tensor, tau: Tensor) -> Tensor:
    """About H^-1 g by preconditioned conjugate gradients on H / mu: any answer will do."""
    ratio = ((1 + tau) / mu).unsqueeze(1)
    unit = powers_of_two(gradient).unsqueeze(1)  # no square of a gradient may vanish
    r, y = gradient / unit, torch.zeros_like(gradient)
    z = factor.solve(r)
    p, square = z, (r * z).sum(1, keepdim=True)
    for _ in range(STEPS):
        image = p - ratio * factor.quadratic.product(p)
        step = (square / (p * image).sum(1, keepdim=True)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        y, r = y + step * p, r - step * image
        z = factor.solve(r)
        new = (r * z).sum(1, keepdim=True)
        p, square = z + (new / square).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * p, new
    return (y / mu.unsqueeze(1) * unit).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
