"""The search for the largest radius, of many items at once: what is known of each, and which ball to try next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import TINY

GROWTH, GROWTHS = 1.5, (1.0, 5.0)
"""Losses grow about like this power of the radius; and the powers believed where two balls tell."""
STRIDE = 2.0
"""How many times larger the next ball may be."""
INSIDE = 0.998
"""The next ball is this part of where the bound seems to vanish."""
MOST_LOSS = 1e3
"""Losses above, in units of the value at 0, say no more than this one."""
STALE = 0.03
"""What an outside ball may have left by `GROWTH` without being believed to be inside."""
DOUBTS = 2
HOPELESS = -1.0
"""Values below say too little of where the bound vanishes."""


def power_step(
    radius: Tensor, value: Tensor, growth: Tensor | float = GROWTH, stride: float = STRIDE, inside: float = INSIDE
) -> Tensor:
    """About where a bound vanishes of which, at `radius`, the part `value` (of its value at 0) is left.

    At most `stride` times as far, and then the part `inside` of it.
    """
    ratio = (1 - value).clamp(min=TINY).pow(-1 / growth).nan_to_num(nan=0.5).clamp(min=0.3, max=stride)
    # a factor that asked whether value > 0 would make rounding, and so the batch, decide where the next ball lies
    return radius * ratio * inside


@dataclass(eq=False)
class Bracket:
    """(items,) each: the radius to try; the largest one inside (0: none) and the least one outside (inf: none) so far,
    the value on the former, the logarithms of what is lost on both, as parts of the value at 0, and on which side the
    last ball was (1 inside, -1 outside); the last ball and what was lost there, and how often an outside ball may still
    be doubted."""

    radius: Tensor
    inside: Tensor
    outside: Tensor
    left: Tensor
    below: Tensor
    above: Tensor
    side: Tensor
    before: Tensor
    loss: Tensor
    doubts: Tensor
    steady: bool = False
    stride: float = STRIDE
    inward: float = INSIDE

    @classmethod
    def around(cls, radius: Tensor, stride: float = STRIDE, inward: float = INSIDE, steady: bool = False) -> Bracket:
        """Nothing known but where to begin. inward: see `power_step`; steady: the bound does not become better during
        the search, so that no outside ball is doubted."""
        often = torch.full_like(radius, DOUBTS, dtype=torch.long)
        inside, left, below, above, side, before, loss = (torch.zeros_like(radius) for _ in range(7))
        outside = torch.full_like(radius, torch.inf)
        return cls(
            radius.clone(), inside, outside, left, below, above, side, before, loss, often, steady, stride, inward
        )

    def update(self, items: Tensor, value: Tensor) -> Tensor:
        """Enters the values found on the items' balls and moves on; which of them (a mask) are the largest inside.

        Between two balls the next is where the straight line through their losses, both logarithmic, says that all is
        lost; an end that stays for long counts half (the Illinois rule), so that both ends move.
        """
        here = self.radius[items]
        value = value.nan_to_num(nan=-torch.inf)
        good = value > 0
        raised, lowered = good & (here > self.inside[items]), ~good & (here < self.outside[items])
        # so much is left that the bound must have become better since a ball was found to be outside
        there = 1 - (1 - value) * (self.outside[items] / here).pow(GROWTH)
        better = (there > STALE) & self.outside[items].isfinite() & (self.doubts[items] > 0)
        self.doubts[items] -= (raised & better).long()
        forgotten = raised & (better | ((self.inside[items] > 0) & (value > self.left[items])))
        if not self.steady:
            self.outside[items] = self.outside[items].masked_fill(forgotten, torch.inf)
        loss = 1 - value
        lost = loss.clamp(min=TINY, max=MOST_LOSS).log()
        side = either(good, 1.0, -1.0)
        again = either(side == self.side[items], 0.5, 1.0)
        self.below[items] = torch.where(raised, lost, self.below[items] * again)
        self.above[items] = torch.where(lowered, lost, self.above[items] * again)
        self.side[items] = side
        self.left[items] = torch.where(raised, value, self.left[items])
        self.inside[items] = inside = torch.where(raised, here, self.inside[items])
        self.outside[items] = outside = torch.where(lowered, here, self.outside[items])
        part = self.below[items] / (self.below[items] - self.above[items]).clamp(max=-TINY)
        between = inside * (outside / inside).pow(part)
        growth = (loss / self.loss[items]).log() / (here / self.before[items]).log()
        growth = growth.nan_to_num(nan=GROWTH, posinf=GROWTH, neginf=GROWTH).clamp(*GROWTHS)
        self.before[items], self.loss[items] = here, loss
        both = (inside > 0) & outside.isfinite()
        following = torch.where(both, between, power_step(here, value, growth, self.stride, self.inward))
        middle = torch.where(inside > 0, (inside * outside).sqrt(), 0.2 * outside)
        within = (following < outside) & ((following > inside) | outside.isinf())
        self.radius[items] = torch.where(within, following, middle)
        return raised

    def unresolved(self, items: Tensor, close: float) -> Tensor:
        """Those of the items whose largest radius is not known to `close`, relatively."""
        gap = self.outside[items] > self.inside[items] * (1 + close)
        onward = self.radius[items] > self.inside[items] * (1 + close / 2)
        return items[gap & onward & self.radius[items].isfinite()]
