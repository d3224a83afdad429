"""Expansions of a batch's pre-activations, ball by ball: with one linearisation, each sample's last ball remembered.

A search asks for one ball several times: for the bounds of several rivals, and after a new linearisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import Ranges, interval_ranges
from certify_cli.bounds.relaxation.intermediate_bounds import intermediate_bounds
from certify_cli.bounds.remainder.expansion import BallExpansion, expand_on_ball
from certify_cli.network.evaluated import EvaluatedPoints

NEAR = 1.5
"""A linearisation serves balls of up to this many times the radius that it was made for, or one part in so many."""


@dataclass(eq=False)
class Expansions:
    """Expansions on balls around the samples of a batch.

    relaxed: whether they begin with the ranges of linear relaxation, not with those of intervals.
    """

    model_bounds: ModelBounds
    point: EvaluatedPoints
    relaxed: bool
    _latest: BallExpansion | None = None
    _centre: Tensor | None = None

    def linearise(self, radius: Tensor) -> None:
        """Make the linearisation of all later balls for those of `radius` (batch,).

        A sample whose present linearisation is for a ball of about this size keeps it.
        """
        before = None
        if self._centre is not None and self._latest is not None:
            ratio = radius / self._centre
            far = ~((ratio < NEAR) & (ratio > 1 / NEAR))
            if not bool(far.any()):
                return
            radius, before = torch.where(far, radius, self._centre), self._latest.linearisation
        self._centre = radius
        self._latest = expand_on_ball(self.point, self._ranges(self.point, radius), like=before)

    def at(self, samples: Tensor, radius: Tensor) -> BallExpansion:
        """The expansion on balls of `radius` (count,) around the samples (count,), each of them once."""
        if self._latest is None:
            point = self.point.at(samples)
            return expand_on_ball(point, self._ranges(point, radius))
        new = (self._latest.radius[samples] != radius).nonzero()[:, 0]
        if len(new):
            self._enter(samples[new], radius[new])
        return self._latest.at(samples)

    def _enter(self, samples: Tensor, radius: Tensor) -> None:
        """Remember the expansions on these balls."""
        latest = self._latest
        assert latest is not None
        point, linearisation = self.point.at(samples), latest.at(samples).linearisation
        found = expand_on_ball(point, self._ranges(point, radius), linearisation)
        residual = {t: old.index_copy(0, samples, found.residual[t]) for t, old in latest.residual.items()}
        self._latest = replace(latest, ranges=latest.ranges.put(samples, found.ranges), residual=residual)

    def _ranges(self, point: EvaluatedPoints, radius: Tensor) -> Ranges:
        ranges = interval_ranges(point, self.model_bounds.weights, radius)
        return intermediate_bounds(point, ranges, self.model_bounds.memory)[0] if self.relaxed else ranges
