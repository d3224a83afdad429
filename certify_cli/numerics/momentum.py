"""Gradient ascent with momentum, as the searches for slopes and weights take it. Nothing here is a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from certify_cli.numerics.rounding import TINY

RATE, LONGEST = 0.3, 1.0
"""Of the first step, and of any: a step that does not fail lets the next one be longer."""
SLOPE_STEP, WEIGHT_STEP = 2.0, 4.0
"""One step of rate 1 moves a slope or weight by this part of its scale (`Grid.scales`) where the gradient is as large
as it can be, and by as much less as that is smaller."""
LEAST_ADJOINT = 0.05
"""A neuron's adjoint counts at least this part of the layer's largest."""
MOMENTUM = 0.6


@dataclass(eq=False)
class MomentumAscent:
    """One tensor (..., batch, size), what a step along its gradient is multiplied by (batch, size), and the gradients'
    running mean."""

    value: Tensor
    scale: Tensor
    mean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros_like(self.value)

    def step(self, gradient: Tensor, rate: Tensor, count: int) -> None:
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradient
        self.value = self.value + rate * self.scale * self.mean / (1 - MOMENTUM**count)


def adjoint_sizes(v: Tensor) -> Tensor:
    """|v| (batch, size) as steps are divided by: none is next to nothing."""
    size = v.abs()
    return torch.maximum(size, LEAST_ADJOINT * size.amax(1, keepdim=True)).clamp(min=TINY)
