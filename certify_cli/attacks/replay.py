"""Attack certificates: a promised point, replayed until it provably changes the prediction (theory section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.numerics.rounding import TINY, up, vector_norm_up

FIRST_PUSH = 1e-12
PUSHES = 24


def replay(point: EvaluatedPoints, moved: Tensor) -> Tensor:
    """(batch,): whether the points `moved` provably have another prediction, the replay's own error bound cleared."""
    there = EvaluatedPoints(point.network, moved)
    margin, error = there.margins_of(point.prediction)
    return there.finite & ((margin + error) < 0).any(1)


def replayed_along(point: EvaluatedPoints, direction: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Witnesses along `direction` (batch, *shape), not normalised, from `radius` (batch,) outwards.

    inf radii are skipped. Each is pushed outwards, in growing relative steps, until its replay has a strictly negative
    margin beyond rounding. Returns the perturbed points x' and ||x' - x||, rounded up; x itself and NaN where no replay
    changed the prediction.
    """
    shape = (-1, *[1] * (point.x.dim() - 1))
    unit = direction / vector_norm_up(direction.flatten(1)).clamp(min=TINY).reshape(shape)
    witness, norm = point.x.clone(), torch.full_like(radius, torch.nan)
    open_ = radius.isfinite().nonzero().squeeze(1)
    step_past = FIRST_PUSH
    for _ in range(PUSHES):
        if not open_.numel():
            break
        start = point.x[open_]
        moved = start + unit[open_] * (radius[open_] * (1 + step_past)).reshape(shape)
        flipped = replay(point.at(open_), moved)
        hit = open_[flipped]
        witness[hit] = moved[flipped]
        norm[hit] = up(vector_norm_up((moved - start)[flipped].flatten(1)))
        open_ = open_[~flipped]
        step_past *= 3
    return witness, norm
