"""Gradient ascent with momentum, for the optimisation of slopes and weights. Nothing here is a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from certify_cli.numerics.rounding import TINY
from certify_cli.numerics.trees import Batched

RATE, LONGEST = 0.3, 1.0
"""Rate of the first step, and the largest rate; the rate grows after each step that succeeds."""
SLOPE_STEP, WEIGHT_STEP = 2.0, 4.0
"""Change of a slope or weight, in units of its scale (`Grid.scales`), by a step of rate 1 along the largest possible
gradient; in proportion for smaller ones."""
LEAST_ADJOINT = 0.05
"""Smallest adjoint that steps are divided by, as a part of the layer's largest."""
MOMENTUM = 0.6


K = TypeVar("K")
S = TypeVar("S", bound=Batched)


def unchanged(value: Tensor) -> Tensor:
    """The projection where every value is allowed."""
    return value


@dataclass(eq=False)
class MomentumAscent:
    """One tensor under ascent.

    value: (..., batch, size).   scale: (batch, size), factor of a step along the gradient.   project: maps a value to
    the nearest that is allowed.   mean: running mean of the gradients, of the shape of `value`.
    """

    value: Tensor
    scale: Tensor
    project: Callable[[Tensor], Tensor] = unchanged
    mean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros_like(self.value)

    def step(self, gradient: Tensor, rate: Tensor, count: int) -> None:
        """Move `value`; count: number of this step, from 1, which corrects the mean's start from zero."""
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradient
        self.value = self.project(self.value + rate * self.scale * self.mean / (1 - MOMENTUM**count))

    def take_back(self, value: Tensor, keep: Tensor) -> None:
        """Return to an earlier `value` where not `keep` (batch,), and forget the gradients there."""
        wide = keep.unsqueeze(1)
        self.value, self.mean = torch.where(wide, self.value, value), torch.where(wide, self.mean, 0.0)


def ascend(
    variables: Mapping[K, MomentumAscent],
    state: S,
    steps: int,
    evaluate: Callable[[S], S],
    gradients: Callable[[S], Mapping[K, Tensor]],
    judge: Callable[[S, S], tuple[Tensor, Tensor]],
    rate: Tensor,
) -> Iterator[S]:
    """The state after each of at most `steps` steps, which become smaller towards the last.

    evaluate: the state at the variables' present values; it is given the state before, to start from.
    gradients: of a state, by variable.   judge: (state before, state after) -> where to keep the step (batch,), and a
    factor (batch,) of the next one's rate. A step that is not kept is taken back, for each item by itself.
    rate (batch,): of the first step.
    """
    for count in range(1, steps + 1):
        gradient, share = gradients(state), (rate * (1 - (count - 1) / steps)).unsqueeze(1)
        before = {key: variable.value for key, variable in variables.items()}
        for key, variable in variables.items():
            variable.step(gradient[key], share, count)
        after = evaluate(state)
        keep, factor = judge(state, after)
        rate = (rate * factor).clamp(max=LONGEST)
        for key, variable in variables.items():
            variable.take_back(before[key], keep)
        state = state.where(keep, after)
        yield state


def adjoint_sizes(v: Tensor) -> Tensor:
    """|v| (batch, size), bounded away from zero, for steps to be divided by."""
    size = v.abs()
    return torch.maximum(size, LEAST_ADJOINT * size.amax(1, keepdim=True)).clamp(min=TINY)
