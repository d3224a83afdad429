"""What is cheap to prove, proved anew: the closed form with a global Lipschitz or curvature bound, at the sample and at
further points, and the expansion at the sample with its remainders on the ball (theory sections 1, 4 and 5).

Every last inequality is one between fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

import torch
from torch import Tensor

from certify_cli.audit.verify.prover import Prover, Values, Vectors
from certify_cli.audit.verify.reading import INPUT, UP, U, length

STEPS = 30
"""Tangents tried for a rival."""
NEVER = 1e-9
STALLED = 0.97
"""No more, where the last one is short of a proof by more than this part of what the one before was."""
NEAR = 0.4
"""Where the closed form reaches less than this part of a radius, tangents will not reach it either."""


def stays_positive(margin: float, gradient: float, curvature: float, loss: float, radius: float) -> bool:
    """Whether  margin - gradient e - curvature e^2 / 2 - loss > 0  at e = radius, in exact arithmetic."""
    numbers = (margin, gradient, curvature, loss, radius)
    if not all(map(isfinite, numbers)):
        return margin == float("inf")
    if margin - (gradient + curvature * radius / 2) * radius - loss < -NEVER * margin:
        return False  # far from it: no need for fractions
    f, g, m, lost, e = map(Fraction, numbers)
    return f - g * e - m * e * e / 2 - lost > 0


def stays_positive_capped(margin: float, gradient: float, curvature: float, lipschitz: float, radius: float) -> bool:
    """Whether  margin - integral over t < e of min(gradient + curvature t, lipschitz) > 0, in exact arithmetic."""
    if not (all(map(isfinite, (margin, gradient, curvature, lipschitz, radius))) and 0 <= gradient < lipschitz):
        return False
    f, g, m, cap, e = map(Fraction, (margin, gradient, curvature, lipschitz, radius))
    turn = min((cap - g) / m, e) if m else e
    return f - g * turn - m * turn * turn / 2 - cap * (e - turn) > 0


def proved(prover: Prover, x: Tensor, prediction: Tensor, radius: Tensor, points: Tensor | None = None) -> list[bool]:
    """For every sample of x (batch, inputs): whether it is proved anew that no perturbation smaller than its radius
    changes the prediction; every rival by whichever way holds. points (batch, inputs): d at which to try the tangents
    first."""
    values, top = prover.values(x), prediction.tolist()
    open_ = [(row, i) for row in range(len(x)) for i in range(prover.classes) if i != top[row]]
    f, size = prover.margins(values, prediction).tolist(), radius.tolist()
    slope = prover.lipschitz[prediction].tolist()
    open_ = [(n, i) for n, i in open_ if not stays_positive(f[n][i], slope[n][i], 0.0, 0.0, size[n])]
    if prover.smooth and open_:
        adjoints = prover.adjoints(values, prover.tops(prediction))
        g = adjoints[INPUT].size.tolist()
        m = {(n, i): prover.curvature(top[n], i) for n, i in open_}
        open_ = [
            (n, i)
            for n, i in open_
            if not stays_positive(f[n][i], g[n][i], m[n, i], 0.0, size[n])
            and not stays_positive_capped(f[n][i], g[n][i], m[n, i], slope[n][i], size[n])
        ]
        ways = [_by_remainders, _by_tangents]  # the cheaper one first
        for way in reversed(ways) if prover.last == 1 else ways:
            open_ = way(prover, Samples(x, values, adjoints, prediction, radius, points), open_)
    failed = {n for n, _ in open_}
    return [row not in failed for row in range(len(x))]


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch at hand: `adjoints` of all its margins, `points` as `proved` takes them."""

    x: Tensor
    values: Values
    adjoints: dict[int, Vectors]
    prediction: Tensor
    radius: Tensor
    points: Tensor | None


Pair = tuple[int, int]
"""A sample's row and a rival."""


def _by_remainders(prover: Prover, at: Samples, open_: list[Pair]) -> list[Pair]:
    """The pairs that the expansion at the sample does not prove."""
    rows = sorted({n for n, _ in open_})
    if not rows:
        return []
    adjoints = {k: v.at(rows) for k, v in at.adjoints.items()}
    found = prover.remainders(at.values.at(rows), adjoints, at.radius[rows])
    lost = dict(zip(rows, found.tolist(), strict=True))
    f, g = prover.margins(at.values, at.prediction).tolist(), at.adjoints[INPUT].size.tolist()
    radius = at.radius.tolist()
    return [(n, i) for n, i in open_ if not stays_positive(f[n][i], g[n][i], 0.0, lost[n][i], radius[n])]


def _by_tangents(prover: Prover, at: Samples, open_: list[Pair]) -> list[Pair]:
    """The pairs that no tangent proves. Each is taken at d (for a start, the sample's row of `points`), and then where
    f + M/2 ||.||^2 is less in the ball."""
    f, g = prover.margins(at.values, at.prediction).tolist(), at.adjoints[INPUT].size.tolist()
    top, reach = at.prediction.tolist(), (NEAR * at.radius).tolist()
    near = [(n, i) for n, i in open_ if stays_positive(f[n][i], g[n][i], prover.curvature(top[n], i), 0.0, reach[n])]
    if not near:
        return open_
    proved = set(near).difference(_descended(prover, at, near))
    return [pair for pair in open_ if pair not in proved]


def _descended(prover: Prover, at: Samples, open_: list[Pair]) -> list[Pair]:
    x, prediction, radius, start = at.x, at.prediction, at.radius, at.points
    sample, rival = (torch.tensor(part, dtype=torch.int64) for part in zip(*open_, strict=True))
    low, high = (
        torch.tensor([prover.curvature(*pair) for pair in pairs], dtype=torch.float64)
        for pairs in (
            [(int(prediction[n]), i) for n, i in open_], [(i, int(prediction[n])) for n, i in open_],
        )
    )  # fmt: skip
    d = torch.zeros_like(x[sample]) if start is None else start[sample]
    live, open_pairs = torch.arange(len(open_)), torch.ones(len(open_), dtype=torch.bool)
    before = torch.full((len(open_),), torch.inf, dtype=torch.float64)
    for _ in range(STEPS):
        holds, short, p = _tangents(
            prover, x[sample[live]], d[live], prediction[sample[live]], rival[live], low[live], radius[sample[live]]
        )
        open_pairs[live[holds]] = False
        onward = ~holds & (short < STALLED * before[live])
        before[live] = short
        live, p = live[onward], p[onward]
        if not len(live):
            break
        moved = d[live] - p / (low + high)[live, None]
        d[live] = moved * (radius[sample[live]] / moved.norm(dim=1)).clamp(max=1.0)[:, None]
    return [pair for pair, still in zip(open_, open_pairs.tolist(), strict=True) if still]


def _tangents(
    prover: Prover, x: Tensor, d: Tensor, top: Tensor, rival: Tensor, m: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the minorant f~ + <p, .> - m ||.||^2 / 2 from x + d (theory section 5) is positive in the ball, about by
    how much it is not, and p."""
    moved = x + d
    step = moved - x  # rounded once more, entry by entry
    values = prover.values(moved)
    margin = prover.margins(values, top).gather(1, rival[:, None])[:, 0]
    eye = torch.eye(prover.classes, dtype=torch.float64)
    gradient = prover.adjoints(values, (eye[top] - eye[rival])[:, None])[INPUT]
    g, error = gradient.value[:, 0], gradient.error[:, 0]
    far = length(step, 1)
    terms = (g * step).abs().sum(1) * UP
    along = (g * step).sum(1) + (g.shape[1] + 4) * U * terms + error * far
    level = margin - along - m * far.square() / 2 * UP
    level = level - 8 * U * (margin.abs() + terms + m * far.square())
    p = g + m[:, None] * step
    steep = ((length(p, 1) + 4 * U * (length(g, 1) + m * far)) * UP + error) * UP
    rows = zip(level.tolist(), steep.tolist(), m.tolist(), radius.tolist(), strict=True)
    holds = torch.tensor([stays_positive(f, slope, c, 0.0, e) for f, slope, c, e in rows], dtype=torch.bool)
    return holds, steep * radius + m * radius.square() / 2 - level, p
