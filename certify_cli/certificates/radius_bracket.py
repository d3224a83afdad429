"""Bracketing search for the largest radius on which a bound stays positive, for many items at once.

A value is the part of the margin that a bound leaves on a ball: 1 at radius 0. The loss is 1 - value, and a radius
passes where the value is positive. The search keeps the largest radius that passed and the smallest one that failed.
The next radius comes from interpolating the logarithmic losses at these ends or, while one end is missing, from a power
law. Nothing here is a proof: it only says which ball to try next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import TINY

GROWTH, GROWTH_RANGE = 1.5, (1.0, 5.0)
"""The power of the radius by which losses usually grow; and the range to which a power measured on two balls is
clamped."""
STRIDE = 2.0
"""Largest ratio of the next radius to the last one, while no radius has failed."""
SHRINK = 0.998
"""The next radius is this part of the one at which the bound seems to vanish."""
LARGEST_LOSS = 1e3
"""Losses are clamped to this before they are interpolated: a larger one carries no further information."""
STALE = 0.03
"""A failed radius is doubted if the latest value, extrapolated to it by `GROWTH`, is larger than this."""
DOUBTS = 2
"""How often an item may discard a failed radius for that reason."""
HOPELESS = -1.0
"""A value below this does not tell where the bound vanishes."""


def power_step(
    radius: Tensor, value: Tensor, growth: Tensor | float = GROWTH, stride: float = STRIDE, shrink: float = SHRINK
) -> Tensor:
    """An estimate of the radius at which a bound vanishes whose value at `radius` is `value`, times `shrink`.

    radius, value: of shapes that broadcast.   growth: power of the radius by which the loss grows.
    stride: largest ratio of the result, before it is shrunk, to `radius`.
    """
    ratio = (1 - value).clamp(min=TINY).pow(-1 / growth).nan_to_num(nan=0.5).clamp(min=0.3, max=stride)
    # a factor that depended on whether value > 0 would let rounding, and so the batch, decide where the next ball lies
    return radius * ratio * shrink


@dataclass(eq=False)
class _End:
    """One end of the brackets: its radius and the logarithm of the loss there, (items,) each."""

    radius: Tensor
    log_loss: Tensor

    def move(self, items: Tensor, moved: Tensor, radius: Tensor, log_loss: Tensor, weight: Tensor) -> None:
        """Move the ends of `items` to `radius` where `moved`; elsewhere multiply their logarithmic losses by `weight`.

        All arguments (count,).
        """
        self.radius[items] = torch.where(moved, radius, self.radius[items])
        self.log_loss[items] = torch.where(moved, log_loss, self.log_loss[items] * weight)


@dataclass(eq=False)
class _Trial:
    """The last ball tried, (items,) each: its radius, loss, and side (1 passed, -1 failed, 0: no ball yet)."""

    radius: Tensor
    loss: Tensor
    side: Tensor


@dataclass(eq=False)
class Bracket:
    """Brackets of the largest radii, one for each item, updated in place. Tensors (items,).

    radius: the radius to try next.
    lower: the largest radius that passed, 0 where there is none.   value: the value there.
    upper: the smallest radius that failed, inf where there is none.
    last: the last ball tried.
    doubts: how often a failed radius may still be discarded.
    steady: whether the bound stays the same during the search, so that no failed radius is doubted.
    stride, shrink: see `power_step`.
    """

    radius: Tensor
    lower: _End
    upper: _End
    value: Tensor
    last: _Trial
    doubts: Tensor
    steady: bool = False
    stride: float = STRIDE
    shrink: float = SHRINK

    @classmethod
    def around(cls, radius: Tensor, stride: float = STRIDE, shrink: float = SHRINK, steady: bool = False) -> Bracket:
        """Brackets without ends; the first balls have `radius` (items,)."""
        lower, log_lower, log_upper, value, last, loss, side = (torch.zeros_like(radius) for _ in range(7))
        return cls(
            radius.clone(),
            lower=_End(lower, log_lower),
            upper=_End(torch.full_like(radius, torch.inf), log_upper),
            value=value,
            last=_Trial(last, loss, side),
            doubts=torch.full_like(radius, DOUBTS, dtype=torch.long),
            steady=steady,
            stride=stride,
            shrink=shrink,
        )

    def update(self, items: Tensor, value: Tensor) -> Tensor:
        """Enter the values at the radii of `items` and choose their next radii; both (count,).

        Returns a mask (count,) of the items whose lower end moved.

        An end that stays twice in a row counts half in the interpolation (Illinois rule), so that both ends move.
        """
        radius = self.radius[items]
        value = value.nan_to_num(nan=-torch.inf)
        passed = value > 0
        raised, lowered = passed & (radius > self.lower.radius[items]), ~passed & (radius < self.upper.radius[items])
        if not self.steady:
            self._discard_upper(items, radius, value, raised)
        loss, side = 1 - value, either(passed, 1.0, -1.0)
        log_loss = loss.clamp(min=TINY, max=LARGEST_LOSS).log()
        weight = either(side == self.last.side[items], 0.5, 1.0)
        self.lower.move(items, raised, radius, log_loss, weight)
        self.upper.move(items, lowered, radius, log_loss, weight)
        self.value[items] = torch.where(raised, value, self.value[items])
        growth = (loss / self.last.loss[items]).log() / (radius / self.last.radius[items]).log()
        growth = growth.nan_to_num(nan=GROWTH, posinf=GROWTH, neginf=GROWTH).clamp(*GROWTH_RANGE)
        self.last.radius[items], self.last.loss[items], self.last.side[items] = radius, loss, side
        self.radius[items] = self._next(items, power_step(radius, value, growth, self.stride, self.shrink))
        return raised

    def _discard_upper(self, items: Tensor, radius: Tensor, value: Tensor, raised: Tensor) -> None:
        """Discard the upper ends of items whose bound must have improved since those radii failed.

        That is so where a larger ball now has a larger value than a smaller one had, and where the value is so large
        that, extrapolated to the failed radius, it would pass clearly.
        """
        upper = self.upper.radius[items]
        extrapolated = 1 - (1 - value) * (upper / radius).pow(GROWTH)
        doubted = (extrapolated > STALE) & upper.isfinite() & (self.doubts[items] > 0)
        self.doubts[items] -= (raised & doubted).long()
        improved = (self.lower.radius[items] > 0) & (value > self.value[items])
        self.upper.radius[items] = upper.masked_fill(raised & (doubted | improved), torch.inf)

    def _next(self, items: Tensor, step: Tensor) -> Tensor:
        """The next radii (count,): by interpolation between two ends, else `step` (count,), but inside the bracket."""
        lower, upper = self.lower.radius[items], self.upper.radius[items]
        log_lower, log_upper = self.lower.log_loss[items], self.upper.log_loss[items]
        part = log_lower / (log_lower - log_upper).clamp(max=-TINY)
        between = lower * (upper / lower).pow(part)
        following = torch.where((lower > 0) & upper.isfinite(), between, step)
        middle = torch.where(lower > 0, (lower * upper).sqrt(), 0.2 * upper)
        within = (following < upper) & ((following > lower) | upper.isinf())
        return torch.where(within, following, middle)

    def unresolved(self, items: Tensor, tolerance: float) -> Tensor:
        """Those of the items (count,) whose largest radius is not known yet to the relative accuracy `tolerance`."""
        lower = self.lower.radius[items]
        gap = self.upper.radius[items] > lower * (1 + tolerance)
        onward = self.radius[items] > lower * (1 + tolerance / 2)
        return items[gap & onward & self.radius[items].isfinite()]
