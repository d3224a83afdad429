"""Curves: piecewise monotone functions of one variable, whose exact range over any interval is known.

Between two neighbouring critical points a curve is monotone, so its range over an interval is the hull of its values at
the two ends and at the critical points inside. A jump is a critical point with two values, a limit at infinity one at
+-inf, and a periodic curve lists one period. One routine therefore serves every activation, its slope and its curvature
(theory section 0, "Activation rows").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from certify_cli.numerics.rounding import TINY, UNIT, next_above, next_below

Function = Callable[[Tensor], Tensor]

ULPS = 4
"""Assumed error, in spacings (2 u, relative), of stored decimals, whether or not a parameter scales them."""


class _WithDerivative(torch.autograd.Function):
    """A function of one variable whose derivative is given, not derived from its formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, function: Function, derivative: Function) -> Tensor:
        return function(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Function, Function], output: Tensor) -> None:
        z, _, ctx.derivative = inputs
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (z,) = ctx.saved_tensors
        tangent: Tensor = tangents[0] * ctx.derivative(z)
        return tangent

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return gradients[0] * ctx.derivative(z), None, None


def differentiable(z: Tensor, function: Function, derivative: Function) -> Tensor:
    """function(z), entrywise; its gradient, where z carries one, comes from `derivative`, which may have one itself."""
    return _WithDerivative.apply(z, function, derivative) if z.requires_grad else function(z)


@dataclass(frozen=True)
class CriticalPoint:
    """A local extremum, jump or limit of a curve. Its values there, one-sided limits included, lie in [low, high].

    The true abscissa is within `slack` of `abscissa`.
    """

    abscissa: float
    low: float
    high: float
    slack: float = 0.0

    @property
    def jump(self) -> float:
        """Height of the jump; 0 where [low, high] is rounding only."""
        height = self.high - self.low
        return height if height > 64 * UNIT * max(abs(self.low), abs(self.high)) else 0.0


def exactly(abscissa: float, *values: float) -> CriticalPoint:
    """A critical point whose abscissa and values are float64 numbers; two values make a jump."""
    return CriticalPoint(abscissa, min(values), max(values))


def nearly(abscissa: float, *values: float) -> CriticalPoint:
    """A critical point whose abscissa and values are rounded: values are moved outward, the abscissa has slack."""
    relative = 2 * ULPS * UNIT
    slack = relative * abs(abscissa) if math.isfinite(abscissa) else 0.0
    low, high = min(values), max(values)
    return CriticalPoint(abscissa, low - relative * abs(low), high + relative * abs(high), slack)


@dataclass(frozen=True, eq=False)
class Curve:
    """A function R -> R with its evaluation error and its critical points.

    function: maps a tensor of any shape entrywise.
    critical_points: in any order; one at -inf and one at +inf among them, unless the curve is periodic.
    relative, absolute: the error in float64 is at most u (relative |computed| + absolute), u = 2^-53, provided that the
        library's elementary functions are within 4 ulp (5 for erfc): SLEEF's kernels on the CPU claim 1 (1.5 for erfc),
        CUDA's guide states at most 2 (5 for erfc).
    period: of a periodic curve, whose critical points are those of one period.
    """

    function: Callable[[Tensor], Tensor]
    critical_points: tuple[CriticalPoint, ...]
    relative: float = 0.0
    absolute: float = 0.0
    period: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)

    def error(self, z: Tensor) -> Tensor:
        """Upper bound of |computed - exact| at the float64 numbers z, entrywise.

        The height of a jump is added where z may be on either side of it, because its abscissa is rounded. At a jump
        whose abscissa is exact, either one-sided limit counts as exact.
        """
        return self.error_of(self.function(z), z)

    def error_of(self, value: Tensor, z: Tensor) -> Tensor:
        """`error`, given the computed value at z."""
        error = UNIT * (self.relative * value.abs() + self.absolute) + TINY
        for point in self._blurred_jumps:
            at_jump = (z >= point.abscissa - point.slack) & (z <= point.abscissa + point.slack)
            error = torch.where(at_jump, error + point.jump, error)
        return error

    @cached_property
    def range(self) -> tuple[float, float]:
        """(lower, upper) over the real line, rounded outward."""
        return min(point.low for point in self.critical_points), max(point.high for point in self.critical_points)

    def on(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) over the intervals [lo, hi], entrywise, rounded outward.

        `lo <= hi` of one shape, ends may be infinite. An interval that touches a jump has both of its sides. NaN gives
        NaN.
        """
        lo, hi = lo.double(), hi.double()
        bounded = bool((hi - lo).isfinite().all())
        lower, upper = self._hull_of_ends(lo, hi, bounded)
        for point in self.critical_points:
            if bounded and math.isinf(point.abscissa):
                continue
            inside = self.may_contain(lo, hi, point)
            lower = torch.where(inside, lower.clamp(max=point.low), lower)
            upper = torch.where(inside, upper.clamp(min=point.high), upper)
        return lower.clamp(*self.range), upper.clamp(*self.range)

    def _hull_of_ends(self, lo: Tensor, hi: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
        """Hull of the values at the finite ends; the empty interval [inf, -inf] where both ends are infinite.

        bounded: whether every end is finite.
        """
        ends = [self._around(z if bounded else torch.where(z.isinf(), 0.0, z)) for z in (lo, hi)]
        if not bounded:
            ends = [
                (below.masked_fill(z.isinf(), math.inf), above.masked_fill(z.isinf(), -math.inf))
                for z, (below, above) in zip((lo, hi), ends, strict=True)
            ]
        (first, second), (third, fourth) = ends
        return torch.minimum(first, third), torch.maximum(second, fourth)

    def _around(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) at the float64 numbers z, rounded outward."""
        value = self.function(z)
        exact = self.relative == self.absolute == 0.0  # so are the numbers of a step function away from its jumps
        if exact and not self._blurred_jumps:
            return value, value
        error = self.error_of(value, z)
        below, above = next_below(value - error), next_above(value + error)
        if exact:
            away = error <= TINY
            below, above = torch.where(away, value, below), torch.where(away, value, above)
        return below, above

    @cached_property
    def _blurred_jumps(self) -> tuple[CriticalPoint, ...]:
        """Jumps whose abscissa is rounded."""
        return tuple(point for point in self.critical_points if point.slack > 0.0 and point.jump > 0.0)

    def may_contain(self, lo: Tensor, hi: Tensor, point: CriticalPoint) -> Tensor:
        """Whether the critical point, or one of its repetitions, may lie in [lo, hi]."""
        if self.period is None:
            return (lo <= point.abscissa + point.slack) & (hi >= point.abscissa - point.slack)
        # Three roundings here and those of abscissa and period, counted in units of z: below 16 u (|z| + |abscissa|).
        width = abs(point.abscissa) + self.period
        first = (lo - 16 * UNIT * (lo.abs() + width) - point.abscissa) / self.period
        last = (hi + 16 * UNIT * (hi.abs() + width) - point.abscissa) / self.period
        return first.ceil() <= last.floor()
