"""The bounds on a ball once more, dense and in plain float64: what `local`, `linear` and `local-lipschitz` certify,
recomputed without their code. Roundings are not counted here: this is a second opinion, no proof.

With any slopes s and weights w >= 0, one a neuron, a margin is in the ball of radius e at least (theory section 4)

    f - max over ||d|| <= e of [-<g_s, d> + sum w D^2 / 2] + sum over neurons of  min over t of [v_s q_s(t) + w t^2 / 2]

where q_s(t) = phi(z + t) - phi(z) - s t and t runs through the neuron's range, here over a fine grid. w = 0 is linear
relaxation. Slopes and weights are climbed by Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from certify_cli.audit.verify.functions import Function
from certify_cli.audit.verify.proof import proved
from certify_cli.audit.verify.prover import Balls, Prover
from certify_cli.audit.verify.reading import INPUT

GRID = 65
"""Places in a neuron's range, besides 0 and the kinks; what lies between is bounded by the curvature."""
STEPS = 120
RATE = 0.03
POWER = 12
"""Steps to the largest eigenvalue."""


class Reference:
    def __init__(self, prover: Prover) -> None:
        self.prover, self.layers, self.last = prover, prover.layers, prover.last

    def holds(self, x: Tensor, top: int, radius: float) -> bool:
        """Whether every margin is positive on the ball of `radius` around x (inputs,)."""
        rivals = [i for i in range(self.prover.classes) if i != top]
        if not self.last:  # affine: the proof is exact already
            prediction, size = torch.tensor([top], dtype=torch.int64), torch.tensor([radius], dtype=torch.float64)
            return proved(self.prover, x[None], prediction, size)[0]
        z = self._values(x)
        ball = self._ball(x, radius)
        self._relax(z, ball, radius)
        f = (z[-1][top] - z[-1])[rivals]
        return bool((self._climbed(z, ball, radius, top, rivals, f) > 0).all())

    def _values(self, x: Tensor) -> list[Tensor]:
        h: dict[int, Tensor] = {INPUT: x}
        z: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            z.append(layer.bias + sum(m.value @ h[s] for s, m in layer.weights.items()))
            if layer.function is not None:
                h[k] = layer.function.value(z[k])
        return z

    def _ball(self, x: Tensor, radius: float) -> Balls | None:
        """The Jacobian tier's ranges, where there is curvature."""
        if not self.prover.smooth:
            return None
        return self.prover.balls(self.prover.values(x[None]), torch.tensor([radius], dtype=torch.float64))

    def _function(self, k: int) -> Function:
        function = self.layers[k].function
        assert function is not None
        return function

    def _grid(self, z: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
        return _grid(self._function(k), z[k], self.low[k], self.high[k])

    def _relax(self, z: list[Tensor], ball: Balls | None, radius: float) -> None:
        """Sets `low`, `high`: ranges of every D_l by backward substitution of two lines a neuron, within the ball's."""
        self.low: dict[int, Tensor] = {}
        self.high: dict[int, Tensor] = {}
        self.lines: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for k in range(self.last):
            rows = torch.eye(len(z[k]), dtype=torch.float64)
            high, low = self._substituted(k, rows, radius), -self._substituted(k, -rows, radius)
            if ball is not None:
                low, high = torch.maximum(low, ball.low[k][0]), torch.minimum(high, ball.high[k][0])
            self.low[k], self.high[k] = low, high
            self.lines[k] = self._two_lines(self._function(k), z[k], low, high)

    def _substituted(self, head: int, rows: Tensor, radius: float) -> Tensor:
        """The most that rows . D_head can be: lines above where a coefficient is positive, below where not."""
        at_head: dict[int, Tensor] = {head: rows}
        most = torch.zeros(len(rows), dtype=torch.float64)
        for k in range(head - 1, -1, -1):
            v = sum(at_head[t] @ self.layers[t].weights[k].value for t in at_head if k in self.layers[t].weights)
            if isinstance(v, int):
                continue
            steep, above, shallow, below = self.lines[k]
            most = most + v.clamp(min=0) @ above + v.clamp(max=0) @ below
            at_head[k] = torch.where(v > 0, v * steep, v * shallow)
        g = sum(at_head[t] @ self.layers[t].weights[INPUT].value for t in at_head if INPUT in self.layers[t].weights)
        return most + radius * torch.as_tensor(g, dtype=torch.float64).norm(dim=1)

    @staticmethod
    def _two_lines(f: Function, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope and offset of a line above phi(z + t) - phi(z) for t in [low, high], and of one below: of the slopes at
        the sample, in the middle, at the ends and of the chord, whichever leaves least in the middle."""
        t, between = _grid(f, z, low, high)
        rise = f.value(z + t) - f.value(z)
        middle = (low + high) / 2
        chord = (rise[GRID - 2] - rise[0]) / (high - low).clamp(min=1e-12)
        slopes = torch.stack([chord, *(f.slope(z + p) for p in (0 * low, middle, low, high))])
        gap = rise - slopes[:, None] * t
        above, below = gap.amax(1) + between, gap.amin(1) - between
        up, down = (above + slopes * middle).argmin(0)[None], (below + slopes * middle).argmax(0)[None]
        picked = [(slopes, up), (above, up), (slopes, down), (below, down)]
        steep, over, shallow, under = (table.gather(0, row)[0] for table, row in picked)
        return steep, over, shallow, under

    def _climbed(
        self, z: list[Tensor], ball: Balls | None, radius: float, top: int, rivals: Sequence[int], f: Tensor
    ) -> Tensor:
        """The best bound found for every rival."""
        eye = torch.eye(self.prover.classes, dtype=torch.float64)
        rows = eye[top] - eye[list(rivals)]
        grids = {k: self._grid(z, k) for k in range(self.last)}
        rise = {k: self._function(k).value(z[k] + t) - self._function(k).value(z[k]) for k, (t, _) in grids.items()}
        best = torch.full_like(f, -torch.inf)
        open_ = torch.arange(len(rivals))
        for start in self._starts(z, ball, rows):
            slopes = {k: s[open_].clone().requires_grad_() for k, s in start[0].items()}
            logs = {k: w[open_].clone().requires_grad_() for k, w in start[1].items()}
            climber = torch.optim.Adam([*slopes.values(), *logs.values()], lr=RATE)
            for _ in range(STEPS):
                with torch.enable_grad():
                    value = self._value(ball, radius, rows[open_], f[open_], slopes, logs, grids, rise)
                    climber.zero_grad()
                    (-value.sum()).backward()
                found = value.detach()
                hopeful = ((found > 0) & (best[open_] <= 0)).nonzero()[:, 0]
                if len(hopeful):  # power iteration is below the largest eigenvalue: what it promises is looked at again
                    s, w = ({k: part.detach()[hopeful] for k, part in parts.items()} for parts in (slopes, logs))
                    which = open_[hopeful]
                    found[hopeful] = self._value(ball, radius, rows[which], f[which], s, w, grids, rise, exact=True)
                climber.step()
                best[open_] = torch.maximum(best[open_], found)
                if bool((best[open_] > 0).all()):
                    break
            open_ = open_[best[open_] <= 0]
            if not len(open_):
                break
        return best

    def _starts(
        self, z: list[Tensor], ball: Balls | None, rows: Tensor
    ) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """Slopes and logarithms of the weights: the relaxation's lines with none, and where there is curvature the
        tangents at the sample with the bends of their ranges."""
        flat: dict[int, Tensor] = {}
        bent: dict[int, Tensor] = {}
        logs: dict[int, Tensor] = {}
        by_lines, by_tangents = {self.last: rows}, {self.last: rows}
        for k in range(self.last - 1, -1, -1):
            v = self._pulled(by_lines, k)
            steep, _, shallow, _ = self.lines[k]
            flat[k] = torch.where(v > 0, shallow, steep)
            by_lines[k] = v * flat[k]
            if ball is not None:
                w = self._pulled(by_tangents, k)
                bent[k] = self._function(k).slope(z[k]).expand_as(w)
                by_tangents[k] = w * bent[k]
                least, most = ball.bend[k]
                logs[k] = torch.maximum(-w * least, -w * most).clamp(min=1e-9).log()
        none = {k: torch.full_like(s, -40.0) for k, s in flat.items()}
        return [(bent, logs), (flat, {k: n + 30 for k, n in none.items()})] if ball is not None else [(flat, none)]

    def _pulled(self, at_head: dict[int, Tensor], k: int) -> Tensor:
        fed = [at_head[t] @ self.layers[t].weights[k].value for t in at_head if k in self.layers[t].weights]
        return torch.stack(fed).sum(0)

    def _value(
        self,
        ball: Balls | None,
        radius: float,
        rows: Tensor,
        f: Tensor,
        slopes: dict[int, Tensor],
        logs: dict[int, Tensor],
        grids: dict[int, tuple[Tensor, Tensor]],
        rise: dict[int, Tensor],
        exact: bool = False,
    ) -> Tensor:
        """The bound (rivals,) by its formula; not exact: with an estimate of the largest eigenvalue, to climb by."""
        at_head, least = {self.last: rows}, torch.zeros_like(f)
        weights = {k: log.exp() for k, log in logs.items()}
        for k in range(self.last - 1, -1, -1):
            v, s, w = self._pulled(at_head, k), slopes[k], weights[k]
            t, between = grids[k][0][:, None], grids[k][1]
            step = (self.high[k] - self.low[k]) / (GRID - 2)
            left = v * (rise[k][:, None] - s * t) + w * t.square() / 2
            least = least + (left.amin(0) - v.abs() * between - w * step.square() / 8).sum(1)
            at_head[k] = v * s
        g = self._pulled(at_head, INPUT).norm(dim=1)
        if ball is None:
            return f - radius * g + least
        largest = _largest(ball, weights, exact)
        spread = torch.stack([(w * ball.rest[k][0] ** 2).sum(1) for k, w in weights.items()]).sum(0)
        bent = (radius * largest.clamp(min=1e-30).sqrt() + spread.clamp(min=1e-30).sqrt()) ** 2 / 2
        return f - radius * g + least - bent


def _grid(f: Function, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(count, size): places from low to high, 0 and the kinks; and by how much phi may leave a line between two."""
    part = torch.linspace(0, 1, GRID - 1, dtype=torch.float64)[:, None]
    marked = [torch.zeros_like(low), *(kink - z for kink in f.kinks)]
    places = torch.cat([low + part * (high - low), *(place.clamp(low, high)[None] for place in marked)])
    return places, f.bend * ((high - low) / (GRID - 2)).square() / 8


def _largest(ball: Balls, weights: dict[int, Tensor], exact: bool) -> Tensor:
    """lambda_max of sum A^T diag(w) A for every rival; not exact: from below, by what power iteration ends with."""
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
    turned = root * vector
    return ((turned @ full) * turned).sum(1)
