"""An interval around a pre-activation, cut into cells: bounds of phi, phi' and phi'' on each cell.

Each side of z is mirrored to t >= 0 and cut by knots into cells. phi, phi' and phi'' are evaluated once per knot, and
their ranges between neighbouring knots are exact (`monotone_pieces`). On a cell

    phi(z+t) lies between two tents       phi_k + [S_lo, S_hi] tau  and  phi_k+1 - [S_lo, S_hi] (w - tau)
    phi(z+t) lies between two parabolas   phi_k + phi'_k tau + [K_lo, K_hi] tau^2 / 2

with tau = t - t_k, w the cell's width, S and K the ranges of phi' and phi'' (Taylor). Every bound is the extreme of a
tent or parabola, divided by t or t^2: at an end of the cell, at the tent's peak or at the parabola's vertex.

The true pre-activation z' is within `error` of z. The knots are fixed points of the axis, so only their offsets from
z', phi(z') and phi'(z') are uncertain; each method says by how much. Near t = 0, where that error divided by t
explodes, the range of the derivative is the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.network.activations.monotone_pieces import Curve
from certify_cli.network.activations.table import Activation
from certify_cli.numerics.rounding import TINY, UNIT

SLACK = 64 * UNIT
"""Bounds all roundings of one formula, relative to the size of its terms: fewer than thirty operations. Evaluation
errors are added separately."""

NEVER = 1e300
"""Added to a bound that must not decide. Finite, so that its product with 0 is no NaN."""

Ends = tuple[Tensor, Tensor]
"""Lower and upper bounds."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Both sides of some entries, cut into cells. Shapes: (knots, 2, entries) and (cells, 2, entries).

    Side 0 looks right and side 1 left. The knots are mirrored coordinates y, never decreasing and finite; the curves
    are evaluated at `points`, exactly. The offset y - signs z' is within error + u |offset| of `offsets`.
    """

    signs: Tensor  # (2, 1)
    z: Tensor  # (entries,)
    error: Tensor  # (entries,)
    knots: Tensor
    ends: Tensor  # (2, entries), inf where the activation's tail follows the last knot

    @cached_property
    def points(self) -> Tensor:
        return self.signs * self.knots

    @cached_property
    def offsets(self) -> Tensor:
        return self.knots - self.signs * self.z

    @cached_property
    def divisors(self) -> Tensor:
        """Offsets with a relative error of at most 1/8 from `error`; smaller ones are replaced."""
        return torch.maximum(self.offsets, self._smallest_divisor)

    @cached_property
    def unusable(self) -> Tensor:
        """NEVER for an offset that cannot be a divisor, else 0."""
        return (self.offsets <= self._smallest_divisor).double().mul_(NEVER)

    @cached_property
    def _smallest_divisor(self) -> Tensor:
        return (8 * self.error).clamp(min=1e-100)

    @cached_property
    def widths(self) -> Tensor:
        return self.knots[1:] - self.knots[:-1]

    @cached_property
    def unbounded(self) -> Tensor | None:
        """Which sides have no end; None if each has one."""
        infinite = self.ends.isinf()
        return infinite if bool(infinite.any()) else None

    def increments(self, curve: Curve) -> tuple[Tensor, Tensor]:
        """signs (curve at the knots - curve at z), as computed, and the evaluation error at z."""
        base = curve(self.z)
        return (curve(self.points) - base).mul_(self.signs), curve.error_of(base, self.z)

    def ranges(self, curve: Curve) -> Ends:
        """The computed range of the curve on each cell: exact but for the evaluation error at the knots."""
        computed, points = curve(self.points), self.points
        lower, upper = torch.minimum(computed[:-1], computed[1:]), torch.maximum(computed[:-1], computed[1:])
        lo, hi = torch.minimum(points[:-1], points[1:]), torch.maximum(points[:-1], points[1:])
        for critical in curve.critical_points:
            if math.isfinite(critical.abscissa):
                away = (~curve.may_contain(lo, hi, critical)).double().mul_(NEVER)
                lower, upper = torch.minimum(lower, away + critical.low), torch.maximum(upper, critical.high - away)
        return lower, upper

    def tails(self, curve: Curve) -> Ends:
        """The range of the curve beyond the last knot, (2, entries); the empty range on a side that has an end."""
        assert self.unbounded is not None
        last, infinity = self.knots[-1], torch.full_like(self.ends, math.inf)
        right, left = curve.on(last[0], infinity[0]), curve.on(-infinity[1], -last[1])
        lower, upper = (torch.stack(ends) for ends in zip(right, left, strict=True))
        return torch.where(self.unbounded, lower, infinity), torch.where(self.unbounded, upper, -infinity)

    def tents(self, heights: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(p, peak, q, trough) of a curve through `heights` at the knots with slopes in [lower, upper].

        The curve is below two lines that meet at p from the left knot and above two that meet at q = width - p. Left
        of the computed p the one line bounds it and right of it the other, so the bounds hold wherever p is. Peak and
        trough are the higher and the lower of the two lines there.
        """
        step = heights[1:] - heights[:-1]
        p = step.addcmul_(lower, self.widths, value=-1).div_((upper - lower).clamp_(min=TINY)).clamp_(min=0.0)
        p = torch.minimum(p, self.widths)
        q = self.widths - p
        left, right = heights[:-1], heights[1:]
        peak = torch.maximum(torch.addcmul(left, upper, p), torch.addcmul(right, lower, q, value=-1))
        trough = torch.minimum(torch.addcmul(left, lower, q), torch.addcmul(right, upper, p, value=-1))
        return p, peak, q, trough

    def means(self, curve: Curve, derivative: Curve) -> Ends:
        """(curve(z'+t) - curve(z')) / t, the mean of the derivative from 0 to t.

        A straight line divided by t is monotone, so the tents' ends and peaks decide. A second bound: the mean is no
        more than the derivative's maximum from 0 to the cell's end; it is the only one where the left knot's offset
        cannot be a divisor. Beyond the last knot the mean lies between its value there and the derivatives that follow.

        Errors, D = sup |derivative|: `error` moves curve(z') by D error and an offset by error, which counts D error
        as no mean exceeds D; a computed value is at most |curve(z)| + D t, hence its error E(z) + 2 u relative D t.
        """
        sup = _sup(derivative)
        increments, base = self.increments(curve)
        slack = SLACK * sup + 2 * UNIT * curve.relative * sup + evaluation_error(derivative)
        base = 2 * base + 4 * sup * self.error
        t = self.divisors
        slope_lower, slope_upper = self.ranges(derivative)
        mean, spread = increments / t, base / t + slack + self.unusable
        p, peak, q, trough = self.tents(increments, slope_lower, slope_upper)
        excess = base + slack * t[1:]
        lower, upper = mean - spread, mean + spread
        tent_lower = torch.minimum(torch.minimum(lower[:-1], lower[1:]), (trough - excess) / (t[:-1] + q))
        tent_upper = torch.maximum(torch.maximum(upper[:-1], upper[1:]), (peak + excess) / (t[:-1] + p))
        if self.unbounded is not None:  # rounding spoils a tent up to FAR; the mean is between these two as well
            tent_lower = torch.maximum(tent_lower, torch.minimum(lower[:-1], slope_lower))
            tent_upper = torch.minimum(tent_upper, torch.maximum(upper[:-1], slope_upper))
        return self._hull(tent_lower, tent_upper, slope_lower, slope_upper, slack, derivative)

    def quadratic_coefficients(self, activation: Activation) -> Ends:
        """2 Q / t^2, Q = phi(z'+t) - phi(z') - phi'(z') t: the mean of phi'' weighted by 2 (t - s) / t^2.

        With r = t_k / t, q = 2 Q_k / t_k^2 and d = Q'_k / t_k a cell's parabola divided by t^2 / 2 is
        q r^2 + 2 d r (1-r) + K (1-r)^2, r from t_k / t_k+1 to 1: a parabola in r, whose ends and vertex decide. A
        second bound: the mean is no more than the maximum of phi'' from 0 to the cell's end. Beyond the last knot it
        lies between q and d there and the values of phi'' that follow.

        Errors, h = sup |phi''|: `error` moves Q_k by h error t_k, Q'_k by h error and, relative to t_k, the offset by
        error / t_k, q and d being at most h: 8 h error / t_k covers each. A computed phi is at most |phi(z)| + L t.
        """
        value, slope, curvature = activation.value, activation.slope, activation.curvature
        assert curvature is not None
        sup, lipschitz = _sup(curvature), activation.lipschitz
        increments, base = self.increments(value)
        slope_increments, _ = self.increments(slope)
        t = self.divisors
        slack = SLACK * sup + evaluation_error(curvature)
        d = slope_increments / t
        q = (increments - slope(self.z) * t).mul_(2 * self.signs).div_(t).div_(t)
        per_offset = 8 * sup * self.error + 2 * evaluation_error(slope)
        d_error = per_offset / t
        q_error = 4 * base / t + (2 * per_offset + (SLACK + 4 * UNIT * value.relative) * lipschitz)
        q_error = q_error.div_(t).add_(self.unusable)
        curvature_lower, curvature_upper = self.ranges(curvature)
        ratio = ((t[:-1] - self.error).clamp_(min=0.0) / t[1:]).mul_(1 - 8 * UNIT)
        upper = _parabola_maximum((q + q_error)[:-1], (d + d_error)[:-1], curvature_upper, ratio)
        lower = -_parabola_maximum((q_error - q)[:-1], (d_error - d)[:-1], -curvature_lower, ratio)
        last = d[-1] - d_error[-1], d[-1] + d_error[-1]
        return self._hull(lower, upper, curvature_lower, curvature_upper, slack, curvature, last)

    def _hull(
        self,
        lower: Tensor,
        upper: Tensor,
        derivative_lower: Tensor,
        derivative_upper: Tensor,
        slack: float,
        derivative: Curve,
        *last: Ends,
    ) -> Ends:
        """Over all cells and sides, each bounded also by the derivative's range up to its end; then the tails."""
        lower = torch.maximum(lower, _cumulative(derivative_lower, torch.minimum)).amin(0)
        upper = torch.minimum(upper, _cumulative(derivative_upper, torch.maximum)).amax(0)
        if self.unbounded is not None:
            for low, high in (self.tails(derivative), *last):
                lower = torch.where(self.unbounded, torch.minimum(lower, low), lower)
                upper = torch.where(self.unbounded, torch.maximum(upper, high), upper)
        return lower.amin(0) - slack, upper.amax(0) + slack

    def remainders(self, activation: Activation, below: Tensor, above: Tensor) -> Ends:
        """The least of phi(z'+t) - phi(z') - slope t for slopes `below` (lines, entries), the greatest for `above`.

        The tents are two polygons around phi, the same for every slope, so that the extremes are at their vertices. In
        the mirrored side, which is turned back here, the tents change places.

        `error` moves phi(z') by D error and slope t by |slope| error, D the Lipschitz constant of phi.
        """
        increments, base = self.increments(activation.value)
        p, peak, q, trough = self.tents(increments, *self.ranges(activation.slope))
        t, far = self.offsets, self.offsets.abs().amax((0, 1))
        lowest, highest = (t[:-1] + q, trough), (t[:-1] + p, peak)
        found = []
        for slopes, right, left, extreme in (
            (below, lowest, highest, torch.amin),
            (above, highest, lowest, torch.amax),
        ):
            at, height = (
                torch.cat([knots[:, 0], -knots[:, 1], between[:, 0], -mirrored[:, 1]])
                for knots, between, mirrored in zip((t, increments), right, left, strict=True)
            )
            found.append(torch.stack([extreme(torch.addcmul(height, at, s, value=-1), 0) for s in slopes]))
        unbounded = self.ends.isinf().any(0)
        sizes = (activation.lipschitz + slopes.abs() for slopes in (below, above))
        relative, absolute = SLACK + 2 * UNIT * activation.value.relative, evaluation_error(activation.slope)
        slack = [2 * base + 2 * size * self.error + (relative * size + absolute) * far for size in sizes]
        lower, upper = found[0] - slack[0], found[1] + slack[1]
        return lower.masked_fill(unbounded, -math.inf), upper.masked_fill(unbounded, math.inf)


def _sup(curve: Curve) -> float:
    return max(map(abs, curve.range))


def evaluation_error(curve: Curve) -> float:
    """Upper bound of the evaluation error of a bounded curve away from the fences around its jumps."""
    return UNIT * (curve.relative * _sup(curve) + curve.absolute) * (1 + 1e-9) + TINY


def _cumulative(ends: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The extreme over each cell and those before it."""
    rows = [ends[0]]
    for row in ends[1:]:
        rows.append(extreme(rows[-1], row))
    return torch.stack(rows)


def _parabola_maximum(q: Tensor, d: Tensor, k: Tensor, ratio: Tensor) -> Tensor:
    """Maximum of q r^2 + 2 d r (1-r) + k (1-r)^2 over r from ratio to 1; rounding is the caller's concern.

    Any r of that range may be added to the ends. Where the parabola is concave it is the vertex; an error of its
    position costs the square of a rounding error only.
    """
    linear = (d - k).mul_(2.0)
    quadratic = (q - k).sub_(linear)
    vertex = (linear * -0.5).div_(quadratic.clamp(max=-TINY))
    vertex = torch.maximum(vertex, ratio).clamp_(max=1.0)
    at_ratio, at_vertex = (torch.addcmul(k, r, torch.addcmul(linear, r, quadratic)) for r in (ratio, vertex))
    return torch.maximum(torch.maximum(q, at_ratio), at_vertex)
