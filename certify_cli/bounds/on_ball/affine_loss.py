"""How much margins fall on balls, as bounds that hold on every smaller ball as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.rounding import difference_down, down, up
from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class AffineLoss(Batched):
    """At most rate e + constant, (batch, rows), on every ball of radius e that is no larger than the one bounded.

    The constant is the loss of the remainders on the largest of these balls. Both >= 0.
    """

    rate: Tensor
    constant: Tensor

    @classmethod
    def of(cls, rate: Tensor, parts: Sequence[Tensor]) -> AffineLoss:
        """With the sum of `parts`, (batch, rows) each, as the constant."""
        constant = up(torch.stack(list(parts)).sum(0), len(parts)) if parts else torch.zeros_like(rate)
        return cls(*torch.broadcast_tensors(rate, constant))

    def on(self, radius: Tensor) -> Tensor:
        """Upper bounds (batch, rows) on balls of `radius` (batch,); inf where it is no number."""
        return up(self.rate * radius.unsqueeze(1) + self.constant, 3).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def least(self, other: AffineLoss, radius: Tensor) -> AffineLoss:
        """Entry by entry whichever is less on the balls of `radius` (batch,)."""
        return other.where(self.on(radius) <= other.on(radius), self)

    def largest(self, margin: Tensor, radius: Tensor) -> Tensor:
        """Radii (batch, rows), at most `radius` (batch,), below which the fall is less than `margin` (batch, rows)."""
        spare = difference_down(margin, self.constant).clamp(min=0.0)
        reach = down(spare / self.rate, 1).nan_to_num(nan=0.0)
        return torch.minimum(reach, radius.unsqueeze(1))
