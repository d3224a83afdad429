"""Proofs of radii for the check of a run, by three rules (theory sections 1, 4 and 5).

- The closed form with a global Lipschitz or curvature bound at the sample.
- The same at further points.
- The expansion at the sample with its remainders on the ball.

The inequality that ends a proof is decided between fractions, without rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

import torch
from torch import Tensor

from certify_cli.audit.verify.prover import Prover, Values, Vectors
from certify_cli.audit.verify.reading import INPUT, UP, U, upper_norm
from certify_cli.audit.verify.remainders import remainders

STEPS = 30
"""Tangents tried for a rival at most."""
HOPELESS = 1e-9
"""Relative to the margin: an inequality that fails by more in floating point is not decided again between fractions."""
STALLED = 0.97
"""The search for a tangent ends where its shortfall is more than this part of the shortfall before."""
REACH_OF_CLOSED_FORM = 0.4
"""Tangents are tried only where the closed form at the sample certifies this part of the radius."""


def stays_positive(margin: float, gradient: float, curvature: float, loss: float, radius: float) -> bool:
    """Whether  margin - gradient e - curvature e^2 / 2 - loss > 0  at e = radius, in exact arithmetic.

    An infinite margin (there is no rival) stays positive; any other number that is not finite decides against it.
    """
    numbers = (margin, gradient, curvature, loss, radius)
    if not all(map(isfinite, numbers)):
        return margin == float("inf")
    if margin - (gradient + curvature * radius / 2) * radius - loss < -HOPELESS * margin:
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
    """Whether it is proved, for every sample, that no perturbation of norm below its radius changes its prediction.

    x: (batch, inputs).   prediction, radius: (batch,).
    points: d (batch, inputs), where the first tangent is taken; by default 0.
    Each rival may be excluded by another rule.
    """
    values, top = prover.values(x), prediction.tolist()
    unproved = [(row, i) for row in range(len(x)) for i in range(prover.classes) if i != top[row]]
    f, size = prover.margins(values, prediction).tolist(), radius.tolist()
    slope = prover.lipschitz[prediction].tolist()
    unproved = [(n, i) for n, i in unproved if not stays_positive(f[n][i], slope[n][i], 0.0, 0.0, size[n])]
    if prover.smooth and unproved:
        adjoints = prover.adjoints(values, prover.margin_rows(prediction))
        g = adjoints[INPUT].norm.tolist()
        m = {(n, i): prover.curvature(top[n], i) for n, i in unproved}
        unproved = [
            (n, i)
            for n, i in unproved
            if not stays_positive(f[n][i], g[n][i], m[n, i], 0.0, size[n])
            and not stays_positive_capped(f[n][i], g[n][i], m[n, i], slope[n][i], size[n])
        ]
        rules = [_by_remainders, _by_tangents]  # the cheaper one first
        for rule in reversed(rules) if prover.last == 1 else rules:
            unproved = rule(prover, Samples(x, values, adjoints, prediction, radius, points), unproved)
    failed = {n for n, _ in unproved}
    return [row not in failed for row in range(len(x))]


@dataclass(frozen=True, eq=False)
class Samples:
    """The arguments of `proved`, with the network's values and the adjoints of all margins at the samples."""

    x: Tensor
    values: Values
    adjoints: dict[int, Vectors]
    prediction: Tensor
    radius: Tensor
    points: Tensor | None


Pair = tuple[int, int]
"""A sample's row and a rival."""


def _by_remainders(prover: Prover, at: Samples, unproved: list[Pair]) -> list[Pair]:
    """The pairs of `unproved` that the expansion at the sample does not prove either."""
    rows = sorted({n for n, _ in unproved})
    if not rows:
        return []
    adjoints = {k: v.at(rows) for k, v in at.adjoints.items()}
    found = remainders(prover, at.values.at(rows), adjoints, at.radius[rows])
    drops = dict(zip(rows, found.tolist(), strict=True))
    f, g = prover.margins(at.values, at.prediction).tolist(), at.adjoints[INPUT].norm.tolist()
    radius = at.radius.tolist()
    return [(n, i) for n, i in unproved if not stays_positive(f[n][i], g[n][i], 0.0, drops[n][i], radius[n])]


def _by_tangents(prover: Prover, at: Samples, unproved: list[Pair]) -> list[Pair]:
    """The pairs of `unproved` that no tangent proves either.

    The first tangent is taken at the sample's row of `points`, each later one where f + M/2 ||.||^2 is smaller.
    """
    f, g = prover.margins(at.values, at.prediction).tolist(), at.adjoints[INPUT].norm.tolist()
    top, part = at.prediction.tolist(), (REACH_OF_CLOSED_FORM * at.radius).tolist()
    near = [(n, i) for n, i in unproved if stays_positive(f[n][i], g[n][i], prover.curvature(top[n], i), 0.0, part[n])]
    if not near:
        return unproved
    proved = set(near).difference(_descend(prover, at, near))
    return [pair for pair in unproved if pair not in proved]


def _descend(prover: Prover, at: Samples, unproved: list[Pair]) -> list[Pair]:
    """The pairs for which no tangent of a descent proves the radius."""
    x, prediction, radius, start = at.x, at.prediction, at.radius, at.points
    sample, rival = (torch.tensor(part, dtype=torch.int64) for part in zip(*unproved, strict=True))
    low, high = (
        torch.tensor([prover.curvature(*pair) for pair in pairs], dtype=torch.float64)
        for pairs in (
            [(int(prediction[n]), i) for n, i in unproved], [(i, int(prediction[n])) for n, i in unproved],
        )
    )  # fmt: skip
    d = torch.zeros_like(x[sample]) if start is None else start[sample]
    active, missing = torch.arange(len(unproved)), torch.ones(len(unproved), dtype=torch.bool)
    previous = torch.full((len(unproved),), torch.inf, dtype=torch.float64)
    for _ in range(STEPS):
        holds, shortfall, p = _tangents(
            prover,
            x[sample[active]],
            d[active],
            prediction[sample[active]],
            rival[active],
            low[active],
            radius[sample[active]],
        )
        missing[active[holds]] = False
        onward = ~holds & (shortfall < STALLED * previous[active])
        previous[active] = shortfall
        active, p = active[onward], p[onward]
        if not len(active):
            break
        moved = d[active] - p / (low + high)[active, None]
        d[active] = moved * (radius[sample[active]] / moved.norm(dim=1)).clamp(max=1.0)[:, None]
    return [pair for pair, still in zip(unproved, missing.tolist(), strict=True) if still]


def _tangents(
    prover: Prover, x: Tensor, d: Tensor, top: Tensor, rival: Tensor, m: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the minorant f~ + <p, .> - m ||.||^2 / 2 from x + d (theory section 5) is positive in the ball.

    A row of each argument is a pair: x, d (pairs, inputs), the others (pairs,).
    Returns that verdict (pairs,), an estimate (pairs,) of the minorant's shortfall, and p (pairs, inputs).
    """
    moved = x + d
    step = moved - x  # rounded once more, entry by entry
    values = prover.values(moved)
    margin = prover.margins(values, top).gather(1, rival[:, None])[:, 0]
    eye = torch.eye(prover.classes, dtype=torch.float64)
    gradient = prover.adjoints(values, (eye[top] - eye[rival])[:, None])[INPUT]
    g, error = gradient.value[:, 0], gradient.error[:, 0]
    distance = upper_norm(step, 1)
    terms = (g * step).abs().sum(1) * UP
    along = (g * step).sum(1) + (g.shape[1] + 4) * U * terms + error * distance
    level = margin - along - m * distance.square() / 2 * UP
    level = level - 8 * U * (margin.abs() + terms + m * distance.square())
    p = g + m[:, None] * step
    gradient_norm = ((upper_norm(p, 1) + 4 * U * (upper_norm(g, 1) + m * distance)) * UP + error) * UP
    rows = zip(level.tolist(), gradient_norm.tolist(), m.tolist(), radius.tolist(), strict=True)
    holds = torch.tensor([stays_positive(f, slope, c, 0.0, e) for f, slope, c, e in rows], dtype=torch.bool)
    return holds, gradient_norm * radius + m * radius.square() / 2 - level, p
