"""A dense reference for radii that are not proved anew, such as those of `local`, `linear` and `local-lipschitz`.

It computes in plain float64 and does not count roundings: its verdict is a second opinion, no proof.

For any slopes s and weights w >= 0, one of each a neuron, a lower bound of a margin in the ball of radius e is (theory
section 4)

    f - max over ||d|| <= e of [-<g_s, d> + sum w D^2 / 2] + sum over neurons of  min over t of [v_s q_s(t) + w t^2 / 2]

where q_s(t) = phi(z + t) - phi(z) - s t and t runs through the neuron's pre-activation bounds, here over a fine grid.
w = 0 is linear relaxation. Slopes and weights are optimised by Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from certify_cli.audit.verify.functions import Function
from certify_cli.audit.verify.proof import proved
from certify_cli.audit.verify.prover import Prover
from certify_cli.audit.verify.reading import INPUT
from certify_cli.audit.verify.remainders import Balls, balls

GRID = 65
"""Points of the grid between a neuron's pre-activation bounds, besides 0 and the kinks. Between two of them phi is
bounded by its curvature."""
STEPS = 120
RATE = 0.03
POWER = 12
"""Steps of the power iteration for the largest eigenvalue."""


class Reference:
    """Bounds of one network on balls, without the code that made the records."""

    def __init__(self, prover: Prover) -> None:
        self.prover, self.layers, self.last = prover, prover.layers, prover.last

    def holds(self, x: Tensor, top: int, radius: float) -> bool:
        """Whether every margin of class `top` has a positive bound on the ball of `radius` around x (inputs,)."""
        rivals = [i for i in range(self.prover.classes) if i != top]
        if not self.last:  # affine: the proof is exact already
            prediction, size = torch.tensor([top], dtype=torch.int64), torch.tensor([radius], dtype=torch.float64)
            return proved(self.prover, x[None], prediction, size)[0]
        z = self._values(x)
        ball = self._ball(x, radius)
        self._relax(z, ball, radius)
        f = (z[-1][top] - z[-1])[rivals]
        return bool((self._optimised(z, ball, radius, top, rivals, f) > 0).all())

    def _values(self, x: Tensor) -> list[Tensor]:
        h: dict[int, Tensor] = {INPUT: x}
        z: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            z.append(layer.bias + sum(m.value @ h[s] for s, m in layer.weights.items()))
            if layer.function is not None:
                h[k] = layer.function.value(z[k])
        return z

    def _ball(self, x: Tensor, radius: float) -> Balls | None:
        """The pre-activation bounds of the Jacobian tier; None for a network without curvature."""
        if not self.prover.smooth:
            return None
        return balls(self.prover, self.prover.values(x[None]), torch.tensor([radius], dtype=torch.float64))

    def _function(self, k: int) -> Function:
        function = self.layers[k].function
        assert function is not None
        return function

    def _relax(self, z: list[Tensor], ball: Balls | None, radius: float) -> None:
        """Set `lines`, the linear relaxations, and `low` and `high`, bounds of every D_l.

        Each bound is the tighter of two: by backward substitution of the lines, and the ball's where there is one.
        """
        self.low: dict[int, Tensor] = {}
        self.high: dict[int, Tensor] = {}
        self.lines: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for k in range(self.last):
            rows = torch.eye(len(z[k]), dtype=torch.float64)
            high, low = self._substituted(k, rows, radius), -self._substituted(k, -rows, radius)
            if ball is not None:
                low, high = torch.maximum(low, ball.low[k][0]), torch.minimum(high, ball.high[k][0])
            self.low[k], self.high[k] = low, high
            self.lines[k] = self._relaxation(self._function(k), z[k], low, high)

    def _substituted(self, layer: int, rows: Tensor, radius: float) -> Tensor:
        """Upper bounds (rows,) of rows . D_layer, by backward substitution.

        A neuron is replaced by its upper line where its coefficient is positive, else by the lower one.
        """
        at_preactivation: dict[int, Tensor] = {layer: rows}
        upper = torch.zeros(len(rows), dtype=torch.float64)
        for k in range(layer - 1, -1, -1):
            v = sum(
                at_preactivation[t] @ self.layers[t].weights[k].value
                for t in at_preactivation
                if k in self.layers[t].weights
            )
            if isinstance(v, int):
                continue
            upper_slope, upper_offset, lower_slope, lower_offset = self.lines[k]
            upper = upper + v.clamp(min=0) @ upper_offset + v.clamp(max=0) @ lower_offset
            at_preactivation[k] = torch.where(v > 0, v * upper_slope, v * lower_slope)
        g = sum(
            at_preactivation[t] @ self.layers[t].weights[INPUT].value
            for t in at_preactivation
            if INPUT in self.layers[t].weights
        )
        return upper + radius * torch.as_tensor(g, dtype=torch.float64).norm(dim=1)

    @staticmethod
    def _relaxation(f: Function, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope and offset of a line above phi(z + t) - phi(z) for t in [low, high], then those of a line below.

        The slope is that of phi at the sample, in the middle or at an end, or the chord's: the tightest in the middle.
        """
        t, between = _grid(f, z, low, high)
        change = f.value(z + t) - f.value(z)
        middle = (low + high) / 2
        chord = (change[GRID - 2] - change[0]) / (high - low).clamp(min=1e-12)
        slopes = torch.stack([chord, *(f.slope(z + p) for p in (0 * low, middle, low, high))])
        gap = change - slopes[:, None] * t
        above, below = gap.amax(1) + between, gap.amin(1) - between
        up, down = (above + slopes * middle).argmin(0)[None], (below + slopes * middle).argmax(0)[None]
        picked = [(slopes, up), (above, up), (slopes, down), (below, down)]
        upper_slope, upper_offset, lower_slope, lower_offset = (table.gather(0, row)[0] for table, row in picked)
        return upper_slope, upper_offset, lower_slope, lower_offset

    def _optimised(
        self, z: list[Tensor], ball: Balls | None, radius: float, top: int, rivals: Sequence[int], f: Tensor
    ) -> Tensor:
        """The largest lower bound (rivals,) of every margin that the ascent meets. f: the margins at the sample."""
        eye = torch.eye(self.prover.classes, dtype=torch.float64)
        rows = eye[top] - eye[list(rivals)]
        grids = {k: _grid(self._function(k), z[k], self.low[k], self.high[k]) for k in range(self.last)}
        changes = {k: self._function(k).value(z[k] + t) - self._function(k).value(z[k]) for k, (t, _) in grids.items()}
        best = torch.full_like(f, -torch.inf)
        unproved = torch.arange(len(rivals))
        for start in self._starts(z, ball, rows):
            slopes = {k: s[unproved].clone().requires_grad_() for k, s in start[0].items()}
            logs = {k: w[unproved].clone().requires_grad_() for k, w in start[1].items()}
            optimiser = torch.optim.Adam([*slopes.values(), *logs.values()], lr=RATE)
            for _ in range(STEPS):
                with torch.enable_grad():
                    value = self._value(ball, radius, rows[unproved], f[unproved], slopes, logs, grids, changes)
                    optimiser.zero_grad()
                    (-value.sum()).backward()
                found = value.detach()
                candidates = ((found > 0) & (best[unproved] <= 0)).nonzero()[:, 0]
                if len(candidates):  # power iteration underestimates the largest eigenvalue: compute it exactly
                    s, w = ({k: part.detach()[candidates] for k, part in parts.items()} for parts in (slopes, logs))
                    which = unproved[candidates]
                    found[candidates] = self._value(
                        ball, radius, rows[which], f[which], s, w, grids, changes, exact=True
                    )
                optimiser.step()
                best[unproved] = torch.maximum(best[unproved], found)
                if bool((best[unproved] > 0).all()):
                    break
            unproved = unproved[best[unproved] <= 0]
            if not len(unproved):
                break
        return best

    def _starts(
        self, z: list[Tensor], ball: Balls | None, rows: Tensor
    ) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """Starting points of the optimisation: slopes and logarithms of the weights, each by layer.

        Where there is curvature, first the tangents at the sample, with weights from the curvature bounds; then the
        slopes of the linear relaxation, with (almost) no weights.
        """
        by_relaxation: dict[int, Tensor] = {}
        by_tangent: dict[int, Tensor] = {}
        logs: dict[int, Tensor] = {}
        relaxed, linearised = {self.last: rows}, {self.last: rows}
        for k in range(self.last - 1, -1, -1):
            v = self._pulled_back(relaxed, k)
            upper_slope, _, lower_slope, _ = self.lines[k]
            by_relaxation[k] = torch.where(v > 0, lower_slope, upper_slope)
            relaxed[k] = v * by_relaxation[k]
            if ball is not None:
                w = self._pulled_back(linearised, k)
                by_tangent[k] = self._function(k).slope(z[k]).expand_as(w)
                linearised[k] = w * by_tangent[k]
                lower, upper = ball.quotient[k]
                logs[k] = torch.maximum(-w * lower, -w * upper).clamp(min=1e-9).log()
        none = {k: torch.full_like(s, -40.0) for k, s in by_relaxation.items()}
        if ball is None:
            return [(by_relaxation, none)]
        return [(by_tangent, logs), (by_relaxation, {k: log + 30 for k, log in none.items()})]

    def _pulled_back(self, at_preactivation: dict[int, Tensor], k: int) -> Tensor:
        """The gradient with respect to h_k, of functions whose gradients at the later pre-activations are given."""
        parts = [
            at_preactivation[t] @ self.layers[t].weights[k].value
            for t in at_preactivation
            if k in self.layers[t].weights
        ]
        return torch.stack(parts).sum(0)

    def _value(
        self,
        ball: Balls | None,
        radius: float,
        rows: Tensor,
        f: Tensor,
        slopes: dict[int, Tensor],
        logs: dict[int, Tensor],
        grids: dict[int, tuple[Tensor, Tensor]],
        changes: dict[int, Tensor],
        exact: bool = False,
    ) -> Tensor:
        """The bound (rivals,) by its formula; not exact: with an estimate of the largest eigenvalue, for the ascent."""
        at_preactivation, minima = {self.last: rows}, torch.zeros_like(f)
        weights = {k: log.exp() for k, log in logs.items()}
        for k in range(self.last - 1, -1, -1):
            v, s, w = self._pulled_back(at_preactivation, k), slopes[k], weights[k]
            t, between = grids[k][0][:, None], grids[k][1]
            step = (self.high[k] - self.low[k]) / (GRID - 2)
            remainder = v * (changes[k][:, None] - s * t) + w * t.square() / 2
            minima = minima + (remainder.amin(0) - v.abs() * between - w * step.square() / 8).sum(1)
            at_preactivation[k] = v * s
        g = self._pulled_back(at_preactivation, INPUT).norm(dim=1)
        if ball is None:
            return f - radius * g + minima
        largest = largest_eigenvalue(ball, weights, exact)
        spread = torch.stack([(w * ball.residual[k][0] ** 2).sum(1) for k, w in weights.items()]).sum(0)
        quadratic = (radius * largest.clamp(min=1e-30).sqrt() + spread.clamp(min=1e-30).sqrt()) ** 2 / 2
        return f - radius * g + minima - quadratic


def _grid(f: Function, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A grid of points t, and an upper bound of the distance of phi from its chord between two neighbours.

    t: (count, entries), from low to high, with 0 and the kinks.   The bound: (entries,).
    """
    part = torch.linspace(0, 1, GRID - 1, dtype=torch.float64)[:, None]
    marked = [torch.zeros_like(low), *(kink - z for kink in f.kinks)]
    points = torch.cat([low + part * (high - low), *(point.clamp(low, high)[None] for point in marked)])
    return points, f.largest_curvature * ((high - low) / (GRID - 2)).square() / 8


def largest_eigenvalue(ball: Balls, weights: dict[int, Tensor], exact: bool) -> Tensor:
    """lambda_max (rivals,) of sum A^T diag(w) A; not exact: a lower bound, by power iteration."""
    order = sorted(weights)
    full = torch.cat(
        [torch.cat([ball.gram[k, j][0] if k >= j else ball.gram[j, k][0].T for j in order], 1) for k in order]
    )
    root = torch.cat([weights[k] for k in order], dim=1).sqrt()
    if exact:
        return torch.stack([torch.linalg.eigvalsh(w[:, None] * full * w)[-1] for w in root])
    with torch.no_grad():
        vector = root.clone()
        for _ in range(POWER):
            vector = root * ((root * vector) @ full)
            vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-300)
    image = root * vector
    return ((image @ full) * image).sum(1)
