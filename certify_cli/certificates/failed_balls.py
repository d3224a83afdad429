"""What a ball that failed is still good for: its ranges hold on every smaller ball around the same sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import Ranges


class FailedBalls:
    """Ranges on each sample's smallest failed ball. On smaller ones fewer units bend, and fewer rows are asked for."""

    def __init__(self) -> None:
        self._ranges: Ranges | None = None

    def narrow(self, index: Tensor, ranges: Ranges) -> Ranges:
        """The ranges of the samples `index`, narrowed where a larger ball has failed."""
        if self._ranges is None:
            return ranges
        known = self._ranges.at(index)
        larger = known.radius >= ranges.radius
        wide = larger.unsqueeze(1)
        return Ranges(
            ranges.radius,
            {t: torch.where(wide, torch.fmax(low, known.low[t]), low) for t, low in ranges.low.items()},
            {t: torch.where(wide, torch.fmin(high, known.high[t]), high) for t, high in ranges.high.items()},
            {t: torch.where(larger, torch.fmin(norm, known.norm[t]), norm) for t, norm in ranges.norm.items()},
        )

    def keep(self, index: Tensor, ranges: Ranges, samples: int) -> None:
        """Enter failed balls around the samples `index`, of so many in all."""
        if self._ranges is None:
            row = torch.zeros(samples, dtype=torch.long, device=index.device)
            self._ranges = replace(ranges.at(row), radius=torch.full_like(ranges.radius[row], -torch.inf))
        before = self._ranges.radius[index]
        smaller = ((before < 0) | (ranges.radius < before)).nonzero()[:, 0]
        self._ranges = self._ranges.put(index[smaller], ranges.at(smaller))
