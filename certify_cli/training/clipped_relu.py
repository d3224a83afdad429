"""ReLU clipped at a threshold that is learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class ClippedReLU(nn.Module):
    """min(max(z, 0), high), whose threshold is a parameter.   high: where it begins, > 0."""

    def __init__(self, high: float = 1.0) -> None:
        super().__init__()
        self.log_high = nn.Parameter(torch.tensor(math.log(high), dtype=torch.float32))

    @property
    def high(self) -> Tensor:
        """The threshold, which stays positive."""
        return self.log_high.exp()

    def forward(self, z: Tensor) -> Tensor:
        # scaled to fixed thresholds, so that a bound's gradient reaches the learned one by way of the scales
        return torch.clamp(z / self.high, 0.0, 1.0) * self.high

    def entry(self) -> dict[str, Any]:
        """The layer of the spec at the present threshold."""
        return {"type": "clip", "low": 0.0, "high": float(self.high.detach())}

    def written_out(self) -> nn.Module:
        """The same layer without parameters."""
        return nn.Hardtanh(0.0, self.entry()["high"])
