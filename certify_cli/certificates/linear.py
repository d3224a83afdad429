"""The linear certificate: the largest ball on which linear relaxation keeps every rival's margin positive.

All rivals are tried on every ball at once, all samples each on its own. A ball that passes is a proof by itself, so the
search needs no monotonicity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.bounds.analysis import Analysis
from certify_cli.bounds.ranges import fast_ranges
from certify_cli.bounds.relaxation import lines, losses, relaxed_ranges
from certify_cli.certificates.bracket import Bracket
from certify_cli.certificates.point import Point
from certify_cli.numerics.rounding import difference_down

ROUGH_BALLS, ROUGH = 10, 0.2
"""Balls tried with the fast tier's ranges, which cost next to nothing, and how closely: where to begin."""
BALLS = {"fast": 8, "normal": 14, "max": 20}
"""By effort: balls tried at most."""
CLOSE = {"fast": 1e-2, "normal": 1e-3, "max": 1e-4}
"""By effort: how closely, relatively, the largest ball is looked for."""


def linear_radii(analysis: Analysis, point: Point, start: Tensor) -> tuple[Tensor, Tensor]:
    """Certified radii (batch,), rounded down, and the rivals that decide them; 0 where nothing was proved.

    start (batch,): where to begin.
    """
    begin, _ = _searched(analysis, point, start, ROUGH_BALLS, ROUGH, rough=True)
    begin = torch.where(begin > 0, begin, start)
    return _searched(analysis, point, begin, BALLS[analysis.effort], CLOSE[analysis.effort])


def _searched(
    analysis: Analysis, point: Point, start: Tensor, balls: int, close: float, rough: bool = False
) -> tuple[Tensor, Tensor]:
    bracket = Bracket.around(start)
    decides = point.margin.argmin(1)
    live = (point.margin_low > 0).all(1).nonzero()[:, 0]
    for _ in range(balls):
        if not len(live):
            break
        left, rival = left_of(analysis, point.at(live), bracket.radius[live], rough)
        raised = bracket.told(live, left)
        decides[live[raised]] = rival[raised]
        live = bracket.open(live, close)
    return bracket.inside, decides


def left_of(analysis: Analysis, point: Point, radius: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
    """What balls of `radius` (batch,) leave of the margin towards the nearest rival, as a part of it; and that rival.

    Unless `rough`, the ranges of pre-activations are relaxed as well.
    """
    ranges = fast_ranges(point, analysis.weights, radius)
    between = lines(point, ranges) if rough else relaxed_ranges(point, ranges, analysis.memory)[1]
    eye = torch.eye(point.network.classes, dtype=radius.dtype, device=radius.device)
    cotangents = eye[point.prediction].unsqueeze(1) - eye.unsqueeze(0)
    left = difference_down(point.margin_low, losses(point, between, radius, cotangents))
    return (left / point.margin_low).masked_fill(point.own, torch.inf).min(1)
