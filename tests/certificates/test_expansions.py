"""Expansions remembered ball by ball are those computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.remainder.expansion import BallExpansion, expand_on_ball
from certify_cli.certificates import expansions
from certify_cli.certificates.expansions import NEAR, Expansions
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from tests.networks import SMOOTH, points

D = torch.float64
NETWORK = SMOOTH["convolutional"]


def bounds_of(ball: BallExpansion) -> list[torch.Tensor]:
    return [t for by_node in (ball.ranges.low, ball.ranges.high, ball.residual) for t in by_node.values()]


BALLS = (([0, 1, 2, 3], [0.1, 0.2, 0.1, 0.3]), ([3, 1], [0.3, 0.05]), ([2], [0.2]), ([1], [0.05]))
"""Samples and the radii of their balls, one call after the other."""


def linearised() -> Expansions:
    point = EvaluatedPoints(NETWORK, points(NETWORK, 4))
    found = Expansions(ModelBounds(NETWORK), point, relaxed=False)
    found.linearise(torch.full((4,), 0.1, dtype=D))
    return found


def test_what_is_remembered_is_what_is_computed_anew() -> None:
    with exact_kernels():
        kept = linearised()
        for samples, radii in BALLS:
            index, radius = torch.tensor(samples), torch.tensor(radii, dtype=D)
            found = kept.at(index, radius)
            assert torch.equal(found.radius, radius)
            for one, other in zip(bounds_of(found), bounds_of(linearised().at(index, radius)), strict=True):
                assert torch.allclose(one, other, rtol=1e-12, atol=0.0)


def test_a_ball_asked_for_twice_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(point: EvaluatedPoints, *rest: Any, **named: Any) -> BallExpansion:
        counts.append(len(point.x))
        return expand_on_ball(point, *rest, **named)

    monkeypatch.setattr(expansions, "expand_on_ball", counted)
    with exact_kernels():
        kept, radius = linearised(), torch.full((4,), 0.1, dtype=D)
        kept.at(torch.arange(4), radius)
        kept.at(torch.tensor([2, 0]), torch.tensor([0.1, 0.15], dtype=D))
        assert counts == [4, 1]
        kept.linearise(radius / 1.1)  # near: the linearisation stays
        assert counts == [4, 1]
        kept.linearise(torch.tensor([0.1, 0.11 * NEAR, 0.1, 0.1], dtype=D))  # that of one sample is new
        kept.at(torch.tensor([0, 1]), torch.tensor([0.1, 0.11 * NEAR], dtype=D))
        assert counts == [4, 1, 4]
