"""Upper bounds of margins' drops on balls, affine in the radius, that hold on every smaller ball as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.rounding import difference_down, down, up
from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class AffineLoss(Batched):
    """A margin drops by at most rate e + constant on every ball of radius e up to the radius that was bounded.

    rate: (batch, rows), >= 0.
    constant: (batch, rows), >= 0: the loss by the nonlinear remainders on the largest ball.
    """

    rate: Tensor
    constant: Tensor

    @classmethod
    def of(cls, rate: Tensor, parts: Sequence[Tensor]) -> AffineLoss:
        """The loss with the sum of `parts`, (batch, rows) each, as its constant."""
        constant = up(torch.stack(list(parts)).sum(0), len(parts)) if parts else torch.zeros_like(rate)
        return cls(*torch.broadcast_tensors(rate, constant))

    def on(self, radius: Tensor) -> Tensor:
        """Upper bounds (batch, rows) of the drops on balls of `radius` (batch,); inf where a bound is NaN."""
        return up(self.rate * radius.unsqueeze(1) + self.constant, 3).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def minimum(self, other: AffineLoss, radius: Tensor) -> AffineLoss:
        """Of the two losses, entry by entry the smaller on balls of `radius` (batch,)."""
        return other.where(self.on(radius) <= other.on(radius), self)

    def largest(self, margin: Tensor, radius: Tensor) -> Tensor:
        """Radii (batch, rows), rounded down, below which the drop is less than `margin` (batch, rows).

        radius: (batch,), the largest for which the loss holds; no result exceeds it.
        """
        slack = difference_down(margin, self.constant).clamp(min=0.0)
        certified = down(slack / self.rate, 1).nan_to_num(nan=0.0)
        return torch.minimum(certified, radius.unsqueeze(1))
