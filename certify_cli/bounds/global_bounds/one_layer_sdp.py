"""The Lipschitz constant of H x + G phi(V x + b) by one linear matrix inequality (LipSDP; theory section 14).

With slopes of phi in [a, b] and any diagonal T >= 0, differences d of inputs and w of hidden values obey
(w - a V d)^T T (b V d - w) >= 0. So if

    M(L^2) = [ L^2 I - H^T H + 2ab V^T T V     -H^T G - (a+b) V^T T ]
             [ .                                2T - G^T G          ]   >=  -delta I ,

then ||H d + G w||^2 <= L^2 ||d||^2 + delta (||d||^2 + ||w||^2), and ||w|| <= s ||V|| ||d|| for s = max(|a|, |b|). T is
a choice: a descent on L^2 finds it, and what it found is proved by one factorisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.numerics.eigen import largest_eigenvalue
from certify_cli.numerics.norms import frobenius_norm, matrix_norm
from certify_cli.numerics.rounding import TINY, gamma, number, times, up, vector_norm_up

STEPS, RATE, SMOOTHING = 80, 0.1, 0.03
"""Of the descent over log T; the last is the width of the smoothing at its start, as a part of L^2."""
SCALES = (0.55, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Multiples of a first T that are tried."""
LARGEST_UNIT = 100
"""Of a hidden value, as a power of two."""
MARGIN = 1e-7
"""By so much, relative, L^2 is proved above the descent's value: a proof needs some room."""


def operations(inputs: int, hidden: int) -> float:
    """Estimate of the floating-point operations that a constant takes."""
    return 20.0 * STEPS * (inputs + hidden) ** 3


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
        """An upper bound of the Lipschitz constant; inf where the descent found no multipliers."""
        g, v = self.g.norm(dim=0), self.v.norm(dim=1)
        used = (g > 0) & (v > 0) & g.isfinite() & v.isfinite()
        # units in which a hidden value's weights into it and out of it are of one size; powers of two round nothing
        unit = torch.where(used, (v / g).sqrt(), torch.ones_like(v)).log2().round().clamp(-LARGEST_UNIT, LARGEST_UNIT)
        balanced = replace(self, g=self.g * unit.exp2(), v=self.v / unit.exp2().unsqueeze(1))
        t = balanced._multipliers(unit.exp2())
        if t is None:
            return math.inf
        norms = [times(self.steepest, matrix_norm(self.v)), times(self.steepest, matrix_norm(self.g))]
        missed = [self.errors[0], times(self.errors[1], norms[0]), times(norms[1], self.errors[2])]
        missed.append(times(self.errors[1], self.steepest, self.errors[2]))
        return up(balanced._proved(t) + sum(missed), 8)

    def _squares(self, t: Tensor) -> Tensor | None:
        """Eigenvalues of the Schur complement, of which the last is the least L^2 for multipliers t (hidden,).

        None where 2T - G^T G is not positive definite.
        """
        low, high = self.slopes
        inner, failed = torch.linalg.cholesky_ex(torch.diag(2 * t) - self.g.T @ self.g)
        if int(failed):
            return None
        cross = self.h.T @ self.g + (low + high) * self.v.T * t
        half = torch.linalg.solve_triangular(inner, cross.T, upper=False)
        whole = self.h.T @ self.h - 2 * low * high * (self.v.T * t) @ self.v + half.T @ half
        return torch.linalg.eigvalsh(0.5 * (whole + whole.T))

    def _multipliers(self, unit: Tensor) -> Tensor | None:
        """The best t that the descent meets.   unit: of the hidden values, with which the same for all is a start."""
        gram = self.g.T @ self.g
        start = gram.abs().sum(1)  # Gershgorin: 2T - G^T G is diagonally dominant
        if not bool(start.isfinite().all()) or number(start.max()) == 0.0:
            return None
        start = start.clamp(min=1e-9 * number(start.max()))
        starts = [start, unit.square() * (start / unit.square()).max()]
        tried = [(self._value(scale * t), scale * t) for t in starts for scale in SCALES]
        best, found = min(tried, key=lambda pair: pair[0])
        if not math.isfinite(best):
            return None
        log = found.log().requires_grad_(True)
        optimiser = torch.optim.Adam([log], lr=RATE)
        for step in range(STEPS):
            left = 1 - step / STEPS
            with torch.enable_grad():
                values = self._squares(log.exp())
                if values is None:
                    log.data += RATE
                    continue
                largest = values.detach()[-1]
                # the largest eigenvalue has kinks where two meet: a mean that leans to the largest has none
                smooth = torch.logsumexp(values / (SMOOTHING * left**2 * largest + TINY), 0)
                smooth = smooth * (SMOOTHING * left**2 + TINY)
            if float(largest) < best:
                best, found = float(largest), log.detach().exp()
            optimiser.param_groups[0]["lr"] = RATE * left
            optimiser.zero_grad()
            smooth.backward()
            optimiser.step()
        return found

    def _value(self, t: Tensor) -> float:
        values = self._squares(t)
        return math.inf if values is None or not bool(values.isfinite().all()) else float(values[-1])

    def _proved(self, t: Tensor) -> float:
        """The bound that multipliers t prove, for the matrices as they stand."""
        square_up = max(0.0, self._value(t)) * (1 + MARGIN)
        low, high = self.slopes
        inputs, hidden = self.h.shape[1], self.g.shape[1]
        top = square_up * torch.eye(inputs, dtype=torch.float64, device=t.device) - self.h.T @ self.h
        top = top + 2 * low * high * (self.v.T * t) @ self.v
        cross = -(self.h.T @ self.g) - (low + high) * self.v.T * t
        bottom = torch.diag(2 * t) - self.g.T @ self.g
        matrix = torch.cat([torch.cat([top, cross], 1), torch.cat([cross.T, bottom], 1)])
        matrix = 0.5 * (matrix + matrix.T)
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
        delta = max(0.0, up(float(largest_eigenvalue(shifted.unsqueeze(0), slack)) - shift, 2))
        norm = times(self.steepest, matrix_norm(self.v))
        return up(math.sqrt(up(square_up + times(delta, up(1 + times(norm, norm), 2)), 3)), 2)
