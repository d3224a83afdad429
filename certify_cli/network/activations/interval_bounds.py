"""An activation on an interval around a pre-activation: bounds of its slopes, curvatures, secants and remainders.

`ActivationOnInterval` covers the interval by knots and takes the extremes of the bounds on the cells between them
(`cells`), by one mechanism for every activation. Knots need no exact position: they cover the interval, and the
activation is evaluated where they are. (Theory sections 3, "Anchored", and 4.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from certify_cli.network.activations.cells import SLACK, Cells, Ends
from certify_cli.network.activations.monotone_pieces import Curve
from certify_cli.network.activations.table import Activation
from certify_cli.numerics.rounding import UNIT, next_above, up

CELLS = ((0.1, 4), (0.5, 6), (2.0, 10), (6.0, 16), (1e6, 24), (math.inf, 64))
"""(longest side of the interval in units of the length on which phi' changes, cells per side)."""

GRADING = 1.25
"""Knots crowd a little towards t = 0, where the divisor is small."""

CHUNK = 2**15
"""Entries of a tensor of knots: it stays in the cache, and below the size that torch splits between threads."""

FENCE = 2.0**-44
"""Half the relative width of the sliver of a cell that holds a jump: only there the range has both of its sides."""

FAR = 1e6
"""Beyond this times 1 + |z| an unbounded interval is covered by the activation's tail; the cells end there."""


@dataclass(frozen=True, eq=False)
class ActivationOnInterval:
    """An activation around a pre-activation z, over the offsets t in [lo, hi].

    z, lo and hi have one shape. Results are (lower, upper) of that shape, float64, rounded outward. They hold for every
    true pre-activation z' within `error` of z, with offsets counted from z'. NaN gives NaN.
    """

    activation: Activation
    z: Tensor
    error: Tensor | float
    lo: Tensor  # <= 0, may be -inf
    hi: Tensor  # >= 0, may be +inf

    def at(self, mask: Tensor) -> ActivationOnInterval:
        """The entries where the mask is true, as vectors."""
        return ActivationOnInterval(self.activation, self.z[mask], self._errors[mask], self.lo[mask], self.hi[mask])

    def slopes(self) -> Ends:
        """phi'(z + t)."""
        return self.activation.slope.on(*self._interval)

    def curvatures(self) -> Ends:
        """phi''(z + t); ValueError where phi' jumps."""
        return self.activation.curvature_on(*self._interval)

    def secants(self) -> Ends:
        """(phi(z+t) - phi(z)) / t, phi'(z) at t = 0; never outside `slopes`."""
        value, slope = self.activation.value, self.activation.slope
        if self.activation.piecewise_linear:
            return _intersection(self._secants_at_kinks(), self.slopes())
        return _intersection(self._by_cells(lambda cells, _: cells.means(value, slope), slope), self.slopes())

    def slope_secants(self) -> Ends:
        """(phi'(z+t) - phi'(z)) / t; never outside `curvatures`; ValueError where phi' jumps."""
        bounds, slope, curvature = self.curvatures(), self.activation.slope, self._curvature
        return _intersection(self._by_cells(lambda cells, _: cells.means(slope, curvature), curvature), bounds)

    def quadratic_coefficients(self) -> Ends:
        """2 (phi(z+t) - phi(z) - phi'(z) t) / t^2; never outside `curvatures`; ValueError where phi' jumps."""
        bounds, activation = self.curvatures(), self.activation
        coefficients = self._by_cells(lambda cells, _: cells.quadratic_coefficients(activation), self._curvature)
        return _intersection(coefficients, bounds)

    def remainders(self, slope: Tensor) -> Ends:
        """phi(z+t) - phi(z) - slope t, for any slopes of the shape of z; lower <= 0 <= upper.

        (-inf, inf) for an unbounded interval.
        """
        slope = slope.expand(self.z.shape).unsqueeze(0)
        lower, upper = self.remainders_of_lines(slope, slope)
        return lower[0], upper[0]

    def remainders_of_lines(self, below: Tensor, above: Tensor) -> Ends:
        """`remainders`: the lower ends for the slopes `below`, the upper ones for `above`, (lines, *shape of z) each.

        The activation is evaluated once for all lines.
        """
        activation = self.activation
        if activation.piecewise_linear:
            return self._remainders_at_kinks(below)[0], self._remainders_at_kinks(above)[1]
        below, above = (slopes.double().reshape(len(slopes), -1) for slopes in (below, above))
        lower, upper = self._by_cells(
            lambda cells, entries: cells.remainders(activation, below[:, entries], above[:, entries]),
            activation.slope,
            lines=len(below),
        )
        return lower.clamp(max=0.0), upper.clamp(min=0.0)

    def _secants_at_kinks(self) -> Ends:
        """`secants` of a piecewise linear activation, which are extreme next to t = 0, at a kink or at an end.

        For they are monotone in t between these. With the true pre-activation, the increment and t move by at most
        2 Lip apart and apart; where t is not much larger than that, the secant is a mean of the slopes next to z.
        """
        phi, lipschitz = self.activation, self.activation.lipschitz
        z, low, high = (t.double() for t in (self.z, self.lo, self.hi))
        apart = self._apart
        reach, base = 16 * apart + 4 * UNIT * z.abs(), phi.value(z)
        lower, upper = phi.slope.on(z - reach, z + reach)
        for t in (low, high, *((kink - z).clamp(min=low, max=high) for kink in phi.kinks)):
            value = phi.value(z + t)
            rounding = 4 * UNIT * (value.abs() + base.abs() + lipschitz * (z.abs() + t.abs()))
            error = phi.value_error(z + t) + phi.value_error(z) + rounding + 4 * lipschitz * apart
            clear = (t.abs() > 8 * apart) & t.isfinite()
            step = torch.where(clear, t, torch.ones_like(t))  # else its gradient, which is not used, would be NaN
            secant, spread = (value - base) / step, up(error / step.abs() + SLACK * lipschitz, 8)
            lower = torch.where(clear, torch.minimum(lower, secant - spread), lower)
            upper = torch.where(clear, torch.maximum(upper, secant + spread), upper)
        for limit in phi.slope.critical_points:  # beyond the last kink the secants tend to the slope there
            beyond = (low if limit.abscissa < 0 else high) == limit.abscissa
            if math.isinf(limit.abscissa) and bool(beyond.any()):
                lower = torch.where(beyond, lower.clamp(max=limit.low), lower)
                upper = torch.where(beyond, upper.clamp(min=limit.high), upper)
        return lower, upper

    @property
    def _apart(self) -> Tensor:
        """How far a kink of a piecewise linear activation may be from where it seems, counted from z."""
        return self._errors + max(point.slack for point in self.activation.slope.critical_points)

    def _remainders_at_kinks(self, slope: Tensor) -> Ends:
        """`remainders` of a piecewise linear activation, which are extreme at the ends of the interval or at a kink.

        With the true pre-activation, the value at an end moves by at most 2 Lip error, and that at a kink, which moves
        too, by (3 Lip + |slope|) error.
        """
        phi, lipschitz = self.activation, self.activation.lipschitz
        z, low, high = (t.double() for t in (self.z, self.lo, self.hi))
        apart = self._apart
        base, steepness = phi.value(z), 3 * lipschitz + 2 * slope.abs()
        at_base = phi.value_error(z) + 4 * UNIT * base.abs()
        lower, upper = torch.zeros_like(z), torch.zeros_like(z)
        for t in (low, high, *((kink - z).clamp(min=low, max=high) for kink in phi.kinks)):
            value, straight, error = phi.value(z + t), slope * t, phi.value_error(z + t)
            remainder = (value - base) - straight
            rounding = 4 * UNIT * (value.abs() + straight.abs() + lipschitz * (z.abs() + t.abs()))
            slack = up(steepness * (apart + UNIT * t.abs()) + at_base + (rounding + error), 8)
            lower, upper = torch.minimum(lower, remainder - slack), torch.maximum(upper, remainder + slack)
        unbounded = low.isinf() | high.isinf()
        lower, upper = lower.masked_fill(unbounded, -math.inf), upper.masked_fill(unbounded, math.inf)
        flattest, steepest = self.slopes()
        line = (flattest == slope) & (steepest == slope)  # phi itself: nothing remains, not even rounding
        return lower.masked_fill(line, 0.0), upper.masked_fill(line, 0.0)

    @property
    def _curvature(self) -> Curve:
        assert self.activation.curvature is not None  # else `curvatures` has refused
        return self.activation.curvature

    @cached_property
    def _errors(self) -> Tensor:
        return torch.as_tensor(self.error, dtype=torch.float64, device=self.z.device).expand(self.z.shape)

    @cached_property
    def _interval(self) -> Ends:
        """The interval of z' + t for every true z' and every offset."""
        z, lo, hi = (tensor.double() for tensor in (self.z, self.lo, self.hi))
        return -_sum_up(_sum_up(-z, -lo), self._errors), _sum_up(_sum_up(z, hi), self._errors)

    def _by_cells(self, rule: Callable[[Cells, Tensor], Ends], jumping: Curve, lines: int | None = None) -> Ends:
        """The bounds of `rule`(cells, indices of their entries), a few entries at a time.

        jumping: the curve whose jumps are fenced.   lines: the rule's bounds are so many for each entry, in rows.
        """
        z, error, low, high = (t.reshape(-1) for t in (self.z.double(), self._errors, *self._interval))
        shape = () if lines is None else (lines,)
        lower, upper = z.new_full((*shape, len(z)), math.nan), z.new_full((*shape, len(z)), math.nan)
        knots = _Knots(self.activation, jumping)
        side = torch.maximum(high - z, z - low) / knots.length
        shortest = -math.inf
        for longest, count in CELLS:
            members = ((side > shortest) & (side <= longest)).nonzero().squeeze(1)
            for entries in members.split(CHUNK // (2 * knots.number(count))):
                cells = knots.cut(count, z[entries], error[entries], low[entries], high[entries])
                lower[..., entries], upper[..., entries] = rule(cells, entries)
            shortest = longest
        return lower.reshape(*shape, *self.z.shape), upper.reshape(*shape, *self.z.shape)


def _sum_up(a: Tensor, b: Tensor) -> Tensor:
    """a + b, rounded up."""
    return next_above(a + b)


def _intersection(ends: Ends, bounds: Ends) -> Ends:
    return torch.maximum(ends[0], bounds[0]), torch.minimum(ends[1], bounds[1])


@dataclass(frozen=True, eq=False)
class _Knots:
    """Where the intervals of one activation are cut: by fences around each jump of `jumping`, and evenly between."""

    activation: Activation
    jumping: Curve

    @cached_property
    def fences(self) -> list[float]:
        jumps = [point for point in self.jumping.critical_points if point.jump]
        gaps = sorted((p.abscissa, FENCE * (1 + abs(p.abscissa)) + 2 * p.slack) for p in jumps)
        return [abscissa + side * gap for abscissa, gap in gaps for side in (-1, 1)]

    @cached_property
    def length(self) -> float:
        """sup |phi'| / sup |phi''|, the length on which phi' changes; to the farthest kink where phi' jumps."""
        sup = self.activation.curvature_sup
        return max([1.0, *map(abs, self.fences)]) if math.isinf(sup) else self.activation.lipschitz / sup

    def number(self, count: int) -> int:
        """Knots per side."""
        pieces = len(self.fences) // 2 + 1
        return pieces * self._between(count) + pieces

    def _between(self, count: int) -> int:
        """Cells from fence to fence."""
        slope = self.activation.slope
        if slope.relative == slope.absolute == 0.0:  # computed without error: constant from jump to jump
            return 1
        return math.ceil(3 * count / (3 + len(self.fences) // 2))

    def cut(self, count: int, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> Cells:
        """Both sides of z from z - error (mirrored: -z - error) to the end of the interval; every cell is bounded."""
        signs = z.new_tensor([[1.0], [-1.0]])
        centre = signs * z
        first = -_sum_up(-centre, error)
        ends = torch.stack((high, -low))
        last = torch.where(ends.isinf(), FAR * (1 + z.abs()), ends)
        fences = z.new_tensor([self.fences, [-fence for fence in reversed(self.fences)]]).T.unsqueeze(2)
        walls = [first, *(wall.clamp(first, last) for wall in fences), last]
        period = self.jumping.period
        middle, length = (centre, period) if period else (torch.zeros_like(centre), self.length)
        pieces = [
            left[None] if index % 2 else _divided(left, right, self._between(count), middle, length)
            for index, (left, right) in enumerate(pairwise(walls))
        ]
        return Cells(signs, z, error, torch.cat((*pieces, last[None])), ends)


def _divided(left: Tensor, right: Tensor, cells: int, middle: Tensor, length: float) -> Tensor:
    """`cells` knots from left (included) to right (excluded), never decreasing: (cells, *shape).

    Up to the grading they are equidistant in u = y / (length + |y|), y counted from the middle: even where
    [left, right] is short, dense around the middle where it is long. Every step is monotone in floating point.
    """
    start, stop = ((end - middle).div_(length + (end - middle).abs()) for end in (left, right))
    steps = torch.arange(1, cells, dtype=left.dtype, device=left.device).div_(cells).pow_(GRADING)
    u = start + (stop - start) * steps.reshape(-1, 1, 1)
    inner = (u / (1.0 - u.abs())).mul_(length).add_(middle)
    return torch.cat((left[None], inner.clamp(left, right)))
