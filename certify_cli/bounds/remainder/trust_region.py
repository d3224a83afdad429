"""Upper bounds of the maximum of -<g, d> + 1/2 sum w D^2 on a ball, where D differs from A d by a bounded residual.

With |D - A d| <= rho entrywise, for every tau > 0,  D^2 <= (1 + tau) (A d)^2 + (1 + 1/tau) rho^2.  This leaves a
trust-region problem, bounded by its dual (theory section 4): for every mu with
H = mu I - (1+tau) A^T diag(w) A >= lam I, lam > 0, and every y,

    sup_{||d|| <= e}  -<g,d> + (1+tau)/2 d^T A^T diag(w) A d  <=  mu e^2/2 + 1/2 g^T H^-1 g
                                            g^T H^-1 g        <=  g^T y + y^T r + ||r||^2 / lam ,      r = g - H y.

The bound is sharp for good mu, tau and y, and holds for any; lam comes from a proved eigenvalue. One Cholesky factor
in single precision serves for both: its residual, measured in double precision, proves the eigenvalue
(`eigen.shifted_cholesky`), and it preconditions the conjugate gradients that compute y. Where mu is clear even of the
bound by squared products of the rows, (w^T (G o G) w)^(1/2) with G = A A^T, which takes no matrix, neither is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import Rows
from certify_cli.numerics.eigen import shifted_cholesky
from certify_cli.numerics.rounding import TINY, UNDERFLOW, UNIT, down, gamma, powers_of_two, times, up, vector_norm_up
from certify_cli.numerics.trees import Batched

NEAREST = 2.0**-16
"""Smallest relative distance of mu from the largest eigenvalue: closer, rounding would exceed lam."""
TRIES = 7
"""Number of shifts that `shifted_cholesky` may try."""
CACHE = 2**24
"""Bytes of the matrices that are treated at once."""
SMALLEST_TAU = 1e-9
"""Smallest tau where there is a residual; without one tau is 0."""
STEPS = 2
"""Number of conjugate gradient steps; the preconditioner differs from H by about NEAREST."""
CLEAR, PLAIN_STEPS = 1.25, 10
"""Ratio of mu to a bound of the largest eigenvalue from which on no factor is needed: conjugate gradients converge by
themselves, and in so many steps."""


@dataclass(frozen=True, eq=False)
class Quadratic(Batched):
    """The quadratic form sum_i w_i D_i^2 of the pre-activations' changes D, with |D - A d| <= residual.

    rows: A.   weights: w (batch, count), >= 0.
    residual: (batch, count), upper bounds that include the errors of A times the ball's radius.
    """

    rows: Rows
    weights: Tensor
    residual: Tensor

    def product(self, d: Tensor) -> Tensor:
        """A^T diag(w) A d, (batch, inputs)."""
        return self.rows.transpose(self.weights * self.rows.apply(d))

    @property
    def residual_sum(self) -> Tensor:
        """sum w residual^2, up, (batch,)."""
        return up((self.weights * up(self.residual.square())).sum(1), self.weights.shape[1] + 5) + UNDERFLOW

    @property
    def without_residual(self) -> Tensor:
        """(batch,): whether every entry has weight or residual 0; `residual_sum` can be NaN then (0 times inf)."""
        return ((self.weights == 0) | (self.residual == 0)).all(1)

    @property
    def trace(self) -> Tensor:
        """Trace of A^T diag(w) A, up, (batch,)."""
        squares = torch.cat([up(b.size.square(), 2).expand(len(self.weights), -1) for b in self.rows.blocks], dim=1)
        return up((self.weights * squares).sum(1), self.weights.shape[1] + 3) + UNDERFLOW

    def matrix(self) -> tuple[Tensor, Tensor]:
        """A matrix (batch, n, n) with the nonzero eigenvalues of A^T diag(w) A, and its rounding error (batch,), up.

        Of D^(1/2) A A^T D^(1/2), D = diag(w), and A^T D A, the smaller.
        """
        batch, count = self.weights.shape
        if self.rows.gram is not None:
            root = self.weights.sqrt()
            matrix = self.rows.gram * root.unsqueeze(2)
            matrix *= root.unsqueeze(1)
            return matrix, up((gamma(self.rows.inputs + 2) + 8 * UNIT) * self.trace, 4) + UNDERFLOW
        parts = self.weights.split(self.rows.sizes, dim=1)
        total = torch.zeros(batch, self.rows.inputs, self.rows.inputs, dtype=torch.float64, device=self.weights.device)
        for block, part in zip(self.rows.blocks, parts, strict=True):
            block.matrix.add_form(total, part)
        return total, up(gamma(2 * count + len(parts) + 3) * self.trace, 4) + UNDERFLOW

    @property
    def norm_bound(self) -> Tensor:
        """Upper bounds (batch,) of lambda_max(A^T diag(w) A), by the rows' squared products; inf without these."""
        unit = powers_of_two(self.weights)
        squared = self.rows.squared_form((self.weights / unit.unsqueeze(1)).unsqueeze(1))
        return torch.full_like(unit, torch.inf) if squared is None else times(up(squared[:, 0].sqrt(), 2), unit)

    @property
    def by_rows(self) -> bool:
        """Whether the matrix of `matrix` has the size of the rows, not of the inputs."""
        return self.rows.count <= self.rows.inputs


def trust_region_loss(
    quadratic: Quadratic, gradient: Tensor, error: Tensor, radius: Tensor, mu: Tensor, tau: Tensor
) -> Tensor:
    """Upper bounds (batch,) of sup -<g,d> + 1/2 sum w D^2 over ||d|| <= radius; inf where a value overflows.

    gradient: (batch, inputs), within `error` (batch,) of the exact g.   radius: (batch,).
    mu, tau: (batch,), hints (see the module); any values give a bound.
    """
    exact = quadratic.without_residual & quadratic.residual_sum.isfinite()
    tau = torch.where(exact, torch.zeros_like(tau), tau.nan_to_num(nan=1.0).clamp(min=SMALLEST_TAU, max=1e9))
    problem = _Problem(quadratic, gradient, error, radius, mu, tau, exact)
    bound = quadratic.norm_bound
    clear = mu > CLEAR * (1 + tau) * bound
    loss = torch.full_like(mu, torch.inf)
    some = clear.nonzero()[:, 0]
    if len(some):
        loss[some] = problem.at(some).loss_above(bound[some])
    side = min(quadratic.rows.count, quadratic.rows.inputs)
    for part in (~clear).nonzero()[:, 0].split(max(1, CACHE // (8 * side * side))):  # memory stays in the caches
        if len(part):
            loss[part] = problem.at(part).loss_by_factor()
    return loss


@dataclass(frozen=True, eq=False)
class _Problem(Batched):
    """The arguments of `trust_region_loss`; mu is a hint, tau a number for every item.

    exact: (batch,), whether there is no residual.
    """

    quadratic: Quadratic
    gradient: Tensor
    error: Tensor
    radius: Tensor
    mu: Tensor
    tau: Tensor
    exact: Tensor

    def loss_above(self, bound: Tensor) -> Tensor:
        """The loss (batch,) where mu is clear of a bound (batch,) of the largest eigenvalue: no matrix is formed."""
        y = conjugate_gradients(self.quadratic, lambda r: r, self.gradient, self.mu, self.tau, PLAIN_STEPS)
        return self.loss(bound, y)

    def loss_by_factor(self) -> Tensor:
        """The loss (batch,) by a Cholesky factor, which proves the largest eigenvalue and preconditions."""
        matrix, slack = self.quadratic.matrix()
        t, lower, proved = shifted_cholesky(matrix, self.mu / (1 + self.tau) * (1 - 2 * NEAREST), TRIES)
        bound = up(proved + slack, 2)
        factor = Factor(self.quadratic, t, lower)
        y = conjugate_gradients(self.quadratic, factor.solve, self.gradient, self._mu(bound)[0], self.tau, STEPS)
        return self.loss(bound, y)

    def _mu(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """mu (batch,) above (1 + tau) times the bound of the largest eigenvalue, and lam (batch,), down."""
        largest = times(bound, up(1 + self.tau, 2))
        mu = torch.fmax(self.mu, largest * (1 + NEAREST) + UNDERFLOW)
        return mu, down(mu - largest, 1)  # both are float64 numbers: one rounding

    def loss(self, bound: Tensor, y: Tensor) -> Tensor:
        """The loss (batch,) from a bound (batch,) of lambda_max(A^T diag(w) A) and any y (batch, inputs)."""
        quadratic, gradient, tau = self.quadratic, self.gradient, self.tau
        mu, lam = self._mu(bound)
        size = vector_norm_up(y)
        residual = gradient - (mu.unsqueeze(1) * y - (1 + tau).unsqueeze(1) * quadratic.product(y))
        rounding = gamma(gradient.shape[1] + quadratic.rows.count + 8) * (
            vector_norm_up(gradient) + (mu + (1 + tau) * quadratic.trace) * size
        )
        r = up(vector_norm_up(residual) + rounding, 6) + UNDERFLOW
        inner = (gradient * y).sum(1)
        inner = inner + gamma(gradient.shape[1] + 3) * (gradient * y).abs().sum(1) + UNDERFLOW  # the sum's rounding
        form = up(inner.clamp(min=0.0) + size * r + up(r * up(r / lam)), 6)  # r^2 alone could underflow
        factor = up(1 + 1 / tau.clamp(min=SMALLEST_TAU), 2)
        residual_loss = torch.where(self.exact, torch.zeros_like(tau), times(quadratic.residual_sum, factor))
        total = up(
            0.5 * (times(mu, self.radius, self.radius) + form + residual_loss) + times(self.error, self.radius), 6
        )
        valid = total.isfinite() & (lam > 0) & mu.isfinite()
        return torch.where(valid, total, torch.full_like(total, torch.inf))


@dataclass(frozen=True, eq=False)
class Factor:
    """A preconditioner from the Cholesky factor L, L L^T approximating I - S / t for the quadratic's matrix S.

    t: (batch,).   lower: L (batch, n, n), single precision. Its results are estimates, and no bound depends on them.
    """

    quadratic: Quadratic
    t: Tensor
    lower: Tensor

    def solve(self, r: Tensor) -> Tensor:
        """An approximation of (I - A^T diag(w) A / t)^-1 r, (batch, inputs) -> the same."""
        if not self.quadratic.by_rows:
            return self._on_side(r)
        root, rows = self.quadratic.weights.sqrt(), self.quadratic.rows
        inside = self._on_side(root * rows.apply(r))
        return r + rows.transpose(root * inside) / self.t.unsqueeze(1)

    def _on_side(self, r: Tensor) -> Tensor:
        size = r.abs().amax(1, keepdim=True).clamp(min=TINY)  # keeps all in the range of single precision
        single = (r / size).to(self.lower.dtype).unsqueeze(2)
        half = torch.linalg.solve_triangular(self.lower, single, upper=False)
        return torch.linalg.solve_triangular(self.lower.mT, half, upper=True).squeeze(2).to(r.dtype) * size


def conjugate_gradients(
    quadratic: Quadratic,
    precondition: Callable[[Tensor], Tensor],
    gradient: Tensor,
    mu: Tensor,
    tau: Tensor,
    steps: int,
) -> Tensor:
    """An approximation y of H^-1 g by preconditioned conjugate gradients on H / mu; any y gives a bound."""
    ratio = ((1 + tau) / mu).unsqueeze(1)
    unit = powers_of_two(gradient).unsqueeze(1)  # so that no square of a gradient underflows
    r, y = gradient / unit, torch.zeros_like(gradient)
    z = precondition(r)
    p, square = z, (r * z).sum(1, keepdim=True)
    for _ in range(steps):
        image = p - ratio * quadratic.product(p)
        step = (square / (p * image).sum(1, keepdim=True)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        y, r = y + step * p, r - step * image
        z = precondition(r)
        new = (r * z).sum(1, keepdim=True)
        p, square = z + (new / square).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * p, new
    return (y / mu.unsqueeze(1) * unit).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
