"""ReLU clipped at a threshold that is learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.training.derived import Derived


class ClippedReLU(Derived):
    """min(max(z, 0), high).   high: > 0; where the threshold begins, if it is `learned`."""

    def __init__(self, high: float = 1.0, learned: bool = True) -> None:
        super().__init__()
        self._fixed = high
        start = torch.tensor(math.log(high), dtype=torch.float32) if learned else None
        self.log_high = None if start is None else nn.Parameter(start)

    def forward(self, z: Tensor) -> Tensor:
        if self.log_high is None:
            return torch.clamp(z, 0.0, self._fixed)
        high = self.log_high.exp()
        # scaled to fixed thresholds, so that a bound's gradient reaches the learned one by way of the scales
        return torch.clamp(z / high, 0.0, 1.0) * high

    @property
    def high(self) -> float:
        """The present threshold."""
        return self._fixed if self.log_high is None else float(self.log_high.detach().exp())

    def entry(self) -> dict[str, Any]:
        return {"type": "clip", "low": 0.0, "high": self.high}

    def written_out(self) -> nn.Module:
        return ClippedReLU(self.high, learned=False)
