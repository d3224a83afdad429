"""The Lipschitz constant of H x + G phi(V x + b) by one linear matrix inequality (LipSDP; theory section 14).

With slopes of phi in [a, b] and any diagonal T >= 0, differences d of inputs and w of hidden values obey
(w - a V d)^T T (b V d - w) >= 0. So if

    M(L^2) = [ L^2 I - H^T H + 2ab V^T T V     -H^T G - (a+b) V^T T ]
             [ .                                2T - G^T G          ]   >=  -delta I ,

then ||H d + G w||^2 <= L^2 ||d||^2 + delta (||d||^2 + ||w||^2), and ||w|| <= s ||V|| ||d|| for s = max(|a|, |b|). T is
a choice: an interior-point method finds it, and what it found is proved by one factorisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.numerics.deadline import check
from certify_cli.numerics.eigen import largest_eigenvalue
from certify_cli.numerics.norms import frobenius_norm, matrix_norm
from certify_cli.numerics.rounding import TINY, gamma, number, powers_of_two, times, up, vector_norm_up

GAP, GROWTH, NEWTON_STEPS, NEAR, HALVINGS = 1e-4, 8.0, 20, 0.05, 30
"""Of the interior-point method: it ends where L^2 is within this part of the least one; the growth of its weight,
the steps for each weight, the decrease below which no further one is worth it, and how often a step is halved."""
SMALLEST = 1e-60
"""Smallest size of an entry other than 0, and inverse of the largest one, of matrices that are bounded."""
MARGIN = 1e-7
"""By so much, relative, L^2 is proved above the value that was found: a proof needs some room."""


def is_moderate(values: Tensor, smallest: float = SMALLEST) -> bool:
    """Whether all entries are 0 or of a size whose squares, and products of a few, neither overflow nor underflow."""
    sizes = values.abs()
    return bool(((sizes == 0) | ((sizes >= smallest) & (sizes <= 1 / smallest))).all())


def operations(inputs: int, hidden: int) -> float:
    """Estimate of the floating-point operations that a constant takes."""
    return 200.0 * (inputs + hidden) ** 3


def _powers_of_two(values: Tensor) -> Tensor:
    return powers_of_two(values.unsqueeze(1))


@dataclass(frozen=True, eq=False)
class OneLayer:
    """The matrices of H x + G phi(V x + b), with bounds of the Frobenius norms of their errors.

    h: (outputs, inputs).   g: (outputs, hidden).   v: (hidden, inputs).   slopes: [a, b].
    """

    h: Tensor
    g: Tensor
    v: Tensor
    errors: tuple[float, float, float]
    slopes: tuple[float, float]

    @property
    def steepest(self) -> float:
        return max(map(abs, self.slopes))

    def constant(self) -> float:
        """An upper bound of the Lipschitz constant; inf where no multipliers were found."""
        size = max(frobenius_norm(self.h), times(frobenius_norm(self.g), frobenius_norm(self.v)))
        if not all(map(is_moderate, (self.h, self.g, self.v))) or not SMALLEST <= size <= 1 / SMALLEST:
            return math.inf
        # in units in which the constant is at most about 1, and weights into and out of a hidden value are of one size
        scale = 2.0 ** round(math.log2(size))
        g, v = self.g.norm(dim=0) / scale, self.v.norm(dim=1)
        unit = torch.where((g > 0) & (v > 0), (v / g).sqrt(), torch.ones_like(v))
        balanced = replace(self, h=self.h / scale, g=self.g / scale)._in_units(unit)
        t = balanced._multipliers()
        if t is None:
            return math.inf
        # and for the proof in units in which multipliers are about L^2, so that its slack is small beside both
        unit = _powers_of_two((balanced._value(t) / t).sqrt())
        proved = balanced._in_units(unit)._proved(t * unit.square())
        norms = [times(self.steepest, matrix_norm(self.v)), times(self.steepest, matrix_norm(self.g))]
        missed = [self.errors[0], times(self.errors[1], norms[0]), times(norms[1], self.errors[2])]
        missed.append(times(self.errors[1], self.steepest, self.errors[2]))
        return up(times(proved, scale) + sum(missed), 8)

    def _in_units(self, unit: Tensor) -> OneLayer:
        """The same map, with hidden values in other units (hidden,), made powers of two, which round nothing."""
        unit = _powers_of_two(unit)
        return replace(self, g=self.g * unit, v=self.v / unit.unsqueeze(1))

    def _squares(self, t: Tensor) -> Tensor | None:
        """Eigenvalues of the Schur complement, of which the last is the least L^2 for multipliers t (hidden,).

        None where 2T - G^T G is not positive definite, or a number overflows.
        """
        low, high = self.slopes
        inner, failed = torch.linalg.cholesky_ex(torch.diag(2 * t) - self.g.T @ self.g)
        if int(failed):
            return None
        cross = self.h.T @ self.g + (low + high) * self.v.T * t
        half = torch.linalg.solve_triangular(inner, cross.T, upper=False)
        whole = self.h.T @ self.h - 2 * low * high * (self.v.T * t) @ self.v + half.T @ half
        if not all(bool(part.isfinite().all()) for part in (2 * t, inner, cross, whole)):
            return None
        try:
            return torch.linalg.eigvalsh(0.5 * (whole + whole.T))
        except torch.linalg.LinAlgError:  # no convergence
            return None

    def _multipliers(self) -> Tensor | None:
        """Multipliers (hidden,) near those of the least L^2, by an interior-point method; None without a start.

        Minimised is  weight L^2 - log det M(L^2),  by Newton steps, for a weight that grows. In M, multiplier i has the
        factor U_i C U_i^T with U_i = [(V_i, 0), (0, e_i)], so that derivatives are products with M^-1 in 2 x 2 blocks.
        """
        start = (self.g.T @ self.g).abs().sum(1)  # Gershgorin: 2T - G^T G is diagonally dominant
        if number(start.max()) == 0.0:
            return None
        t = 2 * start.clamp(min=1e-9 * number(start.max()))
        square = 2 * self._value(t)
        size = self.h.shape[1] + len(t)
        if not 0.0 < square < math.inf:
            return None
        weight = size / square
        while size / weight > GAP * square:
            for _ in range(NEWTON_STEPS):
                check()
                moved = self._newton(t, square, weight)
                if moved is None:
                    break
                t, square = moved
            weight *= GROWTH
        return t

    def _newton(self, t: Tensor, square: float, weight: float) -> tuple[Tensor, float] | None:
        """One step from (t, L^2), as far as it goes down; None where it would not, or by less than NEAR."""
        n, m, (low, high) = self.h.shape[1], len(t), self.slopes
        factor, failed = torch.linalg.cholesky_ex(self._matrix(t, square))
        if int(failed):
            return None
        inverse = torch.cholesky_inverse(factor)
        zero = self.v.new_zeros(n, m)
        eye = torch.eye(m, dtype=torch.float64, device=t.device)
        units = torch.cat([torch.cat([self.v.T, zero], 1), torch.cat([torch.zeros_like(eye), eye], 1)])
        core = t.new_tensor([[2 * low * high, -(low + high)], [-(low + high), 2.0]])
        carried = inverse @ units
        blocks = (units.T @ carried).reshape(2, m, 2, m).permute(1, 3, 0, 2)  # (i, j, 2, 2)
        turned = core @ blocks
        slope = torch.cat([weight - inverse[:n, :n].trace().reshape(1), -torch.einsum("iiaa->i", turned)])
        bend = t.new_zeros(1 + m, 1 + m)
        bend[0, 0] = inverse[:n, :n].square().sum()
        top = carried[:n].reshape(n, 2, m)
        bend[0, 1:] = bend[1:, 0] = torch.einsum("ab,nam,nbm->m", core, top, top)
        bend[1:, 1:] = torch.einsum("ijab,jiba->ij", turned, turned)
        each = bend.diagonal().clamp(min=TINY).rsqrt()  # in units in which the diagonal is 1
        solved, singular = torch.linalg.solve_ex(each[:, None] * bend * each, each * slope)
        step = -each * solved
        if int(singular) or not float(-(slope @ step)) >= NEAR:  # not finite, either
            return None
        before = weight * square - 2 * float(factor.diagonal().log().sum())
        for _ in range(HALVINGS):
            new_t, new_square = t + step[1:], square + float(step[0])
            factor, failed = torch.linalg.cholesky_ex(self._matrix(new_t, new_square))
            if not int(failed) and weight * new_square - 2 * float(factor.diagonal().log().sum()) < before:
                return new_t, new_square
            step = step / 2
        return None

    def _matrix(self, t: Tensor, square: float) -> Tensor:
        """M(L^2), as computed."""
        low, high = self.slopes
        top = square * torch.eye(self.h.shape[1], dtype=torch.float64, device=t.device) - self.h.T @ self.h
        top = top + 2 * low * high * (self.v.T * t) @ self.v
        cross = -(self.h.T @ self.g) - (low + high) * self.v.T * t
        bottom = torch.diag(2 * t) - self.g.T @ self.g
        matrix = torch.cat([torch.cat([top, cross], 1), torch.cat([cross.T, bottom], 1)])
        return 0.5 * (matrix + matrix.T)

    def _value(self, t: Tensor) -> float:
        values = self._squares(t)
        return math.inf if values is None else float(values[-1])

    def _proved(self, t: Tensor) -> float:
        """The bound that multipliers t prove, for the matrices as they stand."""
        square_up = self._value(t) * (1 + MARGIN)
        exact = all(is_moderate(part, SMALLEST**2) for part in (self.h, self.g, self.v, t))  # in the units chosen, too
        if not exact or not math.isfinite(square_up):
            return math.inf
        square_up = max(square_up, 0.0)
        low, high = self.slopes
        inputs, hidden = self.h.shape[1], self.g.shape[1]
        matrix = self._matrix(t, square_up)
        h, g, v, largest = frobenius_norm(self.h), frobenius_norm(self.g), frobenius_norm(self.v), number(t.max())
        sizes = [
            times(square_up, math.sqrt(inputs)),
            times(h + g, h + g),
            times(2 * abs(low * high) + 2 * abs(low + high) * (1 + 1 / max(v, 1e-9)), largest, v, max(v, 1e-9)),
            2 * number(vector_norm_up(t)),
        ]
        rounding = times(gamma(max(*self.h.shape, hidden) + 12), up(sum(sizes), 8))
        # matrix >= -delta I, as lambda_max(shift I - matrix) <= shift + delta; the shift makes it semidefinite
        shift = up(number(matrix.abs().sum(1).max()), len(matrix) + 2)
        shifted = shift * torch.eye(len(matrix), dtype=torch.float64, device=t.device) - matrix
        slack = up(rounding + 2 * times(gamma(2), shift), 2)
        delta = up(float(largest_eigenvalue(shifted.unsqueeze(0), slack)) - shift, 2)
        if not math.isfinite(delta):  # nothing was proved
            return math.inf
        delta = max(delta, 0.0)
        norm = times(self.steepest, matrix_norm(self.v))
        return up(math.sqrt(up(square_up + times(delta, up(1 + times(norm, norm), 2)), 3)), 2)
