"""Gradient ascent with momentum, for the optimisation of slopes and weights. Nothing here is a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from certify_cli.numerics.rounding import TINY

RATE, LONGEST = 0.3, 1.0
"""Rate of the first step, and the largest rate; the rate grows after each step that succeeds."""
SLOPE_STEP, WEIGHT_STEP = 2.0, 4.0
"""Change of a slope or weight, in units of its scale (`Grid.scales`), by a step of rate 1 along the largest possible
gradient; in proportion for smaller ones."""
LEAST_ADJOINT = 0.05
"""Smallest adjoint that steps are divided by, as a part of the layer's largest."""
MOMENTUM = 0.6


@dataclass(eq=False)
class MomentumAscent:
    """One tensor under ascent.

    value: (..., batch, size).   scale: (batch, size), factor of a step along the gradient.   mean: running mean of the
    gradients, of the shape of `value`.
    """

    value: Tensor
    scale: Tensor
    mean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros_like(self.value)

    def step(self, gradient: Tensor, rate: Tensor, count: int) -> None:
        """Move `value`; count: number of this step, from 1, which corrects the mean's start from zero."""
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradient
        self.value = self.value + rate * self.scale * self.mean / (1 - MOMENTUM**count)


def adjoint_sizes(v: Tensor) -> Tensor:
    """|v| (batch, size), bounded away from zero, for steps to be divided by."""
    size = v.abs()
    return torch.maximum(size, LEAST_ADJOINT * size.amax(1, keepdim=True)).clamp(min=TINY)
