"""Replay: attacks count only once they provably change the prediction (theory section 1).

A certified attack lies on the decision boundary up to rounding, where its replay may still have the sample's
prediction. It is therefore moved outward until the replay's margin is negative beyond its own error bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.numerics.rounding import TINY, up, vector_norm_up

FIRST_PUSH = 1e-12
"""The first relative step past the certified radius; every further one is three times as long."""
PUSHES = 24
"""Largest number of steps tried."""


def replay(point: EvaluatedPoints, moved: Tensor) -> Tensor:
    """Mask (batch,): points `moved` (batch, *shape) whose prediction provably differs from that of their samples.

    A margin must be negative by more than the error bound of its evaluation.
    """
    there = EvaluatedPoints(point.network, moved)
    margin, error = there.margins_of(point.prediction)
    return there.finite & ((margin + error) < 0).any(1)


def replayed_along(point: EvaluatedPoints, direction: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Witnesses of attacks at or a little beyond a radius along a direction.

    direction (batch, *shape): of any length.   radius (batch,): samples with an infinite one are skipped.

    Returns perturbed points x' (batch, *shape) whose replay changed the prediction, and ||x' - x|| (batch,), rounded
    up; x itself and NaN where no replay did.
    """
    shape = (-1, *[1] * (point.x.dim() - 1))
    unit = direction / vector_norm_up(direction.flatten(1)).clamp(min=TINY).reshape(shape)
    witness, norm = point.x.clone(), torch.full_like(radius, torch.nan)
    todo = radius.isfinite().nonzero().squeeze(1)
    step_past = FIRST_PUSH
    for _ in range(PUSHES):
        if not todo.numel():
            break
        start = point.x[todo]
        moved = start + unit[todo] * (radius[todo] * (1 + step_past)).reshape(shape)
        flipped = replay(point.at(todo), moved)
        hit = todo[flipped]
        witness[hit] = moved[flipped]
        norm[hit] = up(vector_norm_up((moved - start)[flipped].flatten(1)))
        todo = todo[~flipped]
        step_past *= 3
    return witness, norm
