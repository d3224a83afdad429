"""Estimates of the trust-region problem's minimiser, for every step of an ascent. Nothing here is a bound.

A few Lanczos steps from the gradient give a Gauss quadrature of the quadratic's spectrum: nodes theta and masses m with
g^T p(Q) g approximately sum m p(theta). With them the loss of `bounds.remainder.trust_region`,

    mu e^2/2 + 1/2 sum m / (mu - (1+tau) theta) + 1/2 (1 + 1/tau) residual_sum ,

is a sum of a few terms, and the best tau and mu (where y = (mu I - (1+tau) Q)^-1 g has the ball's radius as its length)
follow. Where rows are fewer than inputs, Lanczos runs on their Gram matrix, with sqrt(w) A g in place of g; matrices
are in the precision of `Rows.estimates`. A gradient may be orthogonal to the eigenvector of the largest eigenvalue, so
that other Lanczos steps estimate this one, and continue from call to call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.row_matrices import times, transposed
from certify_cli.bounds.remainder.trust_region import Quadratic
from certify_cli.numerics.lanczos import lanczos
from certify_cli.numerics.rounding import TINY
from certify_cli.numerics.trees import Batched

STEPS = 7
"""Number of Lanczos steps from the gradient, and for the largest eigenvalue in the first call."""
FURTHER = 2
"""Number of Lanczos steps for the largest eigenvalue in later calls."""
BREAKDOWN = 1e-5
ROOT_STEPS = 8
"""Number of Newton's steps for mu."""
MARGIN = 1.0 + 2.0**-12
"""Smallest ratio of mu to the largest eigenvalue, whose estimate is from below."""
TAUS = (1e-9, 1e9)
"""Smallest and largest tau."""
SMALLEST_SHORTFALL = 1e-3
"""A shortfall of ||y||^2 below this part of the radius' square is ignored."""


@dataclass(frozen=True, eq=False)
class Solution(Batched):
    """An estimated solution of the trust-region problem.

    y: (batch, inputs), minus the minimiser.   mu, tau: (batch,), of the dual.   form: (batch,), g^T H^-1 g.
    top: (batch, n), the eigenvector of the largest eigenvalue, on the side of `_Side`.
    ridge: (batch, count), the addition to (A d)^2 in the hard case, else 0.

    In the hard case mu is almost the largest eigenvalue and ||y|| is smaller than the radius: the minimisers are -y
    plus or minus a multiple of the unit eigenvector u that completes the length. The addition is multiple^2 (A u)^2.
    """

    y: Tensor
    mu: Tensor
    tau: Tensor
    form: Tensor
    top: Tensor
    ridge: Tensor


@dataclass(frozen=True, eq=False)
class _Side:
    """A matrix with the nonzero eigenvalues of A^T diag(w) A over unit^2: by rows or by inputs, whichever are fewer."""

    quadratic: Quadratic
    unit: Tensor

    @classmethod
    def of(cls, quadratic: Quadratic) -> _Side:
        return cls(quadratic, quadratic.rows.unit * quadratic.weights.amax(1, keepdim=True).sqrt().clamp(min=TINY))

    @property
    def root(self) -> Tensor:
        """sqrt(w) over its largest entry, (batch, count)."""
        root = self.quadratic.weights.sqrt()
        return (root / root.amax(1, keepdim=True).clamp(min=TINY)).to(self.quadratic.rows.estimates[0].values.dtype)

    @property
    def begin(self) -> Tensor:
        """The first vector of Lanczos for the largest eigenvalue: the rows' sum, weighted by sqrt(w)."""
        if self.quadratic.by_rows:
            return self.root
        return self._transpose(self.root)

    def _transpose(self, p: Tensor) -> Tensor:
        """A^T p over the unit, (batch, count) -> (batch, inputs)."""
        return transposed(self.quadratic.rows.estimates, p)

    def product(self) -> Callable[[Tensor], Tensor]:
        """The product with the matrix, (batch, n) -> (batch, n), in the precision of `Rows.estimates`."""
        parts = self.quadratic.rows.estimates
        root = self.root
        if self.quadratic.by_rows:
            gram = parts[0]
            return lambda q: root * gram.times(root * q)

        def through(q: Tensor) -> Tensor:
            moved = root * times(parts, q)
            return self._transpose(root * moved)

        return through

    def along(self, top: Tensor) -> Tensor:
        """A u, (batch, count), for the unit vector u of the inputs that corresponds to `top` on this side."""
        parts, unit = self.quadratic.rows.estimates, self.quadratic.rows.unit
        if not self.quadratic.by_rows:
            return self.quadratic.rows.apply((top / top.norm(dim=1, keepdim=True).clamp(min=1e-30)).double())
        inside = self.root * top
        moved = parts[0].times(inside)
        length = (inside * moved).sum(1, keepdim=True).clamp(min=1e-30).sqrt()
        return unit * (moved / length).double()

    def start(self, g: Tensor) -> Tensor:
        """g (batch, inputs) mapped to this side, (batch, n), double precision."""
        if not self.quadratic.by_rows:
            return g
        return self.quadratic.weights.sqrt() * self.quadratic.rows.apply(g)


def estimated_minimiser(quadratic: Quadratic, g: Tensor, radius: Tensor, previous: Solution | None) -> Solution:
    """The estimated solution for gradients g (batch, inputs) on balls of `radius` (batch,).

    previous: the solution of a similar problem, whose `top` is improved instead of computed anew.
    """
    side = _Side.of(quadratic)
    product, square = side.product(), side.unit.squeeze(1).square()
    top, largest = _leading(product, *((side.begin, STEPS) if previous is None else (previous.top, FURTHER)))
    begin = side.start(g)
    size = begin.norm(dim=1).clamp(min=TINY)
    krylov = lanczos(product, (begin / size.unsqueeze(1)).to(top.dtype), STEPS, BREAKDOWN)
    values, vectors, basis = krylov.values, krylov.vectors, krylov.basis
    nodes = values.clamp(min=0.0).double() * square.unsqueeze(1)
    masses = (vectors[:, 0].double() * size.unsqueeze(1)).square()
    if quadratic.by_rows:  # by inputs: the part of g orthogonal to all rows has eigenvalue 0
        masses = masses / nodes.clamp(min=TINY)
        masses = torch.where(nodes > 1e-6 * nodes.amax(1, keepdim=True), masses, torch.zeros_like(masses))
        orthogonal = (g.square().sum(1) - masses.sum(1)).clamp(min=0.0)
        nodes = torch.cat([nodes, torch.zeros_like(orthogonal).unsqueeze(1)], dim=1)
        masses = torch.cat([masses, orthogonal.unsqueeze(1)], dim=1)
    largest = torch.maximum(largest.double() * square, nodes.amax(1))
    mu, tau = _balanced(nodes, masses, largest, radius, quadratic.residual_sum)
    gaps = mu.unsqueeze(1) - (1 + tau).unsqueeze(1) * nodes
    inverse = size.unsqueeze(1) * vectors[:, 0].double() / gaps[:, : values.shape[1]]
    y = ((vectors.double() @ inverse.unsqueeze(2)).mT @ basis.double()).squeeze(1)
    if quadratic.by_rows:
        image = quadratic.rows.transpose(quadratic.weights.sqrt() * y)
        y = (g + (1 + tau).unsqueeze(1) * image) / mu.unsqueeze(1)
    return Solution(y, mu, tau, (masses / gaps).sum(1), top, _ridge(side, top, radius, y))


def _ridge(side: _Side, top: Tensor, radius: Tensor, y: Tensor) -> Tensor:
    """`Solution.ridge`, (batch, count)."""
    shortfall = (1 - SMALLEST_SHORTFALL - y.square().sum(1) / radius.square()).clamp(min=0.0)
    if not bool((shortfall > 0).any()):
        return torch.zeros_like(side.quadratic.weights)
    return (shortfall * radius.square()).unsqueeze(1) * side.along(top).square()


def largest_eigenvalue_estimate(quadratic: Quadratic, steps: int) -> Tensor:
    """An estimate from below of the largest eigenvalue of A^T diag(w) A, (batch,), by `steps` Lanczos steps."""
    side = _Side.of(quadratic)
    _, value = _leading(side.product(), side.begin, steps)
    return value.double() * side.unit.squeeze(1).square()


def _leading(product: Callable[[Tensor], Tensor], q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Estimates of the largest eigenvalue's eigenvector, (batch, n), and of the eigenvalue, from below, (batch,)."""
    q = q / q.norm(dim=1, keepdim=True).clamp(min=1e-30)
    found = lanczos(product, q, steps, BREAKDOWN)
    return (found.vectors[:, :, -1:].mT @ found.basis).squeeze(1), found.values[:, -1]


def _balanced(
    nodes: Tensor, masses: Tensor, largest: Tensor, radius: Tensor, residual_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimates of the best (mu, tau), (batch,) each: Newton's steps on 1/||y|| = 1/radius, tau the best at each mu.

    nodes, masses: of the quadrature, (batch, k).   largest: (batch,), the largest eigenvalue.
    """
    e = radius.clamp(min=TINY)
    tau = torch.zeros_like(e)
    mu = MARGIN * largest + masses.sum(1).sqrt() / e + TINY
    for _ in range(ROOT_STEPS):
        gaps = mu.unsqueeze(1) - (1 + tau).unsqueeze(1) * nodes
        squares = masses / gaps.square()
        size = squares.sum(1).sqrt()
        newton = mu + (size / e - 1) * size.square() / (squares / gaps).sum(1)
        mu = torch.where(newton.isfinite(), newton, mu)
        curved = (squares * nodes).sum(1) * (e / size).square()  # as if y had the ball's radius already
        tau = (residual_sum / curved.clamp(min=TINY)).sqrt().nan_to_num(nan=1.0).clamp(*TAUS)
        mu = torch.maximum(mu, (1 + tau) * largest * MARGIN + TINY)
    return mu, tau
